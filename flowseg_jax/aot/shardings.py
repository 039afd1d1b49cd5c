"""Which parameter lies where, as text: what a change of the rules, of a module's axis names or of a width would move.

    python -m flowseg_jax.aot.shardings --config=configs/stage3_mixed.py fsdp=16

`tests/golden/shardings` holds what this prints for two configs; a test compares.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that a Ctrl-C while they last is as clean as later
    from flowseg_jax.errors import run_cli

    run_cli("flowseg_jax.aot.shardings:main")

import json
import sys
from collections.abc import Mapping, Sequence

from flowseg_jax import experiment as configs
from flowseg_jax import sharding
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig


def shardings(cfg: FlowSegConfig, mesh: Mapping[str, int]) -> dict[str, list]:
    """{parameter: [shape, mesh axes of each dimension]} of every parameter that a mesh of these sizes divides."""
    _, state = flowseg.abstract_model(cfg)
    shapes = {path: list(x.shape) for path, x in flatten_params(flowseg.params_dict(state)).items()}
    places = flatten_params(sharding.param_shardings(state, sharding.abstract_mesh(mesh)))
    return {path: [shapes[path], list(place.spec)] for path, place in places.items() if any(place.spec)}


def main(argv: Sequence[str] | None = None) -> int:
    config, rest = configs.load(sys.argv[1:] if argv is None else argv)
    mesh = {}
    for text in rest:
        axis, _, size = text.partition("=")
        if not size.isdigit():
            raise UserError(f"expected AXIS=SIZE for the mesh, got {text!r}")
        mesh[axis] = int(size)
    found = shardings(FlowSegConfig.from_dict(config.model.to_dict()), mesh)
    lines = [f"{json.dumps(path)}: {json.dumps(place)}" for path, place in sorted(found.items())]
    print("{" + ",\n ".join(lines) + "}")
    return 0
