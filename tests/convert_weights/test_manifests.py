"""The tables over the names and shapes of the real, full-size checkpoints; no weights, nothing is allocated."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert_weights import configs_from_shapes
from convert_weights.convert import TorchView, get_family
from convert_weights.families import FAMILIES, Mask2FormerConfig
from convert_weights.plan import detect_family, make_plan
from convert_weights.sources import TensorInfo
from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from flowseg_jax.models.siglip import SiglipConfig
from tests.helpers.tiny_checkpoints import expand

MANIFESTS = Path(__file__).parents[2] / "convert_weights" / "manifests"
BF16 = np.dtype(ml_dtypes.bfloat16)

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}
MASK2FORMER = Mask2FormerConfig(
    PixelDecoderConfig.mask2former((1536, 768, 384, 192), num_levels=3), MaskDecoderConfig(), 133
)  # fmt: skip
COMPONENTS = {
    "qwen3_4b": ("qwen3", dataclasses.replace(LanguageConfig.qwen3_4b(), vocab_size=151936)),
    "qwen3_1b7": ("qwen3", dataclasses.replace(LanguageConfig.qwen3_1b7(), vocab_size=151936)),
    "qwen3_8b": ("qwen3", dataclasses.replace(LanguageConfig.qwen3_8b(), vocab_size=151936)),
    "qwen3_14b": ("qwen3", dataclasses.replace(LanguageConfig.qwen3_14b(), vocab_size=151936)),
    "qwen3_32b": ("qwen3", dataclasses.replace(LanguageConfig.qwen3_32b(), vocab_size=151936)),
    "llama3_8b": ("llama", dataclasses.replace(LanguageConfig.llama3_8b(), vocab_size=128256)),
    "phi3_mini": ("phi3", dataclasses.replace(LanguageConfig.phi3_mini(), vocab_size=32064)),
    "smollm2_135m": ("llama", LanguageConfig.from_hf(SMOLLM2)),
    "siglip2_so400m_14_384": ("siglip2", SiglipConfig.so400m_14_384()),
    "sam_vit_large": ("sam", SamConfig.vit_large()),
    "mask2former_swin_large_coco": ("mask2former", MASK2FORMER),
}
XSAM = {
    "xsam_phi3_mini": (LanguageConfig.phi3_mini, 1356, 4_624_248_065),
    "xsam_qwen3_1b7": (LanguageConfig.qwen3_1b7, 1472, 2_818_008_321),
    "xsam_qwen3_4b": (LanguageConfig.qwen3_4b, 1560, 5_204_961_025),
}


class Abstract:
    """Tensors of which only names and shapes exist."""

    def __init__(self, name: str):
        self.name = name
        self.entries = {
            n: TensorInfo(tuple(s), BF16) for n, s in expand(json.loads((MANIFESTS / f"{name}.json").read_text())["shapes"])
        }

    def read(self, *_):
        raise AssertionError("no tensor is read")


@pytest.mark.parametrize("name", [path.stem for path in sorted(MANIFESTS.glob("*.json"))])
def test_totals(name):
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    tensors = list(expand(manifest["shapes"]))
    assert len({n for n, _ in tensors}) == len(tensors) == manifest["tensors"]
    assert sum(math.prod(shape) for _, shape in tensors) == manifest["values"]
    if name in XSAM:
        assert (manifest["tensors"], manifest["values"]) == XSAM[name][1:]


@pytest.mark.parametrize("name", COMPONENTS)
def test_components(name):
    family, cfg = COMPONENTS[name]
    source = Abstract(name)
    plan = make_plan(get_family(family), cfg, source)
    assert detect_family(source.entries) == family
    assert plan.layout == "hf"
    assert plan.fresh == (("mask_decoder/logit_scale",) if family == "mask2former" else ())
    assert {target.dtype for target in plan.targets if target.slices} == {BF16}
    if family in ("qwen3", "phi3", "llama"):
        assert not plan.ignored
        cut = dataclasses.replace(cfg, vocab_size=cfg.vocab_size - 100)  # X-SAM's resize
        assert make_plan(get_family(family), cut, source).resized["embed_tokens"] == (cfg.vocab_size, cfg.vocab_size - 100)


@pytest.mark.parametrize("mode", ["off", "sr_cr"])
@pytest.mark.parametrize("name", XSAM)
def test_xsam(name, mode):
    source = Abstract(name)
    shapes = configs_from_shapes.Shapes(source.entries, name)
    cfg = configs_from_shapes.xsam_from_shapes(shapes, None, None, mode, "bfloat16")
    full = FlowSegConfig.full(XSAM[name][0]())
    assert dataclasses.replace(cfg, semantic_flow=full.semantic_flow, boundary=full.boundary) == full
    plan = make_plan(get_family("xsam"), cfg, source)
    assert detect_family(source.entries) == "xsam"
    groups = {
        re.match(r"(mask_decoder/layers/(semantic|condition)_refinement|boundary)/", name).group(1) for name in plan.fresh
    }
    flow = {"mask_decoder/layers/semantic_refinement", "mask_decoder/layers/condition_refinement", "boundary"}
    assert groups == (set() if mode == "off" else flow)
    unused = {re.sub(r"\d+", "#", n) for n in plan.ignored}
    assert all(
        re.match(r"llm\.lm_head|segmentor\.(encoder\.neck|shared_image)|vision_encoder.*(head|post_layernorm)", n)
        for n in unused
    )
    assert set(plan.tied_copies) == ({"llm.lm_head.weight"} if cfg.llm.tie_word_embeddings else set())


@pytest.mark.parametrize("layout", ["main", "aaai"])
def test_what_is_exported_is_what_was_imported(layout):
    source = Abstract("xsam_phi3_mini")
    family = get_family("xsam")
    cfg = configs_from_shapes.xsam_from_shapes(configs_from_shapes.Shapes(source.entries, ""), None, None, "off", "bfloat16")
    ours = Abstract("xsam_phi3_mini")
    ours.entries = {name: TensorInfo(shape, BF16) for name, shape in family.shapes(cfg).items()}
    exported = TorchView(family, cfg, ours, layout).entries
    if layout == "aaai":
        exported = {
            name.replace("visual_encoder.", "vision_encoder.").replace("segmentor.logit", "segmentor.class_predictor.logit"): x
            for name, x in exported.items()
        }
    unused = make_plan(family, cfg, source).ignored
    assert exported == {name: x for name, x in source.entries.items() if name not in unused}


def test_four_levels_have_no_fpn_stage():
    three = configs_from_shapes.xsam_from_shapes(
        configs_from_shapes.Shapes(Abstract("xsam_qwen3_1b7").entries, ""), None, None, "off", "bfloat16"
    )
    four = dataclasses.replace(
        three,
        connector=dataclasses.replace(three.connector, channels=(1024,) * 4, scales=(4, 2, 1, 0.5)),
        connector_hidden_layers=(6, 12, 18, 24),
        pixel_decoder=PixelDecoderConfig.mask2former((2048, 1024, 512, 256)),
        mask_decoder=MaskDecoderConfig(num_levels=4),
    )
    family = get_family("xsam")
    ours = Abstract("xsam_qwen3_1b7")
    ours.entries = {name: TensorInfo(shape, BF16) for name, shape in family.shapes(four).items()}
    names = TorchView(family, four, ours).entries
    assert not [name for name in names if "adapter" in name or "layer_1" in name]
    assert names["seg_connector.model.0.model.4.weight"].shape == (4096, 512, 1, 1)
    source = Abstract("xsam_qwen3_1b7")
    source.entries = names
    assert configs_from_shapes.xsam_from_shapes(configs_from_shapes.Shapes(names, ""), None, None, "off", "bfloat16") == four
    assert not make_plan(family, four, source).fresh


@pytest.mark.parametrize(("family", "layout"), [(f.name, layout) for f in FAMILIES.values() for layout in f.layouts])
def test_every_parameter_has_exactly_one_place_in_every_layout(family, layout):
    family = get_family(family)
    cfg = family.example_config()
    if isinstance(cfg, FlowSegConfig):
        cfg = dataclasses.replace(cfg, semantic_flow=SemanticFlowConfig(norm="post"), num_classes=3)
    ours = Abstract("xsam_qwen3_1b7")
    ours.entries = {name: TensorInfo(shape, BF16) for name, shape in family.shapes(cfg).items()}
    exported = TorchView(family, cfg, ours, layout)
    slices = list(itertools.chain.from_iterable(exported._slices.values()))
    covered = sum(math.prod(part.shape) for part in slices)
    unnamed = ("mask_decoder/logit_scale",) if family.name == "mask2former" else ()
    assert {part.target for part in slices} == set(ours.entries) - set(unnamed)
    assert covered == sum(math.prod(e.shape) for name, e in ours.entries.items() if name not in unnamed)


def sam_of(*rows: int, meta: bool = False) -> SamConfig:
    """The config of an encoder on a grid of 4 x 4 patches whose layers have tables of so many rows."""
    patches, blocks = ("patch_embed.proj", "blocks") if meta else ("patch_embed.projection", "layers")
    shapes = {"pos_embed": (1, 4, 4, 8), f"{patches}.weight": (8, 3, 16, 16), f"{blocks}.0.mlp.lin1.weight": (24, 8)}
    shapes |= {f"{blocks}.{i}.attn.rel_pos_h": (n, 4) for i, n in enumerate(rows)}
    entries = {f"it.{name}": TensorInfo(shape, BF16) for name, shape in shapes.items()}
    return configs_from_shapes.sam_from_shapes(configs_from_shapes.Shapes(entries, "it"), "it.")


def test_windows_and_whole_maps_are_told_apart_by_their_tables():
    sizes = {"image_size": 64, "patch_size": 16, "hidden_size": 8, "num_attention_heads": 2, "mlp_dim": 24}
    for rows, window, whole in (((3, 7), 2, (1,)), ((7, 5, 5, 7), 3, (0, 3)), ((7, 7), 1, (0, 1)), ((5,), 3, ())):
        wanted = SamConfig(**sizes, num_hidden_layers=len(rows), window_size=window, global_attn_indexes=whole)
        assert sam_of(*rows) == sam_of(*rows, meta=True) == wanted
    with pytest.raises(UserError, match=r"^it\.: layers with windows of 2 sizes, \[2, 3\]; one size is supported$"):
        sam_of(3, 5, 7)
    with pytest.raises(UserError, match=r"it holds no it\.layers\.0\.mlp\.lin1\.weight: its sizes cannot be read off"):
        configs_from_shapes.Shapes({}, "it")["it.layers.0.mlp.lin1.weight"]


def test_the_last_quarters_of_an_encoder_are_read():
    assert [configs_from_shapes.quarters(*of) for of in ((24, 3), (24, 4), (5, 3), (12, 1))] == [
        (12, 18, 24), (6, 12, 18, 24), (2, 4, 5), (12,)
    ]  # fmt: skip
    shapes = configs_from_shapes.Shapes({"a.9.w": None, "a.10.w": None, "b.a.30.w": None, "a.40": None}, "it")
    assert (shapes.count("a."), shapes.count("c."), "a.40" in shapes, "a.9" in shapes) == (11, 0, True, False)
