"""Optimal one-to-one assignment (Hungarian matching) on the device.

Shortest augmenting paths with dual variables (Jonker and Volgenant 1987, Crouse 2016). Every target's dual starts as its least
cost, and a target gets the query of that cost if no earlier one wants it: most targets are assigned so, all at once. The others
enter one at a time, each by a Dijkstra search over the queries whose steps are vectorised over all queries. Padded rows, which
tie everywhere and would walk long paths, cost nothing.

The loops are data-dependent `while` loops. In a step that the compiler partitions automatically, a batched one would test "is
any example of the whole mesh unfinished" with a collective in every iteration. So call `batched_hungarian` inside
`jax.shard_map` over every mesh axis that the batch is split on.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped

LIMIT = 1e10  # costs are clamped to +-LIMIT


def batched_hungarian(cost: Float[Array, "*b m q"], valid: Bool[Array, "*b m"]) -> Int32[Array, "*b m"]:
    """`hungarian` over any leading axes.

    An accelerator searches in all problems at once, as long as the slowest one needs. One problem fills a CPU: there, one is
    searched after the other.
    """
    lead = math.prod(cost.shape[:-2])
    start = jax.vmap(_row_minima)(cost.reshape(lead, *cost.shape[-2:]), valid.reshape(lead, -1))
    out = jax.lax.platform_dependent(
        *start, cpu=lambda *start: jax.lax.map(lambda one: _augment(*one), start), default=jax.vmap(_augment)
    )
    return out.reshape(valid.shape)


def hungarian(cost: Float[Array, "m q"], valid: Bool[Array, " m"]) -> Int32[Array, " m"]:
    """The query of each valid target in an assignment of least total cost.

    Args:
        cost: cost of giving query q to target m, M <= Q. Computed in float32 and without a gradient; NaN counts as 0 and
            everything beyond +-1e10, infinities included, as +-1e10, as in X-SAM's matcher.
        valid: False on padded targets, wherever they stand.

    Returns:
        Distinct queries in [0, Q) for valid targets, -1 for the others.
    """
    return _augment(*_row_minima(cost, valid))


def _row_minima(
    cost: Float[Array, "m q"], valid: Bool[Array, " m"]
) -> tuple[Float[Array, "m q"], Float[Array, " m"], Int32[Array, " m"], Int32[Array, " q"], Bool[Array, " m"]]:
    """The start of `_augment`: clean costs, the targets' duals, the query of each target and the target of each query (-1:
    none), and which targets still wait for a query."""
    targets, queries = cost.shape
    if targets > queries:
        raise ValueError(f"hungarian: {targets} targets need at least as many queries, got {queries}")
    cost = jax.lax.stop_gradient(cost).astype(jnp.float32)
    cost = jnp.where(jnp.isnan(cost), 0.0, cost.clip(-LIMIT, LIMIT))
    target, query = jnp.arange(targets, dtype=jnp.int32), jnp.arange(queries, dtype=jnp.int32)
    target_dual = _least(cost)
    wanted = jnp.where(valid, _least(jnp.where(cost == target_dual[:, None], query, queries)), -1)
    earlier = (wanted[:, None] == wanted) & (target < target[:, None])
    served = valid & ~earlier.any(1)
    target_of = jnp.where(wanted[:, None] == query, target[:, None], targets).min(0)
    return (
        cost,
        target_dual,
        jnp.where(served, wanted, -1),
        jnp.where(target_of < targets, target_of, -1),
        valid & ~served,
    )


def _augment(
    cost: Float[Array, "m q"],
    target_dual: Float[Array, " m"],
    query_of: Int32[Array, " m"],
    target_of: Int32[Array, " q"],
    waits: Bool[Array, " m"],
) -> Int32[Array, " m"]:
    """The query of each target, once all that wait have one."""
    queries = cost.shape[1]
    numbers = jnp.arange(queries, dtype=jnp.int32)
    up_to = jnp.cumsum(waits)  # how many that wait stand up to each target

    def assign(k, state):
        target_dual, query_dual, query_of, target_of = state
        root = jnp.argmax(up_to > k).astype(jnp.int32)  # number k of those that wait

        # Dijkstra from `root`: grow the set of reached queries by the nearest one until that one is free.
        def grow(search):
            target, _, length, distance, parent, reached = search
            through = length + (cost[target] - target_dual[target] - query_dual)
            nearer = ~reached & (through < distance)
            distance = jnp.where(nearer, through, distance)
            parent = jnp.where(nearer, target, parent)
            ahead = jnp.where(reached, jnp.inf, distance)
            length = _least(ahead)
            query = _least(jnp.where(ahead == length, numbers, queries))
            return target_of[query], query, length, distance, parent, reached.at[query].set(True)

        search = (
            root,
            jnp.int32(-1),
            jnp.float32(0.0),
            jnp.full(queries, jnp.inf),
            jnp.full(queries, -1, jnp.int32),
            jnp.zeros(queries, bool),
        )
        _, query, length, distance, parent, reached = jax.lax.while_loop(lambda search: search[0] >= 0, grow, search)

        # Duals: reduced costs stay non-negative, and become zero along the path.
        slack = jnp.where(reached, length - distance, 0.0)
        target_dual += jnp.where(query_of >= 0, slack[query_of], 0.0).at[root].set(length)
        query_dual -= slack

        # Swap the assignments along the path, from the free query back to `root`.
        def step(path):
            query, query_of, target_of = path
            target = parent[query]
            previous = jnp.where(target == root, -1, query_of[target])
            return previous, query_of.at[target].set(query), target_of.at[query].set(target)

        _, query_of, target_of = jax.lax.while_loop(lambda path: path[0] >= 0, step, (query, query_of, target_of))
        return target_dual, query_dual, query_of, target_of

    state = target_dual, jnp.zeros(queries), query_of, target_of
    return jax.lax.fori_loop(0, waits.sum(), assign, state)[2]


def _least(x: Shaped[Array, "*b q"]) -> Shaped[Array, "*b"]:
    """`x.min(-1)`, the first steps by halves that may overlap: a CPU reduces the last axis one value at a time."""
    while x.shape[-1] > 32:
        half = (x.shape[-1] + 1) // 2
        x = jnp.minimum(x[..., :half], x[..., -half:])
    return x.min(-1)
