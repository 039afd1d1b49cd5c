"""One conversion from beginning to end: find sources, config and tokenizer, match everything, stream into a model directory."""

from __future__ import annotations

import contextlib
import dataclasses
import reprlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert_weights import configs, configs_from_hf, configs_from_shapes
from convert_weights.convert import TorchView, build, fresh_params, get_family, in_layout
from convert_weights.directory import ModelDirectory, is_model_directory
from convert_weights.families import FAMILIES, CheckpointFamily
from convert_weights.files import open_source, read_json, resolve_source
from convert_weights.names import unwrapped
from convert_weights.plan import ConversionPlan, check_tied_copies, make_plan
from convert_weights.refusals import refuse_pointer
from convert_weights.sources import JoinedSource, TensorSource
from flowseg_jax import sharding
from flowseg_jax.checkpoints.pretrained import require_empty_directory, save_pretrained_streaming
from flowseg_jax.checkpoints.streaming import LazyArray
from flowseg_jax.data.prompts import PromptTemplates, as_jinja
from flowseg_jax.data.tokenizer import Extended, add_special_tokens, load_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.models import hf_keys
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.language_config import PRESETS, LanguageConfig

LLAMA3_VOCABULARY = 128_000  # a Llama with as many tokens is a Llama 3, with the special tokens of its own chat
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
# Where a component's names stand in a whole model: (what they begin with alone, what they begin with there).
COMPONENT_PREFIXES = {
    "llm": ("", "llm."),
    "siglip": ("vision_model.", "vision_encoder.vision_model."),
    "sam": ("vision_encoder.", "segmentor.encoder."),
    "segmentor": ("", ""),
}


@dataclasses.dataclass(frozen=True)
class ConversionRequest:
    """What the user asks for.

    Attributes:
        family: a key of `FAMILIES`.
        source: file or directory; for flowseg {component: path}, components as in `COMPONENT_PREFIXES`.
        out: the directory to write; None to check only.
        tokenizer: directory; None: the one beside the language model's weights.
        config: `config.json` or a directory with it; None: beside the weights, or from shapes.
        llm, siglip: of xsam: a preset's name or a directory with config.json.
        mode: of a whole model, the semantic flow's: "off", "sr", "sr_cr"; None: off for xsam, sr_cr for flowseg.
        chat: chat template; None: the language model's own.
        settings: `KEY=VALUE`s of the config.
        dtype: what parameters are stored as; None keeps the checkpoint's.
        seed: of newly initialised parameters.
        mesh: sizes of the mesh axes that the arrays are sharded for on disk; None: not sharded.
        overwrite: replace OUT.
    """

    family: str
    source: str | dict[str, str]
    out: str | None = None
    tokenizer: str | None = None
    config: str | None = None
    llm: str | None = None
    siglip: str | None = None
    mode: str | None = None
    chat: str | None = None
    settings: Sequence[str] = ()
    dtype: str | None = None
    seed: int = 0
    overwrite: bool = False
    mesh: Mapping[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class ConversionJob:
    """A conversion that is known to be possible; nothing is written yet."""

    plan: ConversionPlan
    source: TensorSource
    tokenizer: Path | None
    extra: dict[str, Any]
    shards: Mapping[str, tuple[int, ...]]

    def arrays(self, seed: int) -> dict[str, LazyArray]:
        initial = fresh_params(self.plan, seed)
        return {
            target.name: LazyArray(
                target.shape,
                target.dtype,
                lambda target=target: build(target, self.source, initial),
                self.shards.get(target.name),
            )
            for target in self.plan.targets
        }


@contextlib.contextmanager
def open_conversion(request: ConversionRequest) -> Iterator[ConversionJob]:
    """Opens and matches everything; the tokenizer lives as long as the context.

    Raises:
        UserError: whatever is wrong with sources, config, tokenizer or OUT, before anything is written.
    """
    family = get_family(request.family)
    if request.out is not None:
        require_empty_directory(request.out, request.overwrite)
    with tempfile.TemporaryDirectory(prefix="convert_weights-") as scratch:
        make = _joined if family.name == "flowseg" else _xsam if family.name == "xsam" else _component
        source, cfg, base = make(family, request)
        chat = PromptTemplates(request.chat or _chat(cfg.llm)) if isinstance(cfg, FlowSegConfig) else None
        # X-SAM writes whatever bos there is, whether or not the language model's own template does.
        template = as_jinja(chat.template, bos=True) if family.name == "xsam" else None
        tokenizer, extended = _tokenizer(request, base, source, Path(scratch), template)
        count = None if extended is None else extended.rows
        if count is not None and isinstance(cfg, LanguageConfig):
            cfg = dataclasses.replace(cfg, vocab_size=count)
        elif count is not None and family.resizable_vocab:
            cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, vocab_size=count))
        cfg = configs.override(cfg, request.settings)
        if count is not None and isinstance(cfg, LanguageConfig) and cfg.vocab_size < count:
            raise UserError(
                f"vocab_size={cfg.vocab_size} has no row for each of the tokenizer's {count} ids: leave --set vocab_size out"
            )
        if request.out is not None and not family.component and tokenizer is None:
            raise UserError(f"{family.name} needs its language model's tokenizer: give --tokenizer DIR")
        extra: dict[str, Any] = {"converted": {"family": family.name, "seed": request.seed}}
        if isinstance(cfg, FlowSegConfig):
            extra["prompts"] = {"chat_template": chat.chat_template}
            if tokenizer is not None:
                load_tokenizer(tokenizer, needed=chat.special_tokens)
                if count != cfg.llm.vocab_size:
                    raise UserError(
                        f"the tokenizer has {count} ids with its segmentation tokens, the checkpoint's table "
                        f"{cfg.llm.vocab_size} rows: give the tokenizer of its language model"
                    )
        plan = make_plan(family, cfg, source, request.dtype)
        given = any(setting.startswith(("vocab_size=", "llm.vocab_size=")) for setting in request.settings)
        if extended is None and plan.resized and not given:  # only a tokenizer, or the user, says that rows are padding
            name, (found, rows) = next(iter(plan.resized.items()))
            raise UserError(
                f"{source.name}: the file has {found} rows for {name}, vocab_size in its config is {rows}, and no tokenizer is "
                "there to say which are in use: give --tokenizer DIR, or correct vocab_size"
            )
        check_tied_copies(plan, source, None if extended is None else extended.words)
        extra["converted"] |= {"layout": plan.layout, "fresh": list(plan.fresh)}
        shards = family.shards(cfg, sharding.abstract_mesh(request.mesh)) if request.mesh else {}
        yield ConversionJob(plan, source, tokenizer, extra, shards)


def write(job: ConversionJob, request: ConversionRequest, progress: Callable[[str], None] = lambda name: None) -> Path:
    """Streams an open conversion into its directory."""
    family, cfg = job.plan.family, job.plan.cfg
    assert request.out is not None
    component = {"family": family.name, "config": _plain(dataclasses.asdict(cfg))} if family.component else None
    return save_pretrained_streaming(
        request.out,
        job.arrays(request.seed),
        None if family.component else cfg.to_dict(),
        job.tokenizer,
        job.extra,
        component=component,
        overwrite=request.overwrite,
        progress=progress,
    )


def check(job: ConversionJob, request: ConversionRequest, progress: Callable[[str], None] = lambda name: None) -> None:
    """Everything but the writing: each array is made and dropped."""
    for name, lazy in job.arrays(request.seed).items():
        lazy.make()
        progress(name)


def _component(family: CheckpointFamily, request: ConversionRequest) -> tuple[TensorSource, Any, Path | None]:
    """Source, config and where a tokenizer may lie, of a component."""
    path = resolve_source(str(request.source))
    source, own = _open(path, family)
    if own is not None:
        return source, own.cfg, own.tokenizer
    if family.name == "xsam_stage1":
        return source, configs_from_shapes.stage1_from_shapes(configs_from_shapes.Shapes(source.entries, source.name)), None
    if family.name == "sam" and request.config is None and (prefix := _meta_prefix(source)) is not None:
        return (
            source,
            configs_from_shapes.sam_from_shapes(configs_from_shapes.Shapes(source.entries, source.name), prefix),
            None,
        )
    if hasattr(source, "config") and request.config is None:
        values = source.config()
    else:
        values = configs_from_hf.hf_config(Path(request.config) if request.config else None, path)
    return source, configs_from_hf.component_config(family.name, values), path if path.is_dir() else path.parent


def _xsam(family: CheckpointFamily, request: ConversionRequest) -> tuple[TensorSource, FlowSegConfig, Path | None]:
    path = resolve_source(str(request.source))
    source, own = _open(path, family)
    if own is not None:
        raise UserError(f"{path} is converted already")
    beside = (path if path.is_dir() else path.parent) / "config.json"
    file = Path(request.config) if request.config else beside
    values = read_json(file) if request.config or file.is_file() else {}
    if "flowseg" in values:
        return source, configs.rebuild(FlowSegConfig, values["flowseg"]), beside.parent
    if request.config:
        raise UserError(f"{file} holds no config of ours (key flowseg); set single values by --set KEY=VALUE")
    llm = configs_from_hf.preset(request.llm, PRESETS, configs_from_hf.language_config, "--llm") if request.llm else None
    siglip = None
    if request.siglip:
        siglip = configs_from_hf.preset(
            request.siglip, configs_from_hf.SIGLIPS, lambda v: configs_from_hf.component_config("siglip2", v), "--siglip"
        )
    shapes = configs_from_shapes.Shapes(source.entries, source.name)
    return (
        source,
        configs_from_shapes.xsam_from_shapes(shapes, llm, siglip, request.mode or "off", _compute(source)),
        beside.parent,
    )


def _joined(family: CheckpointFamily, request: ConversionRequest) -> tuple[TensorSource, FlowSegConfig, Path | None]:
    if not isinstance(request.source, dict):
        raise UserError("flowseg is put together from components: flowseg llm=DIR siglip=DIR sam=DIR [segmentor=FILE] OUT")
    parts = dict(request.source)
    for part in parts:
        if part not in COMPONENT_PREFIXES:
            raise UserError(f"flowseg has no part {part!r} (known: {', '.join(COMPONENT_PREFIXES)})")
    lacking = [part for part in ("llm", "siglip", "sam") if part not in parts and not (part == "sam" and "segmentor" in parts)]
    if lacking:
        raise UserError(
            f"flowseg needs {', '.join(f'{part}=DIR' for part in lacking)}: nothing is made up for a missing component"
        )
    if "sam" in parts and "segmentor" in parts:
        raise UserError("both sam= and segmentor= hold a mask encoder: leave sam= out")
    opened, cfgs, tokenizer = [], {}, None
    for part, path in parts.items():
        name = {"siglip": "siglip2", "segmentor": "xsam_stage1"}.get(part, part)
        component = FAMILIES[_llm_family(resolve_source(path)) if part == "llm" else name]
        source, cfgs[part], base = _component(component, dataclasses.replace(request, source=path, config=None))
        if part == "sam" and _meta_prefix(source) is not None:
            source = in_layout(component, cfgs[part], source, "hf")
        opened.append((part, source))
        tokenizer = base if part == "llm" else tokenizer
    old_names = any("segmentor.class_predictor.weight" in source.entries for _, source in opened)
    joined = []
    for part, source in opened:
        old, new = COMPONENT_PREFIXES[part]
        joined.append((source, old, new.replace("vision_encoder", "visual_encoder") if old_names else new))
    source = JoinedSource(joined, " + ".join(source.name for _, source in opened))
    sam = cfgs["segmentor"].sam if "segmentor" in cfgs else cfgs["sam"]
    cfg = configs.joined_config(
        cfgs["llm"], cfgs["siglip"], sam, cfgs.get("segmentor"), request.mode or "sr_cr", _compute(opened[0][1])
    )
    return source, cfg, tokenizer


def _open(path: Path, family: CheckpointFamily) -> tuple[TensorSource, ModelDirectory | None]:
    """A source; one of our own directories is read through the family's table."""
    if path.is_dir() and is_model_directory(path):
        own = ModelDirectory(path, family)
        return TorchView(family, own.cfg, own), own
    return unwrapped(open_source(path), family), None


def _meta_prefix(source: TensorSource) -> str | None:
    """What segment-anything's names of the image encoder begin with; None if they are not these."""
    return next((p for p in ("image_encoder.", "") if f"{p}patch_embed.proj.weight" in source.entries), None)


def _llm_family(path: Path) -> str:
    """Which language model a directory holds."""
    if not is_model_directory(path):
        open_source(path)  # an adapter alone, or the shards of a training run, say so; they may have no config.json
    if path.suffix == ".gguf" or (path.is_dir() and list(path.glob("*.gguf")) and not (path / "config.json").is_file()):
        raise UserError(f"{path}: convert a GGUF by itself first (flowseg convert llama ...), then give its directory")
    values = configs_from_hf.hf_config(None, path)
    # A component of ours, a whole model of ours, Hugging Face's language model, and one of its models with pictures.
    places = (("component", "family"), ("model", "llm", "model_type"), ("model_type",), ("text_config", "model_type"))
    named = [_at(values, place) for place in places]
    found = next((name for name in named if name in hf_keys.LANGUAGE), None)
    if found is None:
        model_type = reprlib.repr(next((name for name in named if name), None))
        raise UserError(
            f"llm={path}: no language model that is supported (config.json says {model_type}; qwen3, phi3 or llama)"
        )
    return found


def _at(values: Any, keys: Sequence[str]) -> str | None:
    """The text at nested keys of a JSON file, whatever it holds there."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, str) else None


def _tokenizer(
    request: ConversionRequest, base: Path | None, source: TensorSource, scratch: Path, template: str | None
) -> tuple[Path | None, Extended | None]:
    """A copy of the tokenizer with the segmentation tokens added, and its number of ids; (None, None) where there is none."""
    if request.tokenizer is not None:
        base = resolve_source(request.tokenizer)
    elif hasattr(source, "save_tokenizer"):
        base = scratch / "base"
        source.save_tokenizer(base)
    elif base is None or not any((base / name).is_file() for name in TOKENIZER_FILES):
        return None, None
    for file in sorted(base.iterdir()) if base.is_dir() else []:
        if file.suffix in (".json", ".txt", ".model", ".jinja"):
            refuse_pointer(file)
    return scratch / "tokenizer", add_special_tokens(base, scratch / "tokenizer", template)


def _chat(cfg: LanguageConfig) -> str:
    """The template that X-SAM uses with a language model; SmolLM2 was trained with Qwen's special tokens."""
    if cfg.model_type == "phi3":
        return "phi3_chat"
    if cfg.model_type == "llama" and cfg.vocab_size >= LLAMA3_VOCABULARY:
        return "llama3_chat"
    size = lambda model: (model.model_type, model.hidden_size, model.num_hidden_layers)  # noqa: E731
    thinks = size(cfg) in [size(PRESETS[name]()) for name in ("qwen3_1b7", "qwen3_8b", "qwen3_14b", "qwen3_32b")]
    return "qwen3_wothinking" if thinks else "qwen3_instruct"


def _compute(source: TensorSource) -> str:
    """What a network computes in whose weights are these: bfloat16 if most of them are."""
    sizes: dict[np.dtype, int] = {}
    for shape, dtype in source.entries.values():
        sizes[dtype] = sizes.get(dtype, 0) + int(np.prod(shape, dtype=np.int64))
    return "bfloat16" if sizes and max(sizes, key=lambda dtype: sizes[dtype]) == ml_dtypes.bfloat16 else "float32"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
