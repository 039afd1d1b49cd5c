"""From the fixture's raw images and conversations to a batch, by the product's own pipeline, compared with X-SAM's.

X-SAM asks for all phrases of an image in the turns of one conversation, so every image has one segment after its prefix here.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from PIL import Image

from convert_weights.parity.fixture import Arrays, Fixture
from convert_weights.parity.report import ParityReport
from flowseg_jax.data import images
from flowseg_jax.data.collate import (
    ProcessedImage,
    TokenizedConversation,
    empty_batch,
    encode_conversation,
    encode_prefix,
    pack_conversations,
)
from flowseg_jax.data.prompts import CHAT_TEMPLATES, ChatTemplate, Conversation, PromptTemplates, Turn
from flowseg_jax.data.tokenizer import IMAGE, PHRASE_START, SEG
from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.flowseg import normalize_sam_images, normalize_siglip_images
from flowseg_jax.types import IGNORE_INDEX, IMAGE_TOKEN_INDEX, PAD, Batch, BatchShape

FILE = "inputs.npz"


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids of an image's conversation: what stands before the image, and what follows it."""

    prefix: list[int]
    body: TokenizedConversation

    def whole(self) -> dict[str, list[int]]:
        """Under X-SAM's names, with one placeholder for the image."""
        first = len(self.prefix) + 1
        return {
            "input_ids": [*self.prefix, IMAGE_TOKEN_INDEX, *self.body.input_ids],
            "labels": [IGNORE_INDEX] * first + self.body.labels,
            "cond_ids": [PAD] * first + self.body.phrase_ids,
            "seg_ids": [PAD] * first + self.body.seg_ids,
        }


@dataclasses.dataclass(frozen=True)
class RecordedSample:
    """One image of the fixture, processed; `pixels` or `text` are None where the fixture lacks their source.

    Attributes:
        size: (height, width) of the original image.
        truth: uint8 [K, height, width], masks at that size, or None.
        phrases: number of phrases.
    """

    name: str
    pixels: ProcessedImage | None
    text: Text | None
    size: tuple[int, int] | None
    truth: np.ndarray | None

    @property
    def phrases(self) -> int:
        return 0 if self.text is None else max(self.text.body.phrase_ids, default=PAD) + 1


def split_turn(text: str, chat: ChatTemplate, name: str) -> str:
    """The question inside a rendered user turn.

    Raises:
        UserError: the template is another one.
    """
    if not (text.startswith(chat.user_prefix) and text.endswith(chat.assistant_prefix)):
        raise UserError(
            f"{name}: the turn {text!r} does not begin with {chat.user_prefix!r} and end with {chat.assistant_prefix!r}"
        )
    return text[len(chat.user_prefix) : len(text) - len(chat.assistant_prefix)]


def read_conversation(turns: list[dict[str, str]], chat: ChatTemplate, name: str) -> Conversation:
    """A conversation of `conversations.json` as the pipeline has it: without the template, and without the image in front.

    Raises:
        UserError: another template, or an image that is not in front.
    """
    out = []
    for number, turn in enumerate(turns):
        question = split_turn(turn["input"], chat, name)
        if number == 0:
            if not question.startswith(IMAGE):
                raise UserError(f"{name}: the first question does not begin with {IMAGE}: {question!r}")
            question = question.removeprefix(IMAGE)
        if not turn["output"].endswith(chat.suffix):
            raise UserError(f"{name}: the answer {turn['output']!r} does not end with {chat.suffix!r}")
        out.append(Turn(question, turn["output"].removesuffix(chat.suffix)))
    text = "".join(turn.question + turn.answer for turn in out)
    return Conversation(tuple(out), tuple(range(text.count(PHRASE_START))), tuple(range(text.count(SEG))))


def _recorded_text(arrays: Arrays, key: str) -> Text | None:
    """The text from the recorded ids, for a fixture without a tokenizer or without conversations."""
    names = ("input_ids", "labels", "cond_ids", "seg_ids")
    if not all(f"{key}/{name}" in arrays for name in names):
        return None
    ids, *rest = (arrays[f"{key}/{name}"].tolist() for name in names)
    if ids.count(IMAGE_TOKEN_INDEX) != 1:
        raise UserError(f"{FILE}: {key}/input_ids holds {ids.count(IMAGE_TOKEN_INDEX)} images, not one")
    at = ids.index(IMAGE_TOKEN_INDEX)
    return Text(ids[:at], TokenizedConversation(ids[at + 1 :], *(values[at + 1 :] for values in rest)))


def read_texts(fixture: Fixture, keys: list[str]) -> dict[str, Text]:
    """Tokenises the conversations of the named samples; those without one get the recorded ids."""
    conversations = fixture.conversations()
    tokenizer, prompts = fixture.tokenizer(), PromptTemplates(chat_template=fixture.chat)
    chat, texts = CHAT_TEMPLATES[fixture.chat], {}
    for key in keys:
        if tokenizer is None or key not in conversations:
            recorded = _recorded_text(fixture.arrays(FILE), key)
            if recorded is not None:
                texts[key] = recorded
            continue
        turns = conversations[key]
        body = encode_conversation(read_conversation(turns, chat, key), prompts, tokenizer, key)
        # X-SAM also writes the separator after the last answer. It changes nothing before it and has no loss.
        last = list(tokenizer.encode(turns[-1].get("sep", "")))
        none = [PAD] * len(last)
        body = TokenizedConversation(
            body.input_ids + last, body.labels + [IGNORE_INDEX] * len(last), body.phrase_ids + none, body.seg_ids + none
        )
        texts[key] = Text(encode_prefix(prompts, tokenizer, 0), body)
    return texts


def read_samples(fixture: Fixture, cfg: FlowSegConfig) -> list[RecordedSample]:
    """All samples of the fixture, in the order of config.json."""
    arrays = fixture.arrays(FILE)
    keys = [f"sample{i}" for i in range(len(fixture.config.get("samples", ())))]
    texts, out = read_texts(fixture, keys), []
    side = cfg.sam.image_size
    for key in keys:
        raw, masks, pixels, size = arrays.get(f"{key}/image_uint8"), arrays.get(f"{key}/gt_masks"), None, None
        if raw is not None:
            image, size = Image.fromarray(raw), raw.shape[:2]
            fitted, scaled = images.resize_and_pad(image, side)
            if masks is not None:
                packed = images.pack_masks(masks.astype(np.uint8), side)
            else:
                packed = np.packbits(arrays.get(f"{key}/mask_labels", np.zeros((0, side, side), np.uint8)), axis=-1)
            pixels = ProcessedImage(fitted, scaled, images.resize_to_square(image, cfg.siglip.image_size), packed)
        out.append(RecordedSample(key, pixels, texts.get(key), size, masks))
    return out


def compare_inputs(fixture: Fixture, samples: list[RecordedSample], report: ParityReport) -> None:
    """Compares every array of inputs.npz that the pipeline makes."""
    arrays = fixture.arrays(FILE)
    has_text = fixture.has("tokenizer.json") and fixture.has("conversations.json")
    for sample in samples:
        key, ours = sample.name, {}
        report.used(FILE, f"{key}/image_uint8", f"{key}/gt_masks")
        if sample.text is not None and has_text:
            ours |= {name: (np.array(ids), "exact") for name, ids in sample.text.whole().items()}
        if sample.pixels is not None:
            pixels = sample.pixels
            scaled = np.array(pixels.resized_hw)
            sam = normalize_sam_images(jnp.asarray(pixels.image)[None], jnp.asarray(scaled, jnp.int32)[None])[0]
            ours |= {
                "sam_pixel_values": (np.moveaxis(np.asarray(sam), -1, 0), "activation"),
                "siglip_pixel_values": (
                    np.moveaxis(np.asarray(normalize_siglip_images(jnp.asarray(pixels.siglip_image)[None])[0]), -1, 0),
                    "activation",
                ),
                "scaled_size": (scaled, "exact"),
            }
            if sample.truth is not None:
                ours["mask_labels"] = (images.unpack_masks(pixels.masks), "exact")
        for name, (value, kind) in ours.items():
            if f"{key}/{name}" in arrays:
                report.compare(FILE, f"{key}/{name}", value, arrays[f"{key}/{name}"], kind)
    report.explain(FILE, r"sample\d+/", "what it is made from is not in the fixture")


def compare_prompts(fixture: Fixture, report: ParityReport) -> None:
    """Whether our chat templates render the turns of prompts.json, text for text; the prompt templates are our own."""
    by_chat: dict[str, list[bool]] = {}
    for template, turns in fixture.prompts():
        chat = CHAT_TEMPLATES.get(template)
        for turn in turns if chat is not None else ():
            rendered = turn["input"].startswith(chat.user_prefix) and turn["input"].endswith(chat.assistant_prefix)
            fits = rendered and turn["output"].endswith(chat.suffix) and turn.get("sep") == chat.separator
            by_chat.setdefault(template, []).append(fits)
    for name, fits in by_chat.items():
        report.compare(
            "prompts.json", name, np.array(fits), np.ones(len(fits), bool), "exact", note="turns that the template renders"
        )


def assemble(samples: list[RecordedSample], cfg: FlowSegConfig, labels: list[Int[np.ndarray, " m"]] | None = None) -> Batch:
    """One batch of samples as X-SAM runs them.

    Args:
        samples: with pixels; with texts too, unless `labels` are given.
        cfg: the model.
        labels: stage 1: the category of each mask. Such a batch has no text, and one phrase that does not exist.

    Returns:
        A batch whose rows are as long as the longest text.
    """
    visual, rows = [IMAGE_TOKEN_INDEX] * cfg.num_visual_tokens, []
    for sample in samples:
        prefix = [*(sample.text.prefix if labels is None else ()), *visual]
        rows.append((prefix, [sample.text.body] if labels is None else []))
    length = max(len(prefix) + sum(len(body.input_ids) for body in bodies) for prefix, bodies in rows)
    shape = BatchShape(
        batch=len(samples),
        text_length=length,
        max_phrases=1 if labels is not None else max(sample.phrases for sample in samples),
        max_masks=max(1, *(len(sample.pixels.masks) for sample in samples)),
        sam_size=cfg.sam.image_size,
        siglip_size=cfg.siglip.image_size,
    )
    batch = empty_batch(shape, pad=0)
    for b, (sample, (prefix, bodies)) in enumerate(zip(samples, rows, strict=True)):
        for key, value in pack_conversations(prefix, bodies, length, 0, sample.name).items():
            getattr(batch, key)[b] = value
        count = len(sample.pixels.masks)
        batch.sam_images[b], batch.resized_hw[b] = sample.pixels.image, sample.pixels.resized_hw
        batch.siglip_images[b] = sample.pixels.siglip_image
        batch.packed_masks[b, :count], batch.mask_valid[b, :count] = sample.pixels.masks, True
        if labels is None:  # phrase k is about mask k
            batch.phrase_target[b, : sample.phrases] = np.minimum(np.arange(sample.phrases), max(count - 1, 0))
        else:
            batch.object_category[b, : len(labels[b])] = labels[b]
        batch.example_id[b] = b
    return batch
