"""int8 weights, for inference and for what is frozen in training: the matrices of the language model's and of SAM's layers, one
scale for every output channel.

A matrix W is stored as whole numbers from -127 to 127 and scales s, the largest magnitude of each of its columns over 127: W is
nearly (whole numbers) * s. A layer multiplies by the whole numbers, in the dtype that it computes in, and its result by s.
Embeddings, norms, biases, SigLIP, projectors, decoders and heads stay as they are.

"bfloat16" stores all matrices and embeddings of the model in half the bytes and rounds nothing else. A model that computes in
bfloat16, as the full-size ones do, rounds them at every use anyway: its answers stay the same to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.layers import Linear

KINDS = ("int8", "bfloat16")
_MATRICES = re.compile(r"(.*/)?(kernel|embed_tokens|lm_head)/value")
_QUANTIZED = re.compile(r"(llm/layers|sam/(window|global)_layers)/.+")  # linear layers
LARGEST = 127


def abstract_model(cfg: FlowSegConfig, quantize: str | None = None) -> tuple[nnx.GraphDef, nnx.State]:
    """`flowseg.abstract_model`, with int8 matrices and their scales, or bfloat16 matrices, where `quantize` says so.

    Raises:
        UserError: another kind of quantization.
    """
    graphdef, state = flowseg.abstract_model(cfg)
    if quantize is None:
        return graphdef, state
    if quantize not in KINDS:
        raise UserError(f"quantize={quantize!r}{did_you_mean(quantize, KINDS)}")
    if quantize == "bfloat16":
        return graphdef, jax.tree.map_with_path(_in_bfloat16, state)
    network = nnx.merge(graphdef, state)
    add_scales(network)
    return nnx.split(network)


def add_scales(network: nnx.Module, chosen: Callable[[str], bool] = lambda path: True) -> list[str]:
    """Gives the layers that int8 is for abstract int8 matrices and scales, in place.

    Args:
        chosen: whether a linear layer, by path, is one of them.

    Returns:
        The paths of the scales.
    """
    linears = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(network) if isinstance(node, Linear)}
    linears = {path: node for path, node in linears.items() if _QUANTIZED.fullmatch(path) and chosen(path)}
    for node in linears.values():
        (layers, _, d_out), axes = node.kernel.shape, node.kernel.get_metadata()["logical_axes"]
        scale = jax.ShapeDtypeStruct((layers, d_out), jnp.float32)
        node.kernel_scale = nnx.Param(scale, logical_axes=(axes[0], None))
        node.kernel = nnx.Param(jax.ShapeDtypeStruct(node.kernel.shape, jnp.int8), logical_axes=axes)
    return [f"{path}/kernel_scale" for path in linears]


def _in_bfloat16(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return x.update(dtype=jnp.bfloat16) if _MATRICES.fullmatch(name) else x


def quantized(path: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """What a parameter of the plain model becomes, by path: itself, or an int8 matrix and its float32 scales.

    Args:
        path: its flat name.
        x: a stack [L, in, out] if it is the matrix of a layer that is quantized; then the scales are [L, out].

    Raises:
        UserError: a matrix with a value that is no number.
    """
    layer, _, leaf = path.rpartition("/")
    if leaf != "kernel" or not _QUANTIZED.fullmatch(layer):
        return {path: x}
    whole, scales = np.empty(x.shape, np.int8), np.empty((len(x), x.shape[2]), np.float32)
    for i, matrix in enumerate(x):  # one layer at a time in float32
        matrix = np.asarray(matrix, np.float32)
        scale = np.abs(matrix).max(0) / LARGEST
        if not np.isfinite(scale).all():
            raise UserError(f"{path} has values that are no numbers, which int8 cannot hold")
        scales[i] = np.where(scale > 0, scale, 1)
        whole[i] = np.rint(matrix / scales[i])
    return {path: whole, f"{path}_scale": scales}
