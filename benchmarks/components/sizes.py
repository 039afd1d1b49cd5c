"""Sizes of the components, and the batches and runs of the whole models."""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from flowseg_jax import experiment as configs
from flowseg_jax.data.collate import empty_batch
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.types import IMAGE_TOKEN_INDEX, Batch, BatchShape

VOCABULARY = 8192  # of the whole models: with Qwen's, a train step in two frameworks would not fit in 24 GiB


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What components are measured at.

    Attributes:
        model: sizes of the single layers.
        whole: of the forward pass and the train step.
        seven: of the image with seven expressions; its stacks are cut from `model`'s by about the same factor.
        words: tokens of an expression's conversation, its answer included.
        points: that losses are taken at.
    """

    model: FlowSegConfig
    whole: FlowSegConfig
    seven: FlowSegConfig
    words: int
    points: int

    @property
    def prompt(self) -> int:
        """Tokens of an image with one expression."""
        return prefix(self.model) + self.words


def prefix(model: FlowSegConfig) -> int:
    """Tokens that all expressions of an image share: one of text and the visual ones."""
    return 1 + model.num_visual_tokens


def cut(model: FlowSegConfig, sam: int, siglip: int, llm: int, pixel: int, decoder: int) -> FlowSegConfig:
    """The same widths with so many layers; SAM's last one is global, and the connector reads its last three states."""
    replace = dataclasses.replace
    return replace(
        model,
        sam=replace(model.sam, num_hidden_layers=sam, global_attn_indexes=(sam - 1,)),
        siglip=replace(model.siglip, num_hidden_layers=siglip),
        llm=replace(model.llm, num_hidden_layers=llm),
        pixel_decoder=replace(model.pixel_decoder, num_layers=pixel),
        mask_decoder=replace(model.mask_decoder, num_layers=decoder),
        connector_hidden_layers=tuple(max(1, sam - 2 + i) for i in range(3)),
    )


def _sizes() -> dict[str, Sizes]:
    qwen = dataclasses.replace(LanguageConfig.qwen3_4b(), vocab_size=VOCABULARY)
    full = dataclasses.replace(FlowSegConfig.full(qwen), dtype="float32", negatives_group_size=1)
    tiny = dataclasses.replace(FlowSegConfig.tiny(64), generic_pass="off", exclude_same_target=False)
    tiny = dataclasses.replace(
        tiny, pixel_decoder=dataclasses.replace(tiny.pixel_decoder, num_points=4)
    )  # HF has no other number
    small = cut(tiny, 2, 3, 1, 1, 2)
    # The LLM does not read SigLIP's last layer: of three, two run.
    whole, seven = cut(full, 2, 3, 2, 2, 2), cut(full, 4, 5, 6, 1, 2)
    return {"full": Sizes(full, whole, seven, 46, 12544), "tiny": Sizes(tiny, small, small, 6, 32)}


SIZES = _sizes()


def dummy_batch(model: FlowSegConfig, expressions: int, words: int, seed: int = 0) -> Batch:
    """One image and expressions about it, packed after it; each refers to a mask of its own."""
    rng = np.random.default_rng(seed)
    start = prefix(model)
    side, vision = model.sam.image_size, model.siglip.image_size
    shape = BatchShape(1, start + expressions * words, expressions, expressions, side, vision)
    batch = empty_batch(shape, 0)
    batch.input_ids[:] = rng.integers(0, model.llm.vocab_size, batch.input_ids.shape)
    batch.input_ids[:, 1:start] = IMAGE_TOKEN_INDEX
    batch.segment_ids[:, :start] = 0
    batch.position_ids[:, :start] = np.arange(start)
    for number in range(expressions):
        here = slice(start + number * words, start + (number + 1) * words)
        batch.segment_ids[:, here] = number + 1
        batch.position_ids[:, here] = start + np.arange(words)
        answer = slice(here.stop - words // 3, here.stop)
        batch.labels[:, answer] = batch.input_ids[:, answer]
        batch.phrase_ids[:, here.start + 1 : here.start + words // 2] = number
        batch.seg_ids[:, here.stop - 2] = number
    batch.sam_images[:] = rng.integers(0, 256, batch.sam_images.shape)
    batch.siglip_images[:] = rng.integers(0, 256, batch.siglip_images.shape)
    batch.resized_hw[:] = side
    batch.packed_masks[:] = blobs(rng, expressions, side)
    batch.mask_valid[:] = True
    batch.phrase_target[:] = np.arange(expressions)
    return dataclasses.replace(batch, example_id=np.zeros(1, np.int32))


def one_of(batch: Batch, number: int, words: int) -> Batch:
    """The same image with one of its expressions alone."""
    expressions = batch.phrase_target.shape[1]
    start = batch.input_ids.shape[1] - expressions * words
    keep = np.r_[:start, start + number * words : start + (number + 1) * words]
    renumbered = lambda ids: np.where(ids[:, keep] == number, 0, -1).astype(ids.dtype)  # noqa: E731
    return dataclasses.replace(
        batch,
        **{name: getattr(batch, name)[:, keep] for name in ("input_ids", "position_ids", "labels")},
        segment_ids=np.minimum(batch.segment_ids[:, keep], 1),
        phrase_ids=renumbered(batch.phrase_ids),
        seg_ids=renumbered(batch.seg_ids),
        phrase_target=batch.phrase_target[:, number : number + 1],
    )


def blobs(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    """Random masks of coarse squares, packed along the width: uint8 [count, side, side / 8]."""
    coarse = rng.random((count, 8, 8)) > 0.6
    pixels = np.arange(side) * 8 // side
    return np.packbits(coarse[:, pixels][:, :, pixels], axis=-1)


def experiment(cfg: FlowSegConfig, batch: Batch, points: int) -> ConfigDict:
    """A run of this model on batches of that shape, everything trained."""
    config = configs.read("configs/shapes_tiny.py")
    config.model = ConfigDict(cfg.to_dict())
    config.update(batch_size=1, num_steps=1000)
    config.data.update(
        text_length=batch.input_ids.shape[1], max_phrases=batch.phrase_target.shape[1], max_masks=batch.mask_valid.shape[1]
    )
    config.optimizer.losses.update(language_weight=1.0, class_loss_scale=1.0, num_points=points, logits_chunk_size=512)
    config.optimizer.param_groups = ((".*", 1.0),)
    config.mesh.update(data=1, fsdp=1)
    return config
