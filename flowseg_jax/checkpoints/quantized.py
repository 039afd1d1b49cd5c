"""A model directory read for inference: as it is, or with int8 weights, which are made while it is read."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from flowseg_jax.checkpoints.manifest import check_manifest, flatten_params, manifest, unflatten_params
from flowseg_jax.checkpoints.pretrained import PretrainedModel, load_pretrained, read_model_config
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.quantization import quantized


def load_for_inference(
    directory: str | os.PathLike[str], cfg: FlowSegConfig, abstract: dict[str, Any], quantize: str | None
) -> PretrainedModel:
    """`load_pretrained`. For int8 the arrays are read in host memory in their stored dtype and rounded there, so that no device
    ever holds more than the int8 model.

    Args:
        directory: a model directory.
        cfg: its model.
        abstract: the parameters of `models.quantization.abstract_model`, with shardings where there is a mesh.
        quantize: None, "int8" or "bfloat16".

    Raises:
        UserError: as `load_pretrained`; a matrix with a value that is no number.
    """
    if quantize in (None, "bfloat16"):
        return load_pretrained(directory, abstract)
    plain = manifest(flowseg.params_dict(flowseg.abstract_model(cfg)[1]))
    check_manifest(plain, read_model_config(directory)["manifest"], f"model directory {directory}")
    loaded = load_pretrained(directory, dtype=None)
    flat, places, found = flatten_params(loaded.params), flatten_params(abstract), {}
    for name in list(flat):
        for path, made in quantized(name, flat.pop(name)).items():
            found[path] = place(made, places[path])
    return PretrainedModel(unflatten_params(found), loaded.model_config, loaded.tokenizer_dir, loaded.extra)


def place(x: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of this process as a part of the global one, in its dtype."""
    x = x.astype(like.dtype)
    if like.sharding is None:
        return jax.device_put(x)
    return jax.make_array_from_callback(x.shape, like.sharding, lambda part: x[part])
