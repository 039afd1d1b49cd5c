"""The families of checkpoints: which tables a family consists of, what its config is, what it may lack."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from convert_weights import encoders, segmentor
from convert_weights.ops import Shape
from convert_weights.table import Table, TableRow, TableSection, linear, unnumbered
from flowseg_jax import sharding
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import ConnectorConfig, SegConnector
from flowseg_jax.models.flowseg import FlowSeg, params_dict
from flowseg_jax.models.language import LanguageModel
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.layers import Linear
from flowseg_jax.models.mask_decoder import MaskDecoder, MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoder, PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig, SamImageEncoder
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from flowseg_jax.models.siglip import SiglipConfig, SiglipVisionEncoder


@dataclasses.dataclass(frozen=True)
class Mask2FormerConfig:
    """The parts of a Mask2Former that we have, its backbone left out; `num_classes` counts without "no object"."""

    pixel_decoder: PixelDecoderConfig
    mask_decoder: MaskDecoderConfig
    num_classes: int


class Mask2Former(nnx.Module):
    def __init__(self, cfg: Mask2FormerConfig, *, rngs: nnx.Rngs):
        self.pixel_decoder = PixelDecoder(cfg.pixel_decoder, rngs=rngs)
        self.mask_decoder = MaskDecoder(cfg.mask_decoder, SemanticFlowConfig(mode="off"), rngs=rngs)
        self.category_head = Linear(cfg.mask_decoder.embed_dim, cfg.num_classes + 1, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class XSamStage1Config:
    """X-SAM's first stage: a closed-vocabulary segmentor without language.

    The fields are those of `FlowSegConfig`, which cannot stand here: it also has sizes of SigLIP and of a language model.
    """

    sam: SamConfig
    connector: ConnectorConfig
    connector_hidden_layers: tuple[int, ...]
    pixel_decoder: PixelDecoderConfig
    mask_decoder: MaskDecoderConfig
    num_classes: int


class XSamStage1(Mask2Former):
    def __init__(self, cfg: XSamStage1Config, *, rngs: nnx.Rngs):
        self.sam = SamImageEncoder(cfg.sam, rngs=rngs)
        self.connector = SegConnector(cfg.connector, rngs=rngs)
        super().__init__(Mask2FormerConfig(cfg.pixel_decoder, cfg.mask_decoder, cfg.num_classes), rngs=rngs)


@dataclasses.dataclass(frozen=True)
class CheckpointFamily:
    """A family of checkpoints.

    Attributes:
        name: as on the command line.
        config: the dataclass of its config.
        module: the network (config, rngs=...) that the parameters belong to.
        layouts: {layout: config -> its sections}; the one that fits a file best is taken, the first one is exported.
        example_config: makes a config, to know the family's names by.
        newly_initialized: patterns of our paths, each naming a group of parameters. A group of which a checkpoint holds nothing
            is initialised as in a new model; of a group that it holds in part, the rest is missing.
        component: it is a part of a model and cannot run by itself.
        resizable_vocab: the vocabulary of the file may be longer or shorter than the config's.
    """

    name: str
    config: type
    module: Callable[..., nnx.Module]
    layouts: Mapping[str, Callable[[Any], tuple[TableSection, ...]]]
    example_config: Callable[[], Any]
    newly_initialized: tuple[str, ...] = ()
    component: bool = True
    resizable_vocab: bool = False

    def shapes(self, cfg: Any) -> dict[str, Shape]:
        """{our path: shape} of all parameters; nothing is allocated."""
        return _shapes(self.module, cfg)

    def shards(self, cfg: Any, mesh: AbstractMesh) -> dict[str, Shape]:
        """{our path: the shape of what one device of `mesh` holds}, by the rules of `sharding`."""
        shardings = flatten_params(sharding.param_shardings(_abstract(self.module, cfg), mesh))
        return {name: shardings[name].shard_shape(shape) for name, shape in self.shapes(cfg).items()}

    def initial(self, cfg: Any, names: Iterable[str], seed: int) -> dict[str, jax.Array]:
        """The parameters `names` of a new model: those of `flowseg.init_model(cfg, seed)`, up to rounding (they are compiled).

        The others are not computed: what is not returned is no part of the compiled program.
        """
        names = tuple(names)

        @jax.jit
        def make() -> dict[str, jax.Array]:
            module = self.module(cfg, rngs=nnx.Rngs(params=jax.random.key(seed, impl="rbg")))
            flat = flatten_params(params_dict(nnx.state(module)))
            return {name: flat[name] for name in names}

        return make() if names else {}

    def fresh_group(self, target: str) -> str | None:
        """The pattern of the group that may be missing and `target` is in; None if it must be in the checkpoint."""
        return next((group for group in self.newly_initialized if re.match(group, target)), None)

    @functools.cached_property
    def names(self) -> dict[str, frozenset[str]]:
        """{layout: the names that it uses, their numbers left out}."""
        example = self.example_config()
        return {
            layout: frozenset(
                unnumbered(section.source + row.source) for section in sections(example) for row in section.table.rows
            )
            for layout, sections in self.layouts.items()
        }


@functools.lru_cache(maxsize=16)
def _abstract(module: Callable[..., nnx.Module], cfg: Any) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: module(cfg, rngs=nnx.Rngs(0))))


@functools.lru_cache(maxsize=16)
def _shapes(module: Callable[..., nnx.Module], cfg: Any) -> dict[str, Shape]:
    return {name: tuple(x.shape) for name, x in flatten_params(params_dict(_abstract(module, cfg))).items()}


def with_prefix(*sections: TableSection, source: str = "", target: str = "") -> tuple[TableSection, ...]:
    """Sections with a prefix more on either side."""
    return tuple(dataclasses.replace(s, source=source + s.source, target=target + s.target) for s in sections)


def _only(table: Table, source: str = "") -> Callable[[Any], tuple[TableSection, ...]]:
    return lambda cfg: (TableSection(table, source),)


def _ignored(*ignore: str) -> TableSection:
    """Tensors of the file that belong to no table."""
    return TableSection(Table((), ignore=ignore))


def _language(name: str, table: Table, **layouts: Table) -> CheckpointFamily:
    tiny = dataclasses.replace(LanguageConfig.tiny(8), model_type=name, qk_norm=name == "qwen3")
    tables = {"hf": table, **layouts}
    return CheckpointFamily(
        name, LanguageConfig, LanguageModel, {k: _only(v) for k, v in tables.items()}, lambda: tiny, resizable_vocab=True
    )  # fmt: skip


def _inside(table: Table, prefix: str) -> Callable[[Any], tuple[TableSection, ...]]:
    """A component inside a whole model of its class: what is ignored lies beside it as well."""
    return lambda cfg: (TableSection(table, prefix), _ignored(*table.ignore))


def _decoders(
    source_pixel: str, source_decoder: str, head: tuple[TableRow, ...], category: tuple[TableRow, ...]
) -> tuple[TableSection, ...]:
    """The mask decoder, whose class heads are named apart from it."""
    return (
        TableSection(segmentor.PIXEL_DECODER, source_pixel, "pixel_decoder/", lambda cfg: cfg.pixel_decoder),
        TableSection(segmentor.DECODER, source_decoder, "mask_decoder/", lambda cfg: cfg.mask_decoder),
        TableSection(Table((*head, *category))),
    )


def _segmentor(logit_scale: str, predictor: str) -> tuple[TableSection, ...]:
    """X-SAM's segmentor: mask encoder, connector, decoders, class head."""
    scale = (TableRow(logit_scale, "mask_decoder/logit_scale"),)
    return (
        TableSection(encoders.SAM, "segmentor.encoder.", "sam/", lambda cfg: cfg.sam),
        TableSection(segmentor.CONNECTOR, "seg_connector.", "connector/", lambda cfg: cfg.connector),
        *_decoders(
            "segmentor.pixel_decoder.", "segmentor.decoder.", scale, linear(predictor, "category_head")
        ),
        _ignored(r"segmentor\.shared_image_embedding\..*", r"segmentor\.(criterion|criteria)\..*"),
    )  # fmt: skip


_MAIN = _segmentor("segmentor.class_predictor.logit_scale", "segmentor.class_predictor.predictor")
_AAAI = _segmentor("segmentor.logit_scale", "segmentor.class_predictor")


def _xsam(
    vision: str, parts: tuple[TableSection, ...], *more: TableSection
) -> Callable[[FlowSegConfig], tuple[TableSection, ...]]:
    def sections(cfg: FlowSegConfig) -> tuple[TableSection, ...]:
        return (
            TableSection(encoders.language(cfg.llm), "llm.", "llm/", lambda cfg: cfg.llm),
            TableSection(encoders.SIGLIP, f"{vision}.vision_model.", "siglip/", lambda cfg: cfg.siglip),
            *with_prefix(TableSection(segmentor.PROJECTOR), source="visual_projector.", target="visual_projector/"),
            *with_prefix(TableSection(segmentor.PROJECTOR), source="seg_projector.", target="seg_projector/"),
            *with_prefix(TableSection(segmentor.PROJECTOR), source="llm_projector.", target="llm_projector/"),
            *parts,
            TableSection(Table((TableRow("bg_embeds.weight", "background_embed"),))),
            TableSection(segmentor.BOUNDARY, "segmentor.boundary.", "boundary/"),
            *more,
        )

    return sections


_XSAM_LAYOUTS = {"main": _xsam("vision_encoder", _MAIN), "aaai": _xsam("visual_encoder", _AAAI)}
# A segmentor of the first stage brings a closed-vocabulary head, for which a model may have no use.
_HEAD = _ignored(r"segmentor\.class_predictor\.(predictor\.)?(weight|bias)")
_FLOWSEG_LAYOUTS = {"main": _xsam("vision_encoder", _MAIN, _HEAD), "aaai": _xsam("visual_encoder", _AAAI, _HEAD)}
# What FlowSeg adds to X-SAM, and the linear head of its closed-vocabulary pass.
_ADDED = (
    r"mask_decoder/layers/semantic_refinement/(attn|norm)/",
    r"mask_decoder/layers/semantic_refinement/gate/",
    r"mask_decoder/layers/condition_refinement/",
    r"boundary/",
    r"category_head/",
)
# What a model that is put together from its components has nothing for.
_JOINTS = (
    r"visual_projector/",
    r"seg_projector/",
    r"llm_projector/",
    r"connector/",
    r"pixel_decoder/",
    r"mask_decoder/logit_scale",
    r"mask_decoder/",
    r"background_embed",
)
_M2F_HEAD = linear("class_predictor", "category_head")

FAMILIES: dict[str, CheckpointFamily] = {
    family.name: family
    for family in (
        _language("qwen3", encoders.QWEN3),
        _language("phi3", encoders.PHI3),
        _language("llama", encoders.LLAMA, gguf=encoders.LLAMA_GGUF),
        CheckpointFamily(
            "siglip2",
            SiglipConfig,
            SiglipVisionEncoder,
            {"hf": _inside(encoders.SIGLIP, "vision_model."), "encoder": _only(encoders.SIGLIP)},
            SiglipConfig.tiny,
        ),
        CheckpointFamily(
            "sam",
            SamConfig,
            SamImageEncoder,
            {
                "hf": _inside(encoders.SAM, "vision_encoder."),
                "encoder": _only(encoders.SAM),
                "meta": _inside(encoders.SAM_META, "image_encoder."),
                "meta_encoder": _only(encoders.SAM_META),
            },
            SamConfig.tiny,
        ),
        CheckpointFamily(
            "mask2former",
            Mask2FormerConfig,
            Mask2Former,
            {
                "hf": lambda cfg: (
                    *_decoders("model.pixel_level_module.decoder.", "model.transformer_module.", (), _M2F_HEAD),
                    _ignored(r"model\.pixel_level_module\.encoder\..*", r"criterion\..*"),
                )
            },
            lambda: Mask2FormerConfig(PixelDecoderConfig.tiny(), MaskDecoderConfig.tiny(), 3),
            newly_initialized=(r"mask_decoder/logit_scale",),
        ),
        CheckpointFamily(
            "xsam_stage1",
            XSamStage1Config,
            XSamStage1,
            {"main": lambda cfg: _MAIN, "aaai": lambda cfg: _AAAI},
            lambda: XSamStage1Config(
                SamConfig.tiny(),
                ConnectorConfig.tiny(),
                (2, 3, 4),
                PixelDecoderConfig.tiny(),
                MaskDecoderConfig.tiny(),
                3,
            ),
            newly_initialized=(r"mask_decoder/logit_scale",),
        ),
        CheckpointFamily(
            "xsam", FlowSegConfig, FlowSeg, _XSAM_LAYOUTS, FlowSegConfig.tiny, newly_initialized=_ADDED, component=False
        ),
        CheckpointFamily(
            "flowseg",
            FlowSegConfig,
            FlowSeg,
            _FLOWSEG_LAYOUTS,
            FlowSegConfig.tiny,
            newly_initialized=(*_ADDED, *_JOINTS),
            component=False,
            resizable_vocab=True,
        ),
    )
}
