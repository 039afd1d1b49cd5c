"""What exactly a number means: one frozen dataclass a protocol.

Published figures differ in what counts as a sample, in the text shown to the model, in how the truth is drawn and in the value
of a sample whose truth and prediction are both empty. Each of these choices is a field, so that a protocol is data that is
written beside the number and not a branch in a script.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from flowseg_jax.errors import UserError, suggest


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One evaluation protocol.

    Attributes:
        name: what `--protocol` takes and what stands in the result file.
        unit: what counts as one sample: every distinct lower-cased sentence of an annotation, every sentence, or every ref.
        text: what the model is shown: the sentence in lower case, as written, or all sentences of the ref in one string.
        raster: how a truth of several polygons is drawn: their union, their sum (overlaps drop out), or filled integer points.
        both_empty: IoU of a sample whose truth and prediction are both empty.
        thresholds: the X of P@X, the share of samples with IoU >= X.
        source: whose evaluation this reproduces.
    """

    name: str
    unit: Literal["unique_sentence", "sentence", "ref"]
    text: Literal["lower", "raw", "joined"]
    raster: Literal["union", "sum", "fill_points"]
    both_empty: float
    thresholds: tuple[float, ...]
    source: str


XSAM = Protocol(
    name="xsam",
    unit="unique_sentence",
    text="lower",
    raster="union",
    both_empty=1.0,
    thresholds=(0.5, 0.6, 0.7, 0.8, 0.9),
    source="X-SAM's referring evaluation, with one fixed prompt and answer instead of random ones",
)

LISA = Protocol(
    name="lisa",
    unit="sentence",
    text="lower",
    raster="sum",
    both_empty=1.0,
    thresholds=(0.5, 0.6, 0.7, 0.8, 0.9),
    source="LISA's validation (GLaMM, GSVA and EVF-SAM count alike), with the same fixed prompt",
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (XSAM, LISA)}


def get(name: str) -> Protocol:
    """The protocol of that name; `UserError` names the nearest known one."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}{suggest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
