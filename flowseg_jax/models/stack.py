"""Repeated layers: stored as one stack, run by `jax.lax.scan` under a named rematerialisation policy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from flowseg_jax.ops.remat import ATTENTION

Layer = TypeVar("Layer", bound=nnx.Module)
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat(body: Callable, policy: str) -> Callable:
    """`body` under the named policy.

    none: keep everything; full: recompute all; attention: all but the results of attention; dots: all but the weight products.
    """
    if policy not in REMAT_POLICIES:
        raise ValueError(f"remat policy {policy!r}: known are {', '.join(REMAT_POLICIES)}")
    if policy == "none":
        return body
    return jax.checkpoint(body, policy=REMAT_POLICIES[policy], prevent_cse=False)


def stack_layers(make: Callable[[nnx.Rngs], Layer], count: int, rngs: nnx.Rngs) -> Layer:
    """`count` layers as one module whose every parameter has a leading axis named "layers"."""
    if count < 1:
        raise ValueError(f"a stack needs at least one layer, got {count}")
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), count)
    state = jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)))))(keys)
    layers = nnx.merge(graphdef, state)
    for _, node in nnx.iter_graph(layers):
        if isinstance(node, nnx.Variable):
            node.set_metadata(logical_axes=("layers", *node.get_metadata()["logical_axes"]))
    return layers


def scan_layers(
    layers: Layer,
    body: Callable[[Layer, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    policy: str = "none",
    start: int = 0,
    stop: int | None = None,
) -> tuple[Any, Any]:
    """Runs `body(layer, carry, x) -> (carry, y)` over layers [start, stop) of a stack.

    Returns the last carry and the stacked ys, as `jax.lax.scan`. `xs` has one leading entry per layer of the stack, or is None
    where not all of them run.
    """
    graphdef, state = nnx.split(layers)
    state = nnx.to_pure_dict(state)

    def step(carry, inputs):
        params, x = inputs
        return body(nnx.merge(graphdef, params), carry, x)

    step = remat(step, policy)
    if start or stop is not None:
        return _scan_part(step, *slice(start, stop).indices(len(jax.tree.leaves(state)[0]))[:2], state, carry)
    return jax.lax.scan(step, carry, (state, xs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan_part(step: Callable, start: int, stop: int, state: Any, carry: Any) -> tuple[Any, Any]:
    """Reads one layer after the other, for a part of a stack would be a copy."""

    def one(carry, index):
        return step(carry, (_layer(state, index), None))

    return jax.lax.scan(one, carry, jnp.arange(start, stop))


def _scan_part_forward(step: Callable, start: int, stop: int, state: Any, carry: Any) -> tuple[Any, Callable]:
    """Of a copy, for each layer's gradient would be as large as the stack."""
    run = lambda state, carry: jax.lax.scan(step, carry, (jax.tree.map(lambda w: w[start:stop], state), None))  # noqa: E731
    return jax.vjp(run, state, carry)


_scan_part.defvjp(_scan_part_forward, lambda step, start, stop, pull, cotangent: pull(cotangent))


def scan_blocks(
    stacks: Sequence[nnx.Module], body: Callable[[nnx.Module, Any], Any], carry: Any, blocks: int, *, policy: str = "none"
) -> tuple[Any, Any]:
    """Runs equal blocks of layers: in each one the next layers of every stack, one stack after the other.

    Args:
        stacks: their layers are divided evenly among the blocks.
        body: (layer, carry) -> carry.
        carry: what the first layer reads.
        blocks: how many; only one of them is compiled.
        policy: rematerialisation of a layer.

    Returns:
        Of all blocks, stacked: the carry before their last stack, and after it.
    """
    graphdefs, states = zip(*map(nnx.split, stacks), strict=True)
    steps = tuple(remat(functools.partial(_layer_step, body, graphdef), policy) for graphdef in graphdefs)
    return _scan_blocks(steps, blocks, tuple(map(nnx.to_pure_dict, states)), carry)


def _layer_step(body: Callable, graphdef: nnx.GraphDef, carry: Any, params: Any) -> tuple[Any, None]:
    return body(nnx.merge(graphdef, params), carry), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan_blocks(steps: tuple[Callable, ...], blocks: int, states: tuple, carry: Any) -> tuple[Any, Any]:
    """Reads one layer after the other, for a block of a stack would be a copy."""
    counts = [len(jax.tree.leaves(state)[0]) // blocks for state in states]

    def block(carry, number):
        for step, state, count in zip(steps, states, counts, strict=True):
            before = carry
            layer = lambda carry, i, step=step, state=state: step(carry, _layer(state, i))  # noqa: E731
            carry, _ = jax.lax.scan(layer, carry, number * count + jnp.arange(count))
        return carry, (before, carry)

    return jax.lax.scan(block, carry, jnp.arange(blocks))[1]


def _scan_blocks_forward(steps: tuple[Callable, ...], blocks: int, states: tuple, carry: Any) -> tuple[Any, Callable]:
    """Of copies, for each layer's gradient would be as large as the stack."""

    def block(carry, states):
        for step, state in zip(steps, states, strict=True):
            before = carry
            carry, _ = jax.lax.scan(step, carry, state)
        return carry, (before, carry)

    def run(states, carry):
        return jax.lax.scan(block, carry, jax.tree.map(lambda w: w.reshape(blocks, -1, *w.shape[1:]), states))[1]

    return jax.vjp(run, states, carry)


_scan_blocks.defvjp(_scan_blocks_forward, lambda steps, blocks, pull, cotangent: pull(cotangent))


def _layer(state: Any, index: Array) -> Any:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), state)
