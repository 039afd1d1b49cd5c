"""Evaluates generic segmentation: every pixel's category and every object's mask, whatever the image shows.

A model with a language side is asked for all category names of the data set in one conversation, as X-SAM does: they are the
conditions of one decoder pass, and a candidate's scores are the softmax over [names, background]. `Benchmark.names` limits how
many a conversation asks for: several conversations behind one image are several passes, whose candidates, each with scores for
the names of its own conversation, are put side by side. A segmentor without language classifies candidates with its linear
head. What becomes of them says `fusion`, what is counted says `panoptic`.

B images, N candidates an image, C categories, h x w the mask logits.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flowseg_jax.checkpoints import storage
from flowseg_jax.checkpoints.pretrained import load_pretrained, read_model_config
from flowseg_jax.data import collate, images
from flowseg_jax.data.collate import TokenBudget, TrainExample
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.prompts import PromptTemplates, check_phrase
from flowseg_jax.data.records import Example
from flowseg_jax.data.tokenizer import Tokenizer, load_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import fusion, panoptic, postprocess
from flowseg_jax.evaluation.benchmark import params_digest, setup_hash
from flowseg_jax.evaluation.fusion import MASK2FORMER, FusionOutput, Thresholds
from flowseg_jax.evaluation.panoptic import Segments
from flowseg_jax.evaluation.resumable import ResumableRecords
from flowseg_jax.evaluation.runner import HEARTBEAT
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.flowseg import FlowSeg
from flowseg_jax.models.mask_decoder import mask_logits
from flowseg_jax.system import distributed, host
from flowseg_jax.system.console import duration, heartbeat, log
from flowseg_jax.types import Batch, BatchShape

TEXT_STEP = 16  # text lengths are multiples of it, so that similar data sets share compilations


@dataclasses.dataclass(frozen=True)
class CategoryPrompts:
    """How the categories are divided into conversations: `size` names each, the last one perhaps fewer.

    Attributes:
        categories: their names.
        size: names a conversation.
    """

    categories: tuple[str, ...]
    size: int

    @classmethod
    def of(cls, categories: tuple[str, ...], at_most: int = 0) -> CategoryPrompts:
        """As few conversations as `at_most` names each allow (0: one), of about equal length."""
        return cls(categories, math.ceil(len(categories) / math.ceil(len(categories) / (at_most or len(categories)))))

    @property
    def count(self) -> int:
        return math.ceil(len(self.categories) / self.size)

    def chunks(self) -> list[tuple[str, ...]]:
        return [self.categories[at : at + self.size] for at in range(0, len(self.categories), self.size)]


def score_categories(
    model: FlowSeg, batch: Batch, questions: CategoryPrompts
) -> tuple[Float[Array, "b n c"], Float[Array, "b n h w"]]:
    """Scores and refined mask logits of all candidates of images whose rows ask `questions` (`GenericData`).

    N is the number of queries, times the number of conversations. SR and CR act as in training (`generic_pass`); without an
    open-vocabulary pass in training, as in "with_flow".
    """
    cfg, features = model.cfg, model.encode_image(batch)
    b, count, size, total = len(batch.sam_images), questions.count, questions.size, len(questions.categories)
    if cfg.has_language_model:
        projected = model.llm_projector(model.run_llm(batch, features.visual_tokens))
        names = flowseg.pool_spans(projected, batch.phrase_ids, count * size).reshape(b * count, size, -1)
        exists = batch.name_valid.reshape(b * count, size)
        conditions = flowseg.append_background(names, exists, exists, model.background_embed[...])
        if cfg.generic_pass == "without_flow":
            conditions = dataclasses.replace(conditions, attend_mask=jnp.zeros_like(conditions.attend_mask))
        # A conversation's <SEG> bears the number of its first name.
        segs = flowseg.pool_spans(projected, batch.seg_ids, count * size)[:, ::size].reshape(b * count, -1)
        out = model.mask_decoder(features.mask_features, features.multi_scale_features, count, conditions, segs)
        logits = out.class_logits[-1]
    else:
        count, size = 1, total
        out = model.mask_decoder(features.mask_features, features.multi_scale_features, 1)
        logits = model.category_head(out.queries[-1]).astype(jnp.float32)
    own = jax.nn.softmax(logits, -1)[..., :-1].reshape(b, count, -1, size)
    # A candidate's scores stand in the place of its own conversation; not a product, which would round them.
    blocks = jnp.where(jnp.eye(count, dtype=bool)[:, None, :, None], own[:, :, :, None], 0)
    scores = blocks.reshape(b, -1, count * size)[..., :total]
    embeds = out.mask_embeds[-1].reshape(b, scores.shape[1], -1)
    return scores, model.refine_masks(mask_logits(embeds, features.mask_features), features.mask_features)


@dataclasses.dataclass(frozen=True)
class GenericBatch:
    """A batch that asks for all categories; the lists have one entry for each real row.

    Attributes:
        batch: without targets.
        places: where each image stands in the split.
        examples: the images with their objects.
        sizes: (H, W) of each.
    """

    batch: Batch
    places: list[int]
    examples: list[Example]
    sizes: list[tuple[int, int]]


class GenericDataset:
    """The images of a split, in order; the last batch is padded.

    Args:
        prepared: a data set of task "generic".
        split: which split.
        tokenizer: None for a model without language.
        questions: how the categories are asked for.
        batch: images at a time.
        cfg: of the model.
        prompts: wording; the fixed one is used.
        max_images: only the first images of the split; None for all.
        skip: places in the split that are left out.

    Raises:
        UserError: an unknown split, or a category name that contains a mark of the tokenizer.
    """

    def __init__(
        self,
        prepared: PreparedDataset,
        split: str,
        tokenizer: Tokenizer | None,
        questions: CategoryPrompts,
        *,
        batch: int,
        cfg: FlowSegConfig,
        prompts: PromptTemplates,
        max_images: int | None = None,
        skip: Collection[int] = (),
    ):
        prompts = dataclasses.replace(prompts, randomize=False)
        self._source = prepared.source(split)
        self._places = [place for place in range(len(prepared.index(split)[:max_images])) if place not in skip]
        self.images = len(self._places)
        self._tokenizer, self._prompts, self._visual = tokenizer, prompts, cfg.num_visual_tokens
        self._conversations, self._names, text = [], 0, 1
        if tokenizer is not None:
            for name in questions.categories:
                check_phrase(name, tokenizer, f"{prepared.directory}: category {name!r}")
            chunks = questions.chunks()
            self._conversations = [prompts.generic(chunk, j * questions.size) for j, chunk in enumerate(chunks)]
            self._names = len(questions.categories)
            bound = TokenBudget(prompts, tokenizer, cfg.num_visual_tokens)
            needed = [bound.generic(bound.phrase_lengths(chunk)) for chunk in chunks]
            text = sum(needed) - (len(chunks) - 1) * bound.upper_bound(())  # they share the image
            text = math.ceil(text / TEXT_STEP) * TEXT_STEP
        slots = questions.count * questions.size if tokenizer is not None else 0
        self.shape = BatchShape(batch, text, 0, 0, cfg.sam.image_size, cfg.siglip.image_size, slots)

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(self.images / self.shape.batch)

    def batch(self, number: int) -> GenericBatch:
        """Batch `number` of the images that are not left out."""
        places = self._places[number * self.shape.batch : (number + 1) * self.shape.batch]
        rows, examples = [], []
        for place in places:
            example = self._source[place]
            image = images.decode(example.image, name=example.file_name)
            pixels = collate.prepare_pixels(image, (), self.shape)
            rows.append(TrainExample(example.file_name, pixels, self._conversations, (), (), (), example.image_id, self._names))
            examples.append(dataclasses.replace(example, image=b""))
        batch = collate.collate(rows, self.shape, self._prompts, self._tokenizer, self._visual)
        return GenericBatch(batch, places, examples, [(e.height, e.width) for e in examples])

    def __iter__(self) -> Iterator[GenericBatch]:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(grain.MapDataset.range(len(self)).map(self.batch).to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class GenericResult:
    """What a run over a split yields: the content of `<split>.json` and the lines of `<split>.jsonl`."""

    result: dict[str, Any]
    records: list[dict[str, Any]]


def evaluate(
    candidates: Callable[[Batch], tuple[Any, Any]],
    data: Iterable[GenericBatch],
    *,
    categories: tuple[str, ...],
    things: tuple[bool, ...] | None,
    restore: Callable[..., FusionOutput],
    thresholds: Thresholds = MASK2FORMER,
    partial: ResumableRecords | None = None,
    save_masks: bool = False,
    progress: Callable[[int], None] = lambda images: None,
) -> GenericResult:
    """Evaluates the candidates that a model proposes.

    Args:
        candidates: batch -> (scores [B, N, C], mask logits [B, N, h, w]).
        data: batches.
        categories: their names.
        things: which of them are things; None: no panoptic and no semantic segmentation, mask AP alone.
        restore: `fusion.restore`, compiled.
        thresholds: of the panoptic segmentation.
        partial: where finished images are kept, those that `data` leaves out among them; None: nowhere.
        save_masks: leave the objects with their masks in the records, from which mask AP can be made again.
        progress: receives how many images are done.

    Returns:
        An `Evaluation` whose result has a table for each protocol: "panoptic" and "semantic" (if `things` are known) and
        "instance".

    Raises:
        UserError: there is no image, or one that cannot be read.
    """
    partial = partial or ResumableRecords(None, {}, None)

    def collect(batch: GenericBatch, found: FusionOutput) -> None:
        found, done = jax.device_get(found), {}
        for b, (place, example) in enumerate(zip(batch.places, batch.examples, strict=True)):
            mine = jax.tree.map(lambda value: value[b], found)  # noqa: B023 (called at once)
            done[place] = [_record(example, mine, things, thresholds)]
        partial.add(done)
        progress(len(partial.records))

    last = None
    try:
        for batch in data:
            scores, logits = candidates(batch.batch)
            where = postprocess.geometry(
                batch.batch.resized_hw, batch.sizes, grid=logits.shape[-2:], padded_size=batch.batch.sam_images.shape[1]
            )
            running = batch, restore(scores, logits, jax.device_put(where), None if things is None else thresholds.score)
            if last:
                collect(*last)
            last = running
    finally:  # also if the next image cannot be read
        if last:
            collect(*last)
    records = [record for place in sorted(partial.records) for record in partial.records[place]]
    if not records:
        raise UserError("the split holds no image to evaluate; prepare it, or choose another split")
    result = _result(records, categories, things, thresholds)
    if not save_masks:
        records = [{key: value for key, value in record.items() if key not in panoptic.OBJECTS} for record in records]
    return GenericResult(result, records)


def _result(
    records: list[dict[str, Any]], categories: tuple[str, ...], things: tuple[bool, ...] | None, thresholds: Thresholds
) -> dict[str, Any]:
    """The content of the JSON: a table a protocol, with its name and n."""
    result = {"n": len(records), "failed": sum(r["failed"] for r in records), "categories": list(categories)}
    result["things"] = None if things is None else list(things)
    settings = {
        "panoptic": {"score_threshold": thresholds.score, "overlap_threshold": thresholds.overlap},
        "instance": {"predictions": fusion.TOP},
    }
    found = panoptic.tables(records, categories, things)
    return result | {name: {"protocol": name} | settings.get(name, {}) | table for name, table in found.items()}


def _record(example: Example, found: FusionOutput, things: tuple[bool, ...] | None, thresholds: Thresholds) -> dict[str, Any]:
    """What an image leaves."""
    size, objects = (example.height, example.width), found.objects
    pairs = zip(objects.category.tolist(), objects.score.tolist(), objects.candidate.tolist(), strict=True)
    record = {
        "image_id": example.image_id,
        "file_name": example.file_name,
        "height": example.height,
        "width": example.width,
        "failed": not bool(found.finite),
        **panoptic.count_objects(example, pairs, lambda n: postprocess.unpack_mask(objects.masks[n], size)),
    }
    if things is None:
        return record
    truth = Segments.of(example)
    semantic = found.labels.semantic[: size[0], : size[1]] if found.finite else np.full(size, -1, np.int16)
    fused = fusion.fuse(found.labels, things, size, thresholds.overlap)
    return record | panoptic.count_segments(fused, truth) | panoptic.count_pixels(semantic, truth)


@dataclasses.dataclass
class GenericEvaluation:
    """A model and a prepared generic data set, ready to be evaluated split by split; nothing compiles twice.

    Attributes:
        cfg, graphdef: the model.
        params: its parameters.
        checkpoint: what is written beside the numbers: digest and step.
        data: the prepared data set.
        tokenizer: None for a model without language.
        prompts: how the question is worded.
        batch: images at a time.
        names: at most so many names a conversation; 0: all in one.
        thresholds: of the panoptic segmentation.

    Raises:
        UserError: the data set is not a generic one, or the model makes no masks or has another number of categories.
    """

    cfg: FlowSegConfig
    graphdef: nnx.GraphDef
    params: dict[str, Any]
    checkpoint: dict[str, Any]
    data: PreparedDataset
    tokenizer: Tokenizer | None
    prompts: PromptTemplates
    batch: int = 8
    names: int = 0
    thresholds: Thresholds = MASK2FORMER

    def __post_init__(self):
        if self.data.task != "generic":
            raise UserError(f"{self.data.directory}: {self.data.task} data has no categories to evaluate on")
        if not self.cfg.has_mask_decoder:
            raise UserError(f"the model holds only the parts {self.cfg.components!r}: it makes no masks")
        if not self.cfg.has_language_model and self.cfg.num_classes != len(self.data.categories):
            raise UserError(
                f"{self.data.directory}: has {len(self.data.categories)} categories, the model's linear head has "
                f"{self.cfg.num_classes} (model.classes): evaluate it on the data set that it was trained on"
            )
        if self.names < 0:
            raise UserError(f"names a conversation must not be negative, got {self.names}")
        self.compiles: collections.Counter[str] = collections.Counter()
        self._questions = CategoryPrompts.of(self.data.categories, self.names if self.cfg.has_language_model else 0)

        def candidates(params, batch):
            self.compiles["model"] += 1  # runs when traced, that is once a compilation
            return score_categories(flowseg.bind_params(self.graphdef, params), batch, self._questions)

        def restored(*arguments):
            self.compiles["restore"] += 1
            return fusion.restore(*arguments)

        self._candidates, self._restore = jax.jit(candidates), jax.jit(restored, static_argnums=3)

    @classmethod
    def of_model(
        cls, directory: str | Path, data: str | Path, *, batch: int = 8, names: int = 0, thresholds: Thresholds = MASK2FORMER
    ) -> GenericEvaluation:
        """Opens a model directory and a prepared data set. Raises UserError where either is missing or damaged."""
        prepared = PreparedDataset.open(data)
        stored = read_model_config(directory)
        cfg = FlowSegConfig.from_dict(stored["model"], f"{directory}/config.json: model")
        with heartbeat(f"loading {directory}"):
            graphdef, abstract = flowseg.abstract_model(cfg)
            loaded = load_pretrained(directory, flowseg.params_dict(abstract))
        prompts = PromptTemplates.of_model(loaded.extra, directory)
        tokenizer = load_tokenizer(loaded.tokenizer_dir, needed=prompts.special_tokens) if cfg.has_language_model else None
        checkpoint = {"digest": params_digest(stored), "step": loaded.extra.get("step")}
        return cls(cfg, graphdef, loaded.params, checkpoint, prepared, tokenizer, prompts, batch, names, thresholds)

    def run(self, split: str, out: str | Path | None, *, images: int | None = None, save_masks: bool = False) -> GenericResult:
        """Evaluates one split into `<out>/<split>.json` and `<split>.jsonl`, which are replaced only when complete.

        Args:
            split: which split.
            out: a folder; None writes nothing. What an interrupted start left there is continued.
            images: only the first images of the split.
            save_masks: add the objects, true and predicted, to each line of `<split>.jsonl` (`panoptic.count_objects`).

        Raises:
            UserError: an unknown split or one without images, a damaged image, or `out` cannot be written or is in use. What
                was finished is kept.
        """
        self.data.check_split(split)
        about = {
            "checkpoint": self.checkpoint,
            "setup": setup_hash(self.cfg, self.prompts, self.tokenizer),
            "data": self.data.digest,
        }
        about |= {"images": images, "conversations": self._questions.count if self.cfg.has_language_model else 0}
        settings = about | {"split": split, "thresholds": dataclasses.asdict(self.thresholds)}
        begin = time.monotonic()
        alone = contextlib.nullcontext() if out is None else distributed.locked(out)
        with alone, ResumableRecords.open(None if out is None else Path(out) / f"{split}.partial.jsonl", settings) as partial:
            if kept := len(partial.records):
                log(f"evaluate {split}: going on behind {kept} images of an earlier start")
            data = GenericDataset(
                self.data,
                split,
                self.tokenizer,
                self._questions,
                batch=self.batch,
                cfg=self.cfg,
                prompts=self.prompts,
                max_images=images,
                skip=partial.records.keys(),
            )
            evaluation = self._evaluate(split, data, partial, save_masks)
            result = {"split": split} | about | evaluation.result
            evaluation = dataclasses.replace(evaluation, result=result)
            compiled = ", ".join(f"{count} {what}" for what, count in self.compiles.items())
            seconds = duration(time.monotonic() - begin)
            log(f"evaluate {split}: {data.images} images in {seconds} (compilations so far: {compiled}); {host.memory_line()}")
            for line in panoptic.in_words(result):
                log(f"evaluate {split}: {line}, failed {result['failed']}")
            if out is not None:
                lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in evaluation.records)
                storage.write_text_atomic(Path(out) / f"{split}.jsonl", lines)
                storage.write_text_atomic(Path(out) / f"{split}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
            partial.finish()
        return evaluation

    def _evaluate(self, split: str, data: GenericDataset, partial: ResumableRecords, save_masks: bool) -> GenericResult:
        total = data.images + len(partial.records)
        with heartbeat(f"evaluate {split}: {len(partial.records)}/{total} images, compiling", HEARTBEAT) as beat:

            def progress(done: int) -> None:
                beat.message = f"evaluate {split}: {done}/{total} images"

            try:
                return evaluate(
                    functools.partial(self._candidates, self.params),
                    data,
                    categories=self.data.categories,
                    things=self.data.things,
                    thresholds=self.thresholds,
                    restore=self._restore,
                    partial=partial,
                    save_masks=save_masks,
                    progress=progress,
                )
            except UserError as error:
                raise UserError(f"{error}; {partial.progress_note()}") from None
