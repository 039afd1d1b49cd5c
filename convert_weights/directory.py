"""Our own model directories as a source: one parameter at a time, each verified against its checksum."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import tensorstore as ts

from convert_weights.families import FAMILIES, CheckpointFamily
from convert_weights.sources import TensorInfo
from flowseg_jax import fields
from flowseg_jax.checkpoints.manifest import verify
from flowseg_jax.checkpoints.pretrained import read_model_config
from flowseg_jax.checkpoints.streaming import chunk_slices
from flowseg_jax.errors import UserError

# Where a component lies in a whole model.
WITHIN = {"qwen3": "llm/", "phi3": "llm/", "llama": "llm/", "siglip2": "siglip/", "sam": "sam/"}


class ModelDirectory:
    """The parameters of a model or component directory under their flat names.

    Args:
        directory: written by `save_pretrained`, `save_pretrained_streaming` or training.
        family: the family to read. A language model or an encoder can be taken out of a whole model.

    Attributes:
        cfg: the family's config.
        tokenizer: the directory's tokenizer, or None.

    Raises:
        UserError: no such directory, a damaged one, or one that does not hold this family.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, directory: str | os.PathLike[str], family: CheckpointFamily):
        self.name, self._path = str(directory), Path(directory).absolute()
        config = read_model_config(self._path, allow_component=True)
        component, prefix = config.get("component"), ""
        if component is not None:
            if component["family"] != family.name:
                raise UserError(f"{directory} holds a component of the family {component['family']}, not {family.name}")
            self.cfg = fields.read(family.config, component["config"], f"{directory}/config.json: component.config")
        else:
            model = fields.read(FAMILIES["flowseg"].config, config["model"], f"{directory}/config.json: model")
            prefix = "" if not family.component else WITHIN.get(family.name, "?")
            if prefix == "?" or (prefix == "llm/" and model.llm.model_type != family.name):
                held = f", its language model is {model.llm.model_type}" if prefix == "llm/" else ""
                raise UserError(f"{directory} holds a whole model{held}: {family.name} cannot be taken out of it")
            self.cfg = {"llm/": model.llm, "siglip/": model.siglip, "sam/": model.sam}.get(prefix, model)
        stored = {n: kind for n, kind in config["manifest"].items() if n.startswith(prefix)}
        self.entries = {
            n.removeprefix(prefix): TensorInfo(tuple(shape), np.dtype(dtype)) for n, (shape, dtype) in stored.items()
        }
        self.tokenizer = self._path / "tokenizer" if (self._path / "tokenizer").is_dir() and prefix in ("", "llm/") else None
        self._prefix, self._sums = prefix, config["checksums"]
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        stored = self._prefix + name
        place = {
            "driver": "ocdbt",
            "base": self._path.joinpath("params").as_uri() + "/",
            "path": stored.replace("/", ".") + "/",
        }
        try:
            store = ts.open({"driver": "zarr", "kvstore": place}, open=True, context=self._context).result()
            if store.shape != self.entries[name].shape:
                raise ValueError(f"its shape is {store.shape}, config.json says {self.entries[name].shape}")
            array = np.empty(store.shape, store.dtype.numpy_dtype)
            for box in chunk_slices(
                store
            ):  # all at once, TensorStore would hold the whole array in its compressed form as well
                array[box] = store[box].read().result()
            verify({stored: array}, self._sums)
        except (ValueError, OSError) as error:
            raise UserError(f"{self.name} is damaged at {stored}: {str(error).splitlines()[0][:200]}") from None
        return array if array.ndim == 0 else array[start:stop]


def is_model_directory(path: Path) -> bool:
    """Whether a directory was written by flowseg_jax, judged by its look only."""
    return (path / "config.json").is_file() and (path / "params").is_dir()
