"""Which parameter lies where, as text: what a change of the rules, of a module's axis names or of a width would move.

    flowseg plan --config=stage3_mixed --shardings=fsdp=16

`tests/golden/shardings` holds what this prints for two configs; a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

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


def text(config: ConfigDict, mesh: Mapping[str, int]) -> str:
    """`shardings` of the model of an experiment as JSON, one line per parameter."""
    found = shardings(FlowSegConfig.from_dict(config.model.to_dict()), mesh)
    lines = [f"{json.dumps(path)}: {json.dumps(place)}" for path, place in sorted(found.items())]
    return "{" + ",\n ".join(lines) + "}"
