"""A model and a prepared data set, ready to be evaluated split by split; nothing compiles twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from flax import nnx

from flowseg_jax.data.batch import BatchShape
from flowseg_jax.data.batching import LengthBound
from flowseg_jax.data.evaluation import EvalData
from flowseg_jax.data.prepared import Prepared
from flowseg_jax.data.prompts import Prompts
from flowseg_jax.data.tokenizer import Tokenizer, load_tokenizer
from flowseg_jax.evaluation import protocols, report
from flowseg_jax.evaluation.runner import Evaluation, Evaluator, evaluate
from flowseg_jax.model_directory import load_model, read_model_config
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.writers import heartbeat

PHRASES = 8  # an image's expressions that share one pass; more spread over several rows
CONTROL_SEED = 0
TEXT_STEP = 16  # text lengths are multiples of it, so that similar data sets share compilations


@dataclasses.dataclass
class Benchmark:
    """What `eval.py` and the demo run.

    Attributes:
        cfg, graphdef: the model.
        params: its parameters; assign others of the same model to evaluate them without compiling again.
        checkpoint: what is written beside the numbers: digest and step.
        data: the prepared data set.
        tokenizer, prompts: how expressions become text.
        batch: images at a time.
        protocol: named protocol.
    """

    cfg: FlowSegConfig
    graphdef: nnx.GraphDef
    params: dict[str, Any]
    checkpoint: dict[str, Any]
    data: Prepared
    tokenizer: Tokenizer
    prompts: Prompts
    batch: int = 8
    protocol: str = "xsam"

    def __post_init__(self):
        self._protocol = protocols.get(self.protocol)
        self._evaluator = Evaluator(self.graphdef)
        # One text length for all splits, long enough for the longest expressions of any of them side by side.
        bound = LengthBound(dataclasses.replace(self.prompts, vary=False), self.tokenizer, self.cfg.visual_tokens)
        asked = {s.sentence for split in self.data.splits for entry in self.data.index(split) for s in entry.samples}
        longest = sorted(bound.phrase_lengths(sorted(asked)), reverse=True)[:PHRASES]
        self._text = -(-bound.needed(longest, task=self.data.task) // TEXT_STEP) * TEXT_STEP

    @classmethod
    def of_model(cls, directory: str | Path, data: str | Path, *, batch: int = 8, protocol: str = "xsam") -> Benchmark:
        """Opens a model directory and a prepared data set. Raises UserError where either is missing or damaged."""
        prepared = Prepared.open(data)
        stored = read_model_config(directory)
        cfg = FlowSegConfig.from_dict(stored["model"])
        cfg.check_complete(str(directory))
        with heartbeat(f"loading {directory}"):
            graphdef, abstract = flowseg.describe(cfg)
            loaded = load_model(directory, flowseg.at_rest(abstract))
        prompts = Prompts(**loaded.extra.get("prompts", {}))
        tokenizer = load_tokenizer(loaded.tokenizer_dir, needed=prompts.needed)
        checkpoint = {"digest": digest(stored), "step": loaded.extra.get("step")}
        return cls(cfg, graphdef, loaded.params, checkpoint, prepared, tokenizer, prompts, batch, protocol)

    def run(
        self, split: str, out: str | Path, *, shuffle_text: bool = False, images: int | None = None, pictures: bool = True
    ) -> Evaluation:
        """Evaluates one split into `out`, with pictures of good, random and failed samples."""
        self.data.check_split(split)
        shape = BatchShape(self.batch, self._text, PHRASES, 1, self.cfg.sam.image_size, self.cfg.siglip.image_size)
        data = EvalData(
            self.data,
            split,
            self.tokenizer,
            shape,
            prompts=self.prompts,
            visual_tokens=self.cfg.visual_tokens,
            max_images=images,
            control_seed=CONTROL_SEED if shuffle_text else None,
        )
        evaluation = evaluate(
            self.graphdef,
            self.params,
            data,
            split=split,
            out=out,
            protocol=self._protocol,
            shuffle_text=shuffle_text,
            checkpoint=self.checkpoint,
            evaluator=self._evaluator,
        )
        if pictures:
            report.save_pictures(out, f"{split}_shuffled" if shuffle_text else split, evaluation.examples)
        return evaluation


def digest(model_config: dict[str, Any]) -> str:
    """SHA-256 over the checksums of all parameters: the same weights, the same digest."""
    return hashlib.sha256(json.dumps(model_config["checksums"], sort_keys=True).encode()).hexdigest()[:16]
