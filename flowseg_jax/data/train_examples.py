"""One image of a data set to one row of a training batch: its conversations and targets, by the task of its data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from PIL import Image

from flowseg_jax.data import collate, images
from flowseg_jax.data.collate import ProcessedImage, TrainExample
from flowseg_jax.data.mixture import MixtureComponent
from flowseg_jax.data.prompts import Conversation, PromptTemplates, check_phrase
from flowseg_jax.data.records import Annotation, Example, Sample, Turn, make_samples
from flowseg_jax.data.token_budget import TokenBudget
from flowseg_jax.data.token_lengths import check_member
from flowseg_jax.data.tokenizer import Tokenizer
from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.types import NO_TARGET, PAD, BatchShape

ANY_FAMILY = "*"


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How many expressions, masks and names an image gets in training, and how it is changed.

    Attributes:
        objects: of images with referring expressions, "all": every object is a target (the passes over all objects need this,
            and that all objects are annotated); "referred": only those asked for.
        include_generic: add a conversation that names the categories of objects in the image to images with referring
            expressions; needs `objects="all"`. Images of a "generic" data set always have it, if the batch has room for names.
        negatives: name categories in the generic conversation that the image does not have: as many as a uniform draw says, up
            to the room that names and text have.
        max_phrases: at most this many phrases per image; 0 for as many as the batch has room for.
        curriculum: ((until_step, {family: weight}), ...) in rising order: before `until_step`, phrases are drawn in proportion
            to their family's weight and never at weight 0. A family that is not listed has the weight of "*", or 0. After the
            last entry all phrases count alike.
        explanation_prob: share of the questions with an explanation that ask for it.
        lsj_scale_range: (smallest, largest) scale of large-scale jitter, of images of "generic" data sets; empty for none.
        pad_to_square: pad the vision encoder's image to a square instead of stretching it.
        cache_bytes: decoded and resized images kept in memory, by all workers together; 0 for none.
        num_threads: that build batches, in each process.
        prefetch: batches that lie ready, of all workers together; at least two a worker.
        num_workers: processes that build batches, where threads of one do not keep up; 0 for none but this one. Neither this
            nor the three above change results.
    """

    objects: str = "all"
    include_generic: bool = False
    negatives: bool = False
    max_phrases: int = 0
    curriculum: tuple[tuple[int, Mapping[str, float]], ...] = ()
    explanation_prob: float = 0.5
    lsj_scale_range: tuple[float, ...] = ()
    pad_to_square: bool = False
    cache_bytes: int = 1 << 29
    num_threads: int = 2
    prefetch: int = 8
    num_workers: int = 0

    def __post_init__(self):
        if self.objects not in ("all", "referred"):
            raise UserError(f"data.objects: unknown value {self.objects!r}{did_you_mean(self.objects, ('all', 'referred'))}")
        if self.include_generic and self.objects != "all":
            raise UserError(
                "data.include_generic needs data.objects='all': a category that is named must have its objects as targets"
            )
        steps = [until for until, _ in self.curriculum]
        if steps != sorted(set(steps)):
            raise UserError(f"data.curriculum: steps must rise, got {steps}")
        if any(w < 0 for _, weights in self.curriculum for w in weights.values()):
            raise UserError("data.curriculum: weights must not be negative")
        if self.lsj_scale_range and not (
            len(self.lsj_scale_range) == 2 and 0 < self.lsj_scale_range[0] <= self.lsj_scale_range[1]
        ):
            raise UserError(f"data.lsj_scale_range: expected (smallest, largest) scale or nothing, got {self.lsj_scale_range}")
        if self.num_workers < 0:
            raise UserError(f"data.num_workers must not be negative, got {self.num_workers}")

    def weights(self, step: int) -> Mapping[str, float] | None:
        """The families' weights at a step, None where all phrases count alike."""
        return next((weights for until, weights in self.curriculum if step < until), None)

    def check_families(self, known: Collection[str]) -> None:
        """Raises a UserError if the curriculum names a family that no data set has."""
        for _, weights in self.curriculum:
            for family in weights:
                if family != ANY_FAMILY and family not in known:
                    raise UserError(f"data.curriculum: no data set has the family {family!r}{did_you_mean(family, known)}")


@dataclasses.dataclass(frozen=True)
class DecodedImage:
    """A stored image, decoded and resized."""

    image_id: int
    file_name: str
    annotations: tuple[Annotation, ...]
    samples: tuple[Sample, ...]
    turns: tuple[Turn, ...]
    pixels: ProcessedImage

    @classmethod
    def of(cls, example: Example, pixels: ProcessedImage) -> DecodedImage:
        annotations = tuple(
            dataclasses.replace(a, rle="", rle_single_cover="", rle_filled_polygons="") for a in example.annotations
        )  # packed now
        return cls(example.image_id, example.file_name, annotations, make_samples(example), example.turns, pixels)


class TrainExampleBuilder:
    """Builds the rows of one data set of a mixture.

    Attributes:
        remark: what whoever trains should know of the data set, or empty.

    Raises:
        UserError: an image may need more text or masks than the shape has, no image has anything that fits, an expression or a
            name has a special token of the tokenizer, or an unknown family.
    """

    def __init__(
        self,
        member: MixtureComponent,
        shape: BatchShape,
        prompts: PromptTemplates,
        tokenizer: Tokenizer | None,
        visual: int,
        options: TrainOptions,
    ):
        self.task, self._categories = member.prepared.task, member.prepared.categories
        self._shape, self._prompts, self._tokenizer, self._options = shape, prompts, tokenizer, options
        self._phrases = min(options.max_phrases or shape.max_phrases, shape.max_phrases)
        self.families = frozenset(member.prepared.families(member.split)) if options.curriculum else frozenset()
        self._name_lengths: list[int] = []
        if tokenizer is not None:
            self._bound = TokenBudget(prompts, tokenizer, visual)
            self._name_lengths = self._bound.phrase_lengths(self._categories) if shape.max_names else []
        self.remark = ""
        self._check(member)

    @property
    def random_resize(self) -> bool:
        """Whether an image looks different each time."""
        return bool(self._options.lsj_scale_range) and self.task == "generic"

    def _check(self, member: MixtureComponent) -> None:
        shape, options = self._shape, self._options
        where = f"{member.prepared.directory}"
        if options.objects == "referred" and self.task in ("referring", "reasoning") and shape.max_masks < self._phrases:
            raise UserError(f"the batch has room for {shape.max_masks} masks, fewer than its {self._phrases} phrases")
        if self.task == "generic":
            self._check_targets(member, where)
        if self._tokenizer is None:
            if self.task != "generic":
                raise UserError(f"{where}: {self.task} data needs a language model, and this model has none (model.components)")
            return
        for name in self._categories if shape.max_names and (self.task == "generic" or options.include_generic) else ():
            check_phrase(name, self._tokenizer, f"{where}: category {name!r}")
        if self.task == "generic" and shape.max_names:
            worst = max(range(len(self._categories)), key=self._name_lengths.__getitem__)
            needed = self._bound.generic([self._name_lengths[worst]])
            if needed > shape.text_length:
                raise UserError(
                    f"{where}: to name {self._categories[worst]!r} takes {needed} tokens, data.text_length is "
                    f"{shape.text_length}: raise it"
                )
        if self.task == "chat" and self._bound.prefix >= shape.text_length:
            raise UserError(
                f"{where}: the image takes {self._bound.prefix} tokens, which leaves no room for a chat in data.text_length, "
                f"{shape.text_length}: raise it"
            )
        if self.task in ("referring", "reasoning"):
            referring = self.task == "referring"
            named, everything = options.include_generic and referring, options.objects == "all" and referring
            check_member(member, self._tokenizer, self._bound, shape, self._phrases, named, everything)

    def _check_targets(self, member: MixtureComponent, where: str) -> None:
        """Refuses generic data of which nothing would be trained on; remarks how many images are without a target.

        All objects of a category are targets together, or none of them is. Without names, for the linear head, all objects of
        an image must be targets: what is left out would be background.
        """
        room = self._shape.max_masks
        most, crowded, fewest, trained = 0, -1, 0, 0
        for records, rows in member.rows():
            place = int(rows["objects"].argmax())
            if rows["objects"][place] > most:
                most, crowded = int(rows["objects"][place]), int(records[place])
            needed = rows["fewest"][rows["fewest"] > 0]
            if len(needed):
                fewest = min(fewest or int(needed.min()), int(needed.min()))
            trained += int((needed <= room).sum())
        if not self._shape.max_names and most > room:
            name = member.prepared.index(member.split)[crowded].file_name
            raise UserError(f"{where}: {name} has {most} objects, the batch has room for {room}: raise data.max_masks")
        if not fewest:
            raise UserError(f"{where}: no image has an object that is neither a crowd nor to be ignored, so there is no target")
        if fewest > room:
            raise UserError(
                f"{where}: in every image each category has more objects than the batch has room for, {room}, so nothing would "
                f"be trained on: raise data.max_masks to {fewest} or more"
            )
        if without := len(member.indices) - trained:
            self.remark = (
                f"{where}: {without:,} of {len(member.indices):,} images are without a target: they have nothing but crowds, "
                f"or of each category more objects than data.max_masks, {room}"
            )

    def decode(self, example: Example, rng: np.random.Generator) -> DecodedImage:
        """Decodes and resizes; `rng` draws the jitter."""
        image = images.decode(example.image, name=example.file_name)
        return DecodedImage.of(example, self._pixels(image, example.annotations, rng))

    def _pixels(self, image: Image.Image, annotations: Sequence[Annotation], rng: np.random.Generator) -> ProcessedImage:
        jitter = None
        if self.random_resize:
            jitter = images.LargeScaleJitter.of(
                image.height, image.width, self._shape.sam_size, rng.uniform(*self._options.lsj_scale_range)
            )
        return collate.prepare_pixels(image, annotations, self._shape, jitter, self._options.pad_to_square)

    def build(self, decoded: DecodedImage, step: int, rng: np.random.Generator) -> TrainExample:
        """The row of an image at a step; `rng` draws phrases and prompt template."""
        if self.task == "chat":
            bare = dataclasses.replace(decoded.pixels, masks=decoded.pixels.masks[:0])
            return TrainExample(decoded.file_name, bare, [Conversation(decoded.turns)], (), (), (), decoded.image_id)
        if self.task == "generic":
            return self._generic(decoded, rng)
        return self._referring(decoded, self._choose(decoded.samples, step, rng), rng)

    def _choose(self, samples: Sequence[Sample], step: int, rng: np.random.Generator) -> list[Sample]:
        """At most K samples, without replacement, in random order; families weighted by the curriculum."""
        draws = rng.exponential(size=len(samples))  # the smallest of draw / weight win: weighted sampling without replacement
        weights = self._options.weights(step)
        if weights is None or not (ANY_FAMILY in weights or self.families & weights.keys()):  # not about this data set
            keyed = list(zip(draws, range(len(samples)), strict=True))
        else:
            each = [weights.get(s.family, weights.get(ANY_FAMILY, 0.0)) for s in samples]
            keyed = [(draw / w, i) for i, (draw, w) in enumerate(zip(draws, each, strict=True)) if w > 0]
        return [samples[i] for _, i in sorted(keyed)[: self._phrases]]

    def _referring(self, decoded: DecodedImage, chosen: Sequence[Sample], rng: np.random.Generator) -> TrainExample:
        """One conversation a phrase. A phrase for several objects has their union as its target."""
        options, annotations = self._options, decoded.annotations
        conversations = []
        for number, sample in enumerate(chosen):
            if self.task == "reasoning":
                explained = sample.answer and rng.random() < options.explanation_prob
                answer = sample.answer if explained else ""
                conversations.append(self._prompts.reasoning(sample.sentence, number, sample.family == "long", answer, rng))
            else:
                conversations.append(self._prompts.referring(sample.sentence, number, rng))
        everything = options.objects == "all" and self.task == "referring"
        if everything:
            targets = [(i,) for i in range(len(annotations))]
        else:
            targets = sorted({s.annotations for s in chosen if len(s.annotations) == 1})
        targets += sorted({s.annotations for s in chosen if len(s.annotations) > 1})
        classes = [PAD] * len(targets)
        if everything:
            classes[: len(annotations)] = [PAD if a.crowd or a.ignore else a.category for a in annotations]
        bears, names = [PAD] * len(targets), 0
        categories = sorted({c for c in classes if c != PAD})
        if options.include_generic and categories and everything:
            categories = [categories[i] for i in rng.permutation(len(categories))]
            bears, names = [PAD if c == PAD else categories.index(c) for c in classes], len(categories)
            conversations.append(self._name(categories, rng))
        packed = decoded.pixels.masks
        union = [np.bitwise_or.reduce(packed[list(target)]) for target in targets]
        pixels = dataclasses.replace(decoded.pixels, masks=np.stack(union) if union else packed[:0])
        phrase_target = [targets.index(s.annotations) if s.annotations else NO_TARGET for s in chosen]
        return TrainExample(decoded.file_name, pixels, conversations, phrase_target, classes, bears, decoded.image_id, names)

    def _generic(self, decoded: DecodedImage, rng: np.random.Generator) -> TrainExample:
        """All objects of the named categories: in random order those that fit, then categories that the image does not have."""
        shape, packed = self._shape, decoded.pixels.masks
        of_category: dict[int, list[int]] = {}
        for i, annotation in enumerate(decoded.annotations):
            if not annotation.crowd and not annotation.ignore and packed[i].any():  # jitter may have cut it off
                of_category.setdefault(annotation.category, []).append(i)
        categories = sorted(of_category)
        conversations, named = [], []
        if shape.max_names:
            for category in rng.permutation(categories) if categories else ():
                wanted = sum(len(of_category[k]) for k in [*named, category])
                if wanted <= shape.max_masks and self._fits([*named, category]):
                    named.append(int(category))
            targets = [i for category in named for i in of_category[category]]
            if self._options.negatives:
                there = {a.category for a in decoded.annotations}  # crowds and what jitter cut off as well
                others = [k for k in range(len(self._categories)) if k not in there]
                count = rng.integers(0, max(min(shape.max_names, len(self._categories)) - len(named), 0) + 1)
                for category in rng.permutation(others)[:count]:
                    if not self._fits([*named, category]):
                        break
                    named.append(int(category))
                named = [named[i] for i in rng.permutation(len(named))]
            if named:
                conversations.append(self._name(named, rng))
        else:
            targets = [i for category in categories for i in of_category[category]]
        classes = [decoded.annotations[i].category for i in targets]
        bears = [named.index(c) for c in classes] if named else [PAD] * len(targets)
        if len(targets) < sum(map(len, of_category.values())):  # for the linear head, what is left out would be background
            classes = [PAD] * len(targets)
        pixels = dataclasses.replace(decoded.pixels, masks=packed[targets])
        return TrainExample(decoded.file_name, pixels, conversations, (), classes, bears, decoded.image_id, len(named))

    def _fits(self, categories: Sequence[int]) -> bool:
        lengths = [self._name_lengths[category] for category in categories]
        return len(categories) <= self._shape.max_names and self._bound.generic(lengths) <= self._shape.text_length

    def _name(self, categories: Sequence[int], rng: np.random.Generator) -> Conversation:
        return self._prompts.generic([self._categories[k] for k in categories], self._shape.max_phrases, rng)
