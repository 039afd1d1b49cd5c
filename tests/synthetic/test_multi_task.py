"""The multi-task data sets of `shapes`: their layouts, their masks, and that every question has the answer that is written."""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
from PIL import Image

from flowseg_jax.cli import data
from flowseg_jax.data import masks
from flowseg_jax.data.formats import open_layout
from flowseg_jax.data.records import DatasetReader, Example, examples
from flowseg_jax.errors import UserError
from flowseg_jax.synthetic import multi_task
from flowseg_jax.synthetic.scene import COLOURS, SHAPES, TEXTURES, is_held_out
from tests.helpers.coarse import coarse
from tests.helpers.reasoning_answers import Object, answer, best

NUMBERS = {"reasonseg": 150, "panoptic": 20, "chat": 150}


class Made(NamedTuple):
    root: Path
    scenes: dict[str, list[Object]]
    counts: dict[str, int]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("multi_task") / "set"
    counts = multi_task.write_datasets(root, seed=3, **NUMBERS, report=lambda line: None)
    rows = map(json.loads, (root / "scenes.jsonl").read_text().splitlines())
    return Made(root, {row["image"]: row["objects"] for row in rows}, counts)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def painted(shapes: list[dict[str, Any]], label: str) -> np.ndarray:
    """As LISA paints them, without its order, which must not matter here."""
    mask = np.zeros((128, 128), np.uint8)
    for shape in shapes:
        if shape["label"] == label:
            points = np.array([shape["points"]], dtype=np.int32)
            cv2.polylines(mask, points, True, 1, 1)
            cv2.fillPoly(mask, points, 1)
    return mask.astype(bool)


def questions(made: Made) -> list[tuple[str, str, dict[str, Any], list[Object]]]:
    return [
        (split, path.stem, read(path), made.scenes[f"reasonseg/{split}/{path.stem}.jpg"])
        for split in ("train", "val", "test")
        for path in sorted((made.root / "reasonseg" / split).glob("*.json"))
    ]


def test_they_are_the_data_sets_that_the_published_figures_are_about(made: Made):
    recorded = json.loads((Path(__file__).parent.parent / "golden" / "synthetic.json").read_text())["multi_task"]
    explanations = read(made.root / "reasonseg" / "explanatory" / "train.json")
    panoptic = read(made.root / "coco" / "annotations" / "panoptic_train2017.json")
    found = {
        "questions": [[entry["text"], [shape["label"] for shape in entry["shapes"]]] for _, _, entry, _ in questions(made)],
        "explanations": [entry["outputs"] for entry in explanations],
        "chat": [[turn["value"] for turn in entry["conversations"]] for entry in read(made.root / "llava" / "chat.json")],
        "segments": [entry["segments_info"] for entry in panoptic["annotations"]],
        "categories": panoptic["categories"],
    }
    for name, rows in found.items():
        assert rows[: len(recorded[name])] == recorded[name], name
    for name, colours in recorded["pictures"].items():
        np.testing.assert_allclose(coarse(made.root / name), colours, atol=2, err_msg=name)


def test_reasonseg_has_the_layout_of_lisa(made: Made):
    entries = questions(made)
    assert collections.Counter(split for split, *_ in entries) == {"train": 90, "val": 30, "test": 30}
    assert {folder: n for folder, n in made.counts.items() if "reasonseg" in folder} == {
        f"reasonseg/{split}": n for split, n in (("train", 90), ("val", 30), ("test", 30))
    }
    labels = collections.Counter()
    for split, name, entry, _ in entries:
        assert entry.keys() == {"text", "is_sentence", "shapes"} and type(entry["is_sentence"]) is bool
        assert len(set(entry["text"])) == len(entry["text"]) > 0
        for text in entry["text"]:
            assert text.endswith("?") == text[0].isupper() == entry["is_sentence"], text
        with Image.open(made.root / "reasonseg" / split / f"{name}.jpg") as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (128, 128))
        for shape in entry["shapes"]:
            labels[shape["label"]] += 1
            assert len(shape["points"]) >= 3 and all(type(v) is float for point in shape["points"] for v in point)
    assert labels.keys() == {"target", "ignore", "flag"} and min(labels.values()) > 10
    assert 40 < sum(entry["is_sentence"] for _, _, entry, _ in entries) < 110
    assert len({name for _, name, _, _ in entries}) == len(entries)


def test_every_question_has_one_answer_and_it_is_outlined_exactly(made: Made):
    kinds = collections.Counter()
    several = 0
    for _, name, entry, objects in questions(made):
        answers = [answer(text, objects) for text in entry["text"]]
        kind, found = answers[0]
        assert answers.count(answers[0]) == len(answers), name  # rephrasings
        assert 0 < len(found) < len(objects)
        kinds[kind] += 1
        several += len(found) > 1
        target, ignore = (painted(entry["shapes"], label) for label in ("target", "ignore"))
        assert target.sum() == sum(objects[i]["area"] for i in found), (name, entry["text"])
        centre = sum(np.array(objects[i]["centre"]) * objects[i]["area"] for i in found) / target.sum()
        assert np.allclose(np.argwhere(target).mean(axis=0)[::-1] + 0.5, centre, atol=1e-3)
        assert not (target & ignore).any()
        for text in entry["text"]:
            assert not re.search(r"[\[\]|{}]", text)
            assert not re.search(r"\bthing\b" if len(found) > 1 else r"\bthings\b", text), text
    assert len(kinds) == 12 and min(kinds.values()) >= 4 and several > 30


def test_no_question_names_what_it_asks_for(made: Made):
    named = {*SHAPES, *COLOURS, *TEXTURES, "stripe", "dot", "round", "large", "small"}
    for _, _, entry, _ in questions(made):
        for text in entry["text"]:
            words = re.findall("[a-z]+", text.lower())
            assert not named & {form for word in words for form in (word, word.removesuffix("s"), word.removesuffix("es"))}, (
                text
            )


def test_explanations_are_true_and_belong_to_their_images(made: Made):
    entries = {f"{name}.jpg": (entry, objects) for split, name, entry, objects in questions(made) if split == "train"}
    explanations = read(made.root / "reasonseg" / "explanatory" / "train.json")
    assert 50 < len({e["image"] for e in explanations}) == len(explanations) < 90  # some images have none
    values = {*SHAPES, *COLOURS, *TEXTURES, "large", "small"}
    for explanation in explanations:
        assert explanation.keys() == {"image", "query", "outputs"}
        entry, objects = entries[explanation["image"]]
        assert explanation["query"] == entry["text"][0]
        text = explanation["outputs"]
        assert text.endswith(".") and text.count(".") == 1 and text[0].isupper() and not re.search(r"[\[\]|{}]", text)
        _, found = answer(explanation["query"], objects)
        true = {v for i in found for v in (objects[i][k] for k in ("shape", "colour", "texture", "size"))}
        assert values & set(re.findall("[a-z]+", text.lower())) <= true, text


def test_outlines_of_arbitrary_masks(rng: np.random.Generator):
    outcomes = collections.Counter()
    for _ in range(300):
        mask = cv2.dilate((rng.random((12, 13)) < rng.uniform(0.02, 0.15)).astype(np.uint8), np.ones((2, 2))).astype(bool)
        if not mask.any():
            continue
        parts = multi_task.outline_points(mask)
        outcomes[parts is None] += 1
        again = np.zeros(mask.shape, np.uint8)
        for points in parts or ():
            cv2.fillPoly(again, np.array([points], dtype=np.int32), 1)
        assert parts is None or np.array_equal(again, mask)
    assert min(outcomes[True], outcomes[False]) > 20
    hole = np.ones((5, 5), bool)
    hole[2, 2] = False
    assert multi_task.outline_points(hole) is multi_task.outline_points(np.eye(1, dtype=bool)) is None
    assert multi_task.outline_points(np.ones((2, 3), bool)) == [[[0, 0], [2, 0], [2, 1], [0, 1]]]


# COCO panoptic


def test_panoptic_segments_are_the_objects_and_the_rest(made: Made):
    coco = made.root / "coco"
    seen = set()
    for split, number in (("train2017", 16), ("val2017", 4)):
        table = read(coco / "annotations" / f"panoptic_{split}.json")
        assert table.keys() == {"info", "licenses", "images", "annotations", "categories"}
        assert made.counts[f"coco/{split}"] == len(table["images"]) == len(table["annotations"]) == number
        categories = {c["id"]: c for c in table["categories"]}
        assert [c["name"] for c in table["categories"]] == [*SHAPES, "background"]
        assert [c["isthing"] for c in table["categories"]] == [1] * 8 + [0]
        assert list(categories) == sorted(categories) != list(range(1, 10))  # the ids have gaps, as COCO's
        assert all(c.keys() == {"id", "name", "supercategory", "isthing", "color"} for c in table["categories"])
        images = {image["id"]: image for image in table["images"]}
        assert not seen & images.keys()
        seen |= images.keys()
        assert sorted(p.name for p in (coco / split).iterdir()) == sorted(i["file_name"] for i in images.values())
        for annotation in table["annotations"]:
            image = images[annotation["image_id"]]
            assert annotation["file_name"] == f"{annotation['image_id']:012d}.png" == f"{Path(image['file_name']).stem}.png"
            with Image.open(coco / "annotations" / f"panoptic_{split}" / annotation["file_name"]) as png:
                assert (png.mode, png.size) == ("RGB", (image["width"], image["height"]))
                ids = np.asarray(png, np.int64) @ [1, 256, 65536]
            objects = made.scenes[f"coco/{split}/{image['file_name']}"]
            assert len(annotation["segments_info"]) == len(objects) + 1
            assert set(np.unique(ids)) == {s["id"] for s in annotation["segments_info"]}
            for segment, thing in zip(annotation["segments_info"], [*objects, None], strict=True):
                assert segment.keys() == {"id", "category_id", "iscrowd", "bbox", "area"} and segment["iscrowd"] == 0
                mask = ids == segment["id"]
                assert mask.sum() == segment["area"]
                ys, xs = np.nonzero(mask)
                assert segment["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                assert categories[segment["category_id"]]["name"] == (thing["shape"] if thing else "background")
                if thing:
                    assert thing["area"] == segment["area"] and thing["bbox"] == segment["bbox"]


# LLaVA. The questions are answered here a second time from the scene graph.

WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
SINGULAR = {"crosses": "cross"}


def fitting(words: str, objects: list[Object]) -> list[Object]:
    """Objects with all attributes in a phrase such as "large striped red stars" or "red things"."""
    wanted = {SINGULAR.get(word, word) for word in words.split()}
    wanted = {word.removesuffix("s") if word not in ("cross", *COLOURS) else word for word in wanted} - {
        "thing",
        "a",
        "an",
        "one",
    }
    assert wanted <= {*SHAPES, *COLOURS, *TEXTURES, "large", "small"}, words
    return [o for o in objects if wanted <= {o[k] for k in ("shape", "colour", "texture", "size")}]


def count(text: str) -> tuple[int, str]:
    number, noun = text.split(" ", 1)
    assert noun.endswith("s") == (number != "one") or noun == "cross", text
    return WORDS.index(number), noun


def check_turn(question: str, reply: str, objects: list[Object]) -> str:
    """Fails unless the reply is true; returns the kind of question."""
    if question.startswith("How many"):
        noun = re.fullmatch(r"How many (.+?)( are there| can you see)( in the picture)?\?", question)[1]
        verb, number, named = re.fullmatch(r"There (is|are) (\w+) (.+)\.", reply).groups()
        assert (verb == "is") == (number == "one") and count(f"{number} {named}")[0] == len(fitting(noun, objects))
        assert fitting(named, objects) == fitting(noun, objects)
        return "total" if noun == "things" else "how many"
    if match := re.fullmatch(r"Is there an? (\w+ \w+) in the picture\?", question):
        assert reply == ("Yes, there is." if fitting(match[1], objects) else "No, there is not.")
        return reply[:3]
    if match := re.fullmatch(r"(What colour is|What shape is|Is it plain, striped or dotted:) the (\w+) thing\?", question):
        (i,) = best(objects, lambda o: o["area"] if match[2] == "biggest" else 1 / o["area"], ratio=1.2)
        kind = {"What colour is": "colour", "What shape is": "shape"}.get(match[1], "texture")
        assert reply == f"It is {'a ' if kind == 'shape' else ''}{objects[i][kind]}."
        return match[2]
    if match := re.fullmatch(r"What is nearest to the (\w+) of the picture\?", question):
        axis, sign = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}[match[1]]
        (i,) = best(objects, lambda o: sign * o["centre"][axis], margin=4.99)
        assert objects[i] in fitting(reply.removesuffix(".").removeprefix("A "), objects)
        return match[1]
    if match := re.fullmatch(r"What is (to the left of|to the right of|above|below) the (\w+ \w+)\?", question):
        (anchor,) = fitting(match[2], objects)
        axis, sign = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}[match[1]]
        there = [o for o in objects if sign * (o["centre"][axis] - anchor["centre"][axis]) > 0 and o is not anchor]
        assert all(sign * (o["centre"][axis] - anchor["centre"][axis]) >= 4.99 for o in there)
        named = reply.removesuffix(".").split(" and ")
        assert len(named) == len(there) and all(any(o in fitting(n.lower(), there) for n in named) for o in there)
        return match[1]
    kind = re.fullmatch(r"Say in one sentence which (shape|colour)s the picture shows, and how many of each\.", question)[1]
    listed = re.fullmatch(r"The picture shows (.+)\.", reply)[1]
    counts = dict(reversed(count(part)) for part in re.split(r", | and ", listed))
    assert all(len(fitting(noun, objects)) == n for noun, n in counts.items()) and sum(counts.values()) == len(objects)
    return kind


def test_chat_has_the_layout_of_llava_and_every_answer_is_true(made: Made):
    entries = read(made.root / "llava" / "chat.json")
    assert len({entry["id"] for entry in entries}) == len(entries) == made.counts["llava"] == NUMBERS["chat"]
    lengths, kinds = collections.Counter(), collections.Counter()
    for entry in entries:
        assert entry.keys() == {"id", "image", "conversations"}
        with Image.open(made.root / "llava" / "images" / entry["image"]) as image:
            assert (image.format, image.size) == ("JPEG", (128, 128))
        turns = entry["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        values = [turn["value"] for turn in turns]
        assert values[0].startswith("<image>\n") and sum("<image>" in value for value in values) == 1
        values[0] = values[0].removeprefix("<image>\n")
        objects = made.scenes[f"llava/images/{entry['image']}"]
        asked = [check_turn(q, a, objects) for q, a in zip(values[::2], values[1::2], strict=True)]
        assert len(set(asked)) == len(asked)
        lengths[len(asked)] += 1
        kinds.update(asked)
    assert lengths.keys() == {1, 2, 3}
    assert kinds.keys() == {
        *("total", "how many", "Yes", "No,", "biggest", "smallest", "left", "right", "top", "bottom", "shape", "colour"),
        *("to the left of", "to the right of", "above", "below"),
    }


# All of them


def read_all(layout: DatasetReader, split: str) -> list[Example]:
    """Every image of a split; nothing may be left out or special."""
    notes: collections.Counter[str] = collections.Counter()
    found = list(examples(layout, split, notes))
    assert len(found) == layout.size(split) and not notes, notes
    return found


def areas(example: Example) -> list[int]:
    rles = [a.rle for a in example.annotations if not a.ignore]
    return masks.decode(rles, example.height, example.width).sum(axis=(1, 2)).tolist()


def test_the_readers_find_what_was_written(made: Made):
    layout = open_layout("reasonseg", made.root / "reasonseg")
    answered = ignored = 0
    for split in layout.splits:
        for example in read_all(layout, split):
            objects = made.scenes[f"reasonseg/{split}/{example.file_name}"]
            for expression in example.expressions:
                assert areas(example) == [sum(objects[i]["area"] for i in answer(expression.text, objects)[1])]
                answered += bool(expression.answer)
            ignored += len(example.annotations) - 1
    assert answered == len(read(made.root / "reasonseg" / "explanatory" / "train.json")) and ignored > 10

    layout = open_layout("coco-panoptic", made.root / "coco")
    assert layout.categories == (*SHAPES, "background")
    for split in layout.splits:
        for example in read_all(layout, split):
            (objects,) = (o for name, o in made.scenes.items() if name.endswith(f"2017/{Path(example.file_name).name}"))
            found = [layout.categories[a.category] for a in example.annotations]
            wanted = [(o["shape"], o["area"]) for o in objects]
            wanted.append(("background", 128 * 128 - sum(area for _, area in wanted)))
            assert sorted(zip(found, areas(example), strict=True)) == sorted(wanted)

    layout = open_layout("llava", made.root / "llava")
    (split,) = layout.splits
    for example, entry in zip(read_all(layout, split), read(made.root / "llava" / "chat.json"), strict=True):
        values = [turn["value"].removeprefix("<image>\n") for turn in entry["conversations"]]
        assert [v for turn in example.turns for v in (turn.question, turn.answer)] == values


def test_combinations_held_out_for_test_b_do_not_occur(made: Made):
    assert len(made.scenes) == sum(NUMBERS.values())
    assert not any(is_held_out(o["colour"], o["shape"], o["texture"]) for objects in made.scenes.values() for o in objects)


def small(out: Path, seed: int) -> dict[str, bytes]:
    multi_task.write_datasets(out, seed=seed, reasonseg=5, panoptic=2, chat=1, report=lambda line: None)
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_the_seed_decides(tmp_path: Path):
    a, b, c = (small(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert a == b and len(a) == 2 * 5 + 1 + 2 * 2 + 2 + 1 + 1 + 1
    assert a.keys() == c.keys() and not any(a[name] == c[name] for name in a if name.endswith(("jpg", "png")))


def test_a_small_world_names_colour_and_shape(tmp_path: Path):
    numbers = {"reasonseg": 20, "panoptic": 30, "chat": 30}
    multi_task.write_datasets(tmp_path / "x", **numbers, objects=(4, 4), palette="few", report=lambda line: None)
    colours, shapes = ("red", "yellow", "green", "blue"), ("circle", "square", "triangle", "star")
    table = read(tmp_path / "x" / "coco" / "annotations" / "panoptic_train2017.json")
    names = {category["id"]: category["name"] for category in table["categories"]}
    assert sorted(names.values()) == sorted([*(f"{c} {s}" for c in colours for s in shapes), "background"])
    scenes = {
        row["image"]: row["objects"] for row in map(json.loads, (tmp_path / "x" / "scenes.jsonl").read_text().splitlines())
    }
    for image, objects in scenes.items():
        looks = {(o["colour"], o["shape"], o["texture"]) for o in objects}
        few = all(c in colours and s in shapes and t == "plain" for c, s, t in looks)
        assert (few and len(objects) == 4) or image.startswith("reasonseg/")
    assert any(o["texture"] != "plain" for image, objects in scenes.items() for o in objects)  # ReasonSeg's questions
    for annotation in table["annotations"]:
        objects = scenes[f"coco/train2017/{annotation['file_name'].replace('.png', '.jpg')}"]
        found = sorted((names[s["category_id"]], s["area"]) for s in annotation["segments_info"] if s["category_id"] != 100)
        assert found == sorted((f"{o['colour']} {o['shape']}", o["area"]) for o in objects)


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multi_task, "_llava", full)
    with pytest.raises(UserError, match="No space left"):
        small(tmp_path / "x", 0)
    assert not list(tmp_path.iterdir())


def test_bad_requests_are_user_errors(tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for match, out, options in (
        ("at least 5 images for reasonseg, got 4", "x", {"reasonseg": 4}),
        ("at least 2 images for panoptic, got 1", "x", {"panoptic": 1}),
        ("at least 1 images for chat, got 0", "x", {"chat": 0}),
        ("did you mean 'few'", "x", {"palette": "fewer"}),
        ("already exists", "taken", {}),
        ("cannot create", "taken/file/x", {}),
    ):
        with pytest.raises(UserError, match=match):
            multi_task.write_datasets(tmp_path / out, report=lambda line: None, **options)
    assert [p.name for p in tmp_path.rglob("*")] == ["taken", "file"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(*more: str) -> int:
        return data.main(["make-multitask", "--out", str(tmp_path / "x"), "--seed", "4", *more])

    for scale in ("0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="--scale"):
            run(f"--scale={scale}")
    with pytest.raises(UserError, match="at least 5 images for reasonseg, got 1"):
        run("--scale", "0.01")
    assert run("--scale", "0.1") == 0
    assert (
        "4 images in reasonseg/train" in capsys.readouterr().out and len(list((tmp_path / "x").rglob("*.jpg"))) == 6 + 12 + 12
    )
