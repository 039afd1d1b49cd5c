"""The layers that all components are made of, with logical axis names on every parameter.

A parameter is `nnx.Param(value, logical_axes=(...))`: one logical axis name (or None) per dimension. `sharding.py` turns names
into shardings; nothing here knows about meshes. Parameters are float32. A layer computes in the dtype of its input; matrix
products accumulate in float32 (`ops.dot`), and norms take their statistics in float32.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from flowseg_jax.ops.attention import attention
from flowseg_jax.ops.collectives import all_gather_2d
from flowseg_jax.ops.dot import dot, einsum
from flowseg_jax.ops.portable import cpu_only
from flowseg_jax.ops.rope import rms_norm

Initializer = Callable[..., jax.Array]
_shapes_only: contextvars.ContextVar[bool] = contextvars.ContextVar("flowseg_shapes_only", default=False)

ones = nnx.initializers.ones
zeros = nnx.initializers.zeros
xavier = nnx.initializers.xavier_uniform()


def normal_init(std: float) -> Initializer:
    return nnx.initializers.normal(std)


def torch_default_init(fan_in: int) -> Initializer:
    """PyTorch's default for Linear and Conv, weight and bias alike: uniform in +-1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def make_param(rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 parameter with one logical axis name per dimension."""
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} do not fit shape {shape}")
    value = jnp.zeros(shape, jnp.float32) if _shapes_only.get() else init(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, logical_axes=axes)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Parameters that are made inside are zeros: to trace hundreds of random generators for their shapes takes a second."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def gathered_weight(variable: nnx.Param, dtype: jnp.dtype) -> Array:
    """The copy of a parameter that a product is computed with: in the compute dtype, and whole.

    A parameter that is sharded over `fsdp` (`sharding.mark_fsdp_axes`) is gathered here, after the cast (before it where it is
    int8, which is less to send). Inside a scanned stack that is one layer at a time, and with rematerialisation again in the
    backward pass: no stack is ever whole.
    """
    axis, x = variable.get_metadata().get("fsdp_axis"), variable[...]
    if axis is None:
        return x.astype(dtype)
    return all_gather_2d(x, axis).astype(dtype) if x.dtype == jnp.int8 else all_gather_2d(x.astype(dtype), axis)


class DropoutKeys(nnx.Variable):
    """A random key for every row of the batch, set anew in every training step; no parameter."""


class LowRankAdapter(nnx.Module):
    """LoRA (https://arxiv.org/abs/2106.09685): s dropout(x) A B, A [in, r], B [r, out], which a Linear adds to its product.

    The product has rank r and is never multiplied out: beside the frozen weight there is no array of its size.

    With a `magnitude` it is DoRA (https://arxiv.org/abs/2402.09353): every column of W + s A B is scaled to the length that the
    column of W has, times 1 + magnitude. As there, no gradient flows through the length of W + s A B.

    Attributes:
        a, b: the factors; `training.lora.add_adapters` makes them, for all layers of a stack at once.
        scale: s.
        dropout: probability with which an element of x is dropped here; it happens only where there are `keys`.
        magnitude: [out], or None.
        keys: one for every row of the batch, [B], or None.
    """

    keys: DropoutKeys | None = None

    def __init__(self, a: nnx.Param, b: nnx.Param, scale: float, dropout: float, magnitude: nnx.Param | None = None):
        self.a, self.b, self.scale, self.dropout, self.magnitude = a, b, scale, dropout, magnitude

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        if self.keys is not None:
            x = self._drop(x, self.keys[...])
        return dot(self.scale * dot(x, gathered_weight(self.a, x.dtype)), gathered_weight(self.b, x.dtype))

    def lengths(self, kernel: Float[Array, "i o"]) -> Float[Array, " o"]:
        """What DoRA multiplies x (W + s A B) by, float32; `kernel` is W."""
        a, b = (gathered_weight(factor, kernel.dtype) for factor in (self.a, self.b))
        return (1 + self.magnitude[...]) * jax.lax.stop_gradient(length_ratio(kernel, a, b, self.scale))

    def _drop(self, x: Array, keys: Array) -> Array:
        """Inverted dropout. What is dropped of an image, and of all its windows, depends on its own key alone."""
        rows = x.reshape(len(keys), -1)
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, rows.shape[1:]))(keys)
        return jnp.where(kept, rows / (1 - self.dropout), 0).reshape(x.shape)


def length_ratio(w: Float[Array, "i o"], a: Float[Array, "i r"], b: Float[Array, "r o"], scale: float) -> Float[Array, " o"]:
    """The length of each column of w over that of w + scale a b, float32, without making an array of their size."""
    w, a, b = (x.astype(jnp.float32) for x in (w, a, b))
    before = einsum("io,io->o", w, w)
    crossed = einsum("or,ro->o", einsum("io,ir->or", w, a), b)
    product = einsum("ro,ro->o", b, einsum("rs,so->ro", einsum("ir,is->rs", a, a), b))
    after = before + 2 * scale * crossed + scale**2 * product
    return jnp.where(before > 0, jnp.sqrt(before / jnp.where(after > 0, after, 1)), 1)


class Linear(nnx.Module):
    """y = x W + b, W [in, out]. `axes` names W's two dimensions. `lora` adds a product of low rank.

    W may be int8 with a `kernel_scale` [out], by which the product is multiplied (`models.quantization`).
    """

    lora: LowRankAdapter | None = None
    kernel_scale: nnx.Param | None = None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        rngs: nnx.Rngs,
        axes: tuple[str | None, str | None] = (None, None),
        bias: bool = True,
        init: Initializer = xavier,
        bias_init: Initializer = zeros,
    ):
        self.kernel = make_param(rngs, init, (d_in, d_out), axes)
        self.bias = make_param(rngs, bias_init, (d_out,), (axes[1],)) if bias else None

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        kernel = gathered_weight(self.kernel, x.dtype)
        y = dot(x, kernel)
        if self.kernel_scale is not None:
            y = (y * self.kernel_scale[...]).astype(x.dtype)
        if self.lora is not None:
            y = y + self.lora(x)
            if self.lora.magnitude is not None:
                whole = kernel if self.kernel_scale is None else kernel * self.kernel_scale[...]
                y = (y * self.lora.lengths(whole)).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Conv(nnx.Module):
    """NHWC convolution, kernel [kh, kw, in, out], symmetric padding as in torch; or patchify (stride = kernel size)."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        kernel: int,
        *,
        rngs: nnx.Rngs,
        stride: int = 1,
        padding: int = 0,
        axes: tuple[str | None, str | None] = (None, None),
        bias: bool = True,
        init: Initializer = xavier,
        bias_init: Initializer = zeros,
    ):
        self.kernel = make_param(rngs, init, (kernel, kernel, d_in, d_out), (None, None, *axes))
        self.bias = make_param(rngs, bias_init, (d_out,), (axes[1],)) if bias else None
        self.stride, self.padding = stride, padding

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b y x o"]:
        kernel = gathered_weight(self.kernel, x.dtype)
        size = kernel.shape[0]
        if size == 1 and self.stride == 1:
            y = dot(x, kernel[0, 0])
        elif size == self.stride and self.padding == 0:  # patchify: one matrix product
            b, h, w, c = x.shape
            x = x[:, : h // size * size, : w // size * size]
            x = x.reshape(b, h // size, size, w // size, size, c).swapaxes(2, 3)
            y = dot(x.reshape(b, h // size, w // size, size * size * c), kernel.reshape(-1, kernel.shape[-1]))
        else:
            # lax.conv has no mixed-precision transpose rule: the convolution is computed in the compute dtype.
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                [(self.padding, self.padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis; statistics in float32, biased variance."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, eps: float = 1e-5):
        self.scale = make_param(rngs, ones, (width,), (None,))
        self.bias = make_param(rngs, zeros, (width,), (None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis; statistics in float32."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, eps: float = 1e-6):
        self.scale = make_param(rngs, ones, (width,), (None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return rms_norm(x, self.scale[...], self.eps)


class GroupNorm(nnx.Module):
    """GroupNorm of an NHWC map; statistics in float32 over (h, w, channels of the group)."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs, eps: float = 1e-5):
        if width % groups:
            raise ValueError(f"GroupNorm: {groups} groups do not divide width {width}")
        self.scale = make_param(rngs, ones, (width,), (None,))
        self.bias = make_param(rngs, zeros, (width,), (None,))
        self.groups, self.eps = groups, eps

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        b, h, w, d = x.shape
        y = x.astype(jnp.float32)
        if not cpu_only():
            y = y.reshape(b, h, w, self.groups, d // self.groups)
        y = y - self._group_mean(y)
        y = y * jax.lax.rsqrt(self._group_mean(jnp.square(y)) + self.eps)
        return (y.reshape(b, h, w, d) * self.scale[...] + self.bias[...]).astype(x.dtype)

    def _group_mean(self, y: Array) -> Array:
        """The mean over the map and the channels of a group, to be broadcast. A CPU takes half the time by channel first."""
        if not cpu_only():
            return y.mean((1, 2, 4), keepdims=True)
        mean = y.mean((1, 2)).reshape(len(y), self.groups, -1).mean(-1)
        return jnp.repeat(mean, y.shape[-1] // self.groups, axis=-1)[:, None, None]


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Exact (erf) GELU, as torch's default: in float32, whatever the dtype of x. For the gradient x alone is kept.

    `jax.nn.gelu` takes erfc in the dtype of x: less exact in bfloat16, and more than twice the time on a CPU.
    """
    y = x.astype(jnp.float32)
    return (y * _normal_cdf(y)).astype(x.dtype)


def _normal_cdf(y: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(y * 0.5**0.5))


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    y = x.astype(jnp.float32)
    slope = _normal_cdf(y) + y * jnp.exp(-0.5 * y * y) * (2 * math.pi) ** -0.5
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def gelu_tanh(x: Array) -> Array:
    """GELU by the tanh approximation (`gelu_pytorch_tanh`)."""
    return jax.nn.gelu(x, approximate=True)


class MultiHeadAttention(nnx.Module):
    """Multi-head attention with biases, as `torch.nn.MultiheadAttention`; its fused in-projection is three matrices here.

    Weights are small and stay replicated: their axes have no names. `fused_init` draws q, k and v as the rows of one
    Xavier-uniform [3D, D] matrix, as torch does; otherwise each is Xavier-uniform on its own (X-SAM's self-attention).
    `zero_output` starts the output projection at zero.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, fused_init: bool = True, zero_output: bool = False):
        if width % heads:
            raise ValueError(f"{heads} heads do not divide width {width}")
        bound = math.sqrt(6 / (4 * width if fused_init else 2 * width))
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)  # noqa: E731
        self.q_proj = Linear(width, width, rngs=rngs, init=init)
        self.k_proj = Linear(width, width, rngs=rngs, init=init)
        self.v_proj = Linear(width, width, rngs=rngs, init=init)
        self.out_proj = Linear(width, width, rngs=rngs, init=zeros if zero_output else xavier)
        self.num_heads = heads

    def __call__(
        self,
        query: Float[Array, "b s d"],
        key: Float[Array, "b t d"],
        value: Float[Array, "b t d"],
        *,
        mask: Bool[Array, "b 1 s t"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Attends. `mask` is True where a query may attend; a query that may attend to nothing gets only the output bias."""
        b, s, d = query.shape

        def split(x: Array) -> Array:
            return x.reshape(b, x.shape[1], self.num_heads, d // self.num_heads)

        out = attention(split(self.q_proj(query)), split(self.k_proj(key)), split(self.v_proj(value)), mask=mask)
        return self.out_proj(out.reshape(b, s, d))
