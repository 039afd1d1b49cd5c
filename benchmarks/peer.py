"""FlowSeg in PyTorch, the peer of the whole model: Hugging Face's modules, and X-SAM's and the paper's formulas between them.

Encoders, pixel decoder and decoder layers are transformers' own (`sdpa` attention). Connector and projectors are plain
PyTorch after X-SAM (`model/modules/connector` and its projectors), SR, CR and BAR after the paper's equations. As in X-SAM,
every decoder pass has a copy of its image's memory, and attention masks are resized masks of all queries. Parameters have the
names that `convert_weights` exports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Mask2FormerConfig, Qwen3Config, SamVisionConfig, SiglipVisionConfig
from transformers.models.mask2former import modeling_mask2former as mask2former
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.sam import modeling_sam as sam
from transformers.models.siglip import modeling_siglip as siglip

from flowseg_jax.models.boundary import BoundaryConfig
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import ConnectorConfig
from flowseg_jax.models.flowseg import SAM_MEAN, SAM_STD
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.siglip import SiglipConfig
from flowseg_jax.types import IMAGE_TOKEN_INDEX, PAD, Batch

Tensors = dict[str, torch.Tensor]


def sam_config(cfg: SamConfig) -> SamVisionConfig:
    config = SamVisionConfig(
        hidden_size=cfg.hidden_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        layer_norm_eps=cfg.layer_norm_eps,
        window_size=cfg.window_size,
        global_attn_indexes=list(cfg.global_attn_indexes),
        mlp_dim=cfg.mlp_dim,
    )
    config._attn_implementation = "sdpa"
    return config


def siglip_config(cfg: SiglipConfig) -> SiglipVisionConfig:
    config = SiglipVisionConfig(
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        layer_norm_eps=cfg.layer_norm_eps,
    )
    config._attn_implementation = "sdpa"
    return config


def qwen3_config(cfg: LanguageConfig) -> Qwen3Config:
    config = Qwen3Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        rms_norm_eps=cfg.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        tie_word_embeddings=cfg.tie_word_embeddings,
    )
    config._attn_implementation = "sdpa"
    return config


def mask2former_config(pixel: PixelDecoderConfig, decoder: MaskDecoderConfig) -> Mask2FormerConfig:
    return Mask2FormerConfig(
        feature_size=pixel.embed_dim,
        mask_feature_size=pixel.mask_dim,
        hidden_dim=decoder.embed_dim,
        encoder_layers=pixel.num_layers,
        encoder_feedforward_dim=pixel.mlp_dim,
        num_attention_heads=decoder.num_heads,
        dim_feedforward=decoder.mlp_dim,
        decoder_layers=decoder.num_layers + 1,
        num_queries=decoder.num_queries,
        dropout=0.0,
    )


class TorchConnectorLevel(nn.Module):
    """One map of X-SAM's `model/modules/connector`; NHWC in, NCHW out."""

    def __init__(self, width: int, hidden: int, scale: float):
        super().__init__()
        inner = int(width * scale)
        convolutions = (nn.Conv2d(width, hidden, 1, bias=False), nn.Conv2d(hidden, hidden, 3, padding=1, bias=False))
        last = nn.Conv2d(hidden, inner, 1, bias=False)
        norms = [nn.LayerNorm(n, eps=1e-6) for n in (hidden, hidden, inner)]
        self.model = nn.ModuleList([convolutions[0], norms[0], convolutions[1], norms[1], last, norms[2]])
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution, norm in zip(self.model[::2], self.model[1::2], strict=True):
            x = norm(convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return pixel_shuffle(x, self.scale).permute(0, 3, 1, 2)


def pixel_shuffle(x: torch.Tensor, scale: float) -> torch.Tensor:
    """X-SAM's connector, on an NHWC map."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, int(w * scale), int(c / scale)).permute(0, 2, 1, 3)
    return x.reshape(n, int(w * scale), int(h * scale), int(c / scale**2)).permute(0, 2, 1, 3)


class Connector(nn.Module):
    def __init__(self, cfg: ConnectorConfig):
        super().__init__()
        levels = zip(cfg.channels, cfg.scales, strict=True)
        self.model = nn.ModuleList([TorchConnectorLevel(width, cfg.hidden_channels, scale) for width, scale in levels])
        self.order = cfg.low_to_high_order

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Low to high resolution."""
        return [self.model[i](maps[i]) for i in self.order]


def projector(d_in: int, hidden: int, d_out: int) -> nn.Module:
    class Projector(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(d_in, hidden), nn.GELU(), nn.Linear(hidden, d_out))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

    return Projector()


class FlowLayer(mask2former.Mask2FormerMaskedAttentionDecoderLayer):
    """Hugging Face's decoder layer with SR after the visual cross-attention and CR at its end."""

    def __init__(self, config: Mask2FormerConfig):
        super().__init__(config)
        width, self.heads = config.hidden_dim, config.num_attention_heads
        self.text_cross_attn = nn.MultiheadAttention(width, self.heads)
        self.text_cross_attn_layer_norm = nn.LayerNorm(width)
        self.text_gate = nn.Linear(2 * width, width)
        self.condition_cross_attn = nn.MultiheadAttention(width, self.heads)

    def forward(self, x, position, memory, memory_position, blocked, conditions, own):
        """x [Q, P, D], memory [S, P, D], blocked bool [P, Q, S], conditions [N, P, D], own bool [P, N] -> (x, conditions)."""
        blocked = blocked.repeat_interleave(self.heads, 0)
        found, _ = self.cross_attn(x + position, memory + memory_position, memory, attn_mask=blocked, need_weights=False)
        vision = self.cross_attn_layer_norm(x + found)
        found, _ = self.text_cross_attn(vision + position, conditions, conditions, key_padding_mask=~own, need_weights=False)
        words = self.text_cross_attn_layer_norm(vision + found)
        gate = self.text_gate(torch.cat([vision, words], -1)).sigmoid()
        x = gate * vision + (1 - gate) * words
        among = self.self_attn(hidden_states=x, position_embeddings=position.expand_as(x))[0]
        attended = self.self_attn_layer_norm(x + among)
        x = self.final_layer_norm(attended + self.fc2(self.fc1(attended).relu()))
        return x, conditions + self.condition_cross_attn(conditions, attended, attended, need_weights=False)[0]


class Boundary(nn.Module):
    """BAR: M + alpha tanh(f_refine([M || f_comp(F)])) B, B where dilation minus erosion of the probabilities exceeds eps."""

    def __init__(self, width: int, cfg: BoundaryConfig):
        super().__init__()
        self.compress = nn.Conv2d(width, cfg.hidden_channels, 1)
        self.refine = nn.Conv2d(1 + cfg.hidden_channels, 1, 3, padding=1)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.kernel, self.eps = cfg.kernel_size, cfg.threshold

    def forward(self, masks: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Masks [N, h, w] of one image, features [1, D, h, w]."""
        with torch.no_grad():
            probability = masks.sigmoid()[:, None]
            window = (self.kernel, 1, self.kernel // 2)
            edge = (F.max_pool2d(probability, *window) + F.max_pool2d(-probability, *window) > self.eps)[:, 0]
        projected = self.compress(features).expand(len(masks), -1, -1, -1)
        delta = self.refine(torch.cat([masks[:, None], projected], 1)).tanh()[:, 0] * self.alpha
        return masks + delta * edge


class Predictions:
    """What the decoder predicts before the first layer and after each: lists of J entries.

    Class logits [P, Q, N], masks [P, Q, h, w].
    """

    def __init__(self):
        self.classes: list[torch.Tensor] = []
        self.masks: list[torch.Tensor] = []


class FlowSegTorch(nn.Module):
    """The network for one image at a time, all of whose expressions are decoder passes.

    Args:
        cfg: with semantic flow (`norm="post"`), BAR, a Qwen3 and three levels; without linear head or pass by name.
        tensors: `export_params("flowseg", ...)`.
        wrap: what every repeated layer is wrapped with, `torch.compile` or nothing.
    """

    def __init__(self, cfg: FlowSegConfig, tensors: Tensors, wrap: Callable[[Any], Any] = lambda layer: layer):
        super().__init__()
        self.cfg, width = cfg, cfg.mask_decoder.embed_dim
        text, vision, mask = qwen3_config(cfg.llm), siglip_config(cfg.siglip), sam_config(cfg.sam)
        decoders = mask2former_config(cfg.pixel_decoder, cfg.mask_decoder)
        with torch.device("meta"):
            self.sam = nn.Module()
            self.sam.patch_embed = sam.SamPatchEmbeddings(mask)
            self.sam.pos_embed = nn.Parameter(torch.zeros(1, cfg.sam.grid_size, cfg.sam.grid_size, cfg.sam.hidden_size))
            windows = (0 if i in cfg.sam.global_attn_indexes else cfg.sam.window_size for i in range(cfg.sam.num_hidden_layers))
            self.sam.layers = nn.ModuleList([sam.SamVisionLayer(mask, window) for window in windows])
            self.siglip = nn.Module()
            self.siglip.embeddings = nn.Module()
            self.siglip.embeddings.patch_embedding = nn.Conv2d(
                3, cfg.siglip.hidden_size, cfg.siglip.patch_size, cfg.siglip.patch_size
            )
            self.siglip.embeddings.position_embedding = nn.Embedding(cfg.siglip.num_patches, cfg.siglip.hidden_size)
            self.siglip.encoder = nn.Module()
            self.siglip.encoder.layers = nn.ModuleList(
                [siglip.SiglipEncoderLayer(vision) for _ in range(cfg.siglip.num_hidden_layers)]
            )
            self.llm = nn.Module()
            self.llm.embed_tokens = nn.Embedding(cfg.llm.vocab_size, cfg.llm.hidden_size)
            self.llm.layers = nn.ModuleList([qwen3.Qwen3DecoderLayer(text, i) for i in range(cfg.llm.num_hidden_layers)])
            self.llm.norm = qwen3.Qwen3RMSNorm(cfg.llm.hidden_size, cfg.llm.rms_norm_eps)
            self.visual_projector = projector(cfg.siglip.hidden_size, cfg.llm.hidden_size, cfg.llm.hidden_size)
            self.seg_projector = projector(4 * cfg.sam.hidden_size, cfg.llm.hidden_size, cfg.llm.hidden_size)
            self.llm_projector = projector(cfg.llm.hidden_size, width, width)
            self.connector = Connector(cfg.connector)
            self.pixel_decoder = mask2former.Mask2FormerPixelDecoder(decoders, list(cfg.pixel_decoder.channels[::-1]))
            self.decoder = mask2former.Mask2FormerTransformerModule(width, decoders)
            self.decoder.decoder.layers = nn.ModuleList([FlowLayer(decoders) for _ in range(cfg.mask_decoder.num_layers)])
            self.boundary = Boundary(cfg.pixel_decoder.mask_dim, cfg.boundary)
            self.background = nn.Embedding(1, width)
            self.logit_scale = nn.Parameter(torch.zeros(1))
        self.load_state_dict({ours: tensors[theirs] for theirs, ours in renamed(tensors).items()}, assign=True)
        # What has buffers is made with their values: nothing that is loaded is in it.
        self.rotary = qwen3.Qwen3RotaryEmbedding(text)
        self.eval()
        self._sam, self._siglip, self._llm = ([wrap(x) for x in stack] for stack in (
            self.sam.layers, self.siglip.encoder.layers[:-1], self.llm.layers
        ))  # fmt: skip
        self._pixel, self._flow = wrap(self.pixel_decoder), [wrap(layer) for layer in self.decoder.decoder.layers]

    def look(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Visual tokens [1, V, W], mask features [1, D, h, w], levels [1, D, y, x] low to high."""
        cfg = self.cfg
        pixels = (batch["sam_images"] / 255 - torch.tensor(SAM_MEAN)) / torch.tensor(SAM_STD)
        x = self.sam.patch_embed(pixels.permute(0, 3, 1, 2)) + self.sam.pos_embed
        states = [x]
        for layer in self._sam:
            states.append(layer(states[-1]))
        shuffled = pixel_shuffle(states[cfg.sam.num_hidden_layers - 1], 0.5)
        y = self.siglip.embeddings.patch_embedding(batch["siglip_images"].permute(0, 3, 1, 2) / 127.5 - 1)
        y = y.flatten(2).transpose(1, 2) + self.siglip.embeddings.position_embedding.weight
        for layer in self._siglip:
            y = layer(y, None)
        tokens = torch.cat([self.visual_projector(y), self.seg_projector(shuffled.flatten(1, 2))], 1)
        features = self.connector([states[i] for i in cfg.connector_hidden_layers])
        decoded = self._pixel(features[::-1])
        return tokens, decoded.mask_features, list(decoded.multi_scale_features)

    def run_llm(self, batch: dict[str, torch.Tensor], visual: torch.Tensor) -> torch.Tensor:
        """Hidden states [1, T, W] after the final norm. Without a mask in the batch, attention is causal."""
        tokens = batch["input_ids"]
        start = int((tokens[0] == IMAGE_TOKEN_INDEX).nonzero()[0])
        words = self.llm.embed_tokens(torch.cat([tokens[:, :start], tokens[:, start + visual.shape[1] :]], 1))
        x = torch.cat([words[:, :start], visual, words[:, start:]], 1)
        angles = self.rotary(x, batch["position_ids"])
        for layer in self._llm:
            x = layer(x, attention_mask=batch.get("visible"), position_embeddings=angles, position_ids=batch["position_ids"])
        return self.llm.norm(x)

    def decode(
        self, features: torch.Tensor, levels: list[torch.Tensor], phrases: torch.Tensor, segs: torch.Tensor, own: torch.Tensor
    ) -> Predictions:
        """Every pass has the rows of `phrases` [N, P, D], of which it owns `own` [P, N], and S `segs` [P, D]."""
        module, passes = self.decoder, len(segs)
        copies = lambda x: x.flatten(2).permute(2, 0, 1).expand(-1, passes, -1)  # noqa: E731
        memories = [copies(x) + module.level_embed.weight[i] for i, x in enumerate(levels)]
        places = [copies(module.position_embedder(x.shape, x.device, x.dtype)) for x in levels]
        position = module.queries_embedder.weight[:, None]
        x = module.queries_features.weight[:, None] + segs
        out, conditions = Predictions(), phrases
        for number in range(len(self._flow) + 1):
            queries = module.decoder.layernorm(x)
            masks = torch.einsum("qpd,dhw->pqhw", module.decoder.mask_predictor.mask_embedder(queries), features[0])
            cosine = F.normalize(queries, dim=-1).transpose(0, 1) @ F.normalize(conditions, dim=-1).permute(1, 2, 0)
            limit = self.cfg.mask_decoder.logit_clamp
            out.classes.append((cosine * self.logit_scale.exp()).clamp(-limit, limit))
            out.masks.append(masks)
            if number == len(self._flow):
                return out
            level = number % len(levels)
            with torch.no_grad():
                blocked = F.interpolate(masks, levels[level].shape[-2:], mode="bilinear", align_corners=False).flatten(2)
                blocked = blocked.sigmoid() < 0.5
                blocked &= ~blocked.all(-1, keepdim=True)
            x, conditions = self._flow[number](x, position, memories[level], places[level], blocked, conditions, own)

    def pool(self, hidden: torch.Tensor, batch: dict[str, torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """C and S of the phrases, [K, D] each."""
        projected = self.llm_projector(hidden)[0]
        spans = lambda ids: torch.stack([projected[ids[0] == k].mean(0) for k in range(count)])  # noqa: E731
        return spans(batch["phrase_ids"]), spans(batch["seg_ids"])

    def segment(self, batch: dict[str, torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [K, Q] and mask logits [K, Q, h, w] of all candidates, each phrase against the background alone."""
        visual, features, levels = self.look(batch)
        phrases, segs = self.pool(self.run_llm(batch, visual), batch, count)
        conditions = torch.stack([phrases, self.background.weight.expand(count, -1)])
        out = self.decode(features, levels, conditions, segs, torch.ones(count, 2, dtype=torch.bool))
        return out.classes[-1].softmax(-1)[..., 0], out.masks[-1]


def renamed(tensors: Tensors) -> dict[str, str]:
    """{exported name: name in `FlowSegTorch`}."""
    prefixes = {
        "llm.model.": "llm.",
        "vision_encoder.vision_model.": "siglip.",
        "segmentor.encoder.": "sam.",
        "seg_connector.": "connector.",
        "segmentor.class_predictor.logit_scale": "logit_scale",
        "segmentor.": "",
        "bg_embeds.": "background.",
        "": "",
    }

    def rename(name: str) -> str:
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        return prefixes[prefix] + name.removeprefix(prefix)

    return {name: rename(name) for name in tensors}


def torch_batch(batch: Batch) -> dict[str, torch.Tensor]:
    """What the network reads of a batch; `visible` only where several conversations stand after the image."""
    names = ("sam_images", "siglip_images", "input_ids", "position_ids", "phrase_ids", "seg_ids", "labels")
    out = {name: torch.from_numpy(np.array(getattr(batch, name))) for name in names}
    out |= {name: out[name].long() for name in names[2:]}
    if batch.segment_ids.max() > 1:
        segments, index = torch.from_numpy(np.array(batch.segment_ids)), torch.arange(batch.segment_ids.shape[1])
        key, query = segments[:, None, :], segments[:, :, None]
        visible = (key != PAD) & ((key == 0) | (key == query)) & (index[None, :] <= index[:, None])
        out["visible"] = visible[:, None]
    return out
