"""The whole comparison: every file of a fixture that is there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from convert_weights.convert import import_params
from convert_weights.parity import training, units
from convert_weights.parity.fixture import RUNS, STAGE1, WEIGHTS, Arrays, Fixture, Run
from convert_weights.parity.forward import ForwardComparison, run_evaluation, run_model
from convert_weights.parity.preprocessing import RecordedSample, assemble, compare_inputs, compare_prompts, read_samples
from convert_weights.parity.report import ParityReport
from flowseg_jax.data import images
from flowseg_jax.errors import UserError
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.system.console import heartbeat
from flowseg_jax.types import PAD, Batch

TRAINING = ("loss/", "match/", "points/", "grad/", "target/")  # what a run of the training path records
HEAD = "segmentor.class_predictor.predictor"


def compare(directory: str | os.PathLike[str]) -> ParityReport:
    """Compares everything that a fixture directory holds, in float32.

    Raises:
        UserError: no fixture, a damaged file, sizes that do not fit each other, or nothing to compare.
    """
    fixture = Fixture(directory)
    held: dict[str, list[str]] = {file: list(fixture.arrays(file)) for file in fixture.files()}
    held["prompts.json"] = sorted({template for template, _ in fixture.prompts()})
    report = ParityReport(held)
    samples = read_samples(fixture, fixture.model())
    work: dict[str, Callable[[], None]] = {
        "the inputs": lambda: compare_inputs(fixture, samples, report),
        "the prompts": lambda: compare_prompts(fixture, report),
        **{run.file: functools.partial(compare_run, fixture, run, samples, report) for run in RUNS if fixture.has(run.file)},
        **({STAGE1: lambda: compare_stage1(fixture, samples, report)} if fixture.has(STAGE1) else {}),
        "the components": lambda: units.compare_units(fixture, report),
        "the text layer": lambda: units.compare_text_layer(fixture, report),
    }
    for number, (name, step) in enumerate(work.items(), 1):
        with heartbeat(f"parity, {number} of {len(work)}: {name}"):
            step()
    if not report.rows:
        raise UserError(f"{directory}: nothing to compare: the fixture holds no array that this version knows")
    return report


def build(
    fixture: Fixture, cfg: FlowSegConfig, extra: dict[str, np.ndarray] | None = None
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The network with the fixture's weights (and `extra` tensors under X-SAM's names)."""
    graphdef, _ = flowseg.abstract_model(cfg)
    return graphdef, import_params("xsam", {**fixture.weights(), **(extra or {})}, cfg)


def missing(fixture: Fixture, samples: list[RecordedSample], text: bool) -> str:
    """What the fixture lacks to run the model on these samples; "" if nothing."""
    if not fixture.has(WEIGHTS):
        return f"the fixture has no {WEIGHTS}"
    for sample in samples:
        if sample.pixels is None:
            return f"the fixture has no image of {sample.name}"
        if text and sample.text is None:
            return f"the fixture has neither a conversation with a tokenizer nor token ids of {sample.name}"
    return ""


def choose(fixture: Fixture, samples: list[RecordedSample], numbers: list[int]) -> list[RecordedSample]:
    """The samples of a batch."""
    if any(not 0 <= i < len(samples) for i in numbers):
        raise UserError(f"{fixture.directory / 'config.json'}: a batch has samples {numbers}, there are {len(samples)}")
    return [samples[i] for i in numbers]


def compare_run(fixture: Fixture, run: Run, samples: list[RecordedSample], report: ParityReport) -> None:
    """One run of the whole model: forward, evaluation, losses and gradients, as far as they are recorded."""
    recorded = fixture.arrays(run.file)
    chosen = choose(fixture, samples, fixture.samples(run.batch))
    if lack := missing(fixture, chosen, text=True):
        report.explain(run.file, "", lack)
        return
    cfg = fixture.model(images=len(chosen), clamp=run.clamp)
    batch = assemble(chosen, cfg)
    graphdef, params = build(fixture, cfg)
    comparison = ForwardComparison(run, recorded, batch, report)
    if any(not name.startswith((*TRAINING, "post/", "meta/")) for name in recorded):
        comparison.observed(run_model(graphdef, params, batch))
    if any(name.startswith("post/") for name in recorded):
        comparison.evaluation(*run_evaluation(graphdef, params, batch), chosen)
    if comparison.comparable and any(name.startswith(TRAINING) for name in recorded):
        compare_training(fixture, run, batch, cfg, graphdef, params, report)


def compare_training(
    fixture: Fixture,
    run: Run,
    batch: Batch,
    cfg: FlowSegConfig,
    graphdef: nnx.GraphDef,
    params: dict[str, Any],
    report: ParityReport,
) -> None:
    """Targets, losses and gradients of a run over referring phrases."""
    recorded, losses = fixture.arrays(run.file), fixture.losses()
    compare_targets(run.file, recorded, batch, report)
    unsure = r"loss/|match/|points/|grad/"
    if not batch.mask_valid.any():
        report.explain(run.file, unsure, "the fixture has no target masks of these samples")
        return
    passes, levels = training.referring_passes(batch), cfg.mask_decoder.num_layers + 1
    recording = training.read_points(recorded, passes, (*batch.phrase_target.shape, 1), levels)
    if recording is None:
        report.explain(run.file, unsure, "not all random points that the losses were taken at are recorded")
        return
    differentiate = any(name.startswith("grad/") for name in recorded)
    found, gradient = training.train(
        graphdef, params, batch, {"referring": recording.points}, losses, "referring", differentiate
    )
    training.compare_losses(run.file, recorded, found, recording, losses, True, report)
    if gradient is not None:
        training.compare_gradients(run.file, recorded, gradient, cfg, report)


def compare_targets(file: str, recorded: Arrays, batch: Batch, report: ParityReport) -> None:
    """The target masks of each image, and which of them each phrase is about."""
    for b, exists in enumerate(np.asarray(batch.phrase_target) != PAD):
        name = f"target/image{b}"
        if f"{name}_masks" in recorded and batch.mask_valid[b].any():
            ours = images.unpack_masks(batch.packed_masks[b, batch.mask_valid[b]])
            report.compare(file, f"{name}_masks", ours, recorded[f"{name}_masks"], "exact")
        if f"{name}_labels" in recorded:
            report.compare(file, f"{name}_labels", batch.phrase_target[b, exists], recorded[f"{name}_labels"], "exact")


def stage1_samples(fixture: Fixture, count: int) -> list[int]:
    """Which samples the stage-1 run has. config.json need not say; as many as were recorded are all, or the training batch."""
    batches, recorded = fixture.config.get("batches", {}), fixture.arrays(STAGE1)
    if "stage1" in batches:
        return fixture.samples("stage1")
    images = max((len(x) for name, x in recorded.items() if name.startswith(("class/", "decoder/"))), default=count)
    training_batch = batches.get("aaai_train", [])
    return training_batch if images == len(training_batch) != count else list(range(images))


def compare_stage1(fixture: Fixture, samples: list[RecordedSample], report: ParityReport) -> None:
    """The run without language: all samples, each with all its masks as labelled objects and the linear class head."""
    recorded, losses = fixture.arrays(STAGE1), fixture.losses()
    chosen = choose(fixture, samples, stage1_samples(fixture, len(samples)))
    if lack := missing(fixture, chosen, text=False):
        report.explain(STAGE1, "", lack)
        return
    head = {f"{HEAD}.{name}": recorded[f"predictor/{name}"] for name in ("weight", "bias") if f"predictor/{name}" in recorded}
    report.used(STAGE1, "predictor/weight", "predictor/bias")
    labels = [recorded.get(f"target/image{b}_labels") for b in range(len(chosen))]
    report.used(STAGE1, *(f"target/image{b}_labels" for b in range(len(chosen))))
    labelled = len(head) == 2 and all(x is not None for x in labels)
    classes = head[f"{HEAD}.weight"].shape[0] - 1 if len(head) == 2 else 1
    cfg = fixture.model(images=len(chosen), classes=classes)
    batch = assemble(chosen, cfg, labels if labelled else [np.zeros(len(s.pixels.masks), int) for s in chosen])
    graphdef, params = build(fixture, cfg, head if len(head) == 2 else None)
    for b in range(len(chosen)):
        if f"target/image{b}_masks" in recorded:
            ours = images.unpack_masks(batch.packed_masks[b, batch.mask_valid[b]])
            report.compare(STAGE1, f"target/image{b}_masks", ours, recorded[f"target/image{b}_masks"], "exact")

    passes, levels, m = training.category_passes(batch), cfg.mask_decoder.num_layers + 1, batch.mask_valid.shape[1]
    recording = training.read_points(recorded, passes, (len(chosen), 1, m), levels) if labelled else None
    points = training.blank_points(losses, levels, len(chosen), m) if recording is None else recording.points
    kinds = {"referring": training.blank_points(losses, levels, len(chosen), 1), "closed_vocab": points}
    differentiate = recording is not None and any(name.startswith("grad/") for name in recorded)
    found, gradient = training.train(graphdef, params, batch, kinds, losses, "closed_vocab", differentiate)
    for j in range(levels):
        names = {f"decoder/pred{j}_mask_logits": found.masks[j, :, 0]}
        if len(head) == 2:
            names[f"class/pred{j}_logits"] = found.class_logits[j, :, 0]
        for name, value in names.items():
            if name in recorded:
                report.compare(STAGE1, name, value, recorded[name], "activation")
    if len(head) < 2:
        report.explain(STAGE1, "", "the linear class head (predictor/weight, predictor/bias) is not recorded")
    elif recording is None:
        report.explain(STAGE1, "", "not all random points and labels that the losses were taken with are recorded")
    else:
        training.compare_losses(STAGE1, recorded, found, recording, losses, False, report)
        if gradient is not None:
            training.compare_gradients(STAGE1, recorded, gradient, cfg, report)
