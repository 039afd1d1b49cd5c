"""Losses, assignments and gradients with the fixture's recorded random points, through the product's training path."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from convert_weights.convert import export_params
from convert_weights.parity.fixture import Arrays
from convert_weights.parity.forward import COMPILE_FAST
from convert_weights.parity.report import ParityReport
from flowseg_jax.losses import (
    LayerLosses,
    LossConfig,
    PassPredictions,
    PointSamples,
    Targets,
    closed_vocab_targets,
    layer_losses,
    loss_terms,
    normalize_terms,
    referring_targets,
)
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.flowseg import bind_params
from flowseg_jax.models.mask_decoder import mask_logits
from flowseg_jax.models.outputs import TrainingOutput
from flowseg_jax.types import PAD, Batch

KINKED = ("sampling_offsets", "pixel_decoder.level_embed", "seg_connector", "segmentor.encoder")


@dataclasses.dataclass(frozen=True)
class Pass:
    """One matching problem of a recorded run.

    Attributes:
        image, slot: its place among our B x R passes.
        targets: number of its targets.
    """

    image: int
    slot: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Recording:
    """The random points of a run in our layout, and where X-SAM's pairs are found in it.

    Attributes:
        points: leading axis J.
        passes: in X-SAM's order.
        targets: the targets of each pass of each level, in X-SAM's order of pairs.
    """

    points: PointSamples
    passes: list[Pass]
    targets: dict[str, list[np.ndarray]]


def level_name(level: int, levels: int) -> str:
    return "final" if level == levels - 1 else f"aux{level}"


def read_points(recorded: Arrays, passes: list[Pass], shape: tuple[int, int, int], levels: int) -> Recording | None:
    """The recorded points, or None if one of them is missing.

    Args:
        recorded: arrays of the run.
        passes: its matching problems, in X-SAM's order.
        shape: (B, R, M) of our targets.
        levels: J, number of predictions.
    """
    b, r, m = shape
    targets: dict[str, list[np.ndarray]] = {}
    by_level: list[tuple[np.ndarray, ...]] = []
    for j in range(levels):
        level = level_name(j, levels)
        names = [f"match/{level}/pass{p}_points" for p in range(len(passes))]
        names += [f"points/{level}/candidates", f"points/{level}/extra_random"]
        if any(name not in recorded for name in names):
            return None
        *of_passes, candidates, extra = (recorded[name] for name in names)
        matcher = np.full((b, r, *of_passes[0].shape[1:]), 0.5, np.float32)
        ours = [np.full((b, r, m, *pairs.shape[1:]), 0.5, np.float32) for pairs in (candidates, extra)]
        targets[level], done = [], 0
        for p, (place, points) in enumerate(zip(passes, of_passes, strict=True)):
            matcher[place.image, place.slot] = points[0]
            order = recorded.get(f"match/{level}/pass{p}_target")
            if order is None and place.targets > 1:
                return None  # which points belong to which target is not known
            order = np.arange(place.targets) if order is None else order
            targets[level].append(order)
            for of_pair, pairs in zip(ours, (candidates, extra), strict=True):
                of_pair[place.image, place.slot, order] = pairs[done : done + len(order)]
            done += len(order)
        by_level.append((matcher, *(x.reshape(b, r * m, *x.shape[3:]) for x in ours)))
    return Recording(PointSamples(*(np.stack(x) for x in zip(*by_level, strict=True))), passes, targets)


def blank_points(cfg: LossConfig, levels: int, images: int, slots: int) -> PointSamples:
    """Points for passes whose losses nobody reads: `slots` targets an image."""
    extra = cfg.num_points - int(cfg.importance_sample_ratio * cfg.num_points)
    counts = {
        "matcher": (1, cfg.num_points),
        "candidates": (slots, int(cfg.oversample_ratio * cfg.num_points)),
        "extra": (slots, extra),
    }
    return PointSamples(**{name: np.full((levels, images, *count, 2), 0.5, np.float32) for name, count in counts.items()})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trained:
    """A run of the training path.

    Attributes:
        terms: each loss term, divided.
        levels: leading axis J.
        class_logits: [J, B, R, Q, N] of the supervised passes.
        masks: [J, B, R, Q, h, w], their mask logits.
    """

    terms: dict[str, Array]
    levels: LayerLosses
    class_logits: Array
    masks: Array


def supervised(out: TrainingOutput, batch: Batch, kind: str, group: int) -> tuple[Array, Array, Targets]:
    """(class logits, mask embeddings, targets) of one kind of pass, [J, B, R, ...]."""
    b, k = batch.phrase_target.shape
    split = lambda x: x.reshape(x.shape[0], b, -1, *x.shape[2:])  # noqa: E731
    embeds = split(out.decoder_output.mask_embeds)
    if kind == "referring":
        return split(out.decoder_output.class_logits)[:, :, :k], embeds[:, :, :k], referring_targets(batch.phrase_target, group)
    return out.category_logits[:, :, None], embeds[:, :, -1:], closed_vocab_targets(batch)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6), compiler_options=COMPILE_FAST)
def train(
    graphdef: nnx.GraphDef,
    params: dict[str, Any],
    batch: Batch,
    points: dict[str, PointSamples],
    cfg: LossConfig,
    kind: str,
    differentiate: bool,
) -> tuple[Trained, dict[str, Any] | None]:
    """Terms of all losses, everything by level, and the gradient of the sum of the terms (None unless asked for).

    Args:
        graphdef, params: the network.
        batch: what it is run on.
        points: of each kind of pass.
        cfg: weights.
        kind: whose levels to return, "referring" or "closed_vocab".
        differentiate: whether the gradient is wanted; compiling it takes most of the time.
    """

    def loss(params: dict[str, Any]) -> tuple[Array, Trained]:
        model = bind_params(graphdef, params)
        out = model(batch)
        terms, _ = loss_terms(model, batch, out, points, cfg)
        terms = normalize_terms(terms)
        logits, embeds, targets = supervised(out, batch, kind, model.cfg.negatives_group_size)
        levels = jax.lax.map(
            lambda level: layer_losses({kind: level}, {kind: targets}, out.mask_features, batch.packed_masks, cfg)[kind],
            PassPredictions(logits, embeds, points[kind]),
        )
        j, b, r, q, _ = embeds.shape
        flat = embeds.swapaxes(0, 1).reshape(b, j * r * q, -1)
        masks = mask_logits(flat, out.mask_features)
        masks = masks.reshape(b, j, r, q, *masks.shape[2:]).swapaxes(0, 1)
        return sum(terms.values()), Trained(terms, levels, logits, masks)

    if not differentiate:
        return loss(params)[1], None
    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return found, gradient


def compare_losses(
    file: str, recorded: Arrays, found: Trained, recording: Recording, cfg: LossConfig, language: bool, report: ParityReport
) -> None:
    """Every loss term, assignment and choice of points.

    Args:
        file: where the recorded arrays are from.
        recorded: arrays of the run.
        found: ours.
        recording: how the recorded pairs lie in our layout.
        cfg: weights of the terms.
        language: whether the run has a language loss.
        report: where rows go.
    """
    levels, terms = found.levels, {name: float(value) for name, value in found.terms.items()}
    count = len(levels.assigned)
    masks = sum(place.targets for place in recording.passes)
    ours: dict[str, Any] = {"loss": sum(terms.values()), "loss_seg": sum(v for n, v in terms.items() if n != "language")}
    if language:
        ours["loss_llm"] = terms["language"]
    for j in range(count):
        suffix = "" if j == count - 1 else f"_{j}"
        sums = {name: float(value[j]) for name, value in levels.sums.items()}
        ours[f"loss_cls{suffix}"] = cfg.class_weight * sums["class"] / sums["class_weight"]
        ours[f"loss_mask{suffix}"] = cfg.mask_weight * sums["mask"] / max(masks, 1)
        ours[f"loss_dice{suffix}"] = cfg.dice_weight * sums["dice"] / max(masks, 1)
    for name, value in ours.items():
        if f"loss/{name}" in recorded:
            report.compare(file, f"loss/{name}", value, recorded[f"loss/{name}"], "loss")

    b, r, m = levels.assigned.shape[1:]
    for j in range(count):
        level = level_name(j, count)
        chosen = np.asarray(levels.points[j]).reshape(b, r, m, *levels.points.shape[2:])
        pairs = []
        for p, (place, order) in enumerate(zip(recording.passes, recording.targets[level], strict=True)):
            pairs.append(chosen[place.image, place.slot, order])
            queries = np.asarray(levels.assigned[j])[place.image, place.slot, order]
            name = f"match/{level}/pass{p}"
            report.used(file, f"{name}_points", f"{name}_target")
            if f"{name}_query" in recorded:
                report.compare(file, f"{name}_query", queries, recorded[f"{name}_query"], "exact")
        report.used(file, f"points/{level}/candidates", f"points/{level}/extra_random")
        name = f"points/{level}/chosen"
        if name in recorded:
            report.compare(file, name, in_order(np.concatenate(pairs)), in_order(recorded[name]), "exact", note="as sets")


def in_order(points: np.ndarray) -> np.ndarray:
    """[pairs, n, 2] with the points of each pair sorted: equally uncertain ones may come in any order."""
    return np.stack([pair[np.lexsort(pair.T)] for pair in points])


def compare_gradients(
    file: str, recorded: Arrays, gradient: dict[str, Any], model: FlowSegConfig, report: ParityReport
) -> None:
    """The recorded gradients under X-SAM's names, and the global norm.

    The maps between its parameters and ours are linear and keep the norm, so the converter's export direction applies to
    gradients as well.
    """
    exported = export_params("xsam", jax.device_get(gradient), model)
    squares = sum(float(np.square(np.asarray(x, np.float64)).sum()) for x in jax.tree.leaves(gradient))
    for name in recorded:
        if not name.startswith("grad/"):
            continue
        parameter = name.removeprefix("grad/")
        if parameter == "global_norm":
            report.compare(file, name, np.sqrt(squares), recorded[name], "gradient norm")
        elif parameter in exported:
            scale, note = 0.0, ""
            if vanishes(parameter, model):
                scale = float(np.abs(exported[parameter.replace(".bias", ".weight")]).max())
                note = "zero up to rounding: relative to the gradient of its weight"
            kinked = any(part in parameter for part in KINKED)
            kind = "kinked gradient" if kinked else "gradient"
            report.compare(file, name, exported[parameter], recorded[name], kind, scale=scale, note=note)


def vanishes(parameter: str, model: FlowSegConfig) -> bool:
    """Whether the gradient of a parameter is zero by construction, so that what was recorded is rounding.

    A bias of all keys shifts every score of a softmax alike; a bias that is a GroupNorm's only channel is subtracted again.
    """
    alone = model.pixel_decoder.embed_dim == model.pixel_decoder.norm_groups
    return parameter.endswith("k_proj.bias") or (alone and bool(re.search(r"input_projections\.\d+\.0\.bias$", parameter)))


def referring_passes(batch: Batch) -> list[Pass]:
    """One target a pass: the real phrases in X-SAM's order."""
    return [Pass(int(b), int(k), 1) for b, k in np.argwhere(np.asarray(batch.phrase_target) != PAD)]


def category_passes(batch: Batch) -> list[Pass]:
    """One pass an image, all labelled masks its targets."""
    return [Pass(b, 0, int(n)) for b, n in enumerate((np.asarray(batch.object_category) != PAD).sum(1))]


def predictions(recorded: Arrays) -> list[int]:
    """Numbers J of the predictions that the run recorded class logits of."""
    return sorted(int(m[1]) for name in recorded if (m := re.fullmatch(r"class/pred(\d+)_logits", name)))
