"""An image and sentences in; for each the selected mask at the image's own size, its score and the runners-up out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, UInt8
from PIL import Image

from flowseg_jax import model_directory
from flowseg_jax.data import batching, drawing, images, masks
from flowseg_jax.data.batch import BatchShape
from flowseg_jax.data.evaluation import PHRASES, round_shape
from flowseg_jax.data.prompts import Prompts, check_phrase
from flowseg_jax.data.tokenizer import Tokenizer, load_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import pictures, postprocess
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig


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
        """query, score, area (pixels) and rle, COCO's run-length code with compressed counts."""
        rle = {"size": list(self.mask.shape), "counts": masks.encode(self.mask.astype(np.uint8))}
        return {"query": self.query, "score": self.score, "area": int(self.mask.sum()), "rle": rle}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer to one sentence.

    Attributes:
        name: the image file. text: the sentence.
        image: uint8 [H, W, 3], upright.
        candidates: highest score first; the first one is the selected mask.
    """

    name: str
    text: str
    image: UInt8[np.ndarray, "y x 3"]
    candidates: Sequence[Candidate]

    def to_json(self) -> dict[str, Any]:
        height, width = self.image.shape[:2]
        top = [candidate.to_json() for candidate in self.candidates]
        return {"image": self.name, "height": height, "width": width, "text": self.text, **top[0], "candidates": top}


@dataclasses.dataclass(frozen=True)
class Look:
    """An image that has been looked at; any number of texts can be asked about it.

    Attributes:
        name: what to call it. image: uint8 [H, W, 3], upright.
        scaled: int32 [1, 2], its size inside the mask encoder's square input.
        seen: what the model keeps of it.
    """

    name: str
    image: UInt8[np.ndarray, "y x 3"]
    scaled: np.ndarray
    seen: flowseg.Seen


class Segmentor:
    """A model that is ready to answer; sentences of similar length and images of a similar size share their compilations.

    Args:
        graphdef, params: the model (`models.flowseg.create`).
        tokenizer: its tokenizer.
        image, vision: sides S and V of its two square inputs, pixels.
        visual_tokens: slots that an image takes in the prompt.
        prompts: its chat template (None: the default one); the fixed wording is used.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        tokenizer: Tokenizer,
        *,
        image: int,
        vision: int,
        visual_tokens: int,
        prompts: Prompts | None = None,
    ):
        self._params, self._tokenizer = params, tokenizer
        self._prompts = dataclasses.replace(prompts or Prompts(), vary=False)
        self._shape = BatchShape(1, 0, PHRASES[-1], 0, image, vision)
        self._prefix = np.array(batching.encode_prefix(self._prompts, tokenizer, visual_tokens), np.int32)

        def top(params, seen, questions, count):
            model = flowseg.bind(graphdef, params)
            found = model.ask(seen, questions)
            chosen = postprocess.top(found.scores, found.mask_logits, min(count, found.scores.shape[-1]))
            return dataclasses.replace(chosen, logits=postprocess.refine(model, chosen.logits, found.mask_features))

        self._see = jax.jit(lambda params, views, prefix: flowseg.bind(graphdef, params).see(views, prefix))
        self._top, self._restore = jax.jit(top, static_argnums=3), jax.jit(postprocess.restore)

    def __call__(self, image: Image.Image, text: str, *, top_k: int = 5, name: str = "image") -> Prediction:
        """`segment` for one sentence about an upright RGB image in memory."""
        return self.ask(self.look(image, name=name), [text], top_k=top_k)[0]

    def segment(self, image: str | os.PathLike[str] | Image.Image, texts: Sequence[str], *, top_k: int = 5) -> list[Prediction]:
        """Segments what each text names; all texts share one look at the image.

        Args:
            image: a file (EXIF rotation applied) or an upright image.
            texts: what to segment, one answer each.
            top_k: candidates an answer.

        Raises:
            UserError: a damaged file; an empty text or one with a mark of the tokenizer; outputs that are no numbers.
        """
        _check(texts, top_k)
        return self.ask(self.look(image), texts, top_k=top_k)

    def look(self, image: str | os.PathLike[str] | Image.Image, *, name: str = "image") -> Look:
        """Looks at a file (EXIF rotation applied) or an upright image. Raises a UserError for a damaged file."""
        if not isinstance(image, Image.Image):
            name, image = os.fspath(image), images.load(image, exif=True)
        image = image.convert("RGB")
        pixels = batching.prepare_pixels(image, (), self._shape)
        views = batching.views([pixels], 1, (self._shape.image, self._shape.vision))
        return Look(name, np.array(image), views.scaled_size, self._see(self._params, views, self._prefix))

    def ask(self, look: Look, texts: Sequence[str], *, top_k: int = 5) -> list[Prediction]:
        """Segments what each text names in an image that has been looked at; arguments and errors as in `segment`."""
        _check(texts, top_k)
        for text in texts:
            check_phrase(text, self._tokenizer, look.name)
        most = PHRASES[-1]
        parts = [texts[at : at + most] for at in range(0, len(texts), most)]
        return [prediction for part in parts for prediction in self._ask(look, part, top_k)]

    def _ask(self, look: Look, texts: Sequence[str], top_k: int) -> list[Prediction]:
        """As `ask`, for as many texts as one round takes."""
        conversations = batching.ask(self._prompts, texts)
        said = [batching.encode_conversation(c, self._prompts, self._tokenizer, look.name) for c in conversations]
        shape = (1, *round_shape(len(said), sum(len(c.tokens) for c in said)))
        questions = batching.questions([said], shape, len(self._prefix), self._tokenizer.pad, [look.name])
        chosen = self._top(self._params, look.seen, questions, top_k)
        size = look.image.shape[:2]
        where = postprocess.geometry(look.scaled, [size], grid=chosen.logits.shape[-2:], padded_size=self._shape.image)
        nothing = np.zeros((1, shape[1], where.bucket[0], where.bucket[1] // 8), np.uint8)
        truth = postprocess.Truth.plain(nothing)
        chosen, restored = jax.device_get((chosen, self._restore(chosen.logits, where, truth)))

        def answer(k: int, text: str) -> Prediction:
            rows = [
                Candidate(int(query), float(score), postprocess.unpack_mask(mask, size))
                for query, score, mask, finite in zip(
                    chosen.query[0, k], chosen.score[0, k], restored.masks[0, k], restored.finite[0, k], strict=True
                )
                if finite
            ]
            if not rows or not restored.finite[0, k, 0]:
                raise UserError(
                    f"{look.name}: the model's output holds no numbers (NaN or infinity); its checkpoint is damaged"
                )
            return Prediction(look.name, text, look.image, rows)

        return [answer(k, text) for k, text in enumerate(texts)]


def _check(texts: Sequence[str], top_k: int) -> None:
    if top_k < 1:
        raise UserError(f"top_k is {top_k}: at least one candidate is needed")
    if isinstance(texts, str):
        raise UserError("segment takes a list of texts, got one string")
    if not texts or not all(text.strip() for text in texts):
        raise UserError("a text is empty: say what to segment")


def load(directory: str | os.PathLike[str]) -> Segmentor:
    """The segmentor of a model directory (`model_directory.save_model`); its `extra["prompts"]` holds the fields of `Prompts`.

    Raises:
        UserError: not a model directory, a damaged one, or one whose tokenizer does not fit the model.
    """
    cfg = FlowSegConfig.from_dict(model_directory.read_model_config(directory)["model"])
    cfg.check_complete(str(directory))
    graphdef, abstract = flowseg.describe(cfg)
    loaded = model_directory.load_model(directory, flowseg.at_rest(abstract))
    prompts = Prompts(**loaded.extra.get("prompts", {}))
    tokenizer = load_tokenizer(loaded.tokenizer_dir, needed=prompts.needed)
    if tokenizer.vocab > cfg.llm.vocab:
        raise UserError(f"{directory}: the tokenizer has {tokenizer.vocab} ids, the model's embedding table {cfg.llm.vocab}")
    return Segmentor(
        graphdef,
        loaded.params,
        tokenizer,
        image=cfg.sam.image_size,
        vision=cfg.siglip.image_size,
        visual_tokens=cfg.visual_tokens,
        prompts=prompts,
    )


def predict(
    segmentor: Segmentor, image: str | os.PathLike[str], text: str, out: str | os.PathLike[str], *, top_k: int = 5
) -> Path:
    """Answers one sentence about one image file (EXIF rotation applied) and writes an overlay PNG and a JSON of the same name.

    Args:
        segmentor: the model.
        image: any image file that Pillow reads. text: what to segment.
        out: the folder to write to.
        top_k: how many candidates the JSON holds.

    Returns:
        The JSON's path; the overlay has the suffix .png instead.

    Raises:
        UserError: a damaged image, a text that cannot be asked, an unwritable folder. Nothing is written then.
    """
    return write(segmentor(images.load(image, exif=True), text, top_k=top_k, name=os.fspath(image)), out)


def write(prediction: Prediction, out: str | os.PathLike[str]) -> Path:
    """Writes `<image>_<text>.png` and `.json` to the folder `out`, both or neither; returns the JSON's path."""
    path = Path(out) / f"{Path(prediction.name).stem}_{drawing.slug(prediction.text)}.json"
    parts = {path.with_suffix(suffix): path.with_suffix(f"{suffix}.part") for suffix in (".png", ".json")}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = Image.fromarray(drawing.overlay(prediction.image, prediction.candidates[0].mask, pictures.SELECTED))
        drawn.save(parts[path.with_suffix(".png")], format="PNG")
        text = json.dumps(prediction.to_json(), indent=1, ensure_ascii=False) + "\n"
        parts[path].write_text(text, encoding="utf-8")
        for final, part in parts.items():
            os.replace(part, final)
    except OSError as error:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder you can write to") from error
    return path
