"""The one thing that travels from the data pipeline to the model: a frozen dataclass of static-shape arrays.

Dimensions: B images, T text (visual slots included), K phrases, M target masks, G generic names, S and V the side of the mask
encoder's and of the vision encoder's image. Everything is padded to the shapes of a `BatchShape` and masked; padding never
changes a real example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

IMAGE_TOKEN_INDEX = -200  # placeholder id: one slot per visual token; never reaches the embedding table
IGNORE_INDEX = -100  # label of a position without language loss
PAD = -1  # "no such phrase / object / segment", and padding of every index array
NO_TARGET = -2  # in `phrase_target`: the phrase is there, what it names is not


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static sizes of a batch.

    Attributes:
        batch: images (B).
        text_length: sequence length with the visual tokens (T).
        max_phrases: referring phrases per image (K); each is one decoder pass.
        max_masks: target masks per image (M).
        sam_size: side of the mask encoder's square input (S), pixels.
        siglip_size: side of the vision encoder's square input (V), pixels.
        max_names: names that the generic conversation of an image may ask for (G); 0 where there is none.
    """

    batch: int
    text_length: int
    max_phrases: int
    max_masks: int
    sam_size: int
    siglip_size: int
    max_names: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One static-shape batch.

    A row with an image has exactly as many visual slots as the model has visual tokens, in one run; a row of padding has none.
    What is said of the image follows: no label, no phrase span and no `<SEG>` stands before the end of that run. So none has
    an index below the number of visual tokens, and losses leave these positions out.

    Attributes:
        sam_images: uint8 [B, S, S, 3], RGB, longest side resized to S, padded with 0 at the bottom and right, not normalised.
        resized_hw: int32 [B, 2], (h', w') of the resized image inside `sam_images`.
        siglip_images: uint8 [B, V, V, 3], RGB, resized without keeping the aspect (in stage 2 padded to a square before).
        input_ids: int32 [B, T]; text ids, IMAGE_TOKEN_INDEX in each visual slot, the pad id after the end.
        position_ids: int32 [B, T], rotary position of each token.
        segment_ids: int32 [B, T]; 0 = prefix that every conversation of the image attends to, 1.. = conversation, PAD =
            padding. A token attends causally to the prefix and to its own conversation, so conversations packed after one
            image are computed as if each stood alone.
        labels: int32 [B, T]; the token itself where it has language loss, IGNORE_INDEX elsewhere (shifted by the loss).
        phrase_ids: int32 [B, T]; k on every token of phrase k's `<p>..</p>` span, the two markers included; PAD elsewhere.
            0..K-1 are referring phrases, K..K+G-1 the names of the generic conversation.
        seg_ids: int32 [B, T]; k on the `<SEG>` of phrase k, K on the generic conversation's; PAD elsewhere.
        packed_masks: uint8 [B, M, S, ceil(S / 8)]; target masks at the mask encoder's size, packed along the width
            (`np.packbits`, big end first).
        mask_valid: bool [B, M]; False on padding.
        phrase_target: int32 [B, K]; which of `packed_masks` phrase k refers to, NO_TARGET for one that refers to nothing, PAD
            for a padded phrase.
        object_category: int32 [B, M]; category of each mask for the linear class head, PAD without one.
        object_name: int32 [B, M]; which name (0..G-1) of the generic conversation each mask bears, PAD without one.
        name_valid: bool [B, G]; names that the generic conversation asks for, those of which the image has no object included.
        example_id: int64 [B]; the record's id, PAD for a padded example.
    """

    sam_images: np.ndarray
    resized_hw: np.ndarray
    siglip_images: np.ndarray
    input_ids: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    labels: np.ndarray
    phrase_ids: np.ndarray
    seg_ids: np.ndarray
    packed_masks: np.ndarray
    mask_valid: np.ndarray
    phrase_target: np.ndarray
    object_category: np.ndarray
    object_name: np.ndarray
    name_valid: np.ndarray
    example_id: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageInputs:
    """The pixels of B images; the fields are those of `Batch`.

    Attributes:
        sam_images: uint8 [B, S, S, 3].
        resized_hw: int32 [B, 2].
        siglip_images: uint8 [B, V, V, 3].
    """

    sam_images: np.ndarray
    resized_hw: np.ndarray
    siglip_images: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpressionQueries:
    """Expressions to segment in images that have been encoded: up to K phrases each, a conversation (segment) a phrase.

    Attributes:
        input_ids: int32 [B, T], text after the image only; the pad id after the end.
        position_ids: int32 [B, T], counted on from the prefix.
        segment_ids: int32 [B, T]; 1.. = conversation, PAD = padding.
        phrase_ids, seg_ids: int32 [B, T], as in `Batch`; 0..K-1.
        query_valid: bool [B, K]; False for a phrase that is padding.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    phrase_ids: np.ndarray
    seg_ids: np.ndarray
    query_valid: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptQueries:
    """Questions without answers, up to K about each encoded image.

    Attributes:
        input_ids: int32 [B, K, T], text after the image up to where the answer begins, right-padded.
        lengths: int32 [B, K], real tokens; 0 for a question that is padding.
        query_valid: bool [B, K]; False for a question that is padding.
    """

    input_ids: np.ndarray
    lengths: np.ndarray

    @property
    def query_valid(self) -> np.ndarray:
        return self.lengths > 0

    @classmethod
    def of(cls, rows: Sequence[Sequence[Sequence[int]]], shape: tuple[int, int, int]) -> PromptQueries:
        """Pads the ids of each image's questions to (B, K, T) = `shape`, on the host."""
        queries = cls(np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32))
        for b, row in enumerate(rows):
            for k, ids in enumerate(row):
                queries.input_ids[b, k, : len(ids)] = ids
                queries.lengths[b, k] = len(ids)
        return queries
