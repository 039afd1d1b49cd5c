"""One update: the same whatever parts it is made in, and none at all when it is not finite."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.losses import LossConfig, denominators, loss_terms
from flowseg_jax.models import flowseg
from flowseg_jax.sharding import BATCH_AXES
from flowseg_jax.training import metric_reporter
from flowseg_jax.training import program as module
from flowseg_jax.training.step import BatchPartition, shard_map_axes, shard_map_spec
from flowseg_jax.types import IGNORE_INDEX, PAD
from tests.helpers import small

CFG = dataclasses.replace(small.lean(), generic_pass="with_flow", num_classes=3)
LOSSES = LossConfig(num_points=24, logits_chunk_size=16)
OPTIMIZER = optax.sgd(1.0, momentum=0.5)


@pytest.fixture(scope="module")
def batch():
    """Eight images, in pairs that share negatives; the later ones have fewer phrases, objects and labels."""
    batch = small.batch(CFG, images=8)
    phrases, names, classes, labels = (
        np.array(x) for x in (batch.phrase_target, batch.object_name, batch.object_category, batch.labels)
    )
    phrases[5:, 1:] = PAD
    phrases[7] = PAD
    names[2, 0] = names[6] = PAD
    asked = np.arange(8)[:, None] != [6] * batch.name_valid.shape[1]
    classes[4:, 1:] = PAD
    labels[3:5] = IGNORE_INDEX
    named = {"object_name": names, "name_valid": asked}
    return dataclasses.replace(batch, phrase_target=phrases, object_category=classes, labels=labels, **named)


@pytest.fixture(scope="module")
def network():
    return flowseg.init_model(CFG, 0)


@pytest.fixture(scope="module")
def steps(batch):
    """(program, compiled step) that differentiates the batch in so many parts; not donating: a state serves several tests."""

    @functools.cache
    def make(accumulate: int):
        experiment = small.experiment(CFG, batch)
        experiment.optimizer.grad_accum_steps = accumulate
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "make_optimizer", lambda *_: OPTIMIZER)
            program = module.TrainProgram.build(experiment, jax.devices()[:1])
        return program, jax.jit(program.step.__wrapped__).lower(program.state, program.batch).compile()

    return make


@pytest.mark.slow  # the whole model; the lean one in two parts is in tests/multidevice
def test_parts_give_the_update_of_the_whole(network, batch, steps):
    """Pairs have between 1 and 4 phrases: a mean over parts of each part's mean would be another update."""
    made = []
    for parts in (1, 4):
        program, step = steps(parts)
        made.append(step(small.start(program, network[1]), program.to_device(batch)))
    (whole, seen), (parts, seen_in_parts) = made
    assert seen.keys() == seen_in_parts.keys()
    for name, value in seen.items():
        assert float(seen_in_parts[name]) == pytest.approx(float(value), rel=1e-5), name
    before, whole, parts = (flatten_params(x) for x in (network[1], whole.trainable, parts.trainable))
    scale = max(np.abs(whole[name] - before[name]).max() for name in before)
    for name, x in whole.items():
        assert np.abs(x - parts[name]).max() <= 1e-5 * scale, name


def test_the_batch_alone_gives_the_denominators(batch):
    found = {name: float(count) for name, count in denominators(CFG, batch, LOSSES).items()}
    assert found.pop("language") == (batch.labels[:, 1:] != IGNORE_INDEX).sum()
    q = CFG.mask_decoder.num_queries
    rows = {
        "referring": batch.phrase_target.reshape(-1, 1),
        "generic": batch.object_name,
        "closed_vocab": batch.object_category,
    }
    for name, targets in rows.items():  # a row is a pass
        masks = (targets != PAD).sum()
        assert found.pop(f"{name}_mask") == found.pop(f"{name}_dice") == masks
        background = sum(q - np.count_nonzero(row != PAD) for row in targets if (row != PAD).any())
        assert found.pop(f"{name}_class") == pytest.approx(masks + 0.1 * background)
    assert not found


def test_a_language_weight_of_zero_leaves_the_vocabulary_out(batch):
    losses = dataclasses.replace(LOSSES, language_weight=0.0)

    def terms(params):
        model = flowseg.bind_params(flowseg.abstract_model(CFG)[0], params)
        return loss_terms(model, batch, model(batch), jax.random.split(jax.random.key(0), 8), losses)[0]

    found = jax.eval_shape(terms, flowseg.params_dict(flowseg.abstract_model(CFG)[1]))
    assert found.keys() == denominators(CFG, batch, losses).keys()
    assert "language" not in found and "referring_class" in found


def test_an_update_that_is_not_finite_is_not_made():
    cfg = small.lean(negatives_group_size=1)
    batch = small.batch(cfg, images=1)
    program = module.TrainProgram.build(small.experiment(cfg, batch), jax.devices()[:1])
    step = jax.jit(program.step.__wrapped__)  # not donating
    params, batch = small.params(cfg), program.to_device(batch)
    state = small.start(program, params | {"background_embed": jnp.full_like(params["background_embed"], jnp.inf)})
    after, metrics = step(state, batch)
    assert jax.tree.all(jax.tree.map(np.array_equal, after.trainable, state.trainable))
    assert jax.tree.all(jax.tree.map(np.array_equal, after.opt_state, state.opt_state))
    assert (int(after.step), after.skipped.tolist(), int(metrics["optimizer/skipped_in_a_row"])) == (1, [1, 1], 1)
    healed, _ = step(dataclasses.replace(after, trainable=small.start(program, params).trainable), batch)
    assert healed.skipped.tolist() == [1, 0]
    assert not np.array_equal(healed.trainable["background_embed"], params["background_embed"])


def test_too_many_skipped_updates_name_the_images():
    data = SimpleNamespace(batch=lambda step: SimpleNamespace(example_id=np.array([10 * step, 10 * step + 1])))
    metric_reporter.check_skipped({"optimizer/skipped_in_a_row": 2.0}, 7, data, limit=2)
    with pytest.raises(
        UserError, match=r"the last 3 updates up to step 7 .*max_skipped_updates is 2; .*: 40, 41; 50, 51; 60, 61$"
    ):
        metric_reporter.check_skipped({"optimizer/skipped_in_a_row": 3.0}, 7, data, limit=2)


def test_a_micro_batch_is_a_run_of_rows_whatever_holds_it():
    partition = BatchPartition(images=16, devices=4, micro_batches=2)
    held = partition.rows().reshape(4, 2, partition.per_device_images)
    assert held[:, 0].reshape(-1).tolist() == list(range(8)) and held[:, 1].reshape(-1).tolist() == list(range(8, 16))
    for group in (1, 2, 4, 8):  # within a device, or over two or four of them
        partition.validate(group)


def test_a_tensor_axis_of_several_devices_is_left_to_the_compiler():
    one, two = (SimpleNamespace(shape={"tensor": devices}) for devices in (1, 2))
    assert shard_map_axes(one) == {*BATCH_AXES, "tensor"} and shard_map_axes(two) == set(BATCH_AXES)
    spec = PartitionSpec(BATCH_AXES, "tensor", None)
    assert shard_map_spec(spec, one) == spec and shard_map_spec(spec, two) == PartitionSpec(BATCH_AXES, None, None)


@pytest.mark.parametrize(
    ("images", "devices", "parts", "group", "message"),
    [
        (8, 3, 1, 1, "cannot be split over 3 device.* a multiple of 3"),
        (
            8,
            1,
            4,
            4,
            "2 images at a time, 2 a device: that does not divide into groups of model.negatives_group_size=4.* of 16",
        ),
        (24, 4, 1, 4, "24 images at a time, 6 a device"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(images, devices, parts, group, message):
    with pytest.raises(UserError, match=message):
        BatchPartition(images, devices, parts).validate(group)
