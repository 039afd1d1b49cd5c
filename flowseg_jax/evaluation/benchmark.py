"""A model and a prepared data set, ready to be evaluated split by split; nothing compiles twice."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from flowseg_jax import sharding as parallel
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.checkpoints.pretrained import load_pretrained, read_model_config
from flowseg_jax.data.dataset import METADATA, PreparedDataset
from flowseg_jax.data.eval_dataset import EvalDataset
from flowseg_jax.data.formats import LAYOUTS
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.tokenizer import Tokenizer, load_tokenizer
from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.evaluation import protocols
from flowseg_jax.evaluation.evaluator import Evaluator
from flowseg_jax.evaluation.runner import EvalResult, evaluate
from flowseg_jax.models import flowseg, generate
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.reports import evaluation as report
from flowseg_jax.system import distributed
from flowseg_jax.system.console import heartbeat

CONTROL_SEED = 0
GALLERY = 6  # pictures of each kind


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """What is evaluated.

    Attributes:
        cfg: the model.
        evaluator: its compiled functions.
        params: its parameters; `dataclasses.replace` them by others of the same model to compile nothing again.
        checkpoint: what is written beside the numbers: digest and step.
        tokenizer, prompts: how expressions become text.
        answer_tokens: the model writes its answers itself, of at most so many tokens; 0: they are given.
    """

    cfg: FlowSegConfig
    evaluator: Evaluator
    params: dict[str, Any]
    checkpoint: dict[str, Any]
    tokenizer: Tokenizer
    prompts: PromptTemplates
    answer_tokens: int = 0

    @classmethod
    def load(cls, directory: str | Path, *, fsdp: int = 1, answer_tokens: int = 0) -> EvalModel:
        """Opens a model directory on all devices.

        Args:
            directory: the model's.
            fsdp: so many devices share one copy of the parameters.
            answer_tokens: the model writes its answers itself, of at most so many tokens; 0: they are given.

        Raises:
            UserError: it is missing, damaged or no whole model, or `fsdp` does not divide the devices.
        """
        stored = read_model_config(directory)
        cfg = FlowSegConfig.from_dict(stored["model"], f"{directory}/config.json: model")
        cfg.require_full_model(str(directory))
        mesh = parallel.make_mesh({"data": -1, "fsdp": fsdp})
        graphdef, abstract = flowseg.abstract_model(cfg)
        shardings = flatten_params(parallel.param_shardings(abstract, mesh))
        shapes = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path])
            for path, x in flatten_params(flowseg.params_dict(abstract)).items()
        }
        with heartbeat(f"loading {directory}"):
            loaded = load_pretrained(directory, unflatten_params(shapes))
        prompts = PromptTemplates.of_model(loaded.extra, directory)
        tokenizer = load_tokenizer(loaded.tokenizer_dir, needed=prompts.special_tokens)
        if tokenizer.vocab > cfg.llm.vocab_size:
            raise UserError(
                f"{directory}: the tokenizer has {tokenizer.vocab} ids, the model's embedding table {cfg.llm.vocab_size}"
            )
        partition = unflatten_params({path: sharding.spec for path, sharding in shardings.items()})
        answer = None
        if answer_tokens:
            marks = generate.SpecialTokenIds(tokenizer.phrase_start, tokenizer.phrase_end, tokenizer.seg)
            answer = functools.partial(
                generate.generate_and_segment, marks=marks, max_new_tokens=answer_tokens, eos=prompts.eos_ids(tokenizer)
            )
        evaluator = Evaluator(parallel.mark_fsdp_axes(nnx.merge(graphdef, abstract), mesh), mesh, partition, answer)
        checkpoint = {"digest": params_digest(stored), "step": loaded.extra.get("step")}
        return cls(cfg, evaluator, loaded.params, checkpoint, tokenizer, prompts, answer_tokens)


@dataclasses.dataclass(frozen=True)
class ReferringEvaluation:
    """A subject and a prepared data set: what `eval.py` and the demo run.

    Attributes:
        subject: the model.
        data: the data set.
        batch: images at a time; rounded up to a multiple of the devices.
        protocol: named protocol.
        no_target_threshold: see `runner.evaluate`.
    """

    subject: EvalModel
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
    ) -> EvalResult:
        """Evaluates one split into `out`, with pictures of good, random and failed samples.

        Raises:
            UserError: as `runner.evaluate`; or another process evaluates into `out`.
        """
        with distributed.locked(out):
            return self._run(split, out, shuffle_text, images, pictures, save_masks)

    def _run(
        self, split: str, out: str | Path, shuffle_text: bool, images: int | None, pictures: bool, save_masks: bool
    ) -> EvalResult:
        subject, protocol = self.subject, protocols.get_protocol(self.protocol)
        open_data = functools.partial(self.open, split, images=images, control_seed=CONTROL_SEED if shuffle_text else None)
        evaluation = evaluate(
            subject.evaluator,
            subject.params,
            open_data,
            split=split,
            out=out,
            protocol=protocol,
            shuffle_text=shuffle_text,
            about={
                "checkpoint": subject.checkpoint,
                "setup": setup_hash(subject.cfg, subject.prompts, subject.tokenizer),
                "data": self.data.digest,
                "images": images,
                "answer": f"written, at most {subject.answer_tokens} tokens" if subject.answer_tokens else "given",
                "prompt": {"question": subject.prompts.question, "answer": subject.prompts.answer},
            },
            no_target_threshold=self.no_target_threshold,
            gallery=GALLERY if pictures else 0,
            save_masks=save_masks,
        )
        if pictures and distributed.is_primary():
            report.save_pictures(out, f"{split}_shuffled" if shuffle_text else split, evaluation.examples)
        return evaluation

    def open(
        self, split: str, *, images: int | None = None, prompts: PromptTemplates | None = None, **options: Any
    ) -> EvalDataset:
        """This process's share of the split's samples, asked as the protocol asks, by default in the model's wording."""
        subject, protocol = self.subject, protocols.get_protocol(self.protocol)
        self.data.check_split(split)
        devices = subject.evaluator.devices
        batch = -(-self.batch // devices) * devices
        return EvalDataset(
            self.data,
            split,
            subject.tokenizer,
            sides=(subject.cfg.sam.image_size, subject.cfg.siglip.image_size),
            batch=batch,
            prompts=prompts or subject.prompts,
            visual_tokens=subject.cfg.num_visual_tokens,
            max_images=images,
            by_ref=protocol.unit == "ref",
            generate=subject.answer_tokens > 0,
            filled=protocol.raster == "fill_points",
            rows=parallel.local_row_indices(batch, subject.evaluator.mesh),
            **options,
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
    """A hash of what numbers depend on beside the weights: the model's config, the wording and the tokenizer."""
    return _hash([cfg.to_dict(), dataclasses.asdict(prompts), tokenizer and tokenizer.definition])


def params_digest(model_config: dict[str, Any]) -> str:
    """SHA-256 over the checksums of all parameters: the same weights, the same digest."""
    return _hash(model_config["checksums"])
