"""Examples to one static-shape `Batch`: token sequences packed after a shared image prefix, pixels, packed masks.

The sequence of an image is

    prefix (segment 0):  [bos] user_prefix <image slots>
    conversation 1:      question tail answer suffix ...
    conversation 2:      ...

Every conversation continues the positions of the prefix, so each is computed as if it stood alone after the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from flowseg_jax.data import images, masks
from flowseg_jax.data.prompts import Conversation, PromptTemplates
from flowseg_jax.data.records import Annotation
from flowseg_jax.data.tokenizer import Tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.types import IGNORE_INDEX, IMAGE_TOKEN_INDEX, PAD, Batch, BatchShape, ExpressionQueries, ImageInputs


@dataclasses.dataclass(frozen=True)
class TokenizedConversation:
    """A tokenised conversation without its prefix; equally long lists with the meaning of `Batch`'s fields."""

    input_ids: list[int]
    labels: list[int]
    phrase_ids: list[int]
    seg_ids: list[int]


@dataclasses.dataclass(frozen=True)
class ProcessedImage:
    """Everything of an image that does not depend on the expressions.

    Attributes:
        image: uint8 [S, S, 3]; `resized_hw` is (h', w') inside it.
        siglip_image: uint8 [V, V, 3].
        masks: uint8 [A, S, ceil(S / 8)], one for each annotation.
    """

    image: UInt8[np.ndarray, "s s 3"]
    resized_hw: tuple[int, int]
    siglip_image: UInt8[np.ndarray, "v v 3"]
    masks: UInt8[np.ndarray, "a s s8"]

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + self.siglip_image.nbytes + self.masks.nbytes


@dataclasses.dataclass(frozen=True)
class TrainExample:
    """One image of a batch before padding.

    Attributes:
        name: what to call it in errors.
        pixels: the image's pixels; `masks` are its targets (m of them).
        conversations: what is said, in order.
        phrase_target: for each referring phrase the index of its target mask, NO_TARGET for one that refers to nothing.
        object_category: category of each target for the linear head, PAD without one.
        object_name: generic name that each target bears, PAD without one.
        names: how many names the generic conversation asks for.
        example_id: the image's id.
    """

    name: str
    pixels: ProcessedImage
    conversations: Sequence[Conversation]
    phrase_target: Sequence[int]
    object_category: Sequence[int]
    object_name: Sequence[int]
    example_id: int
    names: int = 0


def prepare_pixels(
    image: Image.Image,
    annotations: Sequence[Annotation],
    shape: BatchShape,
    jitter: images.LargeScaleJitter | None = None,
    square: bool = False,
) -> ProcessedImage:
    """Resizes an RGB image for both encoders and packs its annotations' masks.

    Args:
        image, annotations: what to resize.
        shape: of the batch.
        jitter: how to scale and cut the mask encoder's input; None: the whole image.
        square: pad the vision encoder's input to a square instead of stretching it.
    """
    rles, most = [a.rle for a in annotations], max(images.MAX_PIXELS // (image.height * image.width), 1)  # masks at a time

    def packed(pack: Callable[..., UInt8[np.ndarray, "n s s8"]]) -> UInt8[np.ndarray, "a s s8"]:
        some = (masks.decode(rles[at : at + most], image.height, image.width) for at in range(0, len(rles) or 1, most))
        return np.concatenate([pack(full, shape.sam_size) for full in some])

    vision = (images.square if square else images.resize_to_square)(image, shape.siglip_size)
    if jitter is not None:
        return ProcessedImage(jitter.image(image, shape.sam_size), jitter.cut, vision, packed(jitter.pack_masks))
    fitted, scaled = images.resize_and_pad(image, shape.sam_size)
    return ProcessedImage(fitted, scaled, vision, packed(images.pack_masks))


def encode_prefix(prompts: PromptTemplates, tokenizer: Tokenizer, visual_tokens: int) -> list[int]:
    """Ids of what every conversation of an image begins with: bos (if any), the template's user_prefix, the visual slots.

    A bos that is the user_prefix's first special token (SmolLM2's is `<|im_start|>`) stands once.
    """
    head = tokenizer.encode(prompts.template.user_prefix)
    bos = () if tokenizer.bos in (None, *head[:1]) else (tokenizer.bos,)
    return [*bos, *head, *([IMAGE_TOKEN_INDEX] * visual_tokens)]


def encode_conversation(
    conversation: Conversation, prompts: PromptTemplates, tokenizer: Tokenizer, name: str
) -> TokenizedConversation:
    """Tokenises a conversation as it follows the image; labels on answers and their suffix only.

    Questions (from the second on with the template's user_prefix before them), answers and separators are tokenised one by
    one. Spans and outputs are numbered in the order of the text.

    Raises:
        UserError: an expression contains a special token, so that spans and phrases do not correspond.
    """
    chat = prompts.template
    tokens: list[int] = []
    labels: list[int] = []
    for number, turn in enumerate(conversation.turns):
        # What stands between two placeholders or answers is one chunk: some tokenizers treat a chunk's first word apart.
        head = chat.user_prefix if number else ""
        question = tokenizer.encode(head + turn.question + chat.assistant_prefix)
        if number:
            # After the suffix, a special token: some tokenizers (Phi-3's) swallow the space that follows one.
            ended = tokenizer.encode(chat.suffix)
            question = (*tokenizer.encode(chat.suffix + chat.separator)[len(ended) :], *question)
        answer = tokenizer.encode(turn.answer + chat.suffix)
        tokens += (*question, *answer)
        labels += (*([IGNORE_INDEX] * len(question)), *answer)
    phrase_ids, seg_ids = [PAD] * len(tokens), [PAD] * len(tokens)
    starts = [i for i, t in enumerate(tokens) if t == tokenizer.phrase_start]
    ends = [i for i, t in enumerate(tokens) if t == tokenizer.phrase_end]
    outputs = [i for i, t in enumerate(tokens) if t == tokenizer.seg]
    ordered = all(s < e for s, e in zip(starts, ends, strict=False)) and all(
        e < s for e, s in zip(ends, starts[1:], strict=False)
    )
    if len(starts) != len(conversation.phrases) or len(ends) != len(starts) or not ordered:
        raise UserError(
            f"{name}: {len(conversation.phrases)} phrases became {len(starts)} spans; an expression contains <p> or </p>"
        )
    if len(outputs) != len(conversation.outputs):
        raise UserError(
            f"{name}: {len(conversation.outputs)} outputs became {len(outputs)} <SEG>; an expression contains <SEG>"
        )
    for phrase, start, end in zip(conversation.phrases, starts, ends, strict=True):
        phrase_ids[start : end + 1] = [phrase] * (end + 1 - start)
    for phrase, at in zip(conversation.outputs, outputs, strict=True):
        seg_ids[at] = phrase
    return TokenizedConversation(tokens, labels, phrase_ids, seg_ids)


def encode_question(conversation: Conversation, prompts: PromptTemplates, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the first question alone, as it follows the image, up to where its answer begins."""
    return tokenizer.encode(conversation.turns[0].question + prompts.template.assistant_prefix)


def pack_conversations(
    prefix: Sequence[int],
    conversations: Sequence[TokenizedConversation],
    length: int,
    pad: int,
    name: str,
    start: int | None = None,
) -> dict[str, Int[np.ndarray, " t"]]:
    """One image's token arrays: prefix, then the conversations, then padding.

    Args:
        prefix: ids of segment 0; it ends with the visual slots. Empty where it has been read already.
        conversations: what follows, without a slot; conversation i is segment i + 1.
        length: T. Nothing is ever cut: a phrase without its end would be a different phrase.
        pad: id after the end.
        name: the example, for the error.
        start: position at which each conversation starts; None: len(prefix).

    Returns:
        int32 [T] arrays `input_ids`, `position_ids`, `segment_ids`, `labels`, `phrase_ids`, `seg_ids`.

    Raises:
        UserError: the text does not fit.
        ValueError: a visual slot somewhere else than at the end of the prefix: losses skip what stands before that.
    """
    slots = prefix.count(IMAGE_TOKEN_INDEX)
    if IMAGE_TOKEN_INDEX in prefix[: len(prefix) - slots] or any(IMAGE_TOKEN_INDEX in c.input_ids for c in conversations):
        raise ValueError(f"{name}: the visual slots must be one run at the end of the prefix")
    start = len(prefix) if start is None else start
    used = len(prefix) + sum(len(c.input_ids) for c in conversations)
    if used > length:
        raise UserError(
            f"{name}: needs {used} tokens ({len(prefix)} of them before the text), more than the text length {length}; "
            "raise data.text_length or ask fewer phrases per image"
        )
    out = {key: np.full(length, PAD, np.int32) for key in ("segment_ids", "phrase_ids", "seg_ids")}
    out |= {"input_ids": np.full(length, pad, np.int32), "labels": np.full(length, IGNORE_INDEX, np.int32)}
    out["position_ids"] = np.zeros(length, np.int32)
    at = len(prefix)
    out["input_ids"][:at] = prefix
    out["segment_ids"][:at] = 0
    out["position_ids"][:at] = np.arange(at)
    for number, conversation in enumerate(conversations, 1):
        here = slice(at, at := at + len(conversation.input_ids))
        for key in ("input_ids", "labels", "phrase_ids", "seg_ids"):
            out[key][here] = getattr(conversation, key)
        out["segment_ids"][here] = number
        out["position_ids"][here] = np.arange(start, start + len(conversation.input_ids))
    return out


def empty_batch(shape: BatchShape, pad: int) -> Batch:
    """A batch of nothing but padding."""
    b, t, k, m, s = shape.batch, shape.text_length, shape.max_phrases, shape.max_masks, shape.sam_size
    none = {key: np.full((b, t), PAD, np.int32) for key in ("segment_ids", "phrase_ids", "seg_ids")}
    return Batch(
        sam_images=np.zeros((b, s, s, 3), np.uint8),
        resized_hw=np.full((b, 2), s, np.int32),
        siglip_images=np.zeros((b, shape.siglip_size, shape.siglip_size, 3), np.uint8),
        input_ids=np.full((b, t), pad, np.int32),
        position_ids=np.zeros((b, t), np.int32),
        labels=np.full((b, t), IGNORE_INDEX, np.int32),
        packed_masks=np.zeros((b, m, s, -(-s // 8)), np.uint8),
        mask_valid=np.zeros((b, m), bool),
        phrase_target=np.full((b, k), PAD, np.int32),
        object_category=np.full((b, m), PAD, np.int32),
        object_name=np.full((b, m), PAD, np.int32),
        name_valid=np.zeros((b, shape.max_names), bool),
        example_id=np.full((b,), PAD, np.int64),
        **none,
    )


def truncate_conversations(chats: Sequence[TokenizedConversation], room: int) -> list[TokenizedConversation]:
    """The first `room` tokens of conversations without phrases: what is left of a long chat still trains the language model."""
    kept = []
    for chat in chats:
        kept.append(TokenizedConversation(*(getattr(chat, field.name)[:room] for field in dataclasses.fields(chat))))
        room -= len(kept[-1].input_ids)
    return kept


def collate(
    rows: Sequence[TrainExample], shape: BatchShape, prompts: PromptTemplates, tokenizer: Tokenizer | None, visual_tokens: int
) -> Batch:
    """Pads rows to a batch; rows that are missing stay padding. Without a tokenizer, all text does.

    Raises:
        UserError: an example has more text, phrases or masks than the shape allows.
        ValueError: more rows than the batch has.
    """
    if len(rows) > shape.batch:
        raise ValueError(f"{len(rows)} rows do not fit a batch of {shape.batch}")
    batch = empty_batch(shape, 0 if tokenizer is None else tokenizer.pad)
    prefix = [] if tokenizer is None else encode_prefix(prompts, tokenizer, visual_tokens)
    for b, row in enumerate(rows):
        phrases, targets = len(row.phrase_target), len(row.pixels.masks)
        if phrases > shape.max_phrases or targets > shape.max_masks or row.names > shape.max_names:
            raise UserError(
                f"{row.name}: {phrases} phrases, {targets} masks and {row.names} names, "
                f"but the batch has room for {shape.max_phrases}, {shape.max_masks} and {shape.max_names}"
            )
        if tokenizer is not None:
            encoded = [encode_conversation(c, prompts, tokenizer, row.name) for c in row.conversations]
            if not any(c.phrases or c.outputs for c in row.conversations):
                encoded = truncate_conversations(encoded, shape.text_length - len(prefix))
            for key, value in pack_conversations(prefix, encoded, shape.text_length, tokenizer.pad, row.name).items():
                getattr(batch, key)[b] = value
        batch.sam_images[b] = row.pixels.image
        batch.resized_hw[b] = row.pixels.resized_hw
        batch.siglip_images[b] = row.pixels.siglip_image
        batch.packed_masks[b, :targets] = row.pixels.masks
        batch.mask_valid[b, :targets] = True
        batch.phrase_target[b, :phrases] = row.phrase_target
        batch.object_category[b, :targets] = row.object_category
        batch.object_name[b, :targets] = row.object_name
        batch.name_valid[b, : row.names] = True
        batch.example_id[b] = row.example_id
    return batch


def collate_images(pixels: Sequence[ProcessedImage], count: int, sides: tuple[int, int]) -> ImageInputs:
    """The images of a batch of `count` for encoders of `sides` (S, V); missing ones are black."""
    side, vision = sides
    out = ImageInputs(
        np.zeros((count, side, side, 3), np.uint8),
        np.full((count, 2), side, np.int32),
        np.zeros((count, vision, vision, 3), np.uint8),
    )
    for i, one in enumerate(pixels):
        out.sam_images[i], out.resized_hw[i], out.siglip_images[i] = one.image, one.resized_hw, one.siglip_image
    return out


def make_conversations(
    prompts: PromptTemplates, phrases: Sequence[str], families: Sequence[str] | None = None
) -> list[Conversation]:
    """The conversations that ask for phrases in the fixed prompt template.

    With `families`, the phrases are reasoning questions, "short" or "long" ones.
    """
    if families is None:
        return [prompts.referring(phrase, k) for k, phrase in enumerate(phrases)]
    numbered = enumerate(zip(phrases, families, strict=True))
    return [prompts.reasoning(phrase, k, family == "long") for k, (phrase, family) in numbered]


def encode_expressions(
    texts: Sequence[str], prompts: PromptTemplates, tokenizer: Tokenizer, name: str
) -> list[TokenizedConversation]:
    """The conversation of each text about the image `name`, in the fixed prompt template, tokenized."""
    return [encode_conversation(said, prompts, tokenizer, name) for said in make_conversations(prompts, texts)]


def collate_queries(
    rows: Sequence[Sequence[TokenizedConversation]], shape: tuple[int, int, int], start: int, pad: int, names: Sequence[str]
) -> ExpressionQueries:
    """Pads the conversations about each image to a batch of (B, K, T) = `shape`; missing rows stay padding.

    Args:
        rows: encoded conversations, one a phrase and in its order.
        shape: images, phrases an image, tokens an image.
        start: length of the prefix, which has been read already.
        pad: id after the end.
        names: what to call each row in errors.

    Raises:
        UserError: an image has more text than there is room.
    """
    b, k, t = shape
    arrays = [pack_conversations((), row, t, pad, name, start) for row, name in zip(rows, names, strict=True)]
    arrays += [pack_conversations((), (), t, pad, "", start)] * (b - len(rows))
    stacked = {
        key: np.stack([a[key] for a in arrays]) for key in ("input_ids", "position_ids", "segment_ids", "phrase_ids", "seg_ids")
    }
    counts = np.array([len(row) for row in rows] + [0] * (b - len(rows)))
    return ExpressionQueries(**stacked, query_valid=np.arange(k) < counts[:, None])
