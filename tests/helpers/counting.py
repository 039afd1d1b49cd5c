"""What a traced program multiplies."""

from __future__ import annotations

import math

import jax
import numpy as np


def products(jaxpr) -> float:
    """FLOPs of all matrix products and convolutions of a jaxpr; loops as often as they run, branches on average."""
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [x.jaxpr if hasattr(x, "jaxpr") else x for x in jax.core.jaxprs_in_params(eqn.params)]
        if eqn.primitive.name == "dot_general":
            (over, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[axis] for axis in over)
        elif eqn.primitive.name == "conv_general_dilated":
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[1].aval.shape[:-1])
        elif eqn.primitive.name == "scan":
            total += eqn.params["length"] * products(inner[0])
        elif eqn.primitive.name == "cond":
            total += float(np.mean([products(branch) for branch in inner]))
        elif eqn.primitive.name != "while":
            total += sum(products(x) for x in inner)
    return total
