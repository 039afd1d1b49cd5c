"""`torch.save` files that somebody else wrote: bounded in time, and damage that torch does not see is seen."""

from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from convert_weights import torch_archive
from convert_weights.files import open_source
from flowseg_jax.errors import UserError


def rebuilt(file, change, compression=zipfile.ZIP_STORED):
    """The archive of one tensor, written again with `change(name, data)` in the place of each record."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(file, "w", compression) as new:
        for item in old.infolist():
            for data in change(item.filename, old.read(item)):
                new.writestr(item.filename, data)


def same(name, data):
    yield data


def test_every_byte_of_an_archive_has_its_checksum(tmp_path):
    file = tmp_path / "x.bin"
    rebuilt(file, same)
    assert np.array_equal(open_source(file).read("a"), np.arange(6, dtype=np.float32))
    whole = file.read_bytes()
    for part in (np.arange(6, dtype=np.float32).tobytes(), b"_rebuild_tensor_v2"):  # a value, and the pickle
        at = whole.index(part)
        file.write_bytes(whole[: at + 3] + bytes([whole[at + 3] ^ 1]) + whole[at + 4 :])
        with pytest.raises(
            UserError, match=r"x.bin cannot be read, it is damaged or truncated: the checksum of .*(data/0|data.pkl) is wrong"
        ):
            open_source(file)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_does_not_write(tmp_path):
    file = tmp_path / "x.bin"
    rebuilt(file, same, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="its records are compressed, torch stores them as they are"):
        open_source(file)
    rebuilt(file, lambda name, data: [data, data] if name.endswith("data/0") else [data])
    with pytest.raises(UserError, match="it holds records of one name"):
        open_source(file)


def bomb(levels: int) -> bytes:
    """A dict whose key is a tuple of two tuples of two tuples...: 3 bytes a level, 2 ** levels to hash."""
    step = b"h\x00h\x00\x86q\x00"  # (memo 0, memo 0) into memo 0
    return b"\x80\x02}K\x01\x85q\x000" + step + (b"0" + step) * (levels - 1) + b"K\x01s."


@pytest.mark.parametrize("old", [True, False])
def test_a_pickle_that_would_never_end(tmp_path, old):
    file = tmp_path / "x.bin"
    assert {type(key) for key in pickle.loads(bomb(4))} == {tuple}
    if old:
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(3)}, buffer, _use_new_zipfile_serialization=False)
        buffer.seek(0)
        for _ in range(3):
            pickle.load(buffer)
        file.write_bytes(buffer.getvalue()[: buffer.tell()] + bomb(200))
    else:
        rebuilt(file, lambda name, data: [bomb(200)] if name.endswith("data.pkl") else [data])
    with pytest.raises(UserError, match=r"x.bin is refused: its pickle repeats its objects more than 10,000,000 times"):
        open_source(file)


def test_a_pickle_longer_than_any_models(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_archive, "MAX_PICKLE", 100)
    rebuilt(tmp_path / "x.bin", same)
    with pytest.raises(UserError, match=r"data.pkl has \d+ bytes: no model's names do"):
        open_source(tmp_path / "x.bin")


def test_what_is_counted_is_what_there_is():
    tensors = {f"layers.{i}.weight": torch.zeros(2, 3) for i in range(50)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    with zipfile.ZipFile(buffer) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        sizes = list(torch_archive._sizes(archive.open(name)))
    assert 50 * 10 < max(sizes) < 50 * 50
