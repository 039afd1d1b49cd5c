"""Writes a model directory back as safetensors, in the layout of Hugging Face or of X-SAM."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert_weights.configs import to_hf
from convert_weights.convert import Exported, cast
from convert_weights.directory import ModelDirectory
from convert_weights.families import Family
from convert_weights.sources import DTYPES
from flowseg_jax.errors import UserError
from flowseg_jax.model_directory import check_free

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def export_directory(
    family: Family,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layout: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Exports a model directory: `model.safetensors`, `config.json` and, with a language model, the tokenizer.

    `config.json` is Hugging Face's for a tower; for a whole model it holds our config, from which xsam and flowseg are read
    back. OUT appears complete or not at all; the parameters that one fused tensor is made of are in memory at a time.

    Args:
        layout: naming, a key of the family's `layouts`.
        dtype: what is written; None keeps each parameter's own.

    Raises:
        UserError: an unsuitable or damaged source, an OUT that exists or cannot be written.
    """
    target = Path(out).absolute()
    check_free(target, overwrite)
    directory = ModelDirectory(source, family)
    exported = Exported(family, directory.cfg, directory, layout)
    fresh = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        fresh.mkdir(parents=True)
        write_safetensors(fresh / "model.safetensors", exported, dtype, progress)
        config = to_hf(family.name, directory.cfg)
        if config is not None and directory.tokenizer is not None:
            config |= _special_ids(directory.tokenizer)
        if not family.tower:
            config = {"model_type": "flowseg", "flowseg": directory.cfg.to_dict()}
        if config is not None:
            (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if directory.tokenizer is not None:
            shutil.copytree(directory.tokenizer, fresh, dirs_exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    except OSError as error:
        raise UserError(f"{target} could not be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(fresh)
    return target


def _special_ids(tokenizer: Path) -> dict[str, int | None]:
    """The ids that a Hugging Face config repeats; its classes' own defaults may lie outside of the table."""
    from transformers import AutoTokenizer  # slow to import, and only needed here

    hf = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    return {f"{name}_token_id": getattr(hf, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def write_safetensors(file: Path, exported: Exported, dtype: str | None, progress: Callable[[str], None]) -> None:
    """One safetensors file, tensor by tensor; the header needs no more than shapes and dtypes."""
    order = list(exported.in_order())
    kinds = {name: cast(np.empty(0, exported.entries[name].dtype), dtype).dtype for name in order}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        shape = exported.entries[name].shape
        end = offset + math.prod(shape) * kinds[name].itemsize
        header[name] = {"dtype": NAMES[kinds[name]], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers want aligned data
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            stream.write(np.ascontiguousarray(cast(exported.read(name), dtype)).reshape(-1).view(np.uint8).data)
            progress(name)
