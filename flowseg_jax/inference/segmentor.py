"""An image and sentences in; for each the selected mask at the image's own size, its score and the runners-up out.

An image is encoded once; any number of sentences share its encoding. By default the model is handed the answer that carries
`<SEG>` (`Segmentor.predict`); `Segmentor.generate` and `Segmentor.chat` let it write the answer itself.
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
from PIL import Image

from flowseg_jax.checkpoints import hub
from flowseg_jax.checkpoints.model_card import ModelCard
from flowseg_jax.checkpoints.pretrained import copy_pretrained
from flowseg_jax.checkpoints.run_checkpoint import is_checkpoint
from flowseg_jax.checkpoints.storage import local_directory
from flowseg_jax.data import collate, images
from flowseg_jax.data.eval_plan import PHRASE_BUCKETS, bucket_shape
from flowseg_jax.data.prompts import PromptTemplates, check_expressions
from flowseg_jax.data.tokenizer import Tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import postprocess
from flowseg_jax.inference.encoded import EncodedImage, GeneratedAnswer, PreprocessedImage
from flowseg_jax.inference.explanation import Explanation, LayerChoice, trace_decoder
from flowseg_jax.inference.selection import (
    Candidate,
    Prediction,
    SelectionConfig,
    select_prediction,
    unpack_candidates,
)
from flowseg_jax.models import flowseg, generate
from flowseg_jax.ops.portable import traced_for
from flowseg_jax.system.paths import resolve_path
from flowseg_jax.types import BatchShape, ExpressionQueries, PromptQueries

__all__ = [
    "Candidate",
    "EncodedImage",
    "Explanation",
    "GeneratedAnswer",
    "Prediction",
    "PreprocessedImage",
    "Segmentor",
    "SelectionConfig",
]

# A file, an upright image, or uint8 [H, W, 3] or [H, W].
ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray

ANSWER_TOKENS = 128  # that the model may write, its end included


class Segmentor:
    """A model that is ready to answer; sentences of similar length and images of a similar size share their compilations.

    Every method that answers takes the fields of `SelectionConfig` as keywords: `top_k`, `score_threshold` and
    `no_target_threshold`.

    Args:
        graphdef, params: the model (`models.flowseg.init_model`).
        tokenizer: its tokenizer.
        sam_size, siglip_size: sides S and V of its two square inputs, pixels.
        visual_tokens: slots that an image takes in the prompt.
        prompts: its prompt templates (None: the default ones); the fixed ones are used.
        no_target_threshold: what `SelectionConfig.no_target_threshold` is where it is not given.
        card: what the model knows.
        directory: where it lies, for `save_pretrained` and `push_to_hub`.

    Attributes:
        card: see there.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        tokenizer: Tokenizer,
        *,
        sam_size: int,
        siglip_size: int,
        visual_tokens: int,
        prompts: PromptTemplates | None = None,
        no_target_threshold: float = 0.0,
        card: ModelCard | None = None,
        directory: os.PathLike[str] | None = None,
    ):
        self.card, self._directory = card or ModelCard(), directory
        self._params, self._tokenizer, self._no_target_threshold = params, tokenizer, no_target_threshold
        self._prompts = dataclasses.replace(prompts or PromptTemplates(), randomize=False)
        self._shape = BatchShape(1, 0, PHRASE_BUCKETS[-1], 0, sam_size, siglip_size)
        self._prefix = np.array(collate.encode_prefix(self._prompts, tokenizer, visual_tokens), np.int32)
        special_tokens = generate.SpecialTokenIds(tokenizer.phrase_start, tokenizer.phrase_end, tokenizer.seg)
        self._eos = self._prompts.eos_ids(tokenizer)

        traced = traced_for(jax.default_backend())

        @traced
        def predict(params, cache, queries, count):
            model = flowseg.bind_params(graphdef, params)
            return postprocess.top_candidates(model, model.predict_cached(cache, queries), count)

        @traced
        def generate_answers(params, cache, prompts, tokens):
            return generate.generate_answers(
                flowseg.bind_params(graphdef, params), cache, prompts, max_new_tokens=tokens, eos_ids=self._eos
            )

        @traced
        def decode_answers(params, cache, prompts, written, outputs, count):
            model = flowseg.bind_params(graphdef, params)
            found, pairs = generate.decode_generated_masks(
                model, cache, prompts, written, special_tokens=special_tokens, num_outputs=outputs
            )
            return postprocess.top_candidates(model, found, count), pairs

        self._prefill = jax.jit(
            traced(lambda params, inputs, prefix: flowseg.bind_params(graphdef, params).prefill_image(inputs, prefix))
        )
        self._predict, self._upsample = jax.jit(predict, static_argnums=3), jax.jit(postprocess.upsample)
        self._trace_decoder = jax.jit(
            traced(lambda params, cache, queries: trace_decoder(flowseg.bind_params(graphdef, params), cache, queries))
        )
        self._generate_answers = jax.jit(generate_answers, static_argnums=3)
        self._decode_answers = jax.jit(decode_answers, static_argnums=(4, 5))

    @property
    def num_layers(self) -> int:
        """L, the number of layers of the mask decoder."""
        return len(jax.tree.leaves(self._params["mask_decoder"]["layers"])[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters as they lie in memory."""
        return sum(x.nbytes for x in jax.tree.leaves(self._params))

    @property
    def no_target_threshold(self) -> float:
        """The score below which the answer is "not found", where no other is given."""
        return self._no_target_threshold

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes the model as a directory of its own, which `load` reads; it appears complete or not at all.

        Raises:
            UserError: the directory exists, cannot be written, or the model was not loaded from one.
        """
        copy_pretrained(self._source(), directory)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Uploads the model to the Hugging Face hub as `org/name`, with its card as README.md; returns its address.

        Raises:
            UserError: the hub does not take it, or the model was not loaded from a directory.
        """
        return hub.upload(local_directory(resolve_path(self._source())), repo_id, private=private)

    def _source(self) -> os.PathLike[str]:
        if self._directory is None:
            raise UserError("this model was not loaded from a directory: write it by checkpoints.pretrained.save_pretrained")
        if is_checkpoint(self._directory):
            raise UserError(f"{self._directory} is a checkpoint of a run, not yet a model: its run writes one when it ends")
        return self._directory

    def __call__(self, image: ImageLike, text: str, *, name: str = "image", **selection: Any) -> Prediction:
        """`segment` for one sentence about an upright RGB image in memory."""
        return self.predict(self.encode_image(image, name=name), [text], **selection)[0]

    def segment(self, image: ImageLike, texts: Sequence[str], **selection: Any) -> list[Prediction]:
        """Segments what each text names; all texts share the image's encoding.

        Args:
            image: a file (EXIF rotation applied) or an upright image.
            texts: what to segment, one answer each.
            **selection: fields of `SelectionConfig`.

        Raises:
            UserError: a damaged file; an empty text or one with a special token; outputs that are no numbers.
        """
        self.validate_texts(texts)
        SelectionConfig(**selection)
        return self.predict(self.encode_image(image), texts, **selection)

    def preprocess(self, image: ImageLike, *, name: str = "image") -> PreprocessedImage:
        """Decodes and resizes a file (EXIF rotation applied) or an upright image, on the host alone: a thread may do it.

        Raises:
            UserError: a damaged file.
        """
        notes: Counter[str] = Counter()
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
                raise UserError(f"{name}: expected an array uint8 [H, W, 3] or [H, W], got {image.dtype} {list(image.shape)}")
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            image = images.to_rgb(image, name=name, notes=notes)
        else:
            name, image = os.fspath(image), images.load(image, exif=True, notes=notes)
        pixels = collate.prepare_pixels(image, (), self._shape)
        inputs = collate.collate_images([pixels], 1, (self._shape.sam_size, self._shape.siglip_size))
        return PreprocessedImage(name, np.array(image), inputs, tuple(notes))

    def encode_image(self, image: ImageLike | PreprocessedImage, *, name: str = "image") -> EncodedImage:
        """Encodes an image: a file, an upright image, or what `preprocess` made of one; errors as there."""
        ready = image if isinstance(image, PreprocessedImage) else self.preprocess(image, name=name)
        cache = self._prefill(self._params, ready.inputs, self._prefix)
        return EncodedImage(ready.name, ready.image, ready.inputs.resized_hw, cache)

    def validate_texts(self, texts: Sequence[str], where: str = "text") -> None:
        """Raises a UserError, which names `where`, for texts that are no use: none, empty ones, special tokens."""
        check_expressions(texts, self._tokenizer, where)

    def predict(self, encoded: EncodedImage, texts: Sequence[str], **selection: Any) -> list[Prediction]:
        """Segments what each text names in an encoded image; arguments and errors as in `segment`."""
        chosen_by = self._selection(selection)
        self.validate_texts(texts)
        return [
            select_prediction(encoded.name, text, encoded.image, found, chosen_by, unknown_words=self.card.unknown_words(text))
            for part in _rounds(texts)
            for text, found in zip(part, self._candidates_of(encoded, part, chosen_by.count), strict=True)
        ]

    def explain(self, image: ImageLike | EncodedImage, texts: Sequence[str], **selection: Any) -> list[Explanation]:
        """`predict`, and how each answer came about: what every decoder layer would answer, the gates, and what BAR changed.

        Args:
            image: as in `segment`, or encoded already.
            texts, selection: as in `segment`; errors as there.
        """
        encoded = image if isinstance(image, EncodedImage) else self.encode_image(image)
        predictions = self.predict(encoded, texts, **selection)
        traced = [one for part in _rounds(texts) for one in self._trace(encoded, part)]
        return [Explanation(prediction, **found) for prediction, found in zip(predictions, traced, strict=True)]

    def _trace(self, encoded: EncodedImage, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The fields of `Explanation` for as many texts as one round takes."""
        trace = self._trace_decoder(self._params, encoded.cache, self._queries(encoded, texts))
        packed, _ = self._upsampled(encoded, trace.masks)
        trace, packed = jax.device_get((trace, packed))
        inside = zip(trace.all_masks.shape[-2:], encoded.resized_hw[0], strict=True)
        h, w = (max(1, round(cells * float(side) / self._shape.sam_size)) for cells, side in inside)
        for k in range(len(texts)):
            *layers, after, band = (postprocess.unpack_mask(mask, encoded.image.shape[:2]) for mask in packed[0, k])
            figures = zip(trace.query[k], trace.score[k], trace.margin[k], trace.gate[k], trace.drift[k], layers, strict=True)
            yield {
                "layers": [
                    LayerChoice(int(query), float(score), float(margin), _or_none(gate), float(drift), mask)
                    for query, score, margin, gate, drift, mask in figures
                ],
                "scores": trace.all_scores[k],
                "mask_logits": trace.all_masks[k, :, :h, :w],
                "before_boundary": layers[-1],
                "after_boundary": after,
                "band": band if "boundary" in self._params else None,
            }

    def generate(
        self, encoded: EncodedImage, texts: Sequence[str], *, max_new_tokens: int = ANSWER_TOKENS, **selection: Any
    ) -> list[GeneratedAnswer]:
        """As `predict`, but the model writes its answer to each text itself; it may have several masks or none.

        A mask is conditioned on the phrase that the model wrote, or else on the text (`models.generate.pair_seg_with_phrases`).
        """
        questions = [
            turn.question for conversation in collate.make_conversations(self._prompts, texts) for turn in conversation.turns
        ]
        answers = self._generate(encoded, texts, questions, max_new_tokens, self._selection(selection))
        return [answer if answer.predictions else dataclasses.replace(answer, failure="no <SEG>") for answer in answers]

    def chat(
        self, encoded: EncodedImage, questions: Sequence[str], *, max_new_tokens: int = ANSWER_TOKENS, **selection: Any
    ) -> list[GeneratedAnswer]:
        """Answers free questions about an image. A `<SEG>` has a mask if the model writes the phrase `<p>..</p>` for it."""
        answers = self._generate(encoded, questions, questions, max_new_tokens, self._selection(selection))
        nameless = lambda answer: answer.without_phrase and not answer.predictions  # noqa: E731
        return [dataclasses.replace(one, failure="<SEG> without a phrase") if nameless(one) else one for one in answers]

    def _selection(self, selection: dict[str, Any]) -> SelectionConfig:
        chosen_by = SelectionConfig(**selection)
        if chosen_by.no_target_threshold is None:
            chosen_by = dataclasses.replace(chosen_by, no_target_threshold=self._no_target_threshold)
        return chosen_by

    def _candidates_of(self, encoded: EncodedImage, texts: Sequence[str], count: int) -> list[list[Candidate]]:
        """The best `count` candidates of each text, for as many texts as one round takes."""
        chosen = self._predict(self._params, encoded.cache, self._queries(encoded, texts), count)
        return list(self._at_original_size(encoded, chosen, range(len(texts))))

    def _queries(self, encoded: EncodedImage, texts: Sequence[str]) -> ExpressionQueries:
        """As many texts as one round takes, tokenized."""
        conversations = collate.encode_expressions(texts, self._prompts, self._tokenizer, encoded.name)
        shape = (1, *bucket_shape(len(texts), sum(len(one.input_ids) for one in conversations)))
        return collate.collate_queries([conversations], shape, len(self._prefix), self._tokenizer.pad, [encoded.name])

    def _generate(
        self,
        encoded: EncodedImage,
        texts: Sequence[str],
        questions: Sequence[str],
        max_new_tokens: int,
        chosen_by: SelectionConfig,
    ) -> list[GeneratedAnswer]:
        self.validate_texts(texts)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: at least one is needed")
        pairs = [*zip(texts, questions, strict=True)]
        return [answer for part in _rounds(pairs) for answer in self._answer(encoded, part, max_new_tokens, chosen_by)]

    def _answer(
        self, encoded: EncodedImage, part: Sequence[tuple[str, str]], max_new_tokens: int, chosen_by: SelectionConfig
    ) -> list[GeneratedAnswer]:
        """The answers to as many (text, question) as one round takes."""
        ids = [self._tokenizer.encode(question + self._prompts.template.assistant_prefix) for _, question in part]
        k, t = bucket_shape(len(part), max(map(len, ids)))
        prompts = PromptQueries.of([ids], (1, k, t))
        written = self._generate_answers(self._params, encoded.cache, prompts, max_new_tokens)
        tokens, lengths = jax.device_get((written.token_ids, written.lengths))
        most = int((tokens == self._tokenizer.seg).sum(1).max())
        found: dict[int, list[tuple[str, list[Candidate]]]] = {}
        if most:
            outputs = next((n for n in PHRASE_BUCKETS if most <= n), -(-most // PHRASE_BUCKETS[-1]) * PHRASE_BUCKETS[-1])
            chosen, pairs = self._decode_answers(self._params, encoded.cache, prompts, written, outputs, chosen_by.count)
            pairs, whole = jax.device_get(pairs), np.concatenate([prompts.input_ids[0], tokens], 1)
            rows, nth = np.nonzero(pairs.exists)
            phrases = [whole[i, pairs.start[i, j] + 1 : pairs.end[i, j]] for i, j in zip(rows, nth, strict=True)]
            restored = self._at_original_size(encoded, chosen, rows * outputs + nth)
            for row, phrase, candidates in zip(rows, phrases, restored, strict=True):
                found.setdefault(int(row), []).append((self._decode(phrase), candidates))
        answers = []
        for row, (text, _) in enumerate(part):
            token_ids = tokens[row, : lengths[row]]
            complete = bool(token_ids[-1] in self._eos)
            words = self._decode(token_ids[:-1] if complete else token_ids)
            masks = [
                select_prediction(encoded.name, text, encoded.image, c, chosen_by, words, phrase)
                for phrase, c in found.get(row, ())
            ]
            answers.append(GeneratedAnswer(text, words, complete, masks))
        return answers

    def _decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.hf.decode(ids.tolist(), skip_special_tokens=False).strip()

    def _upsampled(self, encoded: EncodedImage, logits: Any) -> tuple[jax.Array, jax.Array]:
        """Mask logits [1, K, N, h, w] at the image's own size, and whether they are numbers (`postprocess.upsample`)."""
        size = encoded.image.shape[:2]
        where = postprocess.geometry(encoded.resized_hw, [size], grid=logits.shape[-2:], padded_size=self._shape.sam_size)
        return self._upsample(logits, where)

    def _at_original_size(
        self, encoded: EncodedImage, chosen: postprocess.SelectedMasks, phrases: Sequence[int]
    ) -> Iterator[list[Candidate]]:
        """The candidates of each of these phrases, without those that are no numbers.

        Raises:
            UserError: the best one is none.
        """
        size = encoded.image.shape[:2]
        found = jax.device_get((chosen.query, chosen.score, *self._upsampled(encoded, chosen.logits)))
        for k in phrases:
            yield unpack_candidates(encoded.name, *(array[0, k] for array in found), size)


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _rounds(texts: Sequence[Any]) -> list[Sequence[Any]]:
    most = PHRASE_BUCKETS[-1]
    return [texts[at : at + most] for at in range(0, len(texts), most)]
