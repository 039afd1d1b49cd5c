"""Scaled dot-product attention: grouped-query, float32 softmax, bounded memory, in the form that suits the platform.

    xla     plain JAX; any platform, any mask. The tests compare the others with it.
    flash   our Pallas kernel for TPUs; any mask but a matrix that differs between heads.
    cudnn   NVIDIA's kernel for GPUs, in bfloat16 or float16; xla computes other types, and widths that cuDNN does not take.

All three recompute the scores in the backward pass. The forward pass keeps the result and one number per query for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float

from flowseg_jax.ops.attention import cudnn, grid, xla
from flowseg_jax.ops.attention.mask import AttentionMask, TokenInfo, causal_mask
from flowseg_jax.ops.portable import cpu_only, kernels_allowed
from flowseg_jax.ops.remat import keepable

__all__ = ["AttentionMask", "TokenInfo", "attention", "causal_mask", "decomposed_rel_pos_attention", "rel_pos_attention"]

IMPLEMENTATIONS = ("auto", "xla", "flash", "cudnn")
# With fewer queries or keys than the first, or fewer scores than the second, a kernel's blocks are mostly padding.
MIN_KERNEL_TOKENS, MIN_KERNEL_SCORES = 128, 256**2


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is static of one call; `mask` is the structure of the mask, of which the arrays alone are passed on."""

    scale: float
    chunk: int | None
    impl: str
    mask: jax.tree_util.PyTreeDef


def attention(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t g e"],
    v: Float[Array, "b t g f"],
    *,
    mask: AttentionMask | Bool[Array, "#b #h #s t"] | None = None,
    scale: float | None = None,
    chunk: int | None = None,
    impl: str = "auto",
) -> Float[Array, "b s h f"]:
    """softmax(scale * q k^T) v, each query head h reading key/value head h // (H / G).

    Args:
        q: queries; H must be a multiple of G.
        k: keys.
        v: values; their width F may differ from E.
        mask: an `AttentionMask`, or a matrix that is True where query s may attend to key t; its axes of size 1 broadcast,
            except that of the keys. None allows every key.
        scale: factor on the scores, default E ** -0.5.
        chunk: queries computed at a time by `xla`, so that no buffer holds all S x T scores. None: all at once, unless the
            float32 scores exceed `xla.WHOLE_BYTES`.
        impl: "xla", "flash", "cudnn" or "auto" (by the platform that the program is compiled for; xla under `without_kernels`).

    Returns:
        Array in the dtype of v; products accumulate in float32. A query that may attend to no key gets zeros.

    Raises:
        ValueError: shapes that do not fit, an unknown `impl`, or `flash` for a matrix that differs between heads.
    """
    (b, s, h, e), (t, g) = q.shape, k.shape[1:3]
    if h % g or k.shape != (b, t, g, e) or v.shape[:3] != (b, t, g):
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    if isinstance(mask, AttentionMask):
        shapes = mask.queries.order.shape, mask.keys.order.shape
        if shapes != ((b, s), (b, t)):
            raise ValueError(f"attention: a mask for queries {shapes[0]} and keys {shapes[1]}, not {(b, s)} and {(b, t)}")
        if mask.in_order and s != t:
            raise ValueError(f"attention: {s} queries and {t} keys are not the same tokens, as the mask's in_order says")
    elif mask is not None:
        if mask.ndim != 4 or mask.shape[3] != t or any(m not in (1, n) for m, n in zip(mask.shape, (b, h, s), strict=False)):
            raise ValueError(f"attention: mask {mask.shape} does not broadcast to {(b, h, s, t)}")
        if impl == "flash" and mask.shape[1] > 1:
            raise ValueError('attention: impl="flash" takes no matrix that differs between heads')
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention: impl={impl!r} is unknown (known: {', '.join(IMPLEMENTATIONS)})")
    leaves, structure = jax.tree.flatten(mask)
    static = _Static(e**-0.5 if scale is None else scale, chunk, _without_kernels(impl), structure)
    return _attention(static, q, k, v, leaves)


def _without_kernels(impl: str) -> str:
    return "xla" if impl == "auto" and not kernels_allowed() else impl


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q: Array, k: Array, v: Array, mask: list[Array]) -> Array:
    return _run("forward", static, q, k, v, mask)[0]


def _attention_forward(static: _Static, q: Array, k: Array, v: Array, mask: list[Array]) -> tuple[Array, tuple]:
    out, logsum = keepable(_run("forward", static, q, k, v, mask))
    return out, (q, k, v, mask, out, logsum)


def _attention_backward(static: _Static, saved: tuple, cotangent: Array) -> tuple:
    return *_run("backward", static, *saved, cotangent), None


_attention.defvjp(_attention_forward, _attention_backward)


def _run(name: str, static: _Static, q: Array, k: Array, v: Array, leaves: list[Array], *saved: Array) -> tuple[Array, ...]:
    """`forward` or `backward` of the implementation that the call names, or the one for the platform."""
    mask = jax.tree.unflatten(static.mask, leaves)
    plain = functools.partial(getattr(xla, name), chunk=static.chunk)

    def call(run):
        return lambda q, k, v, mask, *saved: run(q, k, v, mask, static.scale, *saved)

    if static.impl == "xla":
        return call(plain)(q, k, v, mask, *saved)
    from flowseg_jax.ops.attention import flash  # Pallas takes long to import, and a CPU has no use for it

    kernels = {"flash": getattr(flash, name), "cudnn": getattr(cudnn, name)}
    if static.impl != "auto":
        return call(kernels[static.impl])(q, k, v, mask, *saved)
    fits = {}
    s, t = q.shape[1], k.shape[1]
    if min(s, t) >= MIN_KERNEL_TOKENS and s * t >= MIN_KERNEL_SCORES:
        if mask is None or isinstance(mask, AttentionMask) or mask.shape[1] == 1:
            fits["tpu"] = call(kernels["flash"])
        if cudnn.takes(q, k, v, mask):
            fits["cuda"] = call(kernels["cudnn"])
    if not fits:
        return call(plain)(q, k, v, mask, *saved)
    return jax.lax.platform_dependent(q, k, v, mask, *saved, default=call(plain), **fits)


@jax.custom_vjp
def decomposed_rel_pos_attention(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b t h e"],
    v: Float[Array, "b t h f"],
    rows: Float[Array, "b s h y"],
    columns: Float[Array, "b s h x"],
) -> Float[Array, "b s h f"]:
    """softmax(q k^T + rows[y] + columns[x]) v for keys in row y and column x of a grid, numbered row by row; no scale.

    No bias of all scores exists: it becomes part of the product (`grid.fold_rel_pos`). Where a CPU attends in chunks, it is
    added to one chunk's scores. Returns an array in the dtype of v; products accumulate in float32.
    """
    return _grid_forward(q, k, v, rows, columns)[0]


def _grid_forward(q: Array, k: Array, v: Array, rows: Array, columns: Array) -> tuple[Array, tuple]:
    def folded(q: Array, k: Array, v: Array, rows: Array, columns: Array) -> tuple[Array, Array]:
        return _run("forward", _grid_static(), *grid.fold_rel_pos(q, k, rows, columns), v, [])

    b, s, h, _ = q.shape
    operands = q, k, v, rows, columns
    if 4 * b * h * s * k.shape[1] <= xla.WHOLE_BYTES:
        out, logsum = folded(*operands)
    elif cpu_only():
        out, logsum = grid.forward(*operands)
    else:
        out, logsum = jax.lax.platform_dependent(*operands, cpu=grid.forward, default=folded)
    return out, (*operands, out, logsum)


def _grid_backward(saved: tuple, cotangent: Array) -> tuple:
    q, k, v, rows, columns, out, logsum = saved
    wide = *grid.fold_rel_pos(q, k, rows, columns), v
    dq, dk, dv = _run("backward", _grid_static(), *wide, [], out, logsum, cotangent)
    e, height = q.shape[-1], rows.shape[-1]
    return dq[..., :e], dk[..., :e], dv, dq[..., e : e + height], dq[..., e + height : e + height + columns.shape[-1]]


def _grid_forward_to_keep(*operands: Array) -> tuple[Array, tuple]:
    out, (*operands, _, logsum) = _grid_forward(*operands)
    out, logsum = keepable((out, logsum))
    return out, (*operands, out, logsum)


decomposed_rel_pos_attention.defvjp(_grid_forward_to_keep, _grid_backward)


def _grid_static() -> _Static:
    return _Static(1.0, None, _without_kernels("auto"), jax.tree.structure(None))


def rel_pos_attention(
    q: Float[Array, "n t w"],
    k: Float[Array, "n t w"],
    v: Float[Array, "n t w"],
    rows: Float[Array, "r e"],
    columns: Float[Array, "r e"],
    heads: int,
) -> Float[Array, "n t w"]:
    """SAM's attention over squares of tokens, heads side by side: softmax(E ** -0.5 q k^T + q Rh[y, y'] + q Rw[x, x']) v.

    `rows` and `columns` are the vectors of relative positions, the same for all heads; offset 0 is in the middle. On a TPU
    small squares have a kernel of their own (`window`).
    """
    divided = AxisType.Auto in jax.sharding.get_abstract_mesh().axis_types  # the compiler cannot divide a kernel
    if kernels_allowed() and not divided and grid.is_window(math.isqrt(q.shape[1]), heads, q.shape[2] // heads):
        return _windows(heads, q, k, v, rows, columns)
    scaled, of_rows, of_columns = grid.rel_pos_operands(heads, q, rows, columns)
    by_head = [x.reshape(*x.shape[:2], heads, -1) for x in (k, v)]
    return decomposed_rel_pos_attention(scaled, *by_head, of_rows, of_columns).reshape(v.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _windows(heads: int, q: Array, k: Array, v: Array, rows: Array, columns: Array) -> Array:
    return _windows_forward(heads, q, k, v, rows, columns)[0]


def _windows_forward(heads: int, *operands: Array) -> tuple[Array, tuple]:
    from flowseg_jax.ops.attention import window  # Pallas takes long to import, and a CPU has no use for it

    def plain(q: Array, k: Array, v: Array, rows: Array, columns: Array) -> tuple[Array, Array]:
        scaled, of_rows, of_columns = grid.rel_pos_operands(heads, q, rows, columns)
        k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (k, v))
        out, (*_, logsum) = _grid_forward(scaled, k, v, of_rows, of_columns)
        return out.reshape(q.shape), logsum

    def kernel(q: Array, *others: Array) -> tuple[Array, Array]:
        return window.forward(q, *others), jnp.zeros((q.shape[0], heads, q.shape[1]), jnp.float32)

    out, logsum = keepable(jax.lax.platform_dependent(*operands, tpu=kernel, default=plain))
    return out, (*operands, out, logsum)


def _windows_backward(heads: int, saved: tuple, cotangent: Array) -> tuple:
    from flowseg_jax.ops.attention import window

    def plain(q: Array, k: Array, v: Array, rows: Array, columns: Array, out: Array, logsum: Array, cotangent: Array) -> tuple:
        (scaled, *positions), pull = jax.vjp(functools.partial(grid.rel_pos_operands, heads), q, rows, columns)
        k, v, out, cotangent = (x.reshape(*x.shape[:2], heads, -1) for x in (k, v, out, cotangent))
        dq, dk, dv, *dpositions = _grid_backward((scaled, k, v, *positions, out, logsum), cotangent)
        dq, drows, dcolumns = pull((dq, *dpositions))
        return dq, dk.reshape(q.shape), dv.reshape(q.shape), drows, dcolumns

    def kernel(q: Array, k: Array, v: Array, rows: Array, columns: Array, out: Array, logsum: Array, cotangent: Array) -> tuple:
        return window.backward(q, k, v, rows, columns, cotangent)

    return jax.lax.platform_dependent(*saved, cotangent, tpu=kernel, default=plain)


_windows.defvjp(_windows_forward, _windows_backward)
