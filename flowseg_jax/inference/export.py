"""`flowseg export`: a model as a `jax.export` artefact, which runs where JAX is, without this package.

Two programs, each lowered for all platforms: `encode_image` encodes images once, `predict` segments what expressions name in
them. Weights are arguments, so they are stored once for both, in the dtype that the checkpoint has them in. Text comes as token
ids alone: the program finds spans, positions and segments by the special tokens. `docs/export.md` describes the directory.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as jax_export
from jaxtyping import Array, Int

from flowseg_jax.checkpoints.manifest import check_manifest, flatten_params, manifest, unflatten_params
from flowseg_jax.checkpoints.pretrained import load_pretrained, read_model_config, require_empty_directory
from flowseg_jax.checkpoints.storage import cast_like, fresh_directory, provenance
from flowseg_jax.data import collate
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.tokenizer import Tokenizer, load_tokenizer
from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.evaluation import postprocess
from flowseg_jax.evaluation.benchmark import params_digest
from flowseg_jax.inference.selection import stored_no_target_threshold
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.kv_cache import KVCache
from flowseg_jax.models.mask_decoder import LevelMemory
from flowseg_jax.models.outputs import ImageCache
from flowseg_jax.ops.portable import without_kernels
from flowseg_jax.system import locks
from flowseg_jax.system.console import heartbeat
from flowseg_jax.types import IMAGE_TOKEN_INDEX, PAD, ExpressionQueries, ImageInputs

FORMAT = "flowseg_jax export"
FORMAT_VERSION = 2
PLATFORMS = ("cpu", "tpu", "cuda")
END = PAD  # stands after each conversation, and in what is left of the text


@dataclasses.dataclass(frozen=True)
class ExportShapes:
    """The static sizes of the programs.

    Attributes:
        batch: images at a time (B).
        phrases: expressions an image (K).
        text: token ids an image (T), all its conversations and what ends them together.
    """

    batch: int = 1
    phrases: int = 8
    text: int = 256

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")


@dataclasses.dataclass(frozen=True)
class PromptTokens:
    """Everything said around an expression, as token ids.

    Attributes:
        prefix: in front of all conversations, the image's slots at its end; part of `encode_image`.
        before, after: a conversation is `before`, the expression between `<p>` and `</p>`, `after`.
        phrase_start, phrase_end, seg: the special tokens that the programs look for.
    """

    prefix: Sequence[int]
    before: Sequence[int]
    after: Sequence[int]
    phrase_start: int
    phrase_end: int
    seg: int

    @classmethod
    def of(cls, prompts: PromptTemplates, tokenizer: Tokenizer, visual_tokens: int) -> PromptTokens:
        """A model's fixed prompt template. A special token splits the text, so the parts do not depend on the expression."""
        (conversation,) = collate.make_conversations(dataclasses.replace(prompts, randomize=False), ["it"])
        ids = collate.encode_conversation(conversation, prompts, tokenizer, "the prompt template").input_ids
        start, end = ids.index(tokenizer.phrase_start), ids.index(tokenizer.phrase_end)
        prefix = collate.encode_prefix(prompts, tokenizer, visual_tokens)
        return cls(prefix, ids[:start], ids[end + 1 :], tokenizer.phrase_start, tokenizer.phrase_end, tokenizer.seg)

    def to_json(self) -> dict[str, Any]:
        """The fields, with the number of the image's slots in place of the slots."""
        text = [token for token in self.prefix if token != IMAGE_TOKEN_INDEX]
        return dataclasses.asdict(self) | {"prefix": text, "visual_tokens": len(self.prefix) - len(text)}


def queries_from_tokens(input_ids: Int[Array, "b t"], phrases: int, prompt: PromptTokens) -> ExpressionQueries:
    """The queries, from token ids alone: conversations one after the other, `END` after each and in the rest of the text.

    The result is that of `collate.collate_queries`, but for the slots that the ends take.
    """
    real = input_ids != END
    at = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
    number = jnp.where(real, jnp.cumsum(~real, 1, dtype=jnp.int32), PAD)
    first = jax.lax.cummax(jnp.where(real, 0, at + 1), axis=1)
    starts, ends = input_ids == prompt.phrase_start, input_ids == prompt.phrase_end
    inside = jnp.cumsum(starts, 1) > jnp.cumsum(ends, 1) - ends  # both ends belong to the span
    return ExpressionQueries(
        input_ids=jnp.where(real, input_ids, 0),
        position_ids=jnp.where(real, len(prompt.prefix) + at - first, 0),
        segment_ids=jnp.where(real, number + 1, PAD),
        phrase_ids=jnp.where(real & inside, number, PAD),
        seg_ids=jnp.where(input_ids == prompt.seg, number, PAD),
        query_valid=(number[:, None] == jnp.arange(phrases)[:, None]).any(-1),
    )


def lower(
    cfg: FlowSegConfig,
    weights: Mapping[str, jax.ShapeDtypeStruct],
    prompt: PromptTokens,
    shapes: ExportShapes,
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, jax_export.Exported]:
    """The programs `encode_image` and `predict`, lowered for the platforms; that takes neither the hardware nor the weights.

    Both take the weights first, a flat dict by name, and everything else by keyword; `docs/export.md` says what.
    """
    graphdef, abstract = flowseg.abstract_model(cfg)
    abstract = flowseg.params_dict(abstract)
    prefix = np.array(prompt.prefix, np.int32)

    def model(weights: Mapping[str, Array]) -> flowseg.FlowSeg:
        return flowseg.bind_params(graphdef, cast_like(unflatten_params(weights), abstract))

    def encode_image(weights, *, sam_images, resized_hw, siglip_images):
        cache = model(weights).prefill_image(ImageInputs(sam_images, resized_hw, siglip_images), prefix)
        # Plain containers: whoever loads the program knows no class of ours.
        return {
            "mask_features": cache.mask_features,
            "levels": [vars(level) for level in cache.levels],
            "kv_cache": vars(cache.kv_cache),
        }

    def predict(weights, *, image, input_ids):
        network, queries = model(weights), queries_from_tokens(input_ids, shapes.phrases, prompt)
        levels = tuple(LevelMemory(**level) for level in image["levels"])
        found = network.predict_cached(ImageCache(image["mask_features"], levels, KVCache(**image["kv_cache"])), queries)
        chosen = postprocess.top_k_masks(found, 1)
        logits = postprocess.refine(network, chosen.logits, found.mask_features)
        return {
            "scores": found.scores,
            "query": jnp.where(queries.query_valid, chosen.query[..., 0], PAD),
            "logits": logits[:, :, 0],
        }

    sam_size, siglip_size = cfg.sam.image_size, cfg.siglip.image_size
    inputs = {
        "sam_images": jax.ShapeDtypeStruct((shapes.batch, sam_size, sam_size, 3), jnp.uint8),
        "resized_hw": jax.ShapeDtypeStruct((shapes.batch, 2), jnp.int32),
        "siglip_images": jax.ShapeDtypeStruct((shapes.batch, siglip_size, siglip_size, 3), jnp.uint8),
    }
    input_ids = jax.ShapeDtypeStruct((shapes.batch, shapes.text), jnp.int32)
    with without_kernels():
        encoder = jax_export.export(jax.jit(encode_image), platforms=platforms)(weights, **inputs)
        image = jax.tree.unflatten(encoder.out_tree, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in encoder.out_avals])
        predictor = jax_export.export(jax.jit(predict), platforms=platforms)(weights, image=image, input_ids=input_ids)
    return {"encode_image": encoder, "predict": predictor}


def export(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    shapes: ExportShapes | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> Path:
    """Exports a model directory; the result appears complete or not at all.

    Args:
        directory: a model directory.
        out: the directory to make; must not exist.
        shapes: the programs' static sizes; None: the default ones.
        platforms: of `PLATFORMS`, for which the programs are lowered.

    Raises:
        UserError: an unknown platform, an `out` that exists or cannot be written, a model directory that is missing, damaged or
            cannot answer expressions, a tokenizer without a `tokenizer.json`, a text length in which no expression fits.
    """
    shapes, target, platforms = shapes or ExportShapes(), Path(out).absolute(), _known(platforms)
    with locks.held(target, beside=True):
        return _export(directory, target, shapes, platforms)


def _export(directory: str | os.PathLike[str], target: Path, shapes: ExportShapes, platforms: Sequence[str]) -> Path:
    require_empty_directory(target)
    stored = read_model_config(directory)
    cfg = FlowSegConfig.from_dict(stored["model"], f"{directory}/config.json: model")
    cfg.require_full_model(str(directory))
    check_manifest(
        manifest(flowseg.params_dict(flowseg.abstract_model(cfg)[1])), stored["manifest"], f"model directory {directory}"
    )
    with heartbeat(f"loading {directory}"):
        loaded = load_pretrained(directory, dtype=None)
    prompts = PromptTemplates.of_model(loaded.extra, directory)
    tokenizer = load_tokenizer(loaded.tokenizer_dir, needed=prompts.special_tokens)
    backend = getattr(tokenizer.hf, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{directory}: its tokenizer is not a fast one, which alone can be written as tokenizer.json")
    if tokenizer.vocab > cfg.llm.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab} ids, the model's embedding table {cfg.llm.vocab_size}"
        )
    no_target_threshold = stored_no_target_threshold(loaded.extra, directory)
    prompt = PromptTokens.of(prompts, tokenizer, cfg.num_visual_tokens)
    if shapes.text < (least := len(prompt.before) + len(prompt.after) + 3):
        raise UserError(f"text is {shapes.text}: even the shortest expression takes {least} tokens")
    weights = flatten_params(loaded.params)
    with heartbeat(f"lowering for {', '.join(platforms)}"):
        abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
        programs = lower(cfg, abstract, prompt, shapes, platforms)
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "checkpoint": {"digest": params_digest(stored), "step": loaded.extra.get("step")},
        **provenance(),
        "platforms": platforms,
        "shapes": dataclasses.asdict(shapes),
        "sam_size": cfg.sam.image_size,
        "siglip_size": cfg.siglip.image_size,
        "prompt": prompt.to_json(),
        "no_target_threshold": no_target_threshold,
        "reserved": [token.lower() for token in tokenizer.reserved if token.strip()],
        "programs": {name: _describe(name, program) for name, program in programs.items()},
    }
    with heartbeat(f"writing {target}"), fresh_directory(target) as fresh:
        _write(fresh, programs, weights, backend.to_str(pretty=True), about)
    return target


def _write(
    folder: Path,
    programs: Mapping[str, jax_export.Exported],
    weights: Mapping[str, Array],
    tokenizer: str,
    about: dict[str, Any],
) -> None:
    """The files of an export, in a folder that is there."""
    for name, program in programs.items():
        (folder / _file(name)).write_bytes(program.serialize())
    safetensors.numpy.save_file(weights, folder / "weights.safetensors")
    (folder / "weights.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    (folder / "export.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _known(platforms: Sequence[str]) -> list[str]:
    for name in platforms:
        if name not in PLATFORMS:
            raise UserError(f"unknown platform {name!r}{did_you_mean(name, PLATFORMS)}")
    return list(dict.fromkeys(platforms))


def _file(name: str) -> str:
    return f"{name}.jax_export"


def _describe(name: str, program: jax_export.Exported) -> dict[str, Any]:
    """File, calling convention, and name -> [shape, dtype] of what goes in beside the weights and of what comes out."""
    _, inputs = jax.tree.unflatten(program.in_tree, program.in_avals)
    outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
    return {
        "file": _file(name),
        "calling_convention_version": program.calling_convention_version,
        "inputs": manifest(inputs),
        "outputs": manifest(outputs),
    }
