"""A model and a prepared data set, ready to be evaluated split by split, on all devices; nothing compiles twice."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from flowseg_jax import sharding
from flowseg_jax.checkpoints.find import model_name
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.checkpoints.pretrained import read_model_config
from flowseg_jax.checkpoints.quantized import load_for_inference
from flowseg_jax.data.dataset import METADATA, PreparedDataset
from flowseg_jax.data.eval_dataset import EvalDataset
from flowseg_jax.data.formats import LAYOUTS
from flowseg_jax.data.generic_dataset import CategoryPrompts, GenericDataset
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.tokenizer import Tokenizer, load_tokenizer
from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.evaluation import protocols, report, runner
from flowseg_jax.evaluation.evaluator import AnswerFn, Evaluator
from flowseg_jax.evaluation.fusion import MASK2FORMER, Thresholds
from flowseg_jax.evaluation.runner import EvalResult
from flowseg_jax.evaluation.tasks import referring
from flowseg_jax.evaluation.tasks.generic import GenericTask
from flowseg_jax.evaluation.tasks.referring import ReferringResult
from flowseg_jax.models import flowseg, generate, quantization
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.system import distributed
from flowseg_jax.system.console import heartbeat

CONTROL_SEED = 0
GALLERY = 6  # pictures of each kind of `examples.KINDS`


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """What is evaluated.

    Attributes:
        cfg: the model.
        evaluator: its compiled functions.
        params: its parameters; `dataclasses.replace` them by others of the same model to compile nothing again.
        checkpoint: what is written beside the numbers: digest and step.
        tokenizer, prompts: how questions become text; no tokenizer for a model without language.
        answer_tokens: the model writes its answers itself, of at most so many tokens; 0: they are given.
        name: what it is called beside the numbers.
    """

    cfg: FlowSegConfig
    evaluator: Evaluator
    params: dict[str, Any]
    checkpoint: dict[str, Any]
    tokenizer: Tokenizer | None
    prompts: PromptTemplates
    answer_tokens: int = 0
    name: str = ""

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        fsdp: int = 1,
        answer_tokens: int = 0,
        expressions: bool = True,
        devices: Sequence[jax.Device] | None = None,
        quantize: str | None = None,
    ) -> EvalModel:
        """Opens a model directory on all devices.

        Args:
            directory: the model's.
            fsdp: so many devices share one copy of the parameters.
            answer_tokens: the model writes its answers itself, of at most so many tokens; 0: they are given.
            expressions: it must answer expressions; else a segmentor without language is enough.
            devices: other than all.
            quantize: "int8" or "bfloat16" (`models.quantization`), or None.

        Raises:
            UserError: it is missing, damaged or lacks a component, or `fsdp` does not divide the devices.
        """
        stored = read_model_config(directory)
        cfg = FlowSegConfig.from_dict(stored["model"], f"{directory}/config.json: model")
        if expressions:
            cfg.require_full_model(str(directory))
        mesh = sharding.make_mesh({"data": -1, "fsdp": fsdp}, devices)
        _, abstract = quantization.abstract_model(cfg, quantize)
        places = flatten_params(sharding.param_shardings(abstract, mesh))
        shapes = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path])
            for path, x in flatten_params(flowseg.params_dict(abstract)).items()
        }
        with heartbeat(f"loading {directory}"):
            loaded = load_for_inference(directory, cfg, unflatten_params(shapes), quantize)
        prompts = PromptTemplates.of_model(loaded.extra, directory)
        tokenizer = load_tokenizer(loaded.tokenizer_dir, needed=prompts.special_tokens) if cfg.has_language_model else None
        if tokenizer and tokenizer.vocab > cfg.llm.vocab_size:
            raise UserError(
                f"{directory}: the tokenizer has {tokenizer.vocab} ids, the model's embedding table {cfg.llm.vocab_size}"
            )
        answer = None
        if answer_tokens:
            special_tokens = generate.SpecialTokenIds(tokenizer.phrase_start, tokenizer.phrase_end, tokenizer.seg)
            answer = functools.partial(
                generate.generate_and_segment,
                special_tokens=special_tokens,
                max_new_tokens=answer_tokens,
                eos_ids=prompts.eos_ids(tokenizer),
            )
        evaluator = make_evaluator(cfg, mesh, answer, quantize)
        checkpoint, name = {"digest": params_digest(stored), "step": loaded.extra.get("step")}, model_name(Path(directory))
        if quantize:
            checkpoint, name = checkpoint | {"quantize": quantize}, f"{name} {quantize}"
        return cls(cfg, evaluator, loaded.params, checkpoint, tokenizer, prompts, answer_tokens, name)


def make_evaluator(cfg: FlowSegConfig, mesh: Mesh, answer: AnswerFn | None = None, quantize: str | None = None) -> Evaluator:
    """The compiled functions of a model whose parameters are sharded over a mesh as `sharding.param_shardings` says."""
    graphdef, abstract = quantization.abstract_model(cfg, quantize)
    places = flatten_params(sharding.param_shardings(abstract, mesh))
    partition = unflatten_params({path: place.spec for path, place in places.items()})
    return Evaluator(sharding.mark_fsdp_axes(nnx.merge(graphdef, abstract), mesh), mesh, partition, answer)


@dataclasses.dataclass(frozen=True)
class ReferringEvaluation:
    """A model and a prepared data set of expressions: what `flowseg eval` and the demo run.

    Attributes:
        model: what is evaluated.
        data: the data set.
        batch: images at a time; rounded up to a multiple of the devices.
        protocol: named protocol.
        no_target_threshold: see `tasks.referring.evaluate`.
    """

    model: EvalModel
    data: PreparedDataset
    batch: int = 8
    protocol: str = "xsam"
    no_target_threshold: float = 0.0

    def run(
        self,
        split: str,
        out: str | Path,
        *,
        shuffle_text: bool = False,
        images: int | None = None,
        pictures: bool = True,
        save_masks: bool = False,
    ) -> ReferringResult:
        """Evaluates one split into `out`, with pictures of good, random and failed samples.

        Raises:
            UserError: as `tasks.referring.evaluate`; or another process evaluates into `out`.
        """
        with distributed.locked(out):
            found = self.evaluate(split, out, shuffle_text, images, gallery=GALLERY if pictures else 0, save_masks=save_masks)
            if pictures and distributed.is_primary():
                report.save_pictures(out, f"{split}_shuffled" if shuffle_text else split, found.examples)
        return found

    def evaluate(
        self, split: str, out: str | Path | None, shuffle_text: bool = False, images: int | None = None, **options: Any
    ) -> ReferringResult:
        """`tasks.referring.evaluate` on one split of the data, with its keywords; `out` is the caller's, or None."""
        model, protocol = self.model, protocols.get_protocol(self.protocol)
        open_data = functools.partial(self.open, split, images=images, control_seed=CONTROL_SEED if shuffle_text else None)
        return referring.evaluate(
            model.evaluator,
            model.params,
            open_data,
            split=split,
            out=out,
            protocol=protocol,
            shuffle_text=shuffle_text,
            about={
                "model": model.name,
                "checkpoint": model.checkpoint,
                "setup": setup_hash(model.cfg, model.prompts, model.tokenizer),
                "data": self.data.digest,
                "images": images,
                "answer": f"written, at most {model.answer_tokens} tokens" if model.answer_tokens else "given",
                "prompt": {"question": model.prompts.question, "answer": model.prompts.answer},
            },
            no_target_threshold=self.no_target_threshold,
            **options,
        )

    def open(
        self, split: str, *, images: int | None = None, prompts: PromptTemplates | None = None, **options: Any
    ) -> EvalDataset:
        """This process's share of the split's samples, with the protocol's prompts, by default with the model's templates."""
        model, protocol = self.model, protocols.get_protocol(self.protocol)
        self.data.check_split(split)
        batch = model.evaluator.round_up(self.batch)
        return EvalDataset(
            self.data,
            split,
            model.tokenizer,
            sides=(model.cfg.sam.image_size, model.cfg.siglip.image_size),
            batch=batch,
            prompts=prompts or model.prompts,
            visual_tokens=model.cfg.num_visual_tokens,
            max_images=images,
            by_ref=protocol.unit == "ref",
            generate=model.answer_tokens > 0,
            filled_polygons=protocol.raster == "fill_points",
            rows=sharding.local_row_indices(batch, model.evaluator.mesh),
            **options,
        )


@dataclasses.dataclass(frozen=True)
class GenericEvaluation:
    """A model and a prepared data set with categories.

    Attributes:
        model: what is evaluated.
        data: the data set.
        batch: images at a time; rounded up to a multiple of the devices.
        names: at most so many category names a conversation; 0: all in one.
        thresholds: of the panoptic segmentation.

    Raises:
        UserError: the data set is not a generic one, or the model makes no masks or has another number of categories.
    """

    model: EvalModel
    data: PreparedDataset
    batch: int = 8
    names: int = 0
    thresholds: Thresholds = MASK2FORMER

    def __post_init__(self):
        cfg = self.model.cfg
        if self.data.task != "generic":
            raise UserError(f"{self.data.directory}: {self.data.task} data has no categories to evaluate on")
        if not cfg.has_mask_decoder:
            raise UserError(f"the model holds only the components {cfg.components!r}: it makes no masks")
        if not cfg.has_language_model and cfg.num_classes != len(self.data.categories):
            raise UserError(
                f"{self.data.directory}: has {len(self.data.categories)} categories, the model's linear head has "
                f"{cfg.num_classes} (model.num_classes): evaluate it on the data set that it was trained on"
            )
        if self.names < 0:
            raise UserError(f"names a conversation must not be negative, got {self.names}")

    @property
    def category_prompts(self) -> CategoryPrompts:
        """How the categories are asked for; one conversation for a model without language."""
        return CategoryPrompts.of(self.data.categories, self.names if self.model.cfg.has_language_model else 0)

    def run(self, split: str, out: str | Path | None, *, images: int | None = None, save_masks: bool = False) -> EvalResult:
        """Evaluates one split into `<out>/<split>.json` and `<split>.jsonl`, which are replaced only when complete.

        Args:
            split: which split.
            out: a folder; None writes nothing. What an interrupted start left there is continued.
            images: only the first images of the split.
            save_masks: add the objects, true and predicted, to each line of `<split>.jsonl` (`tasks.instance.count_objects`).

        Raises:
            UserError: an unknown split or one without images, a damaged image, or `out` cannot be written or is in use. What
                was finished is kept.
        """
        self.data.check_split(split)
        model, prompts = self.model, self.category_prompts
        about = {
            "split": split,
            "checkpoint": model.checkpoint,
            "setup": setup_hash(model.cfg, model.prompts, model.tokenizer),
            "data": self.data.digest,
            "images": images,
            "conversations": prompts.count if model.cfg.has_language_model else 0,
        }
        task = GenericTask(model.evaluator, prompts, self.data.things, self.thresholds, save_masks)
        with contextlib.nullcontext() if out is None else distributed.locked(out):
            return runner.evaluate(
                task,
                model.evaluator.place(model.params),
                functools.partial(self.open, split, images=images),
                name=split,
                out=out,
                about=about,
                settings=about | {"thresholds": dataclasses.asdict(self.thresholds)},
            )

    def open(self, split: str, *, images: int | None = None, skip: Collection[int] = ()) -> GenericDataset:
        """This process's share of the split's images, in all of which all categories are looked for."""
        model, batch = self.model, self.model.evaluator.round_up(self.batch)
        return GenericDataset(
            self.data,
            split,
            model.tokenizer,
            self.category_prompts,
            batch=batch,
            sides=(model.cfg.sam.image_size, model.cfg.siglip.image_size),
            visual_tokens=model.cfg.num_visual_tokens,
            prompts=model.prompts,
            max_images=images,
            skip=skip,
            rows=sharding.local_row_indices(batch, model.evaluator.mesh),
        )


def parse_benchmarks(benchmarks: str, root: Path) -> list[tuple[str, PreparedDataset, str]]:
    """The (name, data set, split) of each entry of a list like "refcoco/val,reasonseg/test".

    Args:
        benchmarks: entries NAME/SPLIT; NAME is that of a prepared data set in `root`.
        root: where prepared data sets lie.

    Raises:
        UserError: an entry of another form, a name that is unknown or whose data set is not prepared, an unknown split.
    """
    prepared = sorted(path.parent.name for path in root.glob(f"*/{METADATA}"))
    found: dict[str, PreparedDataset] = {}
    result = []
    for entry in benchmarks.split(","):
        name, slash, split = entry.strip().rpartition("/")
        if not slash or not split:
            raise UserError(f"--benchmark: {entry!r} is not NAME/SPLIT, for instance refcoco/val")
        if name in LAYOUTS and name not in prepared:
            raise UserError(
                f"{root / name}: the benchmark {name} is not prepared; make it with `flowseg data prepare "
                f"--layout {name} --source DIR --out {root / name}`"
            )
        if name not in prepared:
            known = sorted({*LAYOUTS, *prepared})
            raise UserError(f"unknown benchmark {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
        found[name] = found.get(name) or PreparedDataset.open(root / name)
        found[name].check_split(split)
        result.append((name, found[name], split))
    return result


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def setup_hash(cfg: FlowSegConfig, prompts: PromptTemplates, tokenizer: Tokenizer | None) -> str:
    """A hash of what numbers depend on beside the weights: the model's config, the prompt templates and the tokenizer."""
    return _hash([cfg.to_dict(), dataclasses.asdict(prompts), tokenizer and tokenizer.definition])


def params_digest(model_config: dict[str, Any]) -> str:
    """SHA-256 over the checksums of all parameters: the same weights, the same digest."""
    return _hash(model_config["checksums"])
