"""Optimal one-to-one assignment (Hungarian matching) on the device.

Shortest augmenting paths with dual variables (Jonker and Volgenant 1987, Crouse 2016): targets enter one at a time, each by a
Dijkstra search over the queries whose steps are vectorised over all queries. The loop over targets is bounded by the number of
*valid* ones: padded rows, which tie everywhere and would walk long paths, cost nothing.

The loops are data-dependent `while` loops. In a step that the compiler partitions automatically, a batched one would test "is
any example of the whole mesh unfinished" with a collective in every iteration. So call `batched_hungarian` inside
`jax.shard_map` over every mesh axis that the batch is split on.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

LIMIT = 1e10  # costs are clamped to +-LIMIT


def batched_hungarian(cost: Float[Array, "*b m q"], valid: Bool[Array, "*b m"]) -> Int32[Array, "*b m"]:
    """`hungarian` over any leading axes, as one batch: its loops run as long as the slowest problem, not the sum of all."""
    lead = math.prod(cost.shape[:-2])
    out = jax.vmap(hungarian)(cost.reshape(lead, *cost.shape[-2:]), valid.reshape(lead, -1))
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
    targets, queries = cost.shape
    if targets > queries:
        raise ValueError(f"hungarian: {targets} targets need at least as many queries, got {queries}")
    cost = jnp.nan_to_num(jax.lax.stop_gradient(cost).astype(jnp.float32), nan=0.0, posinf=LIMIT, neginf=-LIMIT)
    cost = cost.clip(-LIMIT, LIMIT)
    up_to = jnp.cumsum(valid)  # how many valid targets stand up to each one

    def assign(k, state):
        target_dual, query_dual, query_of, target_of = state
        root = jnp.argmax(up_to > k).astype(jnp.int32)  # the valid target number k

        # Dijkstra from `root`: grow the set of reached queries by the nearest one until that one is free.
        def unfinished(search):
            query = search[0]
            return (query < 0) | (target_of[query] >= 0)

        def grow(search):
            query, length, distance, parent, reached = search
            target = jnp.where(query < 0, root, target_of[query])
            through = length + (cost[target] - target_dual[target] - query_dual)
            nearer = ~reached & (through < distance)
            distance = jnp.where(nearer, through, distance)
            parent = jnp.where(nearer, target, parent)
            query = jnp.argmin(jnp.where(reached, jnp.inf, distance)).astype(jnp.int32)
            return query, distance[query], distance, parent, reached.at[query].set(True)

        search = (
            jnp.int32(-1),
            jnp.float32(0.0),
            jnp.full(queries, jnp.inf),
            jnp.full(queries, -1, jnp.int32),
            jnp.zeros(queries, bool),
        )
        query, length, distance, parent, reached = jax.lax.while_loop(unfinished, grow, search)

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

    state = (
        jnp.zeros(targets),
        jnp.zeros(queries),
        jnp.full(targets, -1, jnp.int32),
        jnp.full(queries, -1, jnp.int32),
    )
    return jax.lax.fori_loop(0, valid.sum(), assign, state)[2]
