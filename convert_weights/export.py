"""Writes a model directory back as safetensors, in the layout of Hugging Face or of X-SAM."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from convert_weights.configs_to_hf import to_hf
from convert_weights.convert import TorchView, cast
from convert_weights.directory import ModelDirectory
from convert_weights.families import FAMILIES, CheckpointFamily
from flowseg_jax.checkpoints.pretrained import require_empty_directory
from flowseg_jax.checkpoints.storage import fresh_directory
from flowseg_jax.system import locks

MAX_SHARD = 1 << 30  # bytes of a file


def export_directory(
    family: CheckpointFamily,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layout: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Exports a model directory: safetensors, `config.json` and, with a language model, the tokenizer.

    `config.json` is Hugging Face's for a component; for a whole model it holds our config, from which xsam and flowseg are read
    back. OUT appears complete or not at all. In memory are one shard (`MAX_SHARD`) and the parameters that a tensor is made of.

    Args:
        layout: naming, a key of the family's `layouts`.
        dtype: what is written; None keeps each parameter's own.

    Raises:
        UserError: an unsuitable or damaged source, an OUT that exists or cannot be written.
    """
    target = Path(out).absolute()
    with locks.held(target, beside=True):
        return _export(family, source, target, layout, dtype, overwrite, progress)


def export_for_huggingface(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Exports a whole model: `xsam/` is all of it in X-SAM's layout, transformers reads `language_model/`, `siglip/`, `sam/`.

    OUT appears complete or not at all; in memory is what `export_directory` holds.

    Args:
        source: a model directory.
        out: the directory to make.
        dtype: as in `export_directory`.

    Raises:
        UserError: a source that is no whole model or a damaged one, an OUT that exists or cannot be written.
    """
    model = ModelDirectory(source, FAMILIES["flowseg"]).cfg
    target = Path(out).absolute()
    with locks.held(target, beside=True):
        require_empty_directory(target)
        with fresh_directory(target) as fresh:
            for name, family in {
                "xsam": "flowseg",
                "language_model": model.llm.model_type,
                "siglip": "siglip2",
                "sam": "sam",
            }.items():
                export_directory(FAMILIES[family], source, fresh / name, dtype=dtype, progress=progress)
    return target


def _export(
    family: CheckpointFamily,
    source: str | os.PathLike[str],
    target: Path,
    layout: str | None,
    dtype: str | None,
    overwrite: bool,
    progress: Callable[[str], None],
) -> Path:
    require_empty_directory(target, overwrite)
    directory = ModelDirectory(source, family)
    exported = TorchView(family, directory.cfg, directory, layout)
    with fresh_directory(target) as fresh:
        write_safetensors(fresh, exported, dtype, progress)
        config = to_hf(family.name, directory.cfg)
        if config is not None and directory.tokenizer is not None:
            config |= _special_ids(directory.tokenizer)
        if not family.component:
            config = {"model_type": "flowseg", "flowseg": directory.cfg.to_dict()}
        if config is not None:
            (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if directory.tokenizer is not None:
            shutil.copytree(directory.tokenizer, fresh, dirs_exist_ok=True)
    return target


def _special_ids(tokenizer: Path) -> dict[str, int | None]:
    """The ids that a Hugging Face config repeats; its classes' own defaults may lie outside of the table."""
    from transformers import AutoTokenizer  # slow to import, and only needed here

    hf = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    return {f"{name}_token_id": getattr(hf, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def write_safetensors(directory: Path, exported: TorchView, dtype: str | None, progress: Callable[[str], None]) -> None:
    """`model.safetensors`; above `MAX_SHARD` bytes shards with their index, as transformers writes and reads them.

    The library writes a file from arrays that are all in memory: those of one shard are, and no more.
    """
    dtypes = {name: cast(np.empty(0, entry.dtype), dtype).dtype for name, entry in exported.entries.items()}
    shards: list[list[str]] = [[]]
    total = size = 0
    for name in exported.in_order():
        bytes_ = math.prod(exported.entries[name].shape) * dtypes[name].itemsize
        if shards[-1] and size + bytes_ > MAX_SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + bytes_, total + bytes_
    places = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {}
        for name in names:
            arrays[name] = cast(exported.read(name), dtype)
            progress(name)
        save_file(arrays, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # the library writes it for its owner alone
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
