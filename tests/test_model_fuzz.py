"""Damaged and hostile model directories, checkpoints and results: a clear error or no effect, no trace, no hang, no change.

python -m pytest tests/test_model_fuzz.py -m slow -s     # the long form; prints the rows of docs/reliability.md
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import jax
import pytest

from flowseg_jax.checkpoints import manager, pretrained
from flowseg_jax.checkpoints.manifest import checksums
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import audit, report, results
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.system import json_files
from tests.helpers import small
from tests.helpers.trees import abstract_of, make_params, make_state

SHORT, LONG = 40, 600  # inputs of each fuzzer
SECONDS = 60.0  # of processor time: what takes longer hangs
VALUES = (
    0,
    -1,
    10**9,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    True,
    None,
    "abc",
    "",
    "x" * 10**5,
    "\ud800",
    "../x",
    [],
    {},
    [[1]],
)


def damage(rng: random.Random, root: Path) -> str:
    """Turns a bit in one of the files below `root`, cuts one, empties one or removes it."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    path = rng.choices(files, [path.stat().st_size ** 0.5 + 1 for path in files])[0]
    data, kind = bytearray(path.read_bytes()), rng.choice(("bit", "bit", "bit", "cut", "gone"))
    if kind == "bit" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    else:
        path.unlink()
    return f"{kind} {path.relative_to(root)}"


def places(value, place=()):
    yield place
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*place, key))


def altered(rng: random.Random, value):
    """A JSON value with another value, one key less, one key more, or something deep somewhere."""
    value = copy.deepcopy(value)
    *way, last = rng.choice([place for place in places(value) if place])
    node = value
    for key in way:
        node = node[key]
    kind = rng.choice(("value", "value", "value", "less", "more", "deep"))
    if kind == "value":
        node[last] = rng.choice(VALUES)
    elif kind == "less":
        del node[last]
    elif kind == "more" and isinstance(node, dict):
        node["new"] = rng.choice(VALUES)
    else:
        for _ in range(rng.choice((50, 500))):
            node[last] = [node[last]]
    return value


def within(some, whole) -> bool:
    """Whether all that is said stands there; what is not said has its default."""
    if isinstance(some, dict):
        return all(key in whole and within(value, whole[key]) for key, value in some.items())
    return some == whole


def outcome(read, expected) -> str:
    """What reading leads to: clear, none, trace, hang or silent; `read` gives None where it says that something is damaged."""
    began, text = time.process_time(), ""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            found = read()
        except UserError as error:
            found, text = None, str(error)
        except Exception as error:
            return f"trace: {type(error).__name__}: {error}"
    if time.process_time() - began > SECONDS:
        return "hang"
    if "\n" in text or len(text) > 2000:
        return f"trace: {text}"
    return "clear" if found is None else "none" if expected(found) else "silent"


def count(name: str, inputs: int, one) -> None:
    """Runs a fuzzer and prints its row; nothing but clear errors and no effect may come out."""
    found, bad = Counter(), []
    for seed in range(inputs):
        said, got = one(random.Random(seed))
        found[got.split(":")[0]] += 1
        bad += [(seed, said, got)] if got not in ("clear", "none") else []
    row = [found[key] for key in ("clear", "none", "trace", "hang", "silent")]
    print(f"| {name} | M | {inputs} | {' | '.join(map(str, row))} |")
    assert not bad, bad[:5]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    config, extra = small.config().to_dict(), {"prompts": {"question": 1}}
    return pretrained.save_pretrained(root / "model", make_params(), config, root / "tokenizer", extra, dtype=None)


def read_model(path):
    loaded = pretrained.load_pretrained(path, dtype=None)
    config = FlowSegConfig.from_dict(loaded.model_config, f"{path}/config.json: model")
    PromptTemplates.of_model(loaded.extra, path)
    return checksums(loaded.params), config, loaded.extra, (loaded.tokenizer_dir / "tokenizer.json").read_bytes()


@contextlib.contextmanager
def copied(source: Path, root: Path):
    target = root / "copy"
    shutil.copytree(source, target)
    try:
        yield target
    finally:
        shutil.rmtree(target)


def fuzz_model_bytes(model, root, inputs):
    usual = read_model(model)

    def one(rng):
        with copied(Path(model), root) as path:
            said = damage(rng, path)
            return said, outcome(lambda: read_model(path), lambda found: found == usual)

    count("model directories, bytes", inputs, one)


def fuzz_model_values(model, root, inputs):
    """Values of config.json with a right checksum, as by somebody who meant it: what is read is what it says."""
    config = json.loads((Path(model) / "config.json").read_text())

    def one(rng):
        with copied(Path(model), root) as path:
            changed = altered(rng, {key: value for key, value in config.items() if key != json_files.ITSELF})
            changed[json_files.ITSELF] = json_files.checksum(changed)
            (path / "config.json").write_text(json.dumps(changed))

            def same(found):
                sums, read, extra, _ = found
                return (
                    sums == changed["checksums"]
                    and within(changed["model"], read.to_dict())
                    and json.dumps(extra) == json.dumps(changed["extra"])
                )

            return "values", outcome(lambda: read_model(path), same)

    count("model directories, values", inputs, one)


def fuzz_checkpoints(root, inputs):
    """Whatever happens to the newest, it is read as it was, or set aside in one line for the one before, or refused."""
    state = make_state()
    with manager.CheckpointManager(root / "run", best=("loss", "min")) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state | {"step": jax.numpy.asarray(step)}, {"config": {"width": 4}}, {"loss": 1.0})
    sums = checksums(state | {"step": jax.numpy.asarray(2)})

    def read(path):
        with manager.CheckpointManager(path, best=("loss", "min")) as checkpoints:
            restored = checkpoints.restore_latest(abstract_of(state))
        aside = (path / "checkpoints/2.damaged").exists()
        return None if restored is not None and restored.step == 1 and aside else restored

    def one(rng):
        with copied(root / "run", root) as path:
            said = damage(rng, path / "checkpoints/2")
            same = lambda found: found.step == 2 and checksums(found.state) == sums and found.meta["config"] == {"width": 4}  # noqa: E731
            return said, outcome(lambda: read(path), same)

    count("checkpoints, bytes", inputs, one)


def fuzz_results(root, inputs):
    """`<split>.json`, `<split>.jsonl` and the index of pictures: what is read back makes a page, or one line."""
    figures = {
        "n": 3,
        "ciou": 1.0,
        "giou": 2.0,
        "oracle_ciou": 3.0,
        "oracle_giou": 4.0,
        "selection_gap": 2.0,
        "p_at": {"0.5": 1.0},
    }
    table = {"protocol": "xsam", **figures, "families": {"a": figures}, "failed": 0, "checkpoint": {"digest": "ab", "step": 1}}
    table |= {"shuffled_text": False, "prompt": {"question": 0, "answer": 0}}
    record = dict.fromkeys(audit.NEEDED, 1) | {
        "text": "t",
        "text_form": "lower",
        "sentence": "t",
        "family": "a",
        "failed": False,
    }
    record |= {"failure": "", "score": 0.5, "no_target_threshold": 0.0, "file_name": "1.jpg", "best_score": None}
    record |= {"query": 1, "best_query": 2, "best_rank": 0, "iou": 0.5, "best_iou": 0.5}
    index = [{"kind": "good", "file": "1.png", "record": record}]

    def one(rng):
        which = rng.randrange(3)
        files = [table, index, record]
        files[which] = altered(rng, files[which])
        folder = root / "eval"
        (folder / "pictures/val").mkdir(parents=True, exist_ok=True)
        for path, value in zip(("val.json", "pictures/val/index.json", "val.jsonl"), files, strict=True):
            (folder / path).write_text(json.dumps(value))

        def read():
            records = audit.read_records(folder / "val.jsonl")
            results.read_pictures(folder / "pictures/val")
            audit.render(audit.tables(records))
            return report.write(root / "page.html", [report.read_row("m", folder)], title="t").read_text()

        return ("table", "index", "record")[which], outcome(read, lambda text: "<script" not in text)

    count("results, values", inputs, one)


def test_model_directories(model, tmp_path):
    fuzz_model_bytes(model, tmp_path, SHORT)
    fuzz_model_values(model, tmp_path, SHORT)


def test_checkpoints(tmp_path):
    fuzz_checkpoints(tmp_path, SHORT // 2)


def test_results(tmp_path):
    fuzz_results(tmp_path, 5 * SHORT)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_long(model, tmp_path):
    inputs = int(os.environ.get("FLOWSEG_FUZZ", LONG))
    fuzz_model_bytes(model, tmp_path, inputs)
    fuzz_model_values(model, tmp_path, inputs)
    fuzz_checkpoints(tmp_path, 5 * inputs // 6)
    fuzz_results(tmp_path, 10 * inputs)
