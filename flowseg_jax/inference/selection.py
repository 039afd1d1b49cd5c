"""From the candidates of a sentence to its answer: the best one, all good ones, or nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from flowseg_jax.checkpoints.model_card import unknown_note
from flowseg_jax.data import masks
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import postprocess
from flowseg_jax.reports import overlay
from flowseg_jax.system.json_files import expect, number

NMS_IOU = 0.8  # a candidate whose IoU with a better one is at least this shows the same thing


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One mask that the model proposes.

    Attributes:
        query: which of the model's queries. score: in [0, 1].
        mask: bool [H, W] at the image's own size.
    """

    query: int
    score: float
    mask: Bool[np.ndarray, "y x"]

    def to_json(self) -> dict[str, Any]:
        """query, score, area (pixels) and rle."""
        return {"query": self.query, "score": self.score, **_described(self.mask)}


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """What of the candidates is the answer.

    Attributes:
        top_k: without `score_threshold`, so many candidates are kept; the best one is the answer.
        score_threshold: in [0, 1]; all candidates with at least this score are kept, and their union is the answer. An empty
            one is left out, and so is one whose IoU with a better one that is kept is at least NMS_IOU. None: `top_k`.
        no_target_threshold: in [0, 1]; the answer is nothing where the best score is below. 0: never; None: the model's own.
    """

    top_k: int = 5
    score_threshold: float | None = None
    no_target_threshold: float | None = None

    def __post_init__(self):
        if self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: at least one candidate is needed")
        for name in ("score_threshold", "no_target_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} is {value}: scores are from 0 to 1")

    @property
    def count(self) -> int:
        """How many candidates it needs at most."""
        return self.top_k if self.score_threshold is None else sys.maxsize


@dataclasses.dataclass(frozen=True, repr=False)
class Prediction:
    """The answer to one sentence.

    Attributes:
        name: the image file. text: the sentence.
        image: uint8 [H, W, 3], upright.
        score: of the best candidate; None where there is none at all.
        mask: bool [H, W], the answer; empty where there is nothing.
        candidates: those that are kept, highest score first.
        answer, phrase: what the model wrote and the phrase in question, where it wrote the answer itself.
        failure: why there is no answer, where there is none.
        unknown_words: of the sentence, which the model was never trained on, so that nothing is found.
    """

    name: str
    text: str
    image: UInt8[np.ndarray, "y x 3"]
    score: float | None
    mask: Bool[np.ndarray, "y x"]
    candidates: Sequence[Candidate]
    answer: str | None = None
    phrase: str | None = None
    failure: str | None = None
    unknown_words: tuple[str, ...] = ()

    @property
    def found(self) -> bool:
        return bool(self.mask.any())

    def __repr__(self) -> str:
        score = "" if self.score is None else f", score {self.score:.3f}"
        what = f"found{score}, {int(self.mask.sum())} pixels" if self.found else f"not found{score}"
        return f"Prediction({self.text!r} in {self.name}: {what}{self._why()})"

    def _why(self) -> str:
        return f" ({unknown_note(self.unknown_words)})" if self.unknown_words else ""

    def summary(self) -> str:
        """One line: found or not, score, pixels, text."""
        score = "       " if self.score is None else f"{self.score:7.3f}"
        return f"{'found' if self.found else 'not found':9} {score} {int(self.mask.sum()):8} px  {self.text}{self._why()}"

    def _repr_png_(self) -> bytes:
        """The overlay, for notebooks."""
        stream = io.BytesIO()
        Image.fromarray(self.overlay()).save(stream, "PNG")
        return stream.getvalue()

    def overlay(self, color: tuple[int, int, int] = (214, 64, 159)) -> UInt8[np.ndarray, "y x 3"]:
        """The image with the mask outlined and everything else faded to grey."""
        return overlay.overlay(self.image, self.mask, color)

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Writes the overlay to a `.png`, `to_json` to a `.json`, or both into any other path, a folder; returns what it wrote.

        Raises:
            UserError: it cannot be written.
        """
        path = Path(path)
        stem = f"{Path(self.name).stem}-{overlay.slug(self.text)}"
        files = [path] if path.suffix in (".png", ".json") else [path / f"{stem}{kind}" for kind in (".png", ".json")]
        try:
            files[0].parent.mkdir(parents=True, exist_ok=True)
            for file in files:
                if file.suffix == ".png":
                    Image.fromarray(self.overlay()).save(file)
                else:
                    file.write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
        return files

    def to_coco(self, image_id: int, category_id: int = 1) -> dict[str, Any]:
        """A COCO result: image_id, category_id, segmentation (RLE), area, bbox [x, y, width, height] in pixels, score."""
        rows, columns = (np.flatnonzero(self.mask.any(axis)) for axis in (1, 0))
        box = [0, 0, 0, 0]
        if self.found:
            box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
        described = _described(self.mask)
        return {
            "image_id": image_id,
            "category_id": category_id,
            "segmentation": described["rle"],
            "area": described["area"],
            "bbox": box,
            "score": 0.0 if self.score is None else self.score,
        }

    def to_json(self, *, rle: bool = True, candidates: bool = True) -> dict[str, Any]:
        """All but the image; masks as `rle`, COCO's run-length code with compressed counts, or not at all."""
        height, width = self.image.shape[:2]
        answered = {key: getattr(self, key) for key in ("answer", "phrase", "failure") if getattr(self, key) is not None}
        answered |= {"unknown_words": list(self.unknown_words)} if self.unknown_words else {}
        whole = {"image": self.name, "height": height, "width": width, "text": self.text, **answered, "found": self.found}
        kept = [candidate.to_json() for candidate in self.candidates] if candidates else []
        result = whole | {"score": self.score, **_described(self.mask)} | ({"candidates": kept} if candidates else {})
        if not rle:
            for described in (result, *kept):
                del described["rle"]
        return result


def stored_no_target_threshold(extra: Mapping[str, Any], directory: str | os.PathLike[str]) -> float:
    """`SelectionConfig.no_target_threshold` as the `extra` of a model directory's config.json has it, by default 0.

    Raises:
        UserError: it is no number from 0 to 1, or stands there by its old name.
    """
    where = f"{directory}/config.json: extra"
    if "no_target_below" in extra:
        raise UserError(f"{where}.no_target_below: it is called no_target_threshold now; rename it")
    value = extra.get("no_target_threshold", 0.0)
    expect(number(value, least=0, most=1), value, f"{where}.no_target_threshold", "a number from 0 to 1")
    return float(value)


def _described(mask: Bool[np.ndarray, "y x"]) -> dict[str, Any]:
    return {"area": int(mask.sum()), "rle": {"size": list(mask.shape), "counts": masks.encode(mask.astype(np.uint8))}}


def mask_nms(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, best first, without empty ones and near-duplicates of better ones."""
    kept: list[tuple[Candidate, np.ndarray]] = []
    for candidate in candidates:
        bits = np.packbits(candidate.mask)
        new = all(_count(bits & other) < NMS_IOU * _count(bits | other) for _, other in kept)
        if new and bits.any():
            kept.append((candidate, bits))
    return [candidate for candidate, _ in kept]


def _count(bits: np.ndarray) -> int:
    return int(np.bitwise_count(bits).sum())


def unpack_candidates(
    name: str,
    query: Int[np.ndarray, " n"],
    score: Float[np.ndarray, " n"],
    packed: UInt8[np.ndarray, "n H W8"],
    finite: Bool[np.ndarray, " n"],
    size: tuple[int, int],
) -> list[Candidate]:
    """The candidates of one sentence, best first, without those that are no numbers.

    Args:
        name: of the image.
        query, score: as in `postprocess.SelectedMasks`.
        packed, finite: from `postprocess.upsample`.
        size: (H, W) of the image.

    Raises:
        UserError: the best one is no number.
    """
    if not finite[0]:
        raise UserError(f"{name}: the model's output holds no numbers (NaN or infinity); its checkpoint is damaged")
    return [Candidate(int(query[n]), float(score[n]), postprocess.unpack_mask(packed[n], size)) for n in np.flatnonzero(finite)]


def select_prediction(
    name: str,
    text: str,
    image: UInt8[np.ndarray, "y x 3"],
    candidates: Sequence[Candidate],
    selection: SelectionConfig,
    answer: str | None = None,
    phrase: str | None = None,
    unknown_words: tuple[str, ...] = (),
) -> Prediction:
    """The answer to a sentence; `candidates`, best first, are at least as many as the selection needs.

    With a no-target threshold above 0, nothing is found for a sentence with `unknown_words` (`ModelCard.unknown_words`).
    """
    unknown_words = unknown_words if selection.no_target_threshold else ()
    best, kept = candidates[0], list(candidates)
    if selection.score_threshold is not None:
        kept = mask_nms([candidate for candidate in kept if candidate.score >= selection.score_threshold])
    if unknown_words or best.score < (selection.no_target_threshold or 0) or not kept:
        mask = np.zeros_like(best.mask)
    elif selection.score_threshold is None:
        mask = best.mask
    else:
        mask = np.any([candidate.mask for candidate in kept], 0)
    return Prediction(name, text, image, best.score, mask, kept, answer, phrase, unknown_words=unknown_words)


def empty_prediction(name: str, text: str, image: UInt8[np.ndarray, "y x 3"], answer: str, failure: str | None) -> Prediction:
    """An answer that the model wrote without a `<SEG>` that stands for a phrase: no mask."""
    blank = np.zeros(image.shape[:2], bool)
    return Prediction(name, text, image, None, blank, (), answer=answer, failure=failure)
