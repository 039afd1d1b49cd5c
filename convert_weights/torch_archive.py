"""What is checked of a `torch.save` file before torch opens it: checksums that torch does not look at, pickles that blow up."""

from __future__ import annotations

import itertools
import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from flowseg_jax.errors import UserError, plain

MAX_PICKLE = 256 << 20  # bytes; the names, shapes and strides of 100,000 tensors take 30 MB
MAX_OBJECTS = 10_000_000  # of a pickle, each counted as often as it is referred to
OLD_PICKLES = 4  # of a file before PyTorch 1.6 the first are magic number, version, system and the tensors


def is_archive(file: Path) -> bool:
    """Whether torch takes a file for a zip archive: by its first bytes. (`zipfile` looks at its end, and raises on some.)"""
    with open(file, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def check_archive(file: Path) -> None:
    """Raises a UserError unless the records of a zip archive have the checksums that they were saved with.

    The archive is read once from beginning to end, a MiB at a time.
    """
    wrong = None
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if len({record.filename for record in records}) < len(records):
                wrong = "it holds records of one name"
            elif any(record.compress_type != zipfile.ZIP_STORED for record in records):
                wrong = "its records are compressed, torch stores them as they are"
            elif bad := archive.testzip():
                wrong = f"the checksum of {plain(bad)} is wrong (or was switched off by torch.serialization.set_crc32_options)"
            for record in () if wrong else records:
                if record.filename.endswith("data.pkl"):
                    if record.file_size > MAX_PICKLE:
                        raise UserError(f"{file}: {plain(record.filename)} has {record.file_size:,} bytes: no model's names do")
                    with archive.open(record) as stream:
                        _check_pickles(file, stream, 1)
    except UserError:
        raise
    except Exception as error:  # zipfile raises half a dozen types, and says so nowhere
        wrong = plain(str(error) or type(error).__name__)
    if wrong:
        raise UserError(f"{file} cannot be read, it is damaged or truncated: {wrong}; download it again")


def check_old_file(file: Path) -> None:
    """The same of a file before PyTorch 1.6, which has no checksums. OSErrors are left to whoever reads it."""
    with open(file, "rb") as stream:
        _check_pickles(file, stream, OLD_PICKLES)


def _check_pickles(file: Path, stream: IO[bytes], count: int) -> None:
    """Raises a UserError if a pickle refers to its objects so often that following all of them would never end.

    Tuples in tuples in tuples, each named twice in the next, are a few bytes; as the key of a dict they take for ever to hash.
    """
    for _ in range(count):
        try:
            largest = max(_sizes(stream), default=0)
        except Exception:  # no pickle: torch says what is wrong
            return
        if largest > MAX_OBJECTS:
            raise UserError(f"{file} is refused: its pickle repeats its objects more than {MAX_OBJECTS:,} times; no model does")


def _sizes(stream: IO[bytes]) -> Iterable[int]:
    """How many objects each object of a pickle is made of, in the order in which they are made; nothing is built."""
    stack: list[int | None] = []  # None is the pickle MARK
    memo: dict[int, int] = {}
    for code, arg, _ in pickletools.genops(stream):
        if "PUT" in code.name:
            memo[int(arg)] = stack[-1] or 1
        elif code.name == "MEMOIZE":
            memo[len(memo)] = stack[-1] or 1
        elif "GET" in code.name and code.name != "GLOBAL":
            stack.append(memo[int(arg)])
        elif code.name == "DUP":
            stack.append(stack[-1])
        else:
            before = list(itertools.takewhile(lambda kind: kind is not pickletools.markobject, code.stack_before))
            size = 1
            if len(before) < len(code.stack_before):
                while (top := stack.pop()) is not None:
                    size += top
            for _ in before:
                size += stack.pop() or 0
            size = min(size, MAX_OBJECTS + 1)  # numbers that double with every step grow long
            stack.extend(None if kind is pickletools.markobject else size for kind in code.stack_after)
            yield size
