"""Rules: who lies where. The committed manifests show what a change of them moves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from flowseg_jax import experiment as configs
from flowseg_jax import sharding
from flowseg_jax.aot.shardings import shardings, warnings
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig

GOLDEN = Path(__file__).parent / "golden" / "shardings"


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.json")))
def test_the_committed_manifest(name):
    """`flowseg plan --shardings` writes it anew; look at what moved before committing it."""
    experiment, _, mesh = name.partition("-")
    sizes = {axis: int(size) for axis, size in (part.split("_") for part in mesh.split("-"))}
    cfg = FlowSegConfig.from_dict(configs.read(f"configs/{experiment}.py").model.to_dict())
    assert shardings(cfg, sizes) == json.loads((GOLDEN / f"{name}.json").read_text())


def test_the_command_prints_the_manifest(capsys):
    assert flowseg(["plan", "--config=shapes_tiny", "--shardings=fsdp=8"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((GOLDEN / "shapes_tiny-fsdp_8.json").read_text())
    with pytest.raises(
        UserError, match="--shardings: axes of a mesh and their sizes are written as fsdp=8,tensor=2; got 'fsdp='"
    ):
        flowseg(["plan", "--shardings=fsdp"])


def test_a_component_that_fsdp_does_not_divide_is_a_warning_with_the_remedy():
    """SigLIP is 1,152 wide, which 256 does not divide and 128 does; the decoders are replicated on purpose."""
    cfg = FlowSegConfig.from_dict(configs.read("configs/stage3_mixed.py").model.to_dict())
    assert warnings(cfg, {"fsdp": 16}) == warnings(cfg, {"data": 256}) == []
    [line] = warnings(cfg, {"data": 2, "fsdp": 256})
    assert line.startswith("warning: fsdp=256 does not divide the sizes of siglip: every device holds 100% of it; ")
    assert line.endswith("mesh.fsdp=128 with mesh.data=4 shards it")


def test_each_mesh_axis_is_used_once_and_tensor_chooses_first():
    mesh = sharding.abstract_mesh({"data": 2, "fsdp": 4, "tensor": 2})
    spec = lambda names, *shape: sharding.partition_spec(names, shape, mesh)  # noqa: E731
    assert spec(("embed", "heads"), 64, 32) == PartitionSpec("fsdp", "tensor")
    assert spec(("heads", "embed"), 32, 64) == PartitionSpec("tensor", "fsdp")
    assert spec(("heads", "mlp"), 33, 32) == PartitionSpec(None, "tensor")  # 33 rows divide by nothing
    assert spec(("layers", "vocab", None), 8, 64, 64) == PartitionSpec(None, "tensor", None)
    assert spec(("vocab", "embed"), 33, 64) == PartitionSpec(None, "fsdp")  # an odd vocabulary
    assert spec(("batch", None), 16, 3) == PartitionSpec(("data", "fsdp"), None)
    one = sharding.abstract_mesh({"fsdp": 4})
    assert sharding.partition_spec(("heads", "embed"), (32, 64), one) == PartitionSpec(
        "fsdp", None
    )  # the first axis, for the scatter
    with pytest.raises(ValueError, match="no sharding rule for logical axis 'width'"):
        spec(("width",), 8)


def test_a_parameter_without_axis_names_is_refused():
    class Mixed(nnx.Module):
        def __init__(self, rngs):
            self.own = nnx.Linear(1024, 2048, rngs=rngs)

    state = nnx.state(nnx.eval_shape(lambda: Mixed(nnx.Rngs(0))))
    with pytest.raises(ValueError, match="parameter own/(kernel|bias) has no logical axes: make it with"):
        sharding.param_shardings(state, sharding.abstract_mesh({"fsdp": 2, "tensor": 2}))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 2}, "mesh.model: unknown axis"),
        ({"data": 3}, r"mesh \{'data': 3, 'fsdp': 1, 'tensor': 1\} does not fit 1 device\(s\); set one axis to -1"),
        ({"data": -1, "fsdp": 2}, "not fit"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(sizes, jax.devices()[:1])


class Device(SimpleNamespace):
    __hash__ = object.__hash__


def fake_devices(slices: int, each: int, **attributes) -> list[Device]:
    """Devices of a platform whose layout JAX does not know, one process a slice."""
    common = {"platform": "gpu", "device_kind": "a", **attributes}
    return [Device(id=i, process_index=i // each, slice_index=i // each, **common) for i in range(slices * each)]


def without_slices(devices: list[Device], processes: int) -> list[Device]:
    for device in devices:
        del device.slice_index
        device.process_index = device.id * processes // len(devices)
    return devices


def ids(sizes: dict[str, int], devices: list[Device]) -> list:
    return np.vectorize(lambda device: device.id)(sharding.make_mesh(sizes, devices).devices).tolist()


def test_data_goes_across_slices_and_fsdp_inside():
    two = fake_devices(2, 4)
    assert ids({"data": 2, "fsdp": 4}, two) == [[[0], [1], [2], [3]], [[4], [5], [6], [7]]]
    assert ids({"data": -1, "fsdp": 2, "slices": 2}, two[::-1]) == [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]]
    assert ids({"fsdp": -1, "slices": 1}, two) == [[[i] for i in range(8)]]  # the user's choice
    assert ids({"data": 2, "fsdp": 4, "slices": 2}, without_slices(fake_devices(1, 8), 1)) == ids({"data": 2, "fsdp": 4}, two)


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        (
            {"fsdp": -1},
            fake_devices(2, 4),
            "mesh.data is 1, and the 8 devices are in 2 slices: .* make it a multiple of 2, or set mesh.slices=1",
        ),
        ({"fsdp": -1}, fake_devices(2, 4, platform="tpu"), "make it a multiple of 2$"),
        ({"fsdp": -1, "slices": 1}, fake_devices(2, 4, platform="tpu"), "mesh.slices is 1, and the devices are in 2: set"),
        ({"data": 2, "slices": 3}, fake_devices(2, 1), "mesh.slices is 3, and the devices are in 2: set it to 2, or to 0"),
        ({"data": 2, "slices": 2}, fake_devices(1, 2, platform="tpu"), "mesh.slices is 2, and the devices are in 1: set it"),
        ({"data": 2, "slices": -1}, fake_devices(1, 2), "mesh.slices is -1"),
        ({"data": 6, "slices": 4}, fake_devices(1, 6), r"mesh.slices=4 does not divide 6 device\(s\) of 1 process"),
        ({"data": 6, "slices": 2}, without_slices(fake_devices(1, 6), 3), r"slices=2 does not divide 6 .* 3 process\(es\)"),
        ({"data": 5}, fake_devices(2, 4)[:5], "the slices have 4, 1 devices: a mesh needs slices of one size"),
    ],
)
def test_slices_that_do_not_fit_are_refused(sizes, devices, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(sizes, devices)


def test_parameters_that_are_divided_know_the_axis_from_the_end(monkeypatch):
    class Two(nnx.Module):
        def __init__(self):
            shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")  # noqa: E731
            self.wide = nnx.Param(shape(3, 64, 32), logical_axes=("layers", "embed", "heads"))
            self.narrow = nnx.Param(shape(64), logical_axes=("embed",))

    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64 * 32)
    model = Two()
    sharding.mark_fsdp_axes(model, sharding.abstract_mesh({"fsdp": 4}))
    axes = {".".join(path): variable.get_metadata().get("fsdp_axis") for path, variable in nnx.state(model).flat_state()}
    assert axes == {"wide": -2, "narrow": None}


def test_rows_go_to_the_devices_and_come_back():
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    rows = {"a": np.arange(6).reshape(3, 2).astype(np.int32), "b": np.ones(3, np.float32)}
    placed = sharding.to_global_arrays(rows, mesh)
    assert sharding.local_row_indices(3, mesh) == [0, 1, 2]
    assert placed["a"].sharding == sharding.batch_sharding(mesh)
    back = sharding.to_local_numpy(placed)
    assert all(isinstance(back[name], np.ndarray) and np.array_equal(back[name], rows[name]) for name in rows)
