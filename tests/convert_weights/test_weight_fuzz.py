"""Damaged weight files: each is a clear error or changes nothing; never a stack trace, a hang, or other values.

Eight thousand of them: `python -m pytest tests/convert_weights/test_weight_fuzz.py -m slow -s`, which prints the counts of
docs/reliability.md. A checkpoint is damaged byte by byte wherever its format can tell (the bytes of tensors in a safetensors
file carry no checksum), and changed in ways that a byte does not reach: entries repeated, moved, of another kind.
"""

from __future__ import annotations

import collections
import functools
import json
import random
import shutil
import signal
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from convert_weights import configs_from_hf
from convert_weights.convert import get_family, import_params
from convert_weights.files import open_source
from convert_weights.names import unwrapped
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.errors import UserError
from tests.helpers import tiny_checkpoints as tiny

SECONDS = 20  # more than this is a hang
CLEAR, NONE, TRACE, HANG, SILENT = "clear errors", "no effect", "traces", "hangs", "silent changes"
WRONG = (None, True, -1, 10**30, 1.5, "", "\ud800", "x" * 300, [], {}, [[]], "../x.safetensors", "/etc/passwd", "\n")


@functools.cache
def original():
    model = tiny.huggingface("llama", num_hidden_layers=2)
    tensors = tiny.state(model)
    cfg = configs_from_hf.component_config("llama", model.config.to_dict())
    return tensors, cfg, flatten_params(import_params("llama", tensors, cfg))


def outcome(path: Path) -> tuple[str, str]:
    """What a conversion makes of a file or directory, and what it says."""
    _, cfg, want = original()

    def hang(number: int, frame: types.FrameType | None) -> None:
        raise InterruptedError("it hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        found = flatten_params(import_params("llama", unwrapped(open_source(path), get_family("llama")), cfg))
    except UserError as error:
        text = str(error)
        return (CLEAR if text.isprintable() and len(text) < 4000 else TRACE), text
    except InterruptedError as error:
        return HANG, str(error)
    except Exception as error:
        return TRACE, f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    same = found.keys() == want.keys() and all(np.array_equal(found[name], want[name]) for name in want)
    return (NONE if same else SILENT), ""


def damaged(data: bytes, rng: random.Random, reach: int) -> bytes:
    """Bytes flipped, cut out, put in, or cut off; within the first `reach` bytes, apart from the last."""
    data, at = bytearray(data), rng.randrange(reach)
    how = rng.randrange(5)
    if how < 2:
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            data[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif how == 2:
        del data[at : at + rng.choice((1, 2, 8, 100))]
    elif how == 3:
        data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))
    else:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def safetensors_bytes(path: Path, rng: random.Random) -> Path:
    """The header, every byte of which the library checks, and the length of the file."""
    file = path / "model.safetensors"
    safetensors.numpy.save_file(original()[0], file)
    data = file.read_bytes()
    file.write_bytes(damaged(data, rng, 8 + int.from_bytes(data[:8], "little")))
    return path


def safetensors_header(path: Path, rng: random.Random) -> Path:
    """A header that is JSON still, with an entry that is not what the format says."""
    file = path / "model.safetensors"
    safetensors.numpy.save_file(original()[0], file)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name, other = rng.sample(sorted(header), 2)
    how = rng.randrange(7)
    if how == 0:
        header[name] = rng.choice(WRONG)
    elif how == 1:
        header[name][rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(WRONG)
    elif how == 2:
        header[name]["data_offsets"] = header[other]["data_offsets"]
    elif how == 3:
        header[name]["data_offsets"][rng.randrange(2)] += rng.choice((-8, -1, 1, 4, 2**40))
    elif how == 4:
        header[name]["shape"] = [*header[name]["shape"], rng.choice((0, 2, -1, 2**62))]
    elif how == 5:
        header[rng.choice(("\x00", "a\nb", "x" * 9000, f"module.{name}", f"{name}.base_layer"))] = header.pop(name)
    else:
        del header[name]
    text = json.dumps(header)
    if rng.random() < 0.3:  # a name given twice, which no dict can hold
        text = text[:-1] + f', "{name}": ' + json.dumps(header.get(name) or header[other]) + "}"
    file.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data[8 + length :])
    return path


def index(path: Path, rng: random.Random) -> Path:
    """Shards whose index is damaged, or names what it must not; or a shard that is missing or another one."""
    tensors = original()[0]
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, path / file)
    table: dict = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    how, name = rng.randrange(7), rng.choice(names)
    file = path / "model.safetensors.index.json"
    if how == 0:
        table["weight_map"][name] = rng.choice(WRONG)
    elif how == 1:
        table[rng.choice(("metadata", "weight_map"))] = rng.choice(WRONG)
    elif how == 2:
        table["weight_map"][f"{name}x"] = table["weight_map"].pop(name)
    elif how == 3:
        (path / rng.choice(list(parts))).unlink()
    elif how == 4:
        shutil.copy(path / "model-00001-of-00002.safetensors", path / "model-00002-of-00002.safetensors")
    file.write_text(json.dumps(table))
    if how >= 5:
        file.write_bytes(damaged(file.read_bytes(), rng, file.stat().st_size))
    return path


def torch_bytes(path: Path, rng: random.Random) -> Path:
    """Any byte of a zip archive, whose records carry checksums."""
    file = path / "pytorch_model.bin"
    torch.save({name: torch.from_numpy(x) for name, x in original()[0].items()}, file)
    data = file.read_bytes()
    file.write_bytes(damaged(data, rng, len(data)))
    return path


def torch_pickle(path: Path, rng: random.Random) -> Path:
    """The pickle inside, damaged and stored with its right checksum: that of somebody who meant it.

    Values are whatever it says, and are not compared.
    """
    file, whole = path / "x.bin", path / "pytorch_model.bin"
    torch.save({name: torch.from_numpy(x) for name, x in original()[0].items()}, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as new:
        for item in old.infolist():
            data = old.read(item)
            new.writestr(item.filename, damaged(data, rng, len(data)) if item.filename.endswith("data.pkl") else data)
    file.unlink()
    return path


def torch_old(path: Path, rng: random.Random) -> Path:
    """The format before PyTorch 1.6, which carries no checksums: cut off anywhere, or another beginning."""
    file = path / "pytorch_model.bin"
    state = {name: torch.from_numpy(x) for name, x in original()[0].items()}
    torch.save(state, file, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    cut = data[: rng.randrange(len(data))]
    file.write_bytes(cut if rng.random() < 0.5 else damaged(data, rng, 24))
    return path


FUZZERS: dict[str, Callable[[Path, random.Random], Path]] = {
    "safetensors, bytes": safetensors_bytes,
    "safetensors, headers": safetensors_header,
    "index of shards": index,
    ".bin, bytes": torch_bytes,
    ".bin, pickles": torch_pickle,
    ".bin of old, cut": torch_old,
}


def fuzz(name: str, seeds: range, root: Path) -> collections.Counter:
    counts: collections.Counter = collections.Counter()
    for seed in seeds:
        path = root / "case"
        path.mkdir()
        kind, said = outcome(FUZZERS[name](path, random.Random(f"{name} {seed}")))
        if kind == SILENT and name == ".bin, pickles":
            kind = NONE
        counts[kind] += 1
        assert kind in (CLEAR, NONE), f"{name}, seed {seed}: {kind}: {said[:500]}"
        shutil.rmtree(path)
    return counts


@pytest.mark.parametrize("name", FUZZERS)
def test_damage_is_a_clear_error_or_nothing(tmp_path, name):
    counts = fuzz(name, range(40), tmp_path)
    assert counts[CLEAR] > 10  # the damage is real


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FUZZERS)
def test_much_damage_is_clear_errors_or_nothing(tmp_path, name):
    counts = fuzz(name, range(100, 1500), tmp_path)
    print(
        f"\n| {name} | W | {counts.total()} | "
        + " | ".join(str(counts[kind]) for kind in (CLEAR, NONE, TRACE, HANG, SILENT))
        + " |"
    )
