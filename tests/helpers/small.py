"""A FlowSeg that is as small as it can be with every part present, and random batches for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import ConnectorConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.siglip import SiglipConfig
from flowseg_jax.training.optimizer import split_trainable
from flowseg_jax.training.program import TrainProgram
from flowseg_jax.training.step import TrainState
from flowseg_jax.types import IGNORE_INDEX, IMAGE_TOKEN_INDEX, PAD, Batch

VOCAB = 40


def config(**changes) -> FlowSegConfig:
    """Widths differ from each other on purpose; no layer count equals another."""
    base = FlowSegConfig(
        sam=SamConfig(32, 8, 24, 2, 2, 32, 3, (1,), remat="none"),
        siglip=SiglipConfig(
            image_size=16,
            patch_size=8,
            hidden_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            remat="none",
        ),
        llm=dataclasses.replace(
            LanguageConfig.tiny(VOCAB), hidden_size=28, num_hidden_layers=1, head_dim=14, intermediate_size=36
        ),
        connector=ConnectorConfig(channels=(24, 24, 24), hidden_channels=12),
        pixel_decoder=PixelDecoderConfig(
            channels=(48, 24, 12),
            strides=(32, 16, 8),
            embed_dim=16,
            mask_dim=16,
            num_layers=1,
            num_heads=2,
            num_points=2,
            mlp_dim=24,
            norm_groups=4,
            remat="none",
        ),
        mask_decoder=MaskDecoderConfig(
            embed_dim=16, num_queries=5, num_layers=4, num_heads=2, mlp_dim=24, query_init_std=1.0, remat="none"
        ),
        connector_hidden_layers=(1, 1, 2),
        num_classes=3,
        generic_pass="with_flow",
        negatives_group_size=2,
        exclude_same_target=True,
    )
    return dataclasses.replace(base, **changes)


def lean(**changes) -> FlowSegConfig:
    """Half the program to compile: referring passes only, one level of features, two decoder layers."""
    whole = config()
    return config(
        connector=ConnectorConfig(channels=(24,), hidden_channels=12, scales=(1,)),
        connector_hidden_layers=(2,),
        pixel_decoder=dataclasses.replace(whole.pixel_decoder, channels=(24,), strides=(8,), common_stride=8),
        mask_decoder=dataclasses.replace(whole.mask_decoder, num_layers=2, num_levels=1),
        num_classes=0,
        generic_pass="off",
        **changes,
    )


def experiment(cfg: FlowSegConfig, batch: Batch, **mesh: int) -> ConfigDict:
    """A run of this model on batches of that shape."""
    experiment = configs.read("configs/shapes_tiny.py")
    experiment.model = ConfigDict(cfg.to_dict())
    experiment.update(batch_size=len(batch.input_ids), num_steps=10)
    experiment.data.update(
        text_length=batch.input_ids.shape[1], max_phrases=batch.phrase_target.shape[1], max_masks=batch.mask_valid.shape[1]
    )
    experiment.optimizer.losses.update(language_weight=1.0, class_loss_scale=1.0, num_points=24, logits_chunk_size=16)
    experiment.mesh.update({"data": 1, **mesh})
    return experiment


def params(cfg: FlowSegConfig, seed: int = 0) -> dict[str, Any]:
    """Random parameters, without the compilation that drawing them as training does would need."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(("/scale", "logit_scale")):
            return np.ones(shape, np.float32)
        return (0.3 * rng.normal(size=shape)).astype(np.float32)

    return unflatten_params(
        {name: draw(name, x.shape) for name, x in flatten_params(flowseg.params_dict(flowseg.abstract_model(cfg)[1])).items()}
    )


def start(program: TrainProgram, params: dict[str, Any]) -> TrainState:
    """The state of a run that begins with these parameters, where the program wants it."""
    trainable, frozen = split_trainable(params, program.lr_multipliers)
    state = TrainState(np.int32(0), trainable, frozen, program.optimizer.init(trainable), np.zeros(2, np.int32))
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, program.state)


def batch(cfg: FlowSegConfig, *, images: int = 2, phrases: int = 2, masks: int = 3, seed: int = 0) -> Batch:
    """Random images; `phrases` referring conversations and one generic conversation after each, all slots used."""
    rng = np.random.default_rng(seed)
    visual, side, length = cfg.num_visual_tokens, cfg.sam.image_size, 6
    text = 1 + visual + phrases * length + 2 * masks + 2
    none = lambda: np.full((images, text), PAD, np.int32)  # noqa: E731
    tokens = rng.integers(0, VOCAB, (images, text)).astype(np.int32)
    tokens[:, 1 : 1 + visual] = IMAGE_TOKEN_INDEX
    phrase_ids, seg_ids, segments = none(), none(), np.zeros((images, text), np.int32)
    positions = np.broadcast_to(np.arange(text, dtype=np.int32), (images, text)).copy()
    at = 1 + visual
    for k in range(phrases):
        segments[:, at : at + length] = k + 1
        positions[:, at : at + length] = 1 + visual + np.arange(length)
        phrase_ids[:, at + 1 : at + 4] = k
        seg_ids[:, at + 4] = k
        at += length
    segments[:, at:] = phrases + 1
    positions[:, at:] = 1 + visual + np.arange(text - at)
    for m in range(masks):
        phrase_ids[:, at + 2 * m : at + 2 * m + 2] = phrases + m
    seg_ids[:, -2] = phrases
    labels = np.where(segments > 0, tokens, IGNORE_INDEX).astype(np.int32)
    soft = rng.random((images, masks, 4, 4)).repeat(side // 4, 2).repeat(side // 4, 3)
    return Batch(
        sam_images=rng.integers(0, 256, (images, side, side, 3)).astype(np.uint8),
        resized_hw=np.broadcast_to(np.array([side, side - 8], np.int32), (images, 2)).copy(),
        siglip_images=rng.integers(0, 256, (images, cfg.siglip.image_size, cfg.siglip.image_size, 3)).astype(np.uint8),
        input_ids=tokens,
        position_ids=positions,
        segment_ids=segments,
        labels=labels,
        phrase_ids=phrase_ids,
        seg_ids=seg_ids,
        packed_masks=np.packbits(soft > 0.6, axis=-1),
        mask_valid=np.ones((images, masks), bool),
        phrase_target=(np.arange(images * phrases).reshape(images, phrases) % masks).astype(np.int32),
        object_category=rng.integers(0, max(cfg.num_classes, 1), (images, masks)).astype(np.int32),
        object_name=np.broadcast_to(np.arange(masks, dtype=np.int32), (images, masks)).copy(),
        name_valid=np.ones((images, 0 if cfg.generic_pass == "off" else masks), bool),
        example_id=np.arange(images, dtype=np.int32),
    )


def pad(x: Batch, *, text: int = 0, phrases: int = 0, masks: int = 0, names: int = 0) -> Batch:
    """The same batch with more padding: `text` tokens after the end, `phrases`, `masks` and `names` that do not exist."""
    k = x.phrase_target.shape[1]
    wide = lambda a, n, fill: np.pad(a, ((0, 0), (0, n)), constant_values=fill)  # noqa: E731
    fields = {
        name: wide(getattr(x, name), text, fill)
        for name, fill in (
            ("input_ids", 7), ("position_ids", 3), ("segment_ids", PAD),
            ("labels", IGNORE_INDEX), ("phrase_ids", PAD), ("seg_ids", PAD),
        )
    }  # fmt: skip
    # Names are numbered after the phrases, so more room for phrases moves them.
    for name in ("phrase_ids", "seg_ids"):
        fields[name] = np.where(fields[name] >= k, fields[name] + phrases, fields[name])
    return dataclasses.replace(
        x,
        **fields,
        phrase_target=wide(x.phrase_target, phrases, PAD),
        packed_masks=np.pad(x.packed_masks, ((0, 0), (0, masks), (0, 0), (0, 0)), constant_values=255),
        mask_valid=wide(x.mask_valid, masks, False),
        object_category=wide(x.object_category, masks, PAD),
        object_name=wide(x.object_name, masks, PAD),
        name_valid=wide(x.name_valid, names, False),
    )
