"""How a command ends whatever happens: one line, never a stack trace, which is in a file that the line names."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from flowseg_jax import traces
from flowseg_jax.errors import UserError, listed, plain

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("train.py", "eval.py", "predict.py", "flowseg_jax/__main__.py")
COMMANDS += tuple(f"experiments/{name}.py" for name in ("demo", "stages", "ablation", "results"))
BENCHMARKS = (
    "__main__",
    "batch_prediction",
    "checkpoint_growth",
    "fine_tuning",
    "growth",
    "input",
    "kernels",
    "measure",
    "on_device",
    "priced",
)
COMMANDS += tuple(f"benchmarks/{name}.py" for name in (*BENCHMARKS, "quantization", "startup", "train_step"))


def command(tmp_path, code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command that is a module of its own; its traces go to `tmp_path`/traces."""
    (tmp_path / "traces").mkdir(exist_ok=True)
    (tmp_path / "the_command.py").write_text(textwrap.dedent(code))
    start = "from flowseg_jax.errors import run_cli; run_cli('the_command:main')"
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(tmp_path / "traces")} | environment
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores Ctrl-C
    return subprocess.run(
        [sys.executable, "-c", start],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        preexec_fn=listen,
    )


def kept(tmp_path) -> list[str]:
    return [path.read_text() for path in sorted((tmp_path / "traces").iterdir())]


def test_an_exception_that_nobody_thought_of(tmp_path):
    code = "def main():\n    raise KeyError('a\\nb')\n"
    done = command(tmp_path, code)
    assert done.returncode == 1
    place = r"the stack trace is in (\S+\.log), FLOWSEG_TRACEBACK=1 prints it"
    (path,) = re.fullmatch(rf"error: unexpected KeyError: 'a\\nb'; {place}\n", done.stderr).groups()
    text = Path(path).read_text()
    assert "Traceback (most recent call last)" in text and "line 2, in main" in text
    assert text.startswith("-c\nPython 3.")
    shown = command(tmp_path, code, FLOWSEG_TRACEBACK="1")
    assert shown.returncode == 1 and "line 2, in main" in shown.stderr and shown.stderr.splitlines()[-1].startswith("error: ")


def test_where_no_file_can_be_written_there_is_still_one_line(tmp_path):
    code = "import tempfile\ndef full(**_): raise OSError(28, 'full')\ntempfile.mkstemp = full\ndef main():\n    return 1 / 0\n"
    done = command(tmp_path, code)
    assert done.returncode == 1
    assert done.stderr == (
        "error: unexpected ZeroDivisionError: division by zero; its stack trace could not be kept, "
        "FLOWSEG_TRACEBACK=1 prints it\n"
    )


def test_a_mistake_of_the_user_is_one_line_whatever_it_quotes(tmp_path):
    code = """
    from flowseg_jax.errors import UserError
    def main():
        raise UserError("file 'a\\n\\x1b[2Jb\\udcff' is no image")
    """
    done = command(tmp_path, code)
    assert (done.returncode, done.stderr) == (2, "error: file 'a\\n\\x1b[2Jb\\udcff' is no image\n")
    assert kept(tmp_path) == []
    assert "in main" in command(tmp_path, code, FLOWSEG_TRACEBACK="1").stderr


NOISE = """
import asyncio, gc, logging, threading
from flowseg_jax.errors import UserError

class Leaves:
    def __del__(self):
        raise ValueError("from a destructor")

async def lost():
    raise OSError("from a task")

async def loop():
    task = asyncio.create_task(lost())
    await asyncio.sleep(0)
    del task
    gc.collect()

def noise():
    thread = threading.Thread(target=lambda: 1 / 0, name="writer")
    thread.start()
    thread.join()
    Leaves()
    asyncio.run(loop())
    try:
        raise RuntimeError("from a library")
    except RuntimeError:
        logging.getLogger("absl").exception("it failed")
        logging.getLogger("absl").warning("a warning")
"""


def test_no_trace_of_a_thread_a_destructor_a_task_or_a_library_reaches_the_user(tmp_path):
    done = command(tmp_path, NOISE + "\ndef main():\n    noise()\n")
    assert done.returncode == 0
    warning, note = done.stderr.splitlines()
    assert warning == "a warning"  # what is no trace is said
    assert note.startswith("note: thread writer: ZeroDivisionError: division by zero; the stack trace is in ")
    (text,) = kept(tmp_path)
    for error in ("division by zero", "from a destructor", "from a task", "from a library"):
        assert error in text
    assert text.count("Traceback (most recent call last)") == 4


def test_what_is_told_already_is_not_told_again(tmp_path):
    done = command(tmp_path, NOISE + "\ndef main():\n    noise()\n    raise UserError('the disk is full')\n")
    assert (done.returncode, done.stderr) == (2, "a warning\nerror: the disk is full\n")
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    "moment",
    [
        "import importing\ndef main():\n    pass\n",  # as the command is imported
        "def main():\n    import importing\n",  # as it imports more
        "import os, signal\ndef main():\n    os.kill(os.getpid(), signal.SIGINT)\n    while True: pass\n",
        "def main():\n    try:\n        raise KeyboardInterrupt\n    except KeyboardInterrupt:\n        raise OSError\n",
    ],
)
def test_ctrl_c_at_any_moment(tmp_path, moment):
    """An extension turns what interrupts its import into another error, and prints the trace."""
    (tmp_path / "importing.py").write_text(
        "import os, signal, traceback\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    for _ in range(1000): pass\n"
        "except KeyboardInterrupt as error:\n    traceback.print_exc()\n    raise ImportError('failed') from None\n"
    )
    done = command(tmp_path, moment)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_ctrl_c_that_hits_a_destructor_is_not_lost(tmp_path):
    code = """
    import time
    class Hit:
        def __del__(self):
            raise KeyboardInterrupt
    def main():
        Hit()
        time.sleep(30)
    """
    done = command(tmp_path, code)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_importing_the_package_installs_nothing():
    code = """
    import logging, sys, threading, signal
    before = sys.excepthook, sys.unraisablehook, threading.excepthook, signal.getsignal(signal.SIGINT)
    import flowseg_jax.cli.main, flowseg_jax.inference.segmentor, flowseg_jax.training.loop
    import flowseg_jax.checkpoints.manager, flowseg_jax.data.workers
    assert before == (sys.excepthook, sys.unraisablehook, threading.excepthook, signal.getsignal(signal.SIGINT))
    from flowseg_jax.traces import LOGGERS
    ours = [f for name in LOGGERS for f in logging.getLogger(name).filters if "flowseg" in getattr(f, "__module__", "")]
    assert not ours, ours
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def first_statements(file: Path) -> list[ast.stmt]:
    """A file's statements without its docstring and imports from the future."""
    body = ast.parse(file.read_text()).body
    return [s for s in body if not isinstance(s, ast.Expr) and not (isinstance(s, ast.ImportFrom) and s.module == "__future__")]


def test_every_command_is_run_before_anything_is_imported():
    """A file that is started hands its command to `errors.run_cli` by name, before its own imports."""
    found = set()
    for folder in (".", "flowseg_jax", "convert_weights", "experiments", "benchmarks"):
        for file in (ROOT / folder).glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py"):
            statements = first_statements(file)
            guards = [s for s in statements if isinstance(s, ast.If) and ast.unparse(s.test) == "__name__ == '__main__'"]
            if not guards or file.name in ("step.py", "worker.py", "peer.py"):  # workers of a benchmark
                continue
            found.add(file.relative_to(ROOT).as_posix())
            code = ast.unparse(guards[0])
            (name,) = re.findall(r"run_cli\('([\w.]+):\w+'\)", code)
            own = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            before = statements[: statements.index(guards[0])]
            if name == own:
                assert before == [], file
            else:
                assert [ast.unparse(s) for s in before] == ["from flowseg_jax.errors import run_cli"], file
    assert found == set(COMMANDS)


def test_one_line_of_an_exception():
    assert traces.one_line(ValueError("  a\nb")) == "ValueError: a"
    assert traces.one_line(UserError()) == "UserError"
    assert len(traces.one_line(ValueError("x" * 9999))) == 300


def test_names_of_others_are_short_and_on_one_line():
    assert listed(["a", "b"]) == "a, b"
    assert listed({str(i): 0 for i in range(13)}) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 3 more"
    assert listed(["a", "b", "c"], 1, "; ") == "a and 2 more"
    assert plain("a\nb\x1b[2J\ud800") == r"a\nb\x1b[2J\ud800"
    assert plain("x" * 200) == "x" * 200
    assert plain("x" * 201) == "x" * 199 + "…"

    class Endless:
        def __str__(self):
            raise AssertionError("its text is not asked for")

    assert plain(Endless()) == "a Endless"


@pytest.mark.slow
def test_a_truncated_array_is_one_line(tmp_path):
    """Orbax reads the arrays at the same time, and each of those that fail prints a stack trace of its own."""
    shutil.copytree(ROOT / "checkpoints/shapes_tiny", tmp_path / "model")
    largest = max((tmp_path / "model/params").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, 300_000)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    arguments = ["--checkpoint", str(tmp_path / "model"), "--image", str(tmp_path / "a.png"), "--text", "a"]
    done = subprocess.run([sys.executable, "predict.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: model directory {tmp_path / 'model'} is damaged: ")
