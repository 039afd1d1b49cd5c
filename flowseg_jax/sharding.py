"""Sharding: the mesh, the one table from logical axes to mesh axes, and the shardings that follow from them.

The mesh always has the axes `data`, `fsdp` and `tensor`; one device is a mesh of ones, so one program serves a laptop and a
pod. Where there are several slices, `data` goes across them. Batches are sharded over `data` and `fsdp`. A parameter is sharded
over `tensor` where a product may be computed in parts, and over `fsdp` on the first other axis that allows it. That is the
leading axis wherever possible: only along that one does the TPU compiler scatter gradients without summing them everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flowseg_jax.errors import UserError
from flowseg_jax.models.flowseg import params_dict
from flowseg_jax.ops.collectives import SHARD_AXIS, squarest_grid

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # each device along these has images of its own

AnyMesh = Mesh | AbstractMesh
Rules = Mapping[str, tuple[str, ...]]

# Over which mesh axes a logical axis may be sharded. A mesh axis is used once per array: on the first axis that allows it.
LOGICAL_AXIS_RULES: Rules = {
    "batch": BATCH_AXES,
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor", "fsdp"),
    "mlp": ("tensor", "fsdp"),
    "vocab": ("tensor",),  # not `fsdp`, as it has any size: `ops.vocabulary` exchanges a device's columns for rows
}

# To shard a small weight costs an exchange and saves nothing: the mask decoder, norms and biases are replicated.
MIN_SHARDED_ELEMENTS = 1 << 20


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh for sizes of `data`, `fsdp`, `tensor`; one of them may be -1, for all remaining devices.

    `data` is laid out across slices, the other axes inside each of them: as `mesh_utils.create_hybrid_device_mesh` does.

    Args:
        sizes: of the axes; `slices` among them is the number of slices, see `split_slices`.
        devices: None: all there are.

    Raises:
        UserError: unknown axis, sizes that do not multiply to the number of devices, or slices that do not divide `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    if unknown := sorted(set(sizes) - {*MESH_AXES, "slices"}):
        raise UserError(f"mesh.{unknown[0]}: unknown axis (known: {', '.join(MESH_AXES)})")
    slices = split_slices(devices, sizes.get("slices", 0))
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if shape.count(-1) == 1:
        rest = -math.prod(shape)
        shape[shape.index(-1)] = len(devices) // rest if len(devices) % rest == 0 else 0
    if math.prod(shape) != len(devices) or min(shape) < 1:
        raise UserError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} does not fit {len(devices)} device(s); "
            "set one axis to -1 to use what is left"
        )
    data, fsdp, tensor = shape
    if data % len(slices):
        raise UserError(
            f"mesh.data is {data}, and the {len(devices)} devices are in {len(slices)} slices: `data` is laid out across "
            f"slices, so make it a multiple of {len(slices)}"
            + (", or set mesh.slices=1 where the network between nodes is fast" if devices[0].platform == "gpu" else "")
        )
    # `fsdp` is laid out as the grid that `ops.collectives.all_gather_2d` expects, so that its steps are between neighbours.
    inside = (data // len(slices), *squarest_grid(fsdp), tensor)
    grid = np.concatenate([_device_grid(inside, part) for part in slices])
    return Mesh(grid.reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def split_slices(devices: Sequence[Any], count: int = 0) -> list[list[Any]]:
    """The devices by slice: the network is fast inside one and slow between them.

    TPUs and GPUs say which slice they are of (a GPU's is its node, or what NVLink connects). Host devices do not.

    Args:
        devices: in the order of their processes.
        count: how many slices; 0: as many as the devices say. Devices that say nothing, and GPUs of one slice, are cut into
            that many equal parts; GPUs of several slices may be taken for one.

    Raises:
        UserError: `count` is not what the devices say, does not divide them or their processes, or slices differ in size.
    """
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    if len({len(part) for part in found.values()}) > 1:
        parts = ", ".join(f"{len(part)}" for part in found.values())
        raise UserError(f"the slices have {parts} devices: a mesh needs slices of one size")
    if count in (0, len(found)):
        return [found[index] for index in sorted(found)]
    tpus = devices[0].platform == "tpu"
    if count == 1 and not tpus:
        return [list(devices)]
    if count < 0 or len(found) > 1 or tpus:
        raise UserError(f"mesh.slices is {count}, and the devices are in {len(found)}: set it to {len(found)}, or to 0")
    processes = len({device.process_index for device in devices})
    if len(devices) % count or (processes % count and count % processes):
        raise UserError(f"mesh.slices={count} does not divide {len(devices)} device(s) of {processes} process(es)")
    each = len(devices) // count
    return [list(devices[i : i + each]) for i in range(0, len(devices), each)]


def _device_grid(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of a slice in an order in which neighbours along an axis are neighbours on the network."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except NotImplementedError:  # JAX knows no layout of such axes on this network: then no order is better than another
        return np.array(devices).reshape(shape)


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


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh, rules: Rules = LOGICAL_AXIS_RULES
) -> PartitionSpec:
    """The partition of one array from its logical axis names; an axis that the mesh does not divide is replicated.

    Raises:
        ValueError: a name without a rule.
    """
    if unknown := [name for name in names if name is not None and name not in rules]:
        raise ValueError(f"no sharding rule for logical axis {unknown[0]!r}")
    allowed = [() if name is None else rules[name] for name in names]
    entries: list[tuple[str, ...]] = [() for _ in names]
    for axis in reversed(MESH_AXES):  # `tensor` is placed first
        ways = mesh.shape[axis]
        for i, size in enumerate(shape):
            taken = math.prod(mesh.shape[other] for other in entries[i])
            fits = axis in allowed[i] and ways > 1 and size % (ways * taken) == 0
            if fits and (not entries[i] or names[i] == "batch"):
                entries[i] = (axis, *entries[i])
                break
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in entries))


def param_logical_axes(path: str, variable: nnx.Variable) -> tuple[str | None, ...]:
    """The logical axis names of a parameter. Raises ValueError for one that its module gave no names."""
    axes = variable.get_metadata().get("logical_axes")
    if axes is None:
        raise ValueError(f"parameter {path} has no logical axes: make it with flowseg_jax.models.layers.make_param")
    return axes


def _param_spec(path: str, variable: nnx.Variable, mesh: AnyMesh, rules: Rules) -> PartitionSpec:
    names, shape = param_logical_axes(path, variable), variable.shape
    beside = variable.get_metadata().get("beside", shape)  # an adapter is sharded where its weight is
    layer_shape = [size for name, size in zip(names, beside, strict=True) if name != "layers"]
    small = math.prod(layer_shape) < MIN_SHARDED_ELEMENTS
    return partition_spec((None,) * len(shape) if small else names, shape, mesh, rules)


def param_shardings(state: nnx.State, mesh: AnyMesh, rules: Rules = LOGICAL_AXIS_RULES) -> dict[str, Any]:
    """The shardings of all parameters, as a nested dict like `params_dict`; `state` may be abstract."""

    def place(path: tuple, variable: nnx.Variable) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _param_spec(name, variable, mesh, rules))

    return params_dict(jax.tree_util.tree_map_with_path(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def mark_fsdp_axes(model: nnx.Module, mesh: AnyMesh, rules: Rules = LOGICAL_AXIS_RULES) -> nnx.GraphDef:
    """The graph definition of a model that computes inside `shard_map` on its device's shards of the parameters.

    Each parameter that is sharded over `fsdp` gets the metadata `fsdp_axis`: the sharded axis, counted from the end (so that it
    holds for one layer of a stack too). `layers.gathered_weight` gathers the shards where the parameter is used.
    """
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable):
            entries = _param_spec("/".join(map(str, path)), variable, mesh, rules)
            at = next((i for i, axes in enumerate(entries) if axes == SHARD_AXIS), None)
            if at is not None:
                variable.set_metadata(fsdp_axis=at - len(variable.shape))
    return nnx.split(model)[0]


def batch_sharding(mesh: Mesh, rules: Rules = LOGICAL_AXIS_RULES) -> NamedSharding:
    """Batches are sharded along their first axis."""
    return NamedSharding(mesh, PartitionSpec(rules["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def to_global_arrays(tree: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch, as its part of global arrays that are sharded over the mesh along their first axis."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def local_row_indices(rows: int, mesh: Mesh) -> list[int]:
    """Which of the rows of such arrays this process holds, ascending, which is the order of `to_global_arrays`."""
    places = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (part,) in places for row in range(rows)[part]})


def to_local_numpy(tree: Any) -> Any:
    """The rows that this process holds, as NumPy arrays."""

    def read(x: jax.Array) -> np.ndarray:
        parts = {part.index[0].start or 0: part.data for part in x.addressable_shards}
        return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])

    return jax.tree.map(read, tree)
