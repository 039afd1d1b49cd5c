"""Losses against the recorded values of X-SAM's PyTorch code, and against formulas written out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowseg_jax import losses
from flowseg_jax.errors import UserError
from flowseg_jax.losses import (
    LossConfig,
    PassPredictions,
    PointSamples,
    Targets,
    class_loss,
    deep_supervision_terms,
    downsample_packed_masks,
    layer_losses,
    match_cost,
    matching,
    next_token_loss,
    normalize_terms,
    point_losses,
    referring_targets,
)
from flowseg_jax.ops.matcher import batched_hungarian
from flowseg_jax.ops.vocabulary import ShardedEmbedding
from flowseg_jax.types import IGNORE_INDEX, NO_TARGET, PAD

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def units():
    return np.load(GOLDEN / "units_ops.npz")


def test_next_token_loss_is_the_mean_over_labels_in_any_chunk(rng):
    hidden = rng.normal(size=(2, 7, 5)).astype(np.float32)
    table = rng.normal(size=(11, 5)).astype(np.float32)
    labels = rng.integers(0, 11, (2, 7))
    labels[0, :3] = labels[1, 5:] = IGNORE_INDEX
    logits = hidden[:, :-1] @ table.T
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kept = labels[:, 1:] != IGNORE_INDEX
    expected = -np.take_along_axis(log_p, np.maximum(labels[:, 1:], 0)[..., None], -1)[..., 0][kept].sum()
    for chunk in (1, 5, 64):
        total, count = next_token_loss(
            jnp.asarray(hidden), ShardedEmbedding.whole(jnp.asarray(table)), jnp.asarray(labels), chunk
        )
        assert float(total) == pytest.approx(expected, rel=1e-5)
        assert int(count) == kept.sum()


@pytest.mark.parametrize("first", [1, 5, 12])
def test_where_the_first_label_may_stand_changes_no_loss(rng, first):
    """What stands before it is left out in whole tiles, so that a few tokens without a label are in."""
    hidden = jnp.asarray(rng.normal(size=(2, 29, 5)), jnp.float32)
    table = ShardedEmbedding.whole(jnp.asarray(rng.normal(size=(11, 5)), jnp.float32))
    labels = rng.integers(0, 11, (2, 29))
    labels[:, :12] = IGNORE_INDEX
    expected = next_token_loss(hidden, table, jnp.asarray(labels), chunk_size=7)
    found = next_token_loss(hidden, table, jnp.asarray(labels), chunk_size=7, first=first)
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-6)
    assert int(found[1]) == 2 * 17


def test_class_loss_weighs_the_background(rng):
    logits = rng.normal(size=(2, 4, 3)).astype(np.float32)
    labels, assigned = np.array([[1, 0], [0, 0]]), np.array([[2, -1], [3, 0]])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.full((2, 4), 2)
    target[0, 2], target[1, 3], target[1, 0] = 1, 0, 0
    weight = np.where(target == 2, 0.1, 1.0)
    loss = -np.take_along_axis(log_p, target[..., None], -1)[..., 0]
    args = jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(assigned)
    total, weights = class_loss(*args, jnp.array([True, True]), 0.1)
    assert float(total) == pytest.approx((weight * loss).sum(), rel=1e-5)
    assert float(weights) == pytest.approx(weight.sum(), rel=1e-6)
    total, weights = class_loss(*args, jnp.array([False, True]), 0.1)
    assert float(total) == pytest.approx((weight * loss)[1].sum(), rel=1e-5)
    assert float(weights) == pytest.approx(weight[1].sum(), rel=1e-6)


def test_mask_losses_equal_the_recorded_ones(units):
    logits, targets = units["mask_loss/pred_logits"], units["mask_loss/targets"]
    cost = np.asarray(
        match_cost(
            jnp.zeros((len(logits), 2)),
            jnp.zeros(len(targets), int),
            jnp.asarray(logits),
            jnp.asarray(targets),
            LossConfig(class_weight=0),
        )
    )
    expected = 5 * units["mask_loss/pair_bce"] + 5 * units["mask_loss/pair_dice"]
    assert np.abs(cost - expected.T).max() <= 1e-5 * np.abs(expected).max()
    assigned = logits[: len(targets)]  # the recorded matched losses pair query i with target i and divide by two masks
    bce, dice = point_losses(jnp.asarray(assigned), jnp.asarray(targets), jnp.ones(len(targets), bool))
    assert float(bce) / 2 == pytest.approx(float(units["mask_loss/bce_nummasks2"]), rel=1e-5)
    assert float(dice) / 2 == pytest.approx(float(units["mask_loss/dice_nummasks2"]), rel=1e-5)


def test_point_losses_are_means_over_points_and_sums_over_masks(rng):
    logits = rng.normal(size=(3, 6)).astype(np.float32)
    targets = (rng.random((3, 6)) > 0.5).astype(np.float32)
    p = 1 / (1 + np.exp(-logits))
    bce = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean(-1)
    dice = 1 - (2 * (p * targets).sum(-1) + 1) / (p.sum(-1) + targets.sum(-1) + 1)
    found = point_losses(jnp.asarray(logits), jnp.asarray(targets), jnp.array([True, False, True]))
    assert [float(x) for x in found] == pytest.approx([bce[[0, 2]].sum(), dice[[0, 2]].sum()], rel=1e-5)


def test_terms_are_divided_once():
    terms = {"a": (jnp.array(6.0), jnp.array(3.0)), "b": (jnp.array(0.0), jnp.array(0.0))}
    assert jax.tree.map(float, normalize_terms(terms)) == {"a": 2.0, "b": 0.0}


@pytest.fixture
def level(rng):
    """One image, one pass, three queries, two targets on a 4 x 6 mask grid of 24 pixel masks."""
    masks = rng.random((1, 2, 24, 24)) > 0.5
    return dict(
        class_logits=jnp.asarray(rng.normal(size=(1, 1, 3, 3)), jnp.float32),
        mask_embeds=jnp.asarray(rng.normal(size=(1, 1, 3, 5)), jnp.float32),
        features=jnp.asarray(rng.normal(size=(1, 4, 6, 5)), jnp.float32),
        packed=jnp.asarray(np.packbits(masks, axis=-1)),
        targets=Targets(jnp.array([[[1, 0]]]), jnp.array([[[0, 1]]]), jnp.array([[True]])),
    ), masks.reshape(1, 2, 4, 6, 6, 4).mean((3, 5))


def of_one_type(class_logits, mask_embeds, targets, cfg, **rest) -> losses.LayerLosses:
    return layer_losses({"x": PassPredictions(class_logits, mask_embeds, None)}, {"x": targets}, **rest, cfg=cfg)["x"]


def terms_of_one_type(class_logits, mask_embeds, targets, cfg, **rest):
    passes = PassPredictions(class_logits, mask_embeds, jax.random.split(jax.random.key(0), 1))
    terms, assigned = deep_supervision_terms({"x": passes}, {"x": targets}, **rest, cfg=cfg, refine=None)
    return terms, assigned["x"]


def test_without_points_every_pixel_of_the_grid_counts(level):
    inputs, truth = level
    found = of_one_type(**inputs, cfg=LossConfig())
    assert len(set(np.asarray(found.assigned)[0, 0].tolist())) == 2
    logits = np.einsum("qd,yxd->qyx", inputs["mask_embeds"][0, 0], inputs["features"][0]).reshape(3, -1)
    pairs = logits[np.asarray(found.assigned)[0, 0]], truth[0, [1, 0]].reshape(2, -1)
    p = 1 / (1 + np.exp(-pairs[0]))
    bce = -(pairs[1] * np.log(p) + (1 - pairs[1]) * np.log(1 - p)).mean(-1).sum()
    dice = (1 - (2 * (p * pairs[1]).sum(-1) + 1) / (p.sum(-1) + pairs[1].sum(-1) + 1)).sum()
    assert float(found.sums["mask"]) == pytest.approx(bce, rel=1e-5)
    assert float(found.sums["dice"]) == pytest.approx(dice, rel=1e-5)
    weight = inputs["targets"].denominators("referring", 3, LossConfig().no_object_weight)["referring_class"]
    assert float(found.sums["class_weight"]) == pytest.approx(float(weight)) == pytest.approx(2.1)


def test_a_grid_that_does_not_divide_the_image_is_refused(level):
    with pytest.raises(ValueError, match="divides the image: 24 pixels, a grid of"):
        downsample_packed_masks(level[0]["packed"], (5, 6))


def test_a_cell_holds_the_share_that_a_mask_covers_where_rows_end_in_half_a_byte(rng):
    masks = rng.random((1, 2, 12, 12)) > 0.5
    found = downsample_packed_masks(jnp.asarray(np.packbits(masks, axis=-1)), (4, 6))
    np.testing.assert_allclose(found, masks.reshape(1, 2, 4, 3, 6, 2).mean((3, 5)).reshape(1, 2, -1), rtol=1e-6)


def test_the_class_loss_scale_changes_the_class_loss_and_nothing_else(level):
    inputs, _ = level
    stacked = {name: inputs[name][None] for name in ("class_logits", "mask_embeds")}
    rest = {name: inputs[name] for name in ("features", "packed", "targets")}

    def terms(scale: float):
        return terms_of_one_type(**stacked, **rest, cfg=LossConfig(num_points=0, class_loss_scale=scale))

    (plain, assigned), (more, same) = terms(1.0), terms(1e4)
    assert (np.asarray(assigned) == np.asarray(same)).all()
    assert float(more["x_class"][0]) == pytest.approx(1e4 * float(plain["x_class"][0]), rel=1e-6)
    assert [float(more[f"x_{k}"][0]) for k in ("mask", "dice")] == [float(plain[f"x_{k}"][0]) for k in ("mask", "dice")]


def test_a_phrase_that_refers_to_nothing_makes_all_its_queries_background(rng):
    """Its class loss counts, its masks do not; a padded phrase counts nothing."""
    targets = referring_targets(jnp.array([[0, NO_TARGET, PAD]]), group_size=1)
    assert targets.masks[..., 0].tolist() == [[0, PAD, PAD]] and targets.pass_valid.tolist() == [[True, True, False]]
    queries, background = 4, 0.1
    counts = targets.denominators("referring", queries, background)
    assert float(counts["referring_mask"]) == 1
    assert float(counts["referring_class"]) == pytest.approx((1 + 3 * background) + 4 * background)
    logits = jnp.asarray(rng.normal(size=(3, queries, 5)), jnp.float32)
    assigned = jnp.array([[2], [PAD], [PAD]])
    total, weight = class_loss(logits, targets.labels[0], assigned, targets.pass_valid[0], background)
    log_p = jax.nn.log_softmax(logits)
    expected = -log_p[0, 2, 0] - background * log_p[0, jnp.array([0, 1, 3]), -1].sum() - background * log_p[1, :, -1].sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-5) and float(weight) == pytest.approx(1.7)


def test_every_labelled_mask_is_a_target_of_its_images_one_pass():
    batch = SimpleNamespace(
        object_name=jnp.array([[2, PAD, 0], [PAD, PAD, PAD]]),
        name_valid=jnp.array([[True, True], [False, True]]),
        object_category=jnp.array([[PAD, 5, 0], [PAD, PAD, PAD]]),
    )
    named, of_categories = losses.generic_targets(batch), losses.closed_vocab_targets(batch)
    assert named.masks.tolist() == [[[0, PAD, 2]], [[PAD, PAD, PAD]]]
    assert named.labels[:, 0].tolist() == batch.object_name.tolist()
    assert named.pass_valid.tolist() == [[True], [True]]  # the second image has none of the names that it is asked for
    assert of_categories.masks.tolist() == [[[PAD, 1, 2]], [[PAD, PAD, PAD]]]
    assert of_categories.pass_valid.tolist() == [[True], [False]]


def test_layers_are_matched_together_as_one_by_one(level, monkeypatch):
    """The matcher runs once for all layers, and gives and costs what it does for each."""
    inputs, _ = level
    rng = np.random.default_rng(7)
    stacked = {
        name: jnp.asarray(rng.normal(size=(3, *inputs[name].shape)), jnp.float32) for name in ("class_logits", "mask_embeds")
    }
    rest = {name: inputs[name] for name in ("features", "packed", "targets")}
    cfg = LossConfig(num_points=0)

    @jax.jit
    def together(class_logits, mask_embeds):
        return terms_of_one_type(class_logits, mask_embeds, **rest, cfg=cfg)

    alone = [of_one_type(**{k: v[i] for k, v in stacked.items()}, **rest, cfg=cfg) for i in range(3)]
    solved = []
    monkeypatch.setattr(
        losses.matching, "batched_hungarian", lambda cost, valid: solved.append(cost.shape) or batched_hungarian(cost, valid)
    )
    terms, assigned = together(**stacked)
    np.testing.assert_array_equal(assigned, alone[-1].assigned)
    assert len({tuple(np.asarray(x.assigned).ravel()) for x in alone}) > 1  # else mixed-up layers would not show
    for kind, weight in (("class", cfg.class_weight), ("mask", cfg.mask_weight), ("dice", cfg.dice_weight)):
        assert float(terms[f"x_{kind}"][0]) == pytest.approx(weight * sum(float(x.sums[kind]) for x in alone), rel=1e-5)
    assert solved == [(3, 1, 1, 2, 3)]


@pytest.mark.parametrize(
    "wrong", [{"oversample_ratio": 0.5}, {"importance_sample_ratio": 1.5}, {"importance_sample_ratio": -0.1}]
)
def test_points_that_cannot_be_chosen_are_refused(wrong):
    with pytest.raises(
        UserError, match="losses: importance_sample_ratio=.* num_points=16 cannot be chosen from oversample_ratio="
    ):
        LossConfig(num_points=16, **wrong)


def test_as_many_points_are_drawn_as_are_configured():
    """Of 20 points a mask 13 are chosen among 50 candidates, and 7 are taken as they are."""
    cfg = LossConfig(num_points=20, oversample_ratio=2.5, importance_sample_ratio=0.66)
    points = PointSamples.draw(jax.random.split(jax.random.key(0), 2), 3, cfg)
    assert (points.matcher.shape, points.candidates.shape, points.extra.shape) == ((2, 1, 20, 2), (2, 3, 50, 2), (2, 3, 7, 2))
    drawn = np.concatenate([x.ravel() for x in (points.matcher, points.candidates, points.extra)])
    assert len(np.unique(drawn)) > 0.99 * drawn.size and drawn.min() >= 0 and drawn.max() < 1


@pytest.fixture
def two_types(rng):
    """Two images; three referring passes of one target, and a pass of two targets, of three layers."""
    masks = jnp.asarray(np.packbits(rng.random((2, 4, 24, 24)) > 0.5, axis=-1))
    embeds = lambda r: jnp.asarray(rng.normal(size=(3, 2, r, 5, 6)), jnp.float32)  # noqa: E731
    logits = lambda r: jnp.asarray(rng.normal(size=(3, 2, r, 5, 4)), jnp.float32)  # noqa: E731
    keys = jax.random.split(jax.random.key(1), 4).reshape(2, 2)
    predictions = {
        "referring": PassPredictions(logits(3), embeds(3), keys[0]),
        "generic": PassPredictions(logits(1), embeds(1), keys[1]),
    }
    targets = {
        "referring": referring_targets(jnp.array([[0, 3, PAD], [2, NO_TARGET, 1]]), group_size=1),
        "generic": losses.object_targets(jnp.array([[0, 1, PAD, PAD], [PAD, 1, 2, 0]]), jnp.array([True, True])),
    }
    return predictions, targets, jnp.asarray(rng.normal(size=(2, 8, 8, 6)), jnp.float32), masks


@pytest.mark.parametrize("points", [0, 40])
def test_types_of_passes_lose_together_what_they_lose_apart(two_types, points):
    predictions, targets, *rest = two_types

    @jax.jit
    def run(predictions):
        return deep_supervision_terms(
            predictions, {name: targets[name] for name in predictions}, *rest, LossConfig(num_points=points), None
        )

    terms, assigned = run(predictions)
    assert set(terms) == {f"{name}_{term}" for name in predictions for term in ("class", "mask", "dice")}
    for name in predictions:
        alone, of_alone = run({name: predictions[name]})
        np.testing.assert_array_equal(assigned[name], of_alone[name])
        for term, expected in alone.items():
            np.testing.assert_allclose(terms[term], expected, rtol=1e-6)


def test_only_the_last_layer_is_refined(two_types):
    predictions, targets, features, packed = two_types
    cfg = LossConfig(num_points=0)

    def refine(masks, features):
        return masks + features.sum((1, 2, 3))[:, None, None, None]

    terms, _ = jax.jit(lambda predictions: deep_supervision_terms(predictions, targets, features, packed, cfg, refine))(
        predictions
    )
    levels = []
    for i in range(3):
        level = {name: PassPredictions(x.class_logits[i], x.mask_embeds[i], None) for name, x in predictions.items()}
        levels.append(layer_losses(level, targets, features, packed, cfg, refine if i == 2 else None))
    plain = layer_losses(level, targets, features, packed, cfg, None)
    for name in predictions:
        assert float(levels[2][name].sums["mask"]) != pytest.approx(float(plain[name].sums["mask"]), rel=1e-3)
        expected = cfg.mask_weight * sum(float(level[name].sums["mask"]) for level in levels)
        assert float(terms[f"{name}_mask"][0]) == pytest.approx(expected, rel=1e-5)


def test_the_matcher_reads_every_mask_at_the_points_of_each_pass(rng):
    bits = rng.integers(0, 2, (2, 3, 16, 16)).astype(np.uint8)
    y, x = rng.integers(0, 16, (2, 2, 4, 5))
    points = (np.stack([x, y], -1) + 0.5) / 16  # the middles of pixels: their values, nothing in between
    found = matching._read_masks(jnp.asarray(np.packbits(bits, axis=-1)), jnp.asarray(points, jnp.float32))
    for b in range(2):
        for r in range(4):
            np.testing.assert_allclose(found[b, r], bits[b][:, y[b, r], x[b, r]], atol=1e-5)


def test_points_are_chosen_once(two_types):
    """The backward pass predicts masks again, but reads where from what was kept."""
    predictions, targets, *rest = two_types

    def total(features):
        terms, _ = deep_supervision_terms(predictions, targets, features, rest[1], LossConfig(num_points=40), None)
        return sum(value for value, _ in terms.values())

    text = jax.jit(jax.value_and_grad(total)).lower(rest[0]).compile().as_text()
    choices = [line for line in text.splitlines() if '"known_trip_count":{"n":"31"}' in line and "pred[" in line]
    assert len(choices) == 1  # loops over the bits of a float that decide about candidates


def test_accuracies_count_matched_queries_that_are_ranked_first(rng, monkeypatch):
    """Two images; two phrases, a generic and a closed-vocabulary pass, four queries, two names, three categories."""
    batch = SimpleNamespace(
        phrase_target=jnp.array([[0, 1], [2, NO_TARGET]]),
        object_name=jnp.array([[0, 1, PAD], [PAD, 1, 0]]),
        name_valid=jnp.ones((2, 2), bool),
        object_category=jnp.array([[2, 0, 1], [1, PAD, PAD]]),
        packed_masks=None,
    )
    assigned = {
        "referring": jnp.array([[[3], [1]], [[0], [2]]]),
        "generic": jnp.array([[[2, 0, PAD]], [[PAD, 3, 1]]]),
        "closed_vocab": jnp.array([[[0, 1, 3]], [[2, PAD, PAD]]]),
    }
    logits = np.zeros((2, 2, 4, 4, 3), np.float32)  # layers, images, passes, queries, classes and the background
    logits[0] = 9 * rng.normal(size=logits[0].shape)  # only the last layer counts
    last = logits[1]
    last[0, 0, 3] = [4, 9, 0]  # the first phrase's class is 0, against the background: query 3, the matched one
    last[0, 0, 1] = [6, 9, 5]
    last[0, 1, 2] = [9, 4, 0]  # the second phrase's class is 1: query 2, but query 1 was matched
    last[0, 1, 1] = [9, 3, 0]
    last[1, 0, 0] = [2, 0, 1]
    last[1, 1, 2] = [0, 7, 0]  # refers to nothing: counted nowhere
    last[0, 2, 2], last[0, 2, 0] = (
        [3, 2, 9],
        [5, 1, 0],
    )  # the name of the first is right whatever the background, of the second wrong
    last[1, 2, 3], last[1, 2, 1] = [0, 1, 0], [2, 1, 9]
    categories = np.zeros((2, 2, 4, 4), np.float32)
    categories[0] = 9 * rng.normal(size=categories[0].shape)
    categories[1, 0, 0] = [0, 0, 1, 9]
    categories[1, 0, 1] = [0, 0, 1, 0]
    categories[1, 0, 3] = [0, 1, 0, 0]
    categories[1, 1, 2] = [1, 0, 0, 0]
    decoder = SimpleNamespace(
        queries=np.zeros((2, 8, 4, 6)),
        class_logits=jnp.asarray(logits.reshape(2, 8, 4, 3)),
        mask_embeds=jnp.zeros((2, 8, 4, 6)),
    )
    out = SimpleNamespace(
        decoder_output=decoder,
        conditions=True,
        category_logits=jnp.asarray(categories),
        mask_features=None,
        hidden_states=None,
    )
    model = SimpleNamespace(cfg=SimpleNamespace(negatives_group_size=1, generic_pass="with_flow"), boundary=None)
    monkeypatch.setattr(losses.total, "deep_supervision_terms", lambda *_: ({}, assigned))
    points = dict.fromkeys(losses.total.PASS_TYPES)
    _, found = losses.loss_terms(model, batch, out, points, LossConfig())
    counts = {name: (float(right), float(of)) for name, (right, of) in found.items()}
    assert counts == {"referring_selection": (2, 3), "generic": (3, 4), "closed_vocab": (2, 4)}
    assert {x.dtype for pair in found.values() for x in pair} == {jnp.dtype("float32")}
