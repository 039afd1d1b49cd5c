"""Where arrays live: the mesh, the one table from logical axes to mesh axes, and what follows from them.

The mesh always has the axes `data`, `fsdp` and `tensor`; one device is a mesh of ones, so one program serves a laptop and a
pod. Batches are split over `data` and `fsdp`; parameters are split where their logical axis names say so.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flowseg_jax.errors import UserError
from flowseg_jax.models.flowseg import at_rest

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # every device of these has images of its own

AnyMesh = Mesh | AbstractMesh
Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    "batch": BATCH_AXES,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
}

# Splitting a small weight costs a collective and saves nothing: the mask decoder, norms and biases stay whole everywhere.
MIN_SHARDED_ELEMENTS = 1 << 16

_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("flowseg_rules", default=None)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh for sizes of `data`, `fsdp`, `tensor`; one of them may be -1, for all remaining devices.

    Raises:
        UserError: unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if unknown := sorted(set(sizes) - set(MESH_AXES)):
        raise UserError(f"mesh.{unknown[0]}: unknown axis (known: {', '.join(MESH_AXES)})")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if shape.count(-1) == 1:
        rest = -math.prod(shape)
        shape[shape.index(-1)] = len(devices) // rest if len(devices) % rest == 0 else 0
    if math.prod(shape) != len(devices) or min(shape) < 1:
        raise UserError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} does not fit {len(devices)} device(s); "
            "set one axis to -1 to use what is left"
        )
    return jax.make_mesh(tuple(shape), MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices, to know what each of them would hold.

    Raises:
        UserError: unknown axis, or a size below 1.
    """
    for axis, size in sizes.items():
        if axis not in MESH_AXES:
            raise UserError(f"mesh.{axis}: unknown axis (known: {', '.join(MESH_AXES)})")
        if size < 1:
            raise UserError(f"mesh.{axis} must be at least 1, got {size}")
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES) -> Iterator[Mesh]:
    """Makes mesh and rules current for everything traced inside."""
    token = _active.set((mesh, rules))
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _active.reset(token)


def spec(names: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh, rules: Rules = RULES) -> PartitionSpec:
    """The partition of one array from its logical axis names; an axis that the mesh does not divide stays whole.

    Raises:
        ValueError: a name without a rule.
    """
    entries: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"no sharding rule for logical axis {name!r}")
        axes = rules[name] if name is not None else None
        axes = (axes,) if isinstance(axes, str) else axes or ()
        ways = math.prod(mesh.shape[axis] for axis in axes)
        entries.append((axes if len(axes) > 1 else axes[0]) if ways > 1 and size % ways == 0 else None)
    return PartitionSpec(*entries)


def param_shardings(state: nnx.State, mesh: AnyMesh, rules: Rules = RULES) -> dict[str, Any]:
    """Shardings of all parameters, as a nested dict like the parameters at rest; `state` may be abstract."""

    def place(variable: nnx.Variable) -> NamedSharding:
        small = math.prod(variable.shape) < MIN_SHARDED_ELEMENTS
        names = (None,) * len(variable.shape) if small else variable.get_metadata()["axes"]
        return NamedSharding(mesh, spec(names, variable.shape, mesh, rules))

    leaves = jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return at_rest(leaves)


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Batches are split along their first axis."""
    return NamedSharding(mesh, PartitionSpec(rules["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation by logical axis names; without a mesh there is nothing to say.

    Raises:
        RuntimeError: a mesh is set but `use` did not set the rules: silently doing nothing would cost memory and speed.
    """
    active = _active.get()
    if active is None:
        if jax.sharding.get_abstract_mesh().empty:
            return x
        raise RuntimeError("a mesh is set without sharding rules: enter it with flowseg_jax.parallel.use")
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names, x.shape, mesh, rules)))
