"""Attention on a TPU: a Pallas kernel that keeps the scores on the chip (FlashAttention: Dao et al., arXiv:2205.14135).

JAX's own TPU kernels know causal masks and segments that are equal. Here all segments attend to a prefix, and windows count
positions. So `mask.may_attend` is evaluated for each block, and blocks in which no query may attend to any key are skipped. A
mask that is a matrix, as the mask decoder has, comes block by block.

Scores are held transposed, keys by queries: what exists once per query (peak, sum, segment) is then a row, the shape in which
a TPU holds a vector. Heads lie side by side in the last axis, padded to whole lanes, so nothing is transposed outside. Query
heads that read the same keys share a step: their mask is evaluated once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from flowseg_jax.ops.attention import flash_backward, flash_forward
from flowseg_jax.ops.attention.flash_call import Mask
from flowseg_jax.ops.collectives import TENSOR_AXIS


def forward(
    q: Float[Array, "b s h e"], k: Float[Array, "b t g e"], v: Float[Array, "b t g f"], mask: Mask, scale: float
) -> tuple[Float[Array, "b s h f"], Float[Array, "b h s"]]:
    """As `xla.forward`, for an `AttentionMask`, a matrix that is the same for all heads, or none."""
    return _on_each_device(functools.partial(flash_forward.run, scale), "qkk", "qs", (q, k, v), mask)


def backward(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t g e"],
    v: Float[Array, "b t g f"],
    mask: Mask,
    scale: float,
    out: Float[Array, "b s h f"],
    logsum: Float[Array, "b h s"],
    cotangent: Float[Array, "b s h f"],
) -> tuple[Float[Array, "b s h e"], Float[Array, "b t g e"], Float[Array, "b t g f"]]:
    """As `xla.backward`, for the masks of `forward`."""
    arrays = (q, k, v, cotangent, out, logsum)
    return _on_each_device(functools.partial(flash_backward.run, scale), "qkkqqs", "qkk", arrays, mask)


def _on_each_device(run: Callable, layouts: str, results: str, arrays: Sequence[Array], mask: Mask) -> tuple[Array, ...]:
    """Runs on the parts of a device: the compiler cannot divide a kernel along the axes of a mesh that are left to it.

    `TENSOR_AXIS` divides heads, other axes the batch, each where it fits. `layouts` are "q" and "k" for [batch, tokens, heads,
    width] and "s" for [batch, heads, tokens].
    """
    mesh = jax.sharding.get_abstract_mesh()
    ours = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    if not ours:
        return run(*arrays, mask)
    if isinstance(mask, Array):
        mask = jnp.broadcast_to(mask, (arrays[0].shape[0], *mask.shape[1:]))
    batch, heads = [], None
    for axis in ours:
        if axis == TENSOR_AXIS:
            heads = axis if all(x.shape[2] % mesh.shape[axis] == 0 for x in arrays[:2]) else None
        elif arrays[0].shape[0] % np.prod([mesh.shape[other] for other in (*batch, axis)]) == 0:
            batch.append(axis)
    batch = tuple(batch) or None
    specs = dict.fromkeys("qk", PartitionSpec(batch, None, heads)) | {"s": PartitionSpec(batch, heads)}
    shared = jax.shard_map(
        run,
        in_specs=(*(specs[layout] for layout in layouts), PartitionSpec(batch)),
        out_specs=tuple(specs[layout] for layout in results),
        axis_names=set(ours),
        check_vma=False,
    )
    return shared(*arrays, mask)
