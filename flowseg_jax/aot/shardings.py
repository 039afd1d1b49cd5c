"""Which parameter lies where, as text: what a change of the rules, of a module's axis names or of a width would move.

    flowseg plan --config=stage3_mixed --shardings=fsdp=16

`tests/golden/shardings` holds what this prints for two configs; a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from flax import nnx
from ml_collections import ConfigDict

from flowseg_jax import sharding
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig


def shardings(cfg: FlowSegConfig, mesh: Mapping[str, int]) -> dict[str, list]:
    """{parameter: [shape, mesh axes of each dimension]} of every parameter that a mesh of these sizes divides."""
    _, state = flowseg.abstract_model(cfg)
    shapes = {path: list(x.shape) for path, x in flatten_params(flowseg.params_dict(state)).items()}
    places = flatten_params(sharding.param_shardings(state, sharding.abstract_mesh(mesh)))
    return {path: [shapes[path], list(place.spec)] for path, place in places.items() if any(place.spec)}


def whole_components(state: nnx.State, mesh: Mapping[str, int]) -> dict[str, float]:
    """{component: share of its parameters that every device holds whole, though they are large enough to shard over fsdp}.

    Only components of which that is at least half are named.
    """
    params = flatten_params(flowseg.params_dict(state))
    places = flatten_params(sharding.param_shardings(state, sharding.abstract_mesh(mesh)))
    sizes: dict[str, list[int]] = {}
    for path, x in params.items():
        counts = sizes.setdefault(path.split("/")[0], [0, 0])
        counts[0] += x.size * (x.size >= sharding.MIN_SHARDED_ELEMENTS and sharding.SHARD_AXIS not in places[path].spec)
        counts[1] += x.size
    return {name: whole / total for name, (whole, total) in sizes.items() if 2 * whole >= total}


def warnings(cfg: FlowSegConfig, mesh: Mapping[str, int]) -> list[str]:
    """A line for each component that `fsdp` leaves whole though a divisor of it would not, with the largest such divisor."""
    fsdp = mesh.get("fsdp", 1)
    if fsdp == 1:
        return []
    _, state = flowseg.abstract_model(cfg)
    found = whole_components(state, mesh)
    lines = []
    for name, share in found.items():
        smaller = (n for n in range(fsdp // 2, 1, -1) if fsdp % n == 0)
        fits = next((n for n in smaller if name not in whole_components(state, {**mesh, "fsdp": n})), None)
        if fits is not None:
            lines.append(
                f"warning: fsdp={fsdp} does not divide the sizes of {name}: every device holds {share:.0%} of it; "
                f"mesh.fsdp={fits} with mesh.data={mesh.get('data', 1) * fsdp // fits} shards it"
            )
    return lines


def text(config: ConfigDict, mesh: Mapping[str, int]) -> str:
    """`shardings` of the model of an experiment as JSON, one line per parameter."""
    found = shardings(FlowSegConfig.from_dict(config.model.to_dict()), mesh)
    lines = [f"{json.dumps(path)}: {json.dumps(place)}" for path, place in sorted(found.items())]
    return "{" + ",\n ".join(lines) + "}"
