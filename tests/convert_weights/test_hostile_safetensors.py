"""safetensors files that somebody else wrote: whatever the format forbids is refused, and reading stays within its bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert_weights import safetensors_source
from convert_weights.files import open_source
from flowseg_jax.errors import UserError

BF16 = np.dtype(ml_dtypes.bfloat16)


def write(file: Path, header: object, data: bytes = b"") -> Path:
    """A file with a header as it is given: a dict, or text that JSON would not write."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def tensor(*offsets: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"\\u0061":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
SAME = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
NESTED = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, 12, "invalid offset for tensor `b`"),  # overlapping
        ({"a": tensor(0, 8), "b": tensor(12, 20)}, 20, "invalid offset for tensor `b`"),  # a hole
        ({"a": tensor(0, 8)}, 12, "file not fully covered"),  # trailing bytes
        ({"a": tensor(0, 8)}, 4, "file not fully covered"),  # truncated
        ({"a": tensor(-8, 0)}, 8, "invalid value: integer `-8`"),
        ({"a": tensor(8, 0)}, 8, "no complete safetensors file"),
        ({"a": tensor(0, 8, shape=(2**62, 2**62))}, 8, "overflow"),
        ({"a": tensor(0, 8, shape=(3,))}, 8, "no complete safetensors file"),
        (TWICE, 16, "holds 1 names twice: a; which one is meant"),
        (SAME, 8, "holds 1 names twice: a"),
        (NESTED, 8, "no safetensors file: its header cannot be read|invalid JSON in header"),
        (b"[" * 100_000, 0, "invalid JSON in header"),
        ({"__metadata__": {"a": 1}, "a": tensor(0, 8)}, 8, "invalid JSON in header"),
        (
            {"a": tensor(0, 2, dtype="F8_E4M3")},
            2,
            "dtype F8_E4M3, which is not supported: a; the checkpoint is quantised: dequ",
        ),
        ({"a": tensor(0, 1, dtype="F4")}, 1, "dtype F4, which is not supported: a; the checkpoint is quantised"),
        ({"a": tensor(0, 16, dtype="C64")}, 16, "dtype C64, which is not supported: a$"),
        ({"\n\x1b[2J" + "x" * 5000: tensor(0, 2, dtype="F8_E4M3")}, 2, r"supported: \\n\\x1b\[2Jxx"),
    ],
)
def test_what_the_format_forbids(tmp_path, header, data, message):
    file = write(tmp_path / "x.safetensors", header, bytes(data))
    with pytest.raises(UserError, match=message) as caught:
        open_source(file)
    assert len(str(caught.value)) < 900
    assert str(caught.value).isprintable()


def test_a_header_that_is_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_source, "MAX_HEADER", 1000)
    file = write(tmp_path / "x.safetensors", {"__metadata__": {"a": "b" * 2000}})
    with pytest.raises(UserError, match=r"a header of 2,0\d\d bytes; a checkpoint's is below 1,000"):
        open_source(file)
    os.truncate(file, 900)
    with pytest.raises(UserError, match="no complete safetensors file"):
        open_source(file)


def test_rows_of_every_shape(tmp_path, rng):
    arrays = {
        "a": rng.standard_normal((7, 3)).astype(BF16),
        "b": np.zeros((4, 0), np.float32),
        "c": np.array(2.5, np.float32),
        "d": rng.integers(0, 9, 5).astype(np.uint16),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    source = open_source(tmp_path)
    for name, x in arrays.items():
        for start, stop in ((0, None), (0, 3), (2, 5), (3, 3), (5, 2), (-2, None), (6, 100), (100, 200)):
            found = source.read(name, start, stop)
            want = x[start:stop] if x.ndim else x
            assert (found.dtype, found.shape, found.tobytes()) == (want.dtype, want.shape, want.tobytes())
            found[...] = 0  # the caller's to keep
    assert np.array_equal(source.read("a"), arrays["a"])


READ = """
import sys
from convert_weights.safetensors_source import SafetensorsSource
from pathlib import Path

def peak():  # of this process alone: getrusage's begins with its parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

source = SafetensorsSource([Path(sys.argv[1])], "it")
before = peak()
for name, (shape, _) in source.entries.items():
    source.read(name)
    for start in range(0, shape[0], 64):
        source.read(name, start, start + 64)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_one_tensor(tmp_path):
    """Twelve tensors of 8 MiB, read as a whole and by rows: all of it is 96 MiB, what is in use two tensors at most."""
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({f"t{i}": np.ones((512, 4096), np.float32) for i in range(12)}, file)
    read = subprocess.run([sys.executable, "-c", READ, str(file)], capture_output=True, text=True, check=True)
    assert int(read.stdout) < 24 << 10  # KiB
