"""What exactly a number means: one frozen dataclass a protocol.

Published figures differ in what counts as a sample, in the text shown to the model, in how the truth is drawn and in the value
of a sample whose truth or prediction is empty. Each of these choices is a field, so that a protocol is data that is written
beside the number and not a branch in a script.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from flowseg_jax.errors import UserError, did_you_mean

IOU_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One evaluation protocol.

    Attributes:
        name: what `--protocol` takes and what stands in the result file.
        unit: what counts as one sample: every distinct lower-cased sentence of an annotation, every sentence, or every ref.
        text: what the model is shown: the sentence in lower case, or all sentences of the ref in one string, "a. b. c.". One
            run answers all protocols of one text.
        raster: how a truth of several polygons is drawn: their union, their sum (overlaps drop out), or filled integer points.
        both_empty: IoU where truth and prediction have no pixel, and cIoU where no sample has one.
        no_target: what becomes of a sample that refers to nothing: it counts like any other ("counted"), after the rule of
            generalised referring segmentation ("gres", see `metrics`), or not at all ("left_out").
        thresholds: the X of P@X, the share of samples with IoU >= X; with "gres", of those that refer to something.
        source: whose evaluation this reproduces.
        ignore: pixels that are marked to be ignored count neither in I nor in U.
    """

    name: str
    unit: Literal["unique_sentence", "sentence", "ref"]
    text: Literal["lower", "joined"]
    raster: Literal["union", "sum", "fill_points"]
    both_empty: float
    no_target: Literal["counted", "gres", "left_out"]
    thresholds: tuple[float, ...]
    source: str
    ignore: Literal["left_out"] = "left_out"


XSAM = Protocol(
    name="xsam",
    unit="unique_sentence",
    text="lower",
    raster="union",
    both_empty=1.0,
    no_target="counted",
    thresholds=IOU_THRESHOLDS,
    source="X-SAM's referring evaluation, with one fixed prompt and answer instead of random ones",
)

LISA = Protocol(
    name="lisa",
    unit="sentence",
    text="lower",
    raster="sum",
    both_empty=1.0,
    no_target="counted",
    thresholds=IOU_THRESHOLDS,
    source="LISA's validation (GLaMM, GSVA and EVF-SAM count alike), with the same fixed prompt",
)

PSALM = Protocol(
    name="psalm",
    unit="ref",
    text="joined",
    raster="fill_points",
    both_empty=1.0,
    no_target="counted",
    thresholds=IOU_THRESHOLDS,
    source="PSALM's referring evaluation (HyperSeg follows it), with the same fixed prompt",
)

GREFCOCO = Protocol(
    name="grefcoco",
    unit="sentence",
    text="lower",
    raster="union",
    both_empty=0.0,
    no_target="gres",
    thresholds=(0.7, 0.8, 0.9),
    source="ReLA's evaluation of gRefCOCO, counted at the original image size",
)

GREFCOCO_TARGET_ONLY = Protocol(
    name="grefcoco-target-only",
    unit="unique_sentence",
    text="lower",
    raster="union",
    both_empty=1.0,
    no_target="left_out",
    thresholds=IOU_THRESHOLDS,
    source="X-SAM and X2SAM on gRefCOCO, who read only the expressions that refer to something",
)

PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (XSAM, LISA, PSALM, GREFCOCO, GREFCOCO_TARGET_ONLY)}


def get_protocol(name: str) -> Protocol:
    """The protocol of that name; `UserError` lists the known ones and names the nearest."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}{did_you_mean(name, PROTOCOLS)}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
