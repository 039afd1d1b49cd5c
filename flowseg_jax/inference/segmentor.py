"""An image and sentences in; for each the selected mask at the image's own size, its score and the runners-up out.

An image is looked at once; any number of sentences share the look. By default the model is handed the answer that carries
`<SEG>` (`Segmentor.ask`); `Segmentor.generate` and `Segmentor.chat` let it write the answer itself.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import UInt8
from PIL import Image

from flowseg_jax.checkpoints import pretrained
from flowseg_jax.data import collate, images
from flowseg_jax.data.eval_dataset import PHRASE_BUCKETS, bucket_shape
from flowseg_jax.data.prompts import PromptTemplates, check_phrase
from flowseg_jax.data.tokenizer import Tokenizer, load_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import postprocess
from flowseg_jax.inference.selection import Candidate, Prediction, SelectionConfig, select_prediction
from flowseg_jax.models import flowseg, generate
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.system.json_files import expect, number
from flowseg_jax.types import BatchShape, ImageInputs, PromptQueries

__all__ = [
    "Candidate",
    "EncodedImage",
    "GeneratedAnswer",
    "Prediction",
    "PreprocessedImage",
    "Segmentor",
    "SelectionConfig",
    "load",
]

ANSWER_TOKENS = 128  # that the model may write, its end included


@dataclasses.dataclass(frozen=True)
class PreprocessedImage:
    """A decoded image as the model takes it.

    Attributes:
        name: what to call it. image: uint8 [H, W, 3], upright.
        views: it alone.
        notes: what is special about its file, in words.
    """

    name: str
    image: UInt8[np.ndarray, "y x 3"]
    views: ImageInputs
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An image that has been looked at; any number of texts can be asked about it.

    Attributes:
        name: what to call it. image: uint8 [H, W, 3], upright.
        scaled: int32 [1, 2], its size inside the mask encoder's square input.
        seen: what the model keeps of it.
    """

    name: str
    image: UInt8[np.ndarray, "y x 3"]
    scaled: np.ndarray
    seen: flowseg.ImageCache


@dataclasses.dataclass(frozen=True)
class GeneratedAnswer:
    """What the model wrote.

    Attributes:
        question: what it was asked.
        text: its words, `<p>`, `</p>` and `<SEG>` included.
        complete: it came to an end before it ran out of tokens.
        predictions: one for each `<SEG>` that stands for a phrase.
        failure: why there is none where there should be one.
    """

    question: str
    text: str
    complete: bool
    predictions: Sequence[Prediction]
    failure: str | None = None


class Segmentor:
    """A model that is ready to answer; sentences of similar length and images of a similar size share their compilations.

    Every method that answers takes the fields of `Selection` as keywords: `top_k`, `score_threshold`, `no_target_threshold`.

    Args:
        graphdef, params: the model (`models.flowseg.create`).
        tokenizer: its tokenizer.
        image, vision: sides S and V of its two square inputs, pixels.
        visual_tokens: slots that an image takes in the prompt.
        prompts: its chat template (None: the default one); the fixed wording is used.
        no_target_threshold: what `SelectionConfig.no_target_threshold` is where it is not given.
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
        prompts: PromptTemplates | None = None,
        no_target_threshold: float = 0.0,
    ):
        self._params, self._tokenizer, self._no_target_threshold = params, tokenizer, no_target_threshold
        self._prompts = dataclasses.replace(prompts or PromptTemplates(), randomize=False)
        self._shape = BatchShape(1, 0, PHRASE_BUCKETS[-1], 0, image, vision)
        self._prefix = np.array(collate.encode_prefix(self._prompts, tokenizer, visual_tokens), np.int32)
        marks = generate.SpecialTokenIds(tokenizer.phrase_start, tokenizer.phrase_end, tokenizer.seg)
        self._eos = self._prompts.eos_ids(tokenizer)

        def top(model, found, count):
            chosen = postprocess.top_k_masks(found.scores, found.mask_logits, min(count, found.scores.shape[-1]))
            return dataclasses.replace(chosen, logits=postprocess.refine(model, chosen.logits, found.mask_features))

        def ask(params, seen, questions, count):
            model = flowseg.bind_params(graphdef, params)
            return top(model, model.predict_cached(seen, questions), count)

        def write(params, seen, asked, tokens):
            return generate.generate_answers(
                flowseg.bind_params(graphdef, params), seen, asked, max_new_tokens=tokens, eos=self._eos
            )

        def segment(params, seen, asked, written, outputs, count):
            model = flowseg.bind_params(graphdef, params)
            found, pairs = generate.decode_generated_masks(model, seen, asked, written, marks=marks, outputs=outputs)
            return top(model, found, count), pairs

        self._see = jax.jit(lambda params, views, prefix: flowseg.bind_params(graphdef, params).prefill_image(views, prefix))
        self._ask, self._restore = jax.jit(ask, static_argnums=3), jax.jit(postprocess.upsample_and_count)
        self._write, self._segment = jax.jit(write, static_argnums=3), jax.jit(segment, static_argnums=(4, 5))

    def __call__(self, image: Image.Image, text: str, *, name: str = "image", **selection: Any) -> Prediction:
        """`segment` for one sentence about an upright RGB image in memory."""
        return self.predict(self.encode_image(image, name=name), [text], **selection)[0]

    def segment(self, image: str | os.PathLike[str] | Image.Image, texts: Sequence[str], **selection: Any) -> list[Prediction]:
        """Segments what each text names; all texts share one look at the image.

        Args:
            image: a file (EXIF rotation applied) or an upright image.
            texts: what to segment, one answer each.
            **selection: fields of `Selection`.

        Raises:
            UserError: a damaged file; an empty text or one with a mark of the tokenizer; outputs that are no numbers.
        """
        self.validate_texts(texts)
        SelectionConfig(**selection)
        return self.predict(self.encode_image(image), texts, **selection)

    def preprocess(self, image: str | os.PathLike[str] | Image.Image, *, name: str = "image") -> PreprocessedImage:
        """Decodes and resizes a file (EXIF rotation applied) or an upright image, on the host alone: a thread may do it.

        Raises:
            UserError: a damaged file.
        """
        notes: Counter[str] = Counter()
        if isinstance(image, Image.Image):
            image = images.to_rgb(image, name=name, notes=notes)
        else:
            name, image = os.fspath(image), images.load(image, exif=True, notes=notes)
        pixels = collate.prepare_pixels(image, (), self._shape)
        views = collate.collate_images([pixels], 1, (self._shape.sam_size, self._shape.siglip_size))
        return PreprocessedImage(name, np.array(image), views, tuple(notes))

    def encode_image(
        self, image: str | os.PathLike[str] | Image.Image | PreprocessedImage, *, name: str = "image"
    ) -> EncodedImage:
        """Looks at an image: a file, an upright image, or one that `prepare` has prepared; errors as there."""
        ready = image if isinstance(image, PreprocessedImage) else self.preprocess(image, name=name)
        seen = self._see(self._params, ready.views, self._prefix)
        return EncodedImage(ready.name, ready.image, ready.views.resized_hw, seen)

    def validate_texts(self, texts: Sequence[str], where: str = "text") -> None:
        """Raises a UserError, which names `where`, for texts that cannot be asked: none, empty ones, those with a mark."""
        if isinstance(texts, str):
            raise UserError(f"{where}: expected a list of texts, got one string")
        if not texts or not all(text.strip() for text in texts):
            raise UserError(f"{where}: a text is empty: say what to segment")
        for text in texts:
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise UserError(f"{where}: the text {text!r} has half of a character pair: it is no Unicode")
            check_phrase(text, self._tokenizer, where)

    def predict(self, look: EncodedImage, texts: Sequence[str], **selection: Any) -> list[Prediction]:
        """Segments what each text names in an image that has been looked at; arguments and errors as in `segment`."""
        chosen_by = self._selection(selection)
        self.validate_texts(texts)
        return [
            select_prediction(look.name, text, look.image, found, chosen_by)
            for part in _rounds(texts)
            for text, found in zip(part, self._candidates_of(look, part, chosen_by.count), strict=True)
        ]

    def generate(
        self, look: EncodedImage, texts: Sequence[str], *, max_new_tokens: int = ANSWER_TOKENS, **selection: Any
    ) -> list[GeneratedAnswer]:
        """As `ask`, but the model writes its answer to each text itself; it may have several masks or none.

        A mask is conditioned on the phrase that the model wrote, or else on the text (`models.generate.pair_outputs`).
        """
        asked = [
            turn.question for conversation in collate.make_conversations(self._prompts, texts) for turn in conversation.turns
        ]
        answers = self._generate(look, texts, asked, max_new_tokens, self._selection(selection))
        return [answer if answer.predictions else dataclasses.replace(answer, failure="no <SEG>") for answer in answers]

    def chat(
        self, look: EncodedImage, questions: Sequence[str], *, max_new_tokens: int = ANSWER_TOKENS, **selection: Any
    ) -> list[GeneratedAnswer]:
        """Answers free questions about an image. A `<SEG>` has a mask if the model writes the phrase `<p>..</p>` for it."""
        return self._generate(look, questions, questions, max_new_tokens, self._selection(selection))

    def _selection(self, selection: dict[str, Any]) -> SelectionConfig:
        chosen_by = SelectionConfig(**selection)
        if chosen_by.no_target_threshold is None:
            chosen_by = dataclasses.replace(chosen_by, no_target_threshold=self._no_target_threshold)
        return chosen_by

    def _candidates_of(self, look: EncodedImage, texts: Sequence[str], count: int) -> list[list[Candidate]]:
        """The best `count` candidates of each text, for as many texts as one round takes."""
        encoded = [
            collate.encode_conversation(conversation, self._prompts, self._tokenizer, look.name)
            for conversation in collate.make_conversations(self._prompts, texts)
        ]
        shape = (1, *bucket_shape(len(texts), sum(len(one.tokens) for one in encoded)))
        questions = collate.collate_queries([encoded], shape, len(self._prefix), self._tokenizer.pad, [look.name])
        chosen = self._ask(self._params, look.seen, questions, count)
        return list(self._at_original_size(look, chosen, range(len(texts))))

    def _generate(
        self, look: EncodedImage, texts: Sequence[str], asked: Sequence[str], max_new_tokens: int, chosen_by: SelectionConfig
    ) -> list[GeneratedAnswer]:
        self.validate_texts(texts)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: at least one is needed")
        pairs = [*zip(texts, asked, strict=True)]
        return [answer for part in _rounds(pairs) for answer in self._answer(look, part, max_new_tokens, chosen_by)]

    def _answer(
        self, look: EncodedImage, part: Sequence[tuple[str, str]], max_new_tokens: int, chosen_by: SelectionConfig
    ) -> list[GeneratedAnswer]:
        """The answers to as many (text, question) as one round takes."""
        ids = [self._tokenizer.encode(question + self._prompts.template.assistant_prefix) for _, question in part]
        k, t = bucket_shape(len(part), max(map(len, ids)))
        asked = PromptQueries.of([ids], (1, k, t))
        written = self._write(self._params, look.seen, asked, max_new_tokens)
        tokens, lengths = jax.device_get((written.tokens, written.lengths))
        most = int((tokens == self._tokenizer.seg).sum(1).max())
        found: dict[int, list[tuple[str, list[Candidate]]]] = {}
        if most:
            outputs = next((n for n in PHRASE_BUCKETS if most <= n), -(-most // PHRASE_BUCKETS[-1]) * PHRASE_BUCKETS[-1])
            chosen, pairs = self._segment(self._params, look.seen, asked, written, outputs, chosen_by.count)
            pairs, whole = jax.device_get(pairs), np.concatenate([asked.input_ids[0], tokens], 1)
            rows, nth = np.nonzero(pairs.exists)
            phrases = [whole[i, pairs.start[i, j] + 1 : pairs.end[i, j]] for i, j in zip(rows, nth, strict=True)]
            restored = self._at_original_size(look, chosen, rows * outputs + nth)
            for row, phrase, candidates in zip(rows, phrases, restored, strict=True):
                found.setdefault(int(row), []).append((self._decode(phrase), candidates))
        answers = []
        for row, (text, _) in enumerate(part):
            said = tokens[row, : lengths[row]]
            complete = bool(said[-1] in self._eos)
            words = self._decode(said[:-1] if complete else said)
            masks = [
                select_prediction(look.name, text, look.image, c, chosen_by, words, phrase) for phrase, c in found.get(row, ())
            ]
            answers.append(GeneratedAnswer(text, words, complete, masks))
        return answers

    def _decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.hf.decode(ids.tolist(), skip_special_tokens=False).strip()

    def _at_original_size(
        self, look: EncodedImage, chosen: postprocess.SelectedMasks, phrases: Sequence[int]
    ) -> Iterator[list[Candidate]]:
        """The candidates of each of these phrases, without those that are no numbers.

        Raises:
            UserError: the best one is none.
        """
        size = look.image.shape[:2]
        where = postprocess.geometry(look.scaled, [size], grid=chosen.logits.shape[-2:], padded_size=self._shape.sam_size)
        blank = np.zeros((1, chosen.query.shape[1], where.bucket[0], where.bucket[1] // 8), np.uint8)
        restored = self._restore(chosen.logits, where, postprocess.GroundTruth.plain(blank))
        query, score, packed, finite = jax.device_get((chosen.query, chosen.score, restored.masks, restored.finite))
        for k in phrases:
            if not finite[0, k, 0]:
                raise UserError(
                    f"{look.name}: the model's output holds no numbers (NaN or infinity); its checkpoint is damaged"
                )
            yield [
                Candidate(int(query[0, k, n]), float(score[0, k, n]), postprocess.unpack_mask(packed[0, k, n], size))
                for n in np.flatnonzero(finite[0, k])
            ]


def _rounds(texts: Sequence[Any]) -> list[Sequence[Any]]:
    most = PHRASE_BUCKETS[-1]
    return [texts[at : at + most] for at in range(0, len(texts), most)]


def load(directory: str | os.PathLike[str]) -> Segmentor:
    """The segmentor of a model directory (`model_directory.save_model`).

    Of its `extra`, "prompts" holds the fields of `Prompts`, and "no_target_threshold" the score below which the answer is "nothing"
    (`Selection`), if it has one.

    Raises:
        UserError: not a model directory, a damaged one, or one whose tokenizer does not fit the model.
    """
    cfg = FlowSegConfig.from_dict(pretrained.read_model_config(directory)["model"], f"{directory}/config.json: model")
    cfg.require_full_model(str(directory))
    graphdef, abstract = flowseg.abstract_model(cfg)
    loaded = pretrained.load_pretrained(directory, flowseg.params_dict(abstract))
    prompts = PromptTemplates.of_model(loaded.extra, directory)
    tokenizer = load_tokenizer(loaded.tokenizer_dir, needed=prompts.special_tokens)
    if tokenizer.vocab > cfg.llm.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab} ids, the model's embedding table {cfg.llm.vocab_size}"
        )
    below = loaded.extra.get("no_target_threshold", 0.0)
    expect(number(below, least=0, most=1), below, f"{directory}/config.json: extra.no_target_threshold", "a number from 0 to 1")
    return Segmentor(
        graphdef,
        loaded.params,
        tokenizer,
        image=cfg.sam.image_size,
        vision=cfg.siglip.image_size,
        visual_tokens=cfg.num_visual_tokens,
        prompts=prompts,
        no_target_threshold=float(below),
    )
