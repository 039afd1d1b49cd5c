"""The commands of `flowseg`: what their help costs and lists, and what is said of mistyped and of old names."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convert_weights.families import FAMILIES
from flowseg_jax.cli import adapters, analyze, convert, data, export, main, parser
from flowseg_jax.data.formats import LAYOUTS
from flowseg_jax.errors import UserError
from flowseg_jax.inference.export import PLATFORMS, ExportShapes

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {"data": data, "analyze": analyze, "adapters": adapters}
COMMANDS = [(), *((name,) for name in main.COMMANDS)]
COMMANDS += [(group, name) for group, module in GROUPS.items() for name in module.COMMANDS]

HELP = """
import contextlib, io, json, sys
from flowseg_jax.cli.main import main
texts = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    texts.append(text.getvalue())
    foreign = {"jax", "flax", "transformers"} & set(sys.modules)
    assert not foreign, (words, foreign)
print(json.dumps(texts))
"""


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def helps() -> dict[tuple[str, ...], str]:
    done = run("-c", HELP, json.dumps(COMMANDS))
    assert done.returncode == 0, done.stderr
    return dict(zip(COMMANDS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_imports_neither_jax_nor_flax_nor_transformers(helps, words):
    assert helps[words].startswith(f"usage: {' '.join(('flowseg', *words))}")


@pytest.mark.parametrize("words", [(), *((group,) for group in GROUPS)], ids=" ".join)
def test_the_help_of_a_group_lists_its_commands(helps, words):
    commands = GROUPS[words[0]].COMMANDS if words else main.COMMANDS
    lines = helps[words].partition("commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines[: len(commands)]] == list(commands)
    assert all(command.help in helps[words] for command in commands.values())


REQUIRED = {
    "convert": ["FAMILY", "SOURCE OUT"],
    "report": ["DIR"],
    "export": ["--out"],
    "parity": ["DIR"],
    "seal": ["DIR"],
    "upgrade": ["OLD", "NEW"],
    "data prepare": ["--source", "--out"],
    "data upgrade": ["OLD", "NEW"],
    "data validate": ["LAYOUT", "DIR"],
    "data preview": ["LAYOUT", "DIR", "--out"],
    "data add-special-tokens": ["--source", "--out"],
    "data make-shapes": ["--out", "--num-images"],
    "data make-multitask": ["--out"],
    "data make-toy": ["--out"],
    "analyze audit": ["FILE"],
    "analyze compare": ["A", "B"],
    "analyze oracle": ["FILE"],
    "analyze compare-failures": ["A", "B"],
    "analyze calibrate-no-target": ["FILE"],
    "adapters merge": ["MODEL", "ADAPTERS", "OUT"],
    "adapters import": ["PEFT", "MODEL", "OUT"],
    "adapters export": ["ADAPTERS", "MODEL", "OUT"],
}


class Stop(Exception):
    """Ends a command where it would parse its flags; carries its parser."""


@pytest.fixture(params=[words for words in COMMANDS if words and words[-1] not in GROUPS], ids=" ".join)
def command(request, monkeypatch) -> tuple[str, parser.Parser]:
    """The name of a command, and its parser."""

    def stop(self, *_):
        raise Stop(self)

    monkeypatch.setattr(parser.Parser, "parse_args", stop)
    with pytest.raises(Stop) as stopped:
        main.main([*request.param, "--help"])
    return " ".join(request.param), stopped.value.args[0]


def test_a_command_tells_its_flags_their_defaults_and_what_it_cannot_do_without(command):
    name, one = command
    assert one.prog == f"flowseg {name}" and one.description
    called = [action.option_strings[-1] if action.option_strings else action.metavar for action in one._actions]
    flags = dict(zip(called, one._actions, strict=True))
    assert [flag for flag, action in flags.items() if action.required] == REQUIRED.get(name, [])
    for flag, action in flags.items():
        assert action.help, flag
        if action.default not in (None, False, [], argparse.SUPPRESS):
            assert re.search(rf"\b{re.escape(str(action.default))}\b|%\(default\)s", action.help), flag
        if action.metavar in ("N", "I") or isinstance(action.default, int):
            assert action.nargs == 0 or action.type("3") == 3, flag
        if action.metavar in ("SCORE", "SHARE"):
            assert action.type("0.5") == 0.5, flag


def described(one: parser.Parser) -> list[str]:
    """A line for each flag: its names, what follows it, how that is read, and what it is when it is not given."""
    lines = []
    for action in one._actions:
        called = ", ".join(action.option_strings) or "argument"
        metavar = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar
        follows = "" if action.nargs == 0 else metavar or "|".join(map(str, action.choices or [])) or action.dest.upper()
        how = [kind for kind in (action.nargs, getattr(action.type, "__name__", None)) if kind]
        how += ["required"] if action.required else []
        how += [type(action).__name__.strip("_").removesuffix("Action").lower()] * (type(action) is not argparse._StoreAction)
        default = "" if action.default is None else f" = {action.default!r}"
        lines.append(f"  {called} {follows}".rstrip() + (f" ({', '.join(map(str, how))})" if how else "") + default)
    return lines


def test_the_flags_of_a_command_are_those_that_are_written_down(command):
    """A flag is an interface: that one is gone, or means something else, is seen here and told in the changelog."""
    name, one = command
    written = (ROOT / "tests" / "golden" / "command_line.txt").read_text(encoding="utf-8")
    sections = dict(section.split("\n", 1) for section in written.removesuffix("\n").split("\n\n"))
    assert described(one) == sections[f"flowseg {name}"].split("\n")


def test_where_an_analysis_writes(helps):
    """Those of results beside them, those that run a model in runs/, and two write nothing."""
    found = {name: re.search(r"--out DIR +default: (\S+)", helps["analyze", name]) for name in analyze.COMMANDS}
    beside = dict.fromkeys(["oracle", "compare-failures", "calibrate-no-target"], "analysis/")
    expected = dict.fromkeys(analyze.COMMANDS, "runs/analysis/<name") | beside | dict.fromkeys(["audit", "compare"])
    assert {name: match and match[1] for name, match in found.items()} == expected


def test_what_help_lists_is_what_there_is():
    """Lists that help repeats, because the modules that have them import JAX."""
    assert data.LAYOUTS.split(", ") == list(LAYOUTS)
    assert convert.FAMILIES.split(", ") == list(FAMILIES)
    assert tuple(export.PLATFORMS.split(",")) == PLATFORMS
    assert (export.BATCH, export.PHRASES, export.TEXT) == (ExportShapes.batch, ExportShapes.phrases, ExportShapes.text)


@pytest.mark.parametrize(
    "command", [("train.py",), ("eval.py",), ("predict.py",), ("-m", "flowseg_jax"), ("-m", "flowseg_jax", "data", "prepare")]
)
def test_scripts_and_the_module_are_the_same_commands(command):
    done = run(*command, "--help")
    name = " ".join(command[2:]) if command[0] == "-m" else command[0].removesuffix(".py")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {f'flowseg {name}'.strip()} ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], r"flowseg: no command 'trian' \(did you mean 'train'\?\)"),
        ([], "flowseg: which command\\? train, eval, predict"),
        (["data", "preprae"], r"flowseg data: no command 'preprae' \(did you mean 'prepare'\?\)"),
        (["analyze", "zzz"], r"flowseg analyze: no command 'zzz' \(known: audit, .*\)"),
        (["data"], "flowseg data: which command"),
        (["eval", "--spilt=val"], r"no flag --spilt \(did you mean '--split'\?\); see flowseg eval --help"),
        (["predict", "--imgae", "x"], r"no flag --imgae \(did you mean '--image'\?\)"),
        (["train", "--work=x"], r"no flag --work \(did you mean '--workdir'\?\)"),  # flags are not abbreviated
        (["convert", "sam", "--tokenizr=x"], r"no flag --tokenizr \(did you mean '--tokenizer'\?\)"),
        (
            ["export", "--oot=x"],
            r"no flag --oot \(did you mean '--out'\?\); see flowseg export --help",
        ),  # not: --out is missing
        (["seal"], "required: DIR; see flowseg seal --help"),
        (["upgrade", "a"], "required: NEW; see flowseg upgrade --help"),
        (["parity", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_a_mistyped_name(words, message):
    with pytest.raises(UserError, match=message) as error:
        main.main(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "--all-above=0.5"], "--all-above is called --score-threshold; see flowseg predict --help"),
        (["predict", "--no-target-below=0.5"], "--no-target-below is called --no-target-threshold"),
        (["eval", "--no-target-below=0.5"], "--no-target-below is called --no-target-threshold"),
        (["eval", "--processes=2"], "--processes is called --num-processes"),
        (["train", "--process=0"], "--process is called --process-id"),
        (["eval", "--images=60"], "--images is called --max-images"),
        (["plan", "--effort=O1"], "--effort is called --xla-opt-level"),
        (["train", "--plan", "--parts"], "--parts is called --by-component"),
        (["analyze", "layer-trace", "--images=60"], "--images is called --max-images"),
        (["analyze", "audit", "x", "--no-target-below=0.5"], "--no-target-below is called --no-target-threshold"),
        (["data", "make-shapes", "--images=60"], "--images is called --num-images"),
        (["data", "make-shapes", "--workers=1"], "--workers is called --num-workers"),
        (["data", "prepare", "--processes=1"], "--processes is called --num-workers"),
        *((["data", old], f"flowseg data {old} is called flowseg data {new}") for old, new in data.RENAMED.items()),
        *((["analyze", old], f"flowseg analyze {old} is called flowseg analyze {new}") for old, new in analyze.RENAMED.items()),
    ],
)
def test_an_old_name(words, message):
    with pytest.raises(UserError, match=message):
        main.main(words)


def test_old_names_lead_to_names_that_there_are():
    assert set(data.RENAMED.values()) <= set(data.COMMANDS) and not set(data.RENAMED) & set(data.COMMANDS)
    assert set(analyze.RENAMED.values()) <= set(analyze.COMMANDS) and not set(analyze.RENAMED) & set(analyze.COMMANDS)


def test_a_value_that_begins_like_a_flag_stands_behind_an_equals_sign():
    one = parser.Parser(prog="x")
    one.add_argument("--text")
    one.add_argument("rest", nargs="*")
    assert one.parse_args(["--text=--odd"]) == argparse.Namespace(text="--odd", rest=[])
    assert one.parse_args(["--", "--odd"]).rest == ["--odd"]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (parser.positive, {"1": 1, "12": 12}, ["0", "-1", "1.5", "x", ""]),
        (parser.share, {"0": 0, "1": 1, "0.25": 0.25}, ["-0.1", "1.1", "nan", "x"]),
        (parser.mesh_sizes, {"fsdp=8": {"fsdp": 8}, "fsdp=2,tensor=4": {"fsdp": 2, "tensor": 4}}, ["fsdp", "fsdp=0", "8", ""]),
    ],
)
def test_types_of_flags(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="fsdp=8|is not a"):
            kind(text)


PROGRAMS = {
    "experiments": ("demo", "stages", "ablation", "results"),
    "benchmarks": (
        "components",
        "startup",
        "train_step",
        "input_pipeline",
        "batch_prediction",
        "quantization",
        "measure",
        "on_device",
        "fine_tuning",
    ),
}
PROGRAM_HELP = """
import contextlib, importlib, io, json, sys
sys.argv = ["program", "--help"]
for package, names in json.loads(sys.stdin.read()).items():
    for name in names:
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            getattr(importlib.import_module(f"{package}.command_line"), name)()
        assert text.getvalue().startswith("usage: python -m " + package), name
        foreign = {"jax", "numpy", "transformers"} & set(sys.modules)
        assert not foreign, (name, foreign)
"""


def test_help_of_the_programs_beside_the_package_needs_no_jax():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM_HELP], cwd=ROOT, input=json.dumps(PROGRAMS), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for package, names in PROGRAMS.items():
        started = "".join(path.read_text() for path in (ROOT / package).glob("*.py"))
        assert all(f'run_cli("{package}.command_line:{name}")' in started for name in names)
