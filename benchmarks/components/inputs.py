"""Weights and inputs of the components, and what carries arrays between the two frameworks.

Weights are random at the scale of trained ones: signals neither vanish nor explode, and no parameter is zero, so that a part
that computed something else would show in the outputs.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks.components import Call
from convert_weights.convert import export_params
from convert_weights.families import FAMILIES
from flowseg_jax.checkpoints.manifest import unflatten_params
from flowseg_jax.models import flowseg


def random(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def parameters(family: str, cfg: Any, seed: int = 0) -> dict[str, Any]:
    """Random parameters of a family of `convert_weights`, a nested dict of NumPy arrays."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        leaf = name.rsplit("/", 1)[-1]
        if leaf == "kernel":
            fan_in = math.prod(shape[:-1] if len(shape) == 4 else shape[-2:-1])  # of a convolution, or of a stack of matrices
            return noise / np.float32(math.sqrt(fan_in))
        if leaf in ("scale", "alpha"):
            return 1 + np.float32(0.1) * noise
        if leaf == "logit_scale":
            return np.full(shape, 2.6593, np.float32)
        if leaf.startswith("queries_") or leaf in ("background_embed", "embed_tokens"):
            return noise
        return np.float32(0.1) * noise

    return unflatten_params({name: draw(name, shape) for name, shape in FAMILIES[family].shapes(cfg).items()})


def module(family: str, cfg: Any) -> nnx.GraphDef:
    """The description of a family's network."""
    return nnx.split(nnx.eval_shape(lambda: FAMILIES[family].module(cfg, rngs=nnx.Rngs(0))))[0]


def bind(graphdef: nnx.GraphDef, params: dict[str, Any]) -> Any:
    return flowseg.bind_params(graphdef, params)


def exported(family: str, params: dict[str, Any], cfg: Any) -> dict[str, torch.Tensor]:
    """The parameters under PyTorch's names."""
    return {name: torch.from_numpy(x) for name, x in export_params(family, params, cfg).items()}


def placed(params: Any, dtype: str = "float32") -> Any:
    """Parameters on the device; stored in the dtype of the computation, which is what a model for inference does."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def to_torch(x: Any) -> torch.Tensor:
    """A tensor with the same numbers and its own memory."""
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(x, np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def load(layer: torch.nn.Module, tensors: dict[str, torch.Tensor], under: str = "", dtype: str = "float32") -> torch.nn.Module:
    """Gives a module made on the meta device the tensors whose names begin with `under`, all of them and no others."""
    mine = {name.removeprefix(under): x for name, x in tensors.items() if name.startswith(under)}
    layer.load_state_dict(mine, assign=True)
    return layer.to(getattr(torch, dtype)).eval()


def inference(call: Call) -> Call:
    """The call as PyTorch makes it where nothing is trained."""

    def without_gradients() -> Any:
        with torch.inference_mode():
            return call()

    return without_gradients
