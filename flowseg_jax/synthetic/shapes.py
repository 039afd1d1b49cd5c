"""The `shapes` benchmark as a prepared data set: opened where it is, made first where it is not."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowseg_jax.data.dataset import FORMAT, PreparedDataset
from flowseg_jax.data.prepare import PROGRESS_SECONDS, Log, log_line, prepare
from flowseg_jax.errors import UserError, quoted
from flowseg_jax.synthetic import generator
from flowseg_jax.synthetic.expressions import NO_TARGET_FAMILY


@contextlib.contextmanager
def _atomic_directory(out: Path) -> Iterator[Path]:
    """A hidden sibling of `out` that becomes `out` when the block ends well and vanishes when it does not."""
    temporary = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        yield temporary
        try:
            os.rename(temporary, out)
        except OSError as error:
            raise UserError(
                f"{out}: cannot be put in place ({error.strerror}); did another process write it meanwhile?"
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    """Holds an exclusive lock on a file; says so while another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    with file:
        reported = -PROGRESS_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - reported > PROGRESS_SECONDS:
                    log(f"waiting for another process to make {path.with_suffix('')}")
                    reported = time.monotonic()
                time.sleep(0.2)
        yield


def load_or_build_shapes(
    directory: str | Path,
    images: int,
    seed: int,
    *,
    tokenizer_vocab: int = 512,
    workers: int | None = None,
    log: Log = log_line,
    **options: Any,
) -> PreparedDataset:
    """Opens the `shapes` benchmark in `directory`, generating and preparing it first if it is not there.

    Appears complete or not at all; of several processes that ask at once, one makes it and the others wait.

    Args:
        directory: holds `refcoco-like/` (the generated layout) and `prepared/`.
        images: number of images over all splits.
        seed: of the generator.
        tokenizer_vocab: ids of the tokenizer that is trained on it.
        workers: processes of the generator; None for the number of cores. Does not change the result.
        log: receives progress at least every 10 s.
        **options: passed to `generator.generate`.

    Raises:
        UserError: the directory holds a set that was made with other arguments, or something else.
    """
    directory = Path(directory)
    request = {"format": FORMAT, "images": images, "seed": seed, "tokenizer_vocab": tokenizer_vocab, **options}
    request = json.loads(json.dumps(request))  # as it reads back: tuples become lists
    stamp = directory / "request.json"
    with _locked(directory.parent / f".{directory.name}.lock", log):
        if not directory.exists() or not any(directory.iterdir()):
            for left in directory.parent.glob(f".{directory.name}.*.partial"):  # of a killed process: the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            log(f"making the shapes benchmark in {directory}: {images} images, seed {seed}")
            with _atomic_directory(directory) as temporary:
                layout = temporary / "refcoco-like"
                generator.generate(layout, images, seed, workers=workers, report=log, **options)
                kind = "grefcoco" if NO_TARGET_FAMILY in options.get("mix", ()) else "refcoco"
                prepare(layout, temporary / "prepared", layout=kind, tokenizer_vocab=tokenizer_vocab, log=log)
                (temporary / stamp.name).write_text(json.dumps(request) + "\n", encoding="utf-8")
    try:
        made_with = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        made_with = None
    if not isinstance(made_with, dict):
        raise UserError(f"{directory}: exists but is not a shapes set made by this command; name another directory")
    if made_with != request:
        changed = sorted(k for k in {*made_with, *request} if made_with.get(k) != request.get(k))
        detail = ", ".join(f"{k[:40]} {quoted(made_with.get(k))} -> {request.get(k)}" for k in changed[:8])
        raise UserError(f"{directory}: holds a shapes set made otherwise ({detail}); remove it or name another directory")
    return PreparedDataset.open(directory / "prepared")
