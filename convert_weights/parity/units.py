"""Small independent checks: units.npz, and the decoder layer with text cross-attention."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert_weights.parity.fixture import Arrays, Fixture
from convert_weights.parity.report import LIMITS, ParityReport, relative_error
from flowseg_jax.evaluation.metrics import summarise
from flowseg_jax.losses import LossConfig, match_cost, point_losses
from flowseg_jax.models.conditions import append_background, pool_spans, referring_conditions
from flowseg_jax.models.connectors import ConnectorLevel, pad_to_multiple, pixel_shuffle
from flowseg_jax.models.mask_decoder import DecoderLayer, MaskDecoderConfig, cosine_logits
from flowseg_jax.models.pixel_decoder import sine_position_embedding
from flowseg_jax.models.semantic_flow import Conditions, SemanticFlowConfig
from flowseg_jax.ops.msda import msda
from flowseg_jax.ops.points import sample_points

FILE, LAYER_FILE = "units.npz", "text_cross_attn_layer.npz"
CLAMP = 50.0  # of the class logits in X-SAM main, which units.npz comes from


def with_params(make: Callable[[], nnx.Module], params: dict[str, Any]) -> nnx.Module:
    """The module that `make` describes, with these parameters; nothing is initialised."""
    graphdef, _ = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graphdef, params)


class Units:
    """The checks of units.npz; each method does one group and tolerates what is missing in it."""

    def __init__(self, arrays: Arrays, report: ParityReport):
        self.arrays, self.report = arrays, report

    def get(self, *names: str) -> list[np.ndarray] | None:
        """The inputs of a check, marked as such; None if one is missing."""
        if any(name not in self.arrays for name in names):
            return None
        self.report.used(FILE, *names)
        return [self.arrays[name] for name in names]

    def add(self, name: str, ours: Any, kind: str = "activation", **options: Any) -> None:
        if name in self.arrays:
            self.report.compare(FILE, name, ours, self.arrays[name], kind, **options)

    def connectors(self) -> None:
        """Pixel shuffle, padding, and a connector level on a map of odd size."""
        if found := self.get("pixel_shuffle/in_nhwc"):
            for name in self.arrays:
                if m := re.fullmatch(r"pixel_shuffle/out_(nhwc|nchw)_scale([\d.]+)", name):
                    scale = float(m[2])
                    # For large scales the input is recorded with too few channels: the second half is twice the first.
                    x = found[0] if scale < 4 else np.concatenate([found[0], 2 * found[0]], -1)
                    y = np.asarray(pixel_shuffle(jnp.asarray(x), scale))
                    self.add(name, y if m[1] == "nhwc" else np.moveaxis(y, -1, 1))
        if found := self.get("maybe_pad/in_nhwc"):
            self.add("maybe_pad/out_nhwc", pad_to_multiple(jnp.asarray(found[0])))
        for group in sorted({m[1] for name in self.arrays if (m := re.match(r"(conv_connector/scale[\d.]+)/", name))}):
            names = {
                f"{kind}{i + 1}": f"{group}/model.{2 * i + at}" for i in range(3) for at, kind in enumerate(("conv", "norm"))
            }
            weights = [f"{name}.weight" for name in names.values()]
            biases = [f"{name}.bias" for ours, name in names.items() if ours.startswith("norm")]
            found = self.get(f"{group}/in_nhwc", *weights, *biases)
            if found is None:
                continue
            params = {
                ours: {"scale": self.arrays[f"{name}.weight"], "bias": self.arrays[f"{name}.bias"]}
                if ours.startswith("norm")
                else {"kernel": self.arrays[f"{name}.weight"].transpose(2, 3, 1, 0)}
                for ours, name in names.items()
            }
            width, hidden, scale = found[0].shape[-1], len(found[1]), float(group.split("scale")[1])
            level = with_params(lambda w=width, h=hidden, s=scale: ConnectorLevel(w, h, s, 2, rngs=nnx.Rngs(0)), params)
            self.add(f"{group}/out_nchw", jnp.moveaxis(level(jnp.asarray(found[0])), -1, 1))

    def sampling(self) -> None:
        """Deformable attention, point sampling and the sine position embedding."""
        if found := self.get("msda/value", "msda/shapes_hw", "msda/locations_xy", "msda/weights"):
            value, shapes, locations, weights = found
            shapes = tuple((int(h), int(w)) for h, w in shapes)
            self.add("msda/out", msda(jnp.asarray(value), shapes, jnp.asarray(locations), jnp.asarray(weights)))
        if found := self.get("sample_point/in", "sample_point/coords_xy"):
            self.add("sample_point/out", sample_points(jnp.asarray(found[0][:, 0]), jnp.asarray(found[1])))
        for name, recorded in self.arrays.items():
            if name.startswith("sine_pos/out_nchw"):
                _, channels, height, width = recorded.shape
                self.add(name, np.moveaxis(np.asarray(sine_position_embedding(height, width, channels)), -1, 0)[None])

    def losses(self) -> None:
        """Pairwise costs, and the losses of pairs: prediction i with target i, over two masks."""
        if found := self.get("mask_loss/pred_logits", "mask_loss/targets"):
            logits, targets = (jnp.asarray(x) for x in found)
            nothing = jnp.zeros((len(logits), 1)), jnp.zeros(len(targets), jnp.int32)
            for name, cfg in (
                ("pair_bce", LossConfig(class_weight=0, mask_weight=1, dice_weight=0)),
                ("pair_dice", LossConfig(class_weight=0, mask_weight=0, dice_weight=1)),
            ):
                self.add(f"mask_loss/{name}", match_cost(*nothing, logits, targets, cfg).T, "loss")
            bce, dice = point_losses(logits[: len(targets)], targets, jnp.ones(len(targets), bool))
            self.add("mask_loss/bce_nummasks2", bce / 2, "loss")
            self.add("mask_loss/dice_nummasks2", dice / 2, "loss")

    def language(self) -> None:
        """Cosine class head, packing of conditions, pooling of spans."""
        if found := self.get("class_head/query", "class_head/cond", "class_head/mask", "class_head/logit_scale"):
            query, cond, mask, scale = (jnp.asarray(x, jnp.float32) for x in found)
            valid = mask > 0
            masked = cosine_logits(query, cond, valid, scale.reshape(1), CLAMP)
            name = "class_head/logits_main_masked"
            if name in self.arrays and self.arrays[name].shape == masked.shape:
                # The constant of a masked column is not what the others are to be measured by.
                shown = np.broadcast_to(np.asarray(valid)[:, None], masked.shape)
                constants = np.array_equal(self.arrays[name][~shown], np.asarray(masked)[~shown])
                note = "masked columns are equal" if constants else "masked columns differ"
                ours = np.asarray(masked) if constants else np.full_like(masked, np.nan)
                self.add(name, ours, where=shown, note=note)
            for name in self.arrays:
                if m := re.fullmatch(r"class_head/logits_main_clamped_scale([\d.]+)", name):
                    every = jnp.ones(valid.shape, bool)
                    self.add(name, cosine_logits(query, cond, every, jnp.array([float(m[1])], jnp.float32), CLAMP))
        if found := self.get("pack_genseg/cond0", "pack_genseg/cond1", "pack_genseg/bg"):
            first, second, background = found
            rows = max(len(first), len(second))
            padded = np.stack([np.pad(x, ((0, rows - len(x)), (0, 0))) for x in (first, second)])
            exists = np.stack([np.arange(rows) < len(x) for x in (first, second)])
            generic = append_background(jnp.asarray(padded), exists, exists, jnp.asarray(background))
            self.add("pack_genseg/out_cond", generic.embeds)
            self.add("pack_genseg/out_mask", generic.valid_mask, "exact")
            numbers = np.where(exists, 0, -1)
            packed = referring_conditions(jnp.asarray(padded), jnp.asarray(background), numbers, 2, False)
            columns = [*np.flatnonzero(exists.reshape(-1)), 2 * rows]
            self.add("pack_refseg/out_cond", np.asarray(packed.embeds)[::rows][:, columns])
        if found := self.get("span_pool/embeds", "span_pool/ids"):
            embeds, ids = found
            self.add("span_pool/out", pool_spans(jnp.asarray(embeds), jnp.asarray(ids, jnp.int32), int(ids.max()) + 1)[0])

    def metrics(self) -> None:
        """cIoU and gIoU from intersections and unions."""
        names = sorted((n for n in self.arrays if re.fullmatch(r"metric/iu_\d+", n)), key=lambda n: int(n.rpartition("_")[2]))
        if "metric/ciou_giou_percent" in self.arrays and names:
            pairs = self.get(*names)
            keys = ("intersection", "union", "oracle_intersection", "oracle_union")
            records = [dict(zip(keys, (*map(int, pair),) * 2, strict=True), failed=False, family="") for pair in pairs]
            table = summarise(records)
            self.add("metric/ciou_giou_percent", [table["ciou"], table["giou"]])


def compare_units(fixture: Fixture, report: ParityReport) -> None:
    """Runs every check of units.npz."""
    if not fixture.has(FILE):
        return
    units = Units(fixture.arrays(FILE), report)
    for check in (units.connectors, units.sampling, units.losses, units.language, units.metrics):
        check()
    for pattern, reason in (
        ("pack_refseg/cond_lens", "says how cond0 and cond1 are used"),
        ("pack_refseg/out_seg", "X-SAM main's <SEG> lookup, which mixes up the images of a batch (we do not copy it)"),
        ("pack_genseg/(seg|out_seg)", "passed through unchanged"),
        ("lsj/", "the random-scale augmentation of stage 1 is not part of this package"),
        ("metric/(pred|gt|ignore)", "masks that the recorded intersections and unions were counted from"),
    ):
        report.explain(FILE, pattern, reason)


def _linear(weight: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    return {"kernel": weight.T, "bias": bias}


def layer_params(arrays: Arrays) -> dict[str, Any]:
    """Weights of the recorded decoder layer under our names; the gate is held at language (g = 0)."""
    w = {name.removeprefix("w/"): x for name, x in arrays.items() if name.startswith("w/")}

    def fused(name: str) -> dict[str, Any]:
        weights, biases = np.split(w[f"{name}.in_proj_weight"], 3), np.split(w[f"{name}.in_proj_bias"], 3)
        parts = {ours: _linear(*part) for ours, *part in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True)}
        return parts | {"out_proj": linear(f"{name}.out_proj")}

    def linear(name: str) -> dict[str, np.ndarray]:
        return _linear(w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

    width = w["fc1.weight"].shape[1]
    return {
        "cross_attn": fused("cross_attn"),
        "cross_attn_layer_norm": norm("cross_attn_layer_norm"),
        "semantic_refinement": {
            "attn": fused("text_cross_attn"),
            "norm": norm("text_cross_attn_layer_norm"),
            "gate": {"kernel": np.zeros((2 * width, width), np.float32), "bias": np.full(width, -1e9, np.float32)},
        },
        "self_attn": {name: linear(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "self_attn_layer_norm": norm("self_attn_layer_norm"),
        "fc1": linear("fc1"),
        "fc2": linear("fc2"),
        "final_layer_norm": norm("final_layer_norm"),
    }


def run_text_layer(arrays: Arrays, heads: int) -> dict[str, np.ndarray]:
    """The recorded layer as ours: SR in its `post` form with the gate at language, pass by pass (each has its positions)."""
    ffn, width = arrays["w/fc1.weight"].shape
    cfg, flow = MaskDecoderConfig(embed_dim=width, num_heads=heads, mlp_dim=ffn), SemanticFlowConfig(mode="sr", norm="post")
    layer = with_params(lambda: DecoderLayer(cfg, flow, rngs=nnx.Rngs(0)), layer_params(arrays))

    def one(query, position, memory, memory_position, text, blocked, padded):
        exists = ~padded[None]
        conditions, out = Conditions(text[None], exists, exists), {}
        q_vis = layer.cross_attention_block(query[None], position, memory[None], memory_position, ~blocked[None], out)
        q_s = layer.refine_and_self_attend(q_vis, position, conditions.embeds, conditions, out)
        last, _ = layer.feed_forward_and_refine_conditions(q_s, conditions.embeds, conditions)
        steps = {name: out[name] for name in ("visual_attention", "text_attention")}
        steps |= {"after_visual_norm": q_vis, "after_text_norm": out["q_sem"], "after_self_norm": q_s}
        return {f"mid/{name}": x[0] for name, x in steps.items()} | {"out": last[0]}

    names = ("query", "query_pos", "memory", "memory_pos", "text", "attn_mask_true_blocks", "text_padding_true")
    return jax.device_get(jax.jit(jax.vmap(one))(*(arrays[f"in/{name}"] for name in names)))


def compare_text_layer(fixture: Fixture, report: ParityReport) -> None:
    """The decoder layer with text cross-attention, which is what SR computes in its `post` form at g = 0."""
    arrays = fixture.arrays(LAYER_FILE)
    if not arrays:
        return
    inputs = [name for name in arrays if name.startswith(("w/", "in/"))]
    report.used(LAYER_FILE, *inputs)
    try:
        width = arrays["w/fc1.weight"].shape[1]
        # The number of heads is not recorded: the segmentor's if it fits, else the one that the output fits.
        first = fixture.segmentor("num_attention_heads")
        candidates = sorted((h for h in range(1, width + 1) if width % h == 0), key=lambda h: (h != first, h))
        found = []
        for heads in candidates:
            ours = run_text_layer(arrays, heads)
            error = relative_error(ours["out"], arrays["out"]) if "out" in arrays else 0.0
            found.append((error, heads, ours))
            if error <= LIMITS["activation"]:
                break
        _, heads, ours = min(found, key=lambda item: item[0])
    except KeyError as error:
        report.explain(LAYER_FILE, "", f"{error.args[0]} is missing")
        return
    for name, value in ours.items():
        if name in arrays:
            report.compare(LAYER_FILE, name, value, arrays[name], "activation", note=f"{heads} heads")
