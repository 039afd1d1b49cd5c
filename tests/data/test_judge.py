"""A judge of training batches: every layout in every stage, read back by code that shares nothing with the package.

Pictures are resized by PIL, masks drawn by pycocotools and OpenCV, text is decoded by the library `tokenizers`; images, masks,
text, phrases and targets must agree to the bit. Twenty times as many examples:

    python -m pytest tests/data/test_judge.py -m slow
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import tokenizers
from PIL import Image

from flowseg_jax.data import prepare
from flowseg_jax.data.mixture import build_mixture
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.tokenizer import load_tokenizer
from flowseg_jax.data.train_dataset import TrainDataset
from flowseg_jax.data.train_examples import TrainOptions
from flowseg_jax.types import BatchShape
from tests.helpers import judged_sets
from tests.helpers.judged_sets import CATEGORIES, Truth

SIDE, VISION, SLOTS, K = 40, 24, 5, 4  # pixels, pixels, visual slots, phrases
NUMBERS = sorted(CATEGORIES)  # a category's place is that of its id
IM_END, SEG, OPEN, CLOSE = "<|im_end|>", "<SEG>", "<p>", "</p>"
STAGES = {  # name: (layouts, room for names, options)
    "stage 1": (("coco-panoptic", "coco-instances"), 0, {"lsj_scale_range": (0.1, 2.0)}),
    "stage 1, whole images": (("coco-panoptic", "coco-instances"), 0, {}),
    "stage 2": (("llava",), 0, {"pad_to_square": True}),
    "stage 3": (
        ("refcoco", "grefcoco", "reasonseg", "coco-panoptic", "coco-instances", "llava", "jsonl"),
        6,
        {"objects": "referred", "negatives": True, "lsj_scale_range": (0.5, 1.5)},
    ),
    "all objects and their names": (("refcoco", "grefcoco", "jsonl"), 6, {"objects": "all", "include_generic": True}),
    "finetune": (("jsonl",), 0, {"objects": "referred", "pad_to_square": True}),
}

FIELDS = (
    "sam_images",
    "siglip_images",
    "packed_masks",
    "input_ids",
    "labels",
    "phrase_target",
    "phrase_ids",
    "seg_ids",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("judged"), seed=0, count=6)


def make(root, seed, count):
    truths = judged_sets.write(root, seed, count)
    prepared = {
        layout: prepare.prepare(root / layout, root / f"{layout}-prepared", layout=layout, processes=1, log=lambda _: None)
        for layout in truths
    }
    prepare.train_dataset_tokenizer(
        [text for one in prepared.values() for text in prepare.tokenizer_corpus(one)], root / "tokenizer", 400
    )
    return truths, prepared, root / "tokenizer"


# --- what a row must be


def resized(array: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(array).resize((size[1], size[0]), how))


def scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    longest = max(size)
    return max(1, int(size[0] * side / longest + 0.5)), max(1, int(size[1] * side / longest + 0.5))


class Placement:
    """How a picture lies in the mask encoder's square: scaled so that its longest side is `longest`, its centre cut out."""

    def __init__(self, truth: Truth, longest: int):
        self.size = scaled(truth.rgb.shape[:2], longest)
        self.cut = min(self.size[0], SIDE), min(self.size[1], SIDE)
        self.corner = (self.size[0] - self.cut[0]) // 2, (self.size[1] - self.cut[1]) // 2

    def place(self, array: np.ndarray, how: Image.Resampling) -> np.ndarray:
        small = resized(array, self.size, how)
        (top, left), (h, w) = self.corner, self.cut
        out = np.zeros((SIDE, SIDE, *array.shape[2:]), array.dtype)
        out[:h, :w] = small[top : top + h, left : left + w]
        return out

    def is_mask(self, got: np.ndarray, mask: np.ndarray, whole: bool) -> bool:
        want = self.place(mask.astype(np.uint8), Image.Resampling.NEAREST)
        if not whole or want.any():
            return np.array_equal(got, want)
        ys, xs = np.nonzero(mask)  # too small to be met: one pixel where it lies
        gy, gx = np.nonzero(got)
        y, x = gy * mask.shape[0] / self.size[0], gx * mask.shape[1] / self.size[1]
        step = max(mask.shape) / max(self.size)
        return len(gy) == 1 and ys.min() - step <= y[0] <= ys.max() and xs.min() - step <= x[0] <= xs.max()


def find(batch, b: int, truths: list[Truth]) -> tuple[Truth, Placement]:
    """The only picture, scaled in the only way, that a row's pixels are."""
    found = []
    for truth in truths:
        if truth.image_id not in (None, int(batch.example_id[b])):
            continue
        for longest in (SIDE, *(n for n in range(SIDE // 10, 2 * SIDE + 1) if n != SIDE)):
            place = Placement(truth, longest)
            if place.cut == tuple(batch.resized_hw[b]):
                if np.array_equal(place.place(truth.rgb, Image.Resampling.BILINEAR), batch.sam_images[b]):
                    found.append((truth, place))
                    break
    assert len(found) == 1, f"{len(found)} pictures fit"
    return found[0]


def judge_vision(got: np.ndarray, rgb: np.ndarray, square: bool) -> None:
    if square:
        h, w = rgb.shape[:2]
        canvas = np.full((max(h, w), max(h, w), 3), 127, np.uint8)
        canvas[(max(h, w) - h) // 2 :, (max(h, w) - w) // 2 :][:h, :w] = rgb
        rgb = canvas
    np.testing.assert_array_equal(got, resized(rgb, (VISION, VISION), Image.Resampling.BILINEAR))


class Reader:
    """Reads the text of a row back."""

    def __init__(self, directory):
        self.tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.id = self.tokenizer.token_to_id

    def text(self, ids) -> str:
        words = " ".join(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False).split())
        return re.sub(r" ?(<\|\w+\|>) ?", r"\1", words)

    def conversations(self, batch, b: int) -> list[dict]:
        """Question and answer of each turn of each conversation, its phrases and outputs by number; checks what surrounds."""
        tokens, segments, labels = batch.input_ids[b], batch.segment_ids[b], batch.labels[b]
        prefix = int((segments == 0).sum())
        assert self.text(tokens[: prefix - SLOTS]) == "<|im_start|>user" and (tokens[prefix - SLOTS : prefix] == -200).all()
        assert (labels[segments <= 0] == -100).all() and (batch.position_ids[b][:prefix] == np.arange(prefix)).all()
        found = []
        used = int((segments >= 0).sum())
        assert (segments[:used] >= 0).all() and (segments[used:] == -1).all()
        assert (tokens[used:] == self.id("<|endoftext|>")).all()
        for number in range(1, int(segments.max()) + 1):
            here = np.flatnonzero(segments == number)
            assert (np.diff(here) == 1).all() and (batch.position_ids[b][here] == prefix + np.arange(len(here))).all()
            taught = labels[here] != -100
            assert (labels[here][taught] == tokens[here][taught]).all()
            runs = np.split(here, np.flatnonzero(np.diff(taught)) + 1)
            turns = []
            for asked, told in zip(runs[::2], runs[1::2], strict=False):
                question = self.text(tokens[asked])
                assert question.endswith("<|im_end|><|im_start|>assistant")
                question = question.removesuffix("<|im_end|><|im_start|>assistant").removeprefix("<|im_start|>user")
                answer = self.text(tokens[told])
                turns.append((question.strip(), answer.removesuffix(IM_END).strip(), answer.endswith(IM_END)))
            phrases, outputs = {}, []
            for k in sorted({*batch.phrase_ids[b][here].tolist()} - {-1}):
                span = here[batch.phrase_ids[b][here] == k]
                assert (np.diff(span) == 1).all() and not taught[np.isin(here, span)].any()
                assert tokens[span[0]] == self.id(OPEN) and tokens[span[-1]] == self.id(CLOSE)
                phrases[k] = self.text(tokens[span[1:-1]])
            assert (tokens[here] == self.id(OPEN)).sum() == len(phrases)
            for at in here[tokens[here] == self.id(SEG)]:
                outputs.append(int(batch.seg_ids[b][at]))
                assert labels[at] == tokens[at]
            found.append({"turns": turns, "phrases": phrases, "outputs": outputs})
        return found


class Judge:
    def __init__(self, truths, reader, names: int, options: dict, prepared):
        self.truths = [truth for layout in prepared for truth in truths[layout]]
        self.reader, self.names, self.options = reader, names, options
        self.seen: Counter[str] = Counter()

    def row(self, batch, b: int) -> None:
        truth, place = find(batch, b, self.truths)
        judge_vision(batch.siglip_images[b], truth.rgb, self.options.get("pad_to_square", False))
        valid = batch.mask_valid[b]
        count = int(valid.sum())
        assert valid[:count].all() and not batch.packed_masks[b][~valid].any()
        masks = np.unpackbits(batch.packed_masks[b, :count], axis=-1)[..., :SIDE]
        whole = max(place.size) == SIDE
        said = [] if self.reader is None else self.reader.conversations(batch, b)
        self.seen[truth.layout] += 1
        if truth.turns:
            assert count == 0 and (batch.phrase_target[b] == -1).all()
            self.chat(said, truth.turns)
        elif truth.phrases:
            self.referring(batch, b, truth, place, masks, said)
        else:
            self.generic(batch, b, truth, place, masks, said, whole)

    def chat(self, said, turns) -> None:
        (one,) = said
        assert not one["phrases"] and not one["outputs"]
        for (question, answer, complete), (asked, told) in zip(one["turns"], turns, strict=False):
            assert question == " ".join(asked.split())
            assert answer == " ".join(told.split()) if complete else " ".join(told.split()).startswith(answer.split("�")[0])
            self.seen["turns"] += 1
        assert len(one["turns"]) == len(turns) or not one["turns"] or not all(c for *_, c in one["turns"])

    def referring(self, batch, b, truth, place, masks, said) -> None:
        everything = self.options.get("objects") == "all" and truth.layout != "reasonseg"
        wanted: list[tuple[int, ...]] = [(i,) for i in range(len(truth.objects))] if everything else []
        named = [one for one in said if min(one["phrases"], default=K) >= K]
        asked = [one for one in said if one not in named]
        assert sorted(k for one in asked for k in one["phrases"]) == list(range(len(asked)))
        for one in asked:
            ((k, text),) = one["phrases"].items()
            assert one["outputs"] == [k] and text in truth.phrases, text
            at = int(batch.phrase_target[b, k])
            meant = truth.phrases[text]
            if at == -2:
                assert () in meant
            else:
                hits = [m for m in meant if m and place.is_mask(masks[at], union(truth, m), len(m) == 1)]
                hits = hits or [m for m in meant if m and np.array_equal(masks[at], united(truth, place, m))]
                assert hits, text
                wanted += [hits[0]] if hits[0] not in wanted else []
            ((question, answer, complete),) = one["turns"]
            assert complete and answer.count(SEG) == 1 and question.count(OPEN) == 1
            explained = answer.partition(SEG)[2].strip(" .")
            if explained:
                assert answer.endswith(" ".join(truth.answers[text].split()))
                self.seen["explained"] += 1
            self.seen["phrases"] += 1
        assert (batch.phrase_target[b, len(asked) :] == -1).all() and len({*map(str, asked)}) == len(asked)
        assert len(masks) == len(set(wanted)), "targets that nobody asked for"
        if everything:
            for i, (mask, category, _) in enumerate(truth.objects):
                assert place.is_mask(masks[i], mask, True)
                assert category is None or batch.object_category[b, i] == NUMBERS.index(category)
        if named:
            self.names_of(batch, b, truth, named, [i for i, _ in enumerate(truth.objects)])

    def names_of(self, batch, b, truth, named, order) -> None:
        """The names of a generic conversation, and which of them each target bears; `order` says which object a target is."""
        (one,) = named
        names = {k - K: text for k, text in one["phrases"].items()}
        assert sorted(names) == list(range(len(names))) and one["outputs"] == [K]
        assert batch.name_valid[b].sum() == len(names) == len(set(names.values()))
        for at, i in enumerate(order):
            category = truth.objects[i][1]
            if category is None:  # of a layout of one's own
                assert names[int(batch.object_name[b, at])] in judged_sets.THINGS
            else:
                assert names[int(batch.object_name[b, at])] == CATEGORIES[category]
        borne = {int(n) for n in batch.object_name[b] if n >= 0}
        there = {CATEGORIES[c] for _, c, _ in truth.objects if c is not None}
        assert all(names[n] not in there for n in {*names} - borne), "a name of what is there without a target"
        self.seen["names"] += len(names)

    def generic(self, batch, b, truth, place, masks, said, whole) -> None:
        free = [i for i, (_, _, crowd) in enumerate(truth.objects) if not crowd]
        order = []
        for got in masks:
            hits = [i for i in free if i not in order and place.is_mask(got, truth.objects[i][0], whole)]
            assert hits, "a target that is no object"
            same = [i for i in hits if batch.object_category[b, len(order)] in (-1, NUMBERS.index(truth.objects[i][1]))]
            order.append(same[0])
        missed = [i for i in free if i not in order]
        visible = [i for i in missed if place.place(truth.objects[i][0].astype(np.uint8), Image.Resampling.NEAREST).any()]
        if self.names:
            if said:
                self.names_of_generic(batch, b, truth, said, order, visible)
        else:
            assert not visible, "an object that is no target"
            assert [int(c) for c in batch.object_category[b, : len(order)]] == [
                NUMBERS.index(truth.objects[i][1]) for i in order
            ] or (batch.object_category[b] == -1).all()
        self.seen["objects"] += len(order)

    def names_of_generic(self, batch, b, truth, said, order, visible) -> None:
        names = {k - K: text for one in said for k, text in one["phrases"].items()}
        assert not {CATEGORIES[truth.objects[i][1]] for i in visible} & {*names.values()}, "an object of a name is no target"
        cut = [i for i, _ in enumerate(truth.objects) if i not in order and i not in visible]
        gone = {CATEGORIES[truth.objects[i][1]] for i in cut}
        (one,) = said
        assert one["outputs"] == [K] and batch.name_valid[b].sum() == len(names)
        for at, i in enumerate(order):
            assert names[int(batch.object_name[b, at])] == CATEGORIES[truth.objects[i][1]]
        borne = {int(n) for n in batch.object_name[b] if n >= 0}
        there = {CATEGORIES[c] for _, c, _ in truth.objects} - gone
        assert all(names[n] not in there for n in {*names} - borne)
        self.seen["names"] += len(names)


def union(truth: Truth, objects: tuple[int, ...]) -> np.ndarray:
    return np.any([truth.objects[i][0] for i in objects], axis=0)


def united(truth: Truth, place: Placement, objects: tuple[int, ...]) -> np.ndarray:
    """The union of small masks, each of which keeps a pixel."""
    return np.max([place.place(truth.objects[i][0].astype(np.uint8), Image.Resampling.NEAREST) for i in objects], axis=0)


def judged(made, stage: str, steps: int, seed: int = 0) -> Counter:
    truths, prepared, directory = made
    layouts, names, options = STAGES[stage]
    speaks = stage not in ("stage 1", "stage 1, whole images")
    data = TrainDataset(
        build_mixture([(prepared[layout], 0.0) for layout in layouts]),
        BatchShape(batch=3, text_length=420, max_phrases=K, max_masks=8, sam_size=SIDE, siglip_size=VISION, max_names=names),
        PromptTemplates(randomize=True),
        seed,
        visual_tokens=SLOTS,
        tokenizer=load_tokenizer(directory) if speaks else None,
        options=TrainOptions(**options),
    )
    judge = Judge(truths, Reader(directory) if speaks else None, names, options, layouts)
    for step in range(steps):
        batch = data.batch(step)
        for b in range(3):
            judge.row(batch, b)
    assert {layout for layout in layouts if judge.seen[layout]} == {*layouts}
    return judge.seen


@pytest.mark.parametrize("stage", STAGES)
def test_batches_are_what_the_files_say(made, stage):
    seen = judged(made, stage, steps=12 if stage != "stage 3" else 30)
    expected = {"stage 1": "objects", "stage 1, whole images": "objects", "stage 2": "turns"}.get(stage, "phrases")
    assert seen[expected] > 20
    if stage == "stage 3":
        assert seen["names"] > 10 and seen["explained"] > 1 and seen["turns"] > 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_batches_are_what_the_files_say(tmp_path, capsys):
    total: Counter[str] = Counter()
    for seed in range(4):
        many = make(tmp_path / str(seed), seed=seed + 1, count=40)
        for stage in STAGES:
            total += judged(many, stage, steps=120, seed=seed)
    with capsys.disabled():
        print("\n" + ", ".join(f"{count:,} {what}" for what, count in total.most_common()))
    assert sum(total[layout] for layout in many[0]) == 4 * len(STAGES) * 120 * 3


@pytest.mark.parametrize("field", FIELDS)
def test_the_judge_notices_one_wrong_value(made, field):
    truths, prepared, directory = made
    data = TrainDataset(
        build_mixture([(prepared["refcoco"], 0.0)]),
        BatchShape(batch=1, text_length=420, max_phrases=K, max_masks=8, sam_size=SIDE, siglip_size=VISION, max_names=0),
        PromptTemplates(randomize=True),
        0,
        visual_tokens=SLOTS,
        tokenizer=load_tokenizer(directory),
        options=TrainOptions(objects="referred"),
    )
    judge = Judge(truths, Reader(directory), 0, {"objects": "referred"}, ("refcoco",))
    noticed = 0
    for step in range(12):
        batch = data.batch(step)
        judge.row(batch, 0)
        array = getattr(batch, field)
        spot = np.argwhere(array[0] >= 0 if array.dtype == np.int32 else array[0] > 0)[-1]
        array[(0, *spot)] ^= 1
        try:
            judge.row(batch, 0)
        except (AssertionError, IndexError, KeyError, ValueError):
            noticed += 1
    assert noticed == 12
