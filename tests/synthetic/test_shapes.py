"""The `shapes` benchmark: its layout, its masks, its language (against an independent parser), its splits and its manners."""

from __future__ import annotations

import ast
import collections
import itertools
import json
import pickle
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from flowseg_jax.cli import data
from flowseg_jax.data import formats
from flowseg_jax.errors import UserError
from flowseg_jax.synthetic import generate, generator, polygons, refcoco_writer
from flowseg_jax.synthetic.expressions import FAMILIES
from flowseg_jax.synthetic.render import PAINT
from flowseg_jax.synthetic.scene import COLOURS, PALETTES, SHAPES, TEXTURES, is_held_out
from tests.helpers import expression_parser
from tests.helpers.coarse import coarse


class Made(NamedTuple):
    root: Path
    instances: dict[str, Any]
    refs: list[dict[str, Any]]
    scenes: dict[int, dict[str, Any]]
    statistics: Any


def load(root: Path, statistics: Any = None) -> Made:
    instances = json.loads((root / "instances.json").read_text())
    refs = pickle.loads((root / "refs(unc).p").read_bytes(), encoding="latin1")
    rows = map(json.loads, (root / "scenes.jsonl").read_text().splitlines())
    return Made(root, instances, refs, {row["image_id"]: row for row in rows}, statistics)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("shapes") / "set"
    return load(root, generate(root, 400, seed=3, workers=1, report=lambda line: None))


def decode(segmentation: Any, size: int) -> np.ndarray:
    """As the COCO tools do it."""
    rle = coco.frPyObjects(segmentation, size, size)
    return coco.decode(coco.merge(rle) if isinstance(segmentation, list) else rle).astype(bool)


def combination(thing: dict[str, Any]) -> tuple[str, str, str]:
    return thing["colour"], thing["shape"], thing["texture"]


def test_the_layout_has_every_field_of_refcoco(made: Made):
    images = {image["id"]: image for image in made.instances["images"]}
    annotations = {a["id"]: a for a in made.instances["annotations"]}
    categories = {c["id"]: c for c in made.instances["categories"]}
    assert len(images) == 400 and len(categories) == 2 * 3 * 8 * 8  # sizes, textures, colours, shapes
    for image in images.values():
        assert {"file_name", "height", "width", "license", "coco_url", "flickr_url"} <= image.keys()
        with Image.open(made.root / "images" / image["file_name"]) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (image["width"], image["height"]))
    for a in annotations.values():
        assert a.keys() == {"id", "image_id", "segmentation", "area", "iscrowd", "bbox", "category_id"}
        assert a["image_id"] in images
    sent_ids = []
    for ref in made.refs:
        assert ref.keys() == {
            *("ref_id", "ann_id", "category_id", "image_id", "file_name", "split", "sent_ids", "sentences"),
        }
        annotation = annotations[ref["ann_id"]]
        assert (annotation["image_id"], annotation["category_id"]) == (ref["image_id"], ref["category_id"])
        stem = images[ref["image_id"]]["file_name"].removesuffix(".jpg")
        assert ref["file_name"] == f"{stem}_{ref['ann_id']}.jpg"
        assert ref["sent_ids"] == [s["sent_id"] for s in ref["sentences"]] and len(ref["sentences"]) in (2, 3)
        assert len({s["sent"] for s in ref["sentences"]}) == len(ref["sentences"])
        for s in ref["sentences"]:
            assert s["tokens"] == s["sent"].split() and s["sent"] == s["sent"].lower() and s["raw"].lower() == s["sent"] + "."
            assert s["family"] in FAMILIES
        sent_ids += ref["sent_ids"]
    assert len(set(sent_ids)) == len(sent_ids)
    assert len({ref["ref_id"] for ref in made.refs}) == len({ref["ann_id"] for ref in made.refs}) == len(made.refs)
    assert (made.root / "refs(unc).p").read_bytes()[:2] == b"\x80\x02"  # pickle protocol 2
    for scene in map(json.loads, (made.root / "scenes.jsonl").read_text().splitlines()):
        for thing in scene["objects"]:  # a category is all that can be seen of an object by itself
            name = " ".join(thing[kind] for kind in ("size", "texture", "colour", "shape"))
            assert categories[annotations[thing["ann_id"]]["category_id"]]["name"] == name


def test_annotations_are_the_visible_pixels(made: Made):
    size = 128
    kinds = collections.Counter()
    by_image = collections.defaultdict(list)
    for a in made.instances["annotations"][:900]:
        mask = decode(a["segmentation"], size)
        kinds[type(a["segmentation"])] += 1
        assert mask.sum() == a["area"]
        ys, xs = np.nonzero(mask)
        assert a["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        by_image[a["image_id"]].append(mask)
        thing = next(o for o in made.scenes[a["image_id"]]["objects"] if o["ann_id"] == a["id"])
        assert np.allclose(thing["centre"], [xs.mean() + 0.5, ys.mean() + 0.5], atol=1e-3)
        if thing["texture"] == "plain":  # the picture shows the object where the mask says it is
            with Image.open(made.root / "images" / f"shapes_{a['image_id']:012d}.jpg") as picture:
                colour = np.median(np.asarray(picture, float)[mask], axis=0)
            nearest = min(PAINT, key=lambda name: np.abs(colour - PAINT[name]).sum())
            assert nearest == thing["colour"], (a["id"], colour)
    assert all(np.sum(masks, axis=0).max() == 1 for masks in by_image.values())
    assert kinds[list] > 6 * kinds[dict] > 0


def test_it_is_the_benchmark_that_the_published_figures_are_about(made: Made):
    """Other scenes or other sentences would make another benchmark: every figure of results/ would have to be measured anew."""
    recorded = json.loads((Path(__file__).parent.parent / "golden" / "synthetic.json").read_text())["shapes"]
    sentences = [sentence["sent"] for ref in made.refs for sentence in ref["sentences"]]
    assert sentences[: len(recorded["sentences"])] == recorded["sentences"]
    assert str(made.statistics).splitlines() == recorded["statistics"]
    objects = [[round(area["area"]), *map(round, area["bbox"])] for area in made.instances["annotations"]]
    assert objects[: len(recorded["objects"])] == recorded["objects"]
    for name, colours in recorded["pictures"].items():
        np.testing.assert_allclose(coarse(made.root / "images" / name), colours, atol=2, err_msg=name)


def test_masks_survive_the_coco_rasteriser():
    config = generator._config(0, None, (7, 10), "default", 128, 92, "all")
    rng, parts = random.Random(5), collections.Counter()
    scenes = [s for s in (generator._draw_scene(rng, config, False) for _ in range(60)) if s]
    for mask in itertools.chain.from_iterable(scene.masks for scene in scenes):
        outlines = polygons.polygons(mask)
        parts[outlines and len(outlines)] += 1
        again = decode(outlines or polygons.run_lengths(mask), 128)
        assert (again & mask).sum() / (again | mask).sum() > 0.97
        assert np.array_equal(decode(polygons.run_lengths(mask), 128), mask)
    assert parts[1] > 100 and parts[2] > 0


def test_outlines_of_arbitrary_masks(rng: np.random.Generator):
    outcomes = collections.Counter()
    for _ in range(300):
        mask = rng.random((6, 7)) < rng.uniform(0.1, 0.8)
        if not mask.any():
            continue
        outlines = polygons.polygons(mask)
        outcomes[outlines is None] += 1
        if outlines is not None:
            rle = coco.frPyObjects(outlines, *mask.shape)
            assert np.array_equal(coco.decode(coco.merge(rle)), mask)
    assert min(outcomes[True], outcomes[False]) > 20
    hole = np.ones((5, 5), bool)
    hole[2, 2] = False
    assert polygons.polygons(hole) is None
    assert polygons.polygons(np.eye(2, dtype=bool)) == [[0, 0, 1, 0, 1, 1, 0, 1], [1, 1, 2, 1, 2, 2, 1, 2]]


def test_the_parser_finds_the_target_of_every_sentence_and_nothing_else(made: Made):
    for ref in made.refs:
        objects = made.scenes[ref["image_id"]]["objects"]
        for sentence in ref["sentences"]:
            assert expression_parser.resolve(sentence["sent"], objects) == [ref["ann_id"]], (ref["image_id"], sentence["sent"])


def test_expressions_leave_room(made: Made, rng: np.random.Generator):
    """Moving every object by up to a pixel and changing areas by 8 % changes no answer."""
    for ref in made.refs:
        objects = made.scenes[ref["image_id"]]["objects"]
        moved = [
            thing
            | {"centre": (thing["centre"] + rng.uniform(-1, 1, 2)).tolist(), "area": thing["area"] * rng.uniform(0.93, 1.08)}
            for thing in objects
        ]
        for sentence in ref["sentences"]:
            assert expression_parser.resolve(sentence["sent"], moved, margin=2.0) == [ref["ann_id"]], sentence["sent"]


def test_every_target_has_look_alikes(made: Made):
    for ref in made.refs:
        objects = made.scenes[ref["image_id"]]["objects"]
        assert 4 <= len(objects) <= 8
        target = next(o for o in objects if o["ann_id"] == ref["ann_id"])
        alike = [
            sum(a == b for a, b in zip(combination(target), combination(o), strict=True)) for o in objects if o is not target
        ]
        assert max(alike) >= 2


def test_held_out_combinations_are_the_targets_of_test_b_and_nowhere_else(made: Made):
    split_of = {}
    for ref in made.refs:
        assert split_of.setdefault(ref["image_id"], ref["split"]) == ref["split"] == made.scenes[ref["image_id"]]["split"]
    assert len(split_of) == 400 and set(split_of.values()) == {"train", "val", "testA", "testB"}
    seen = collections.defaultdict(set)
    for image_id, scene in made.scenes.items():
        seen[split_of[image_id]] |= {combination(o) for o in scene["objects"]}
    for split in ("train", "val", "testA"):
        assert not any(is_held_out(*c) for c in seen[split])
    assert seen["testA"] <= seen["train"]
    for ref in made.refs:
        (target,) = (o for o in made.scenes[ref["image_id"]]["objects"] if o["ann_id"] == ref["ann_id"])
        assert is_held_out(*combination(target)) == (ref["split"] == "testB")
    held = [c for c in itertools.product(COLOURS, SHAPES, TEXTURES) if is_held_out(*c)]
    assert len(held) == 24
    for a, b in ((0, 1), (0, 2), (1, 2)):  # only the combination is new: every pair of words occurs in training
        kept = set(itertools.product(COLOURS, SHAPES, TEXTURES)) - set(held)
        assert len({(c[a], c[b]) for c in kept}) == len({(c[a], c[b]) for c in itertools.product(COLOURS, SHAPES, TEXTURES)})


def test_the_mix_is_what_was_asked_for(made: Made):
    families = collections.Counter(s["family"] for ref in made.refs for s in ref["sentences"])
    wanted, _ = generator.PRESETS["default"]
    for family, share in wanted.items():
        assert abs(families[family] / families.total() - share) < 0.03, family
    assert sum(len(ref["sentences"]) for ref in made.refs if ref["split"] == "val") >= 300
    assert made.statistics.sentences.total() == families.total()
    assert made.statistics.family("two-hop") == families["two-hop"]
    assert 0.15 < made.statistics.random_reader < 0.25 < made.statistics.noun_reader < 0.7
    assert "two-hop" in str(made.statistics)


def test_presets_need_more_than_attributes():
    for mix, (fewest, most) in generator.PRESETS.values():
        assert set(mix) == set(FAMILIES) and sum(mix.values()) == pytest.approx(1)
        assert mix["attribute"] <= 0.6 and 4 <= fewest <= most <= 10


def test_the_hardest_mix_and_other_sizes_work(tmp_path: Path):
    generate(tmp_path / "x", 16, 0, mix={"two-hop": 2.0}, objects=(9, 10), size=192, workers=1, report=lambda line: None)
    made = load(tmp_path / "x")
    assert {s["family"] for ref in made.refs for s in ref["sentences"]} == {"two-hop"}
    assert {image["width"] for image in made.instances["images"]} == {192}
    assert all(len(scene["objects"]) in (9, 10) for scene in made.scenes.values())
    for ref in made.refs:
        for s in ref["sentences"]:
            assert expression_parser.resolve(s["sent"], made.scenes[ref["image_id"]]["objects"]) == [ref["ann_id"]]


def test_a_set_can_have_few_looks(tmp_path: Path):
    mix = {"attribute": 1.0}
    generate(tmp_path / "x", 30, 0, mix=mix, objects=(4, 4), palette="few", workers=1, report=lambda line: None)
    made, seen = load(tmp_path / "x"), collections.defaultdict(set)
    for scene in made.scenes.values():
        assert len(scene["objects"]) == 4
        for o in scene["objects"]:
            for kind in ("shape", "colour", "texture"):
                seen[kind].add(o[kind])
    looks = PALETTES["few"]
    assert seen == {"shape": set(looks.shapes), "colour": set(looks.colours), "texture": {"plain"}}
    assert {ref["split"] for ref in made.refs} == {"train", "val", "testA", "testB"}
    for ref in made.refs:
        for s in ref["sentences"]:
            assert expression_parser.resolve(s["sent"], made.scenes[ref["image_id"]]["objects"]) == [ref["ann_id"]]


def test_an_expression_can_refer_to_nothing(tmp_path: Path):
    mix = {"attribute": 0.4, "ordinal": 0.2, "relation": 0.15, "no-target": 0.25}
    statistics = generate(tmp_path / "x", 60, 3, mix=mix, workers=1, report=lambda line: None)
    assert not (tmp_path / "x" / "refs(unc).p").exists()
    refs = json.loads((tmp_path / "x" / "grefs(unc).json").read_text())
    scenes = {row["image_id"]: row for row in map(json.loads, (tmp_path / "x" / "scenes.jsonl").read_text().splitlines())}
    absent = [ref for ref in refs if ref["no_target"]]
    assert {"train", "val", "testB"} <= {ref["split"] for ref in absent}
    ranks = relations = 0
    for ref in refs:
        for s in ref["sentences"]:
            objects = scenes[ref["image_id"]]["objects"]
            assert expression_parser.resolve(s["sent"], objects) == ([] if ref["no_target"] else ref["ann_id"])
            assert (s["family"] == "no-target") == ref["no_target"]
            if ref["no_target"]:
                words = set(s["sent"].split())
                ranks += bool(words & {"second", "third", "fourth"})
                relations += bool(words & {"above", "below", "under", "of"})
                kinds = [words.intersection(values) for values in (COLOURS, SHAPES, TEXTURES)]
                if all(kinds) and not words & {"above", "below", "under", "of", "left", "right", "top", "bottom"}:
                    assert not is_held_out(*(kind.pop() for kind in kinds)), s["sent"]  # or training would say: there is none
    sentences = [s["sent"] for ref in absent for s in ref["sentences"]]
    assert 0.2 < statistics.share("no-target") < 0.27 and len(sentences) == statistics.family("no-target")
    assert min(ranks, relations, len(sentences) - ranks - relations) > 0.15 * len(sentences)
    assert "no-target" in str(statistics)
    layout = formats.open_layout("grefcoco", tmp_path / "x")
    assert "val" in layout.splits


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_seed_decides_and_the_workers_do_not(tmp_path: Path):
    lines: list[str] = []
    for name, seed, workers in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        generate(tmp_path / name, 20, seed, workers=workers, report=lines.append)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and len(a) == 23
    assert not any(a[name] == c[name] for name in a)
    assert any("20 images" in line for line in lines)


def test_progress_is_reported(monkeypatch: pytest.MonkeyPatch):
    clock = itertools.count(0, 2.0)
    monkeypatch.setattr(generator.time, "monotonic", lambda: next(clock))
    lines: list[str] = []
    assert list(generator._with_progress(range(10), 10, lines.append)) == list(range(10))
    assert len(lines) == 4 and "3/10 images" in lines[1] and "s left" in lines[1]


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(refcoco_writer, "write", full)
    with pytest.raises(UserError, match="No space left"):
        generate(tmp_path / "x", 16, 0, workers=1, report=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_bad_requests_are_user_errors(tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for match, out, images, options in (
        ("at least 16 images", "x", 15, {}),
        ("already exists", "taken", 16, {}),
        ("cannot create", "file/x", 16, {}),
        ("did you mean 'relation'", "x", 16, {"mix": {"relations": 1.0}}),
        ("all 0", "x", 16, {"mix": {"relation": 0.0}}),
        ("at least 0", "x", 16, {"mix": {"relation": float("nan")}}),
        ("4..10", "x", 16, {"objects": (3, 8)}),
        ("64..4096", "x", 16, {"size": 32}),
        ("quality", "x", 16, {"quality": 0}),
        ("preset", "x", 16, {"preset": "harder"}),
        ("did you mean 'few'", "x", 16, {"palette": "fewer"}),
        ("workers", "x", 16, {"workers": 0}),
    ):
        with pytest.raises(UserError, match=match):
            generate(tmp_path / out, images, 0, report=lambda line: None, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = ["make-shapes", f"--out={tmp_path / 'x'}", "--num-images=16", "--seed=4", "--num-workers=1", "--preset=hard"]
    assert data.main(line) == 0
    assert "two-hop" in capsys.readouterr().out and (tmp_path / "x" / "refs(unc).p").exists()


def test_the_mix_of_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(generator, "generate", lambda *arguments, **options: asked.append(options["mix"]))
    line = ["make-shapes", f"--out={tmp_path / 'x'}", "--num-images=16", "--mix"]
    assert data.main([*line, "attribute=.5", "two-hop=1"]) == 0
    assert asked == [{"attribute": 0.5, "two-hop": 1.0}]
    with pytest.raises(UserError, match="FAMILY=SHARE"):
        data.main([*line, "attribute"])


# The parser itself: a scene and answers written by hand.
#
#     1 large red plain square (20, 20)      2 small red plain circle (100, 20)
#     3 small blue striped circle (40, 60)   4 large blue dotted circle (90, 70)
#     5 small red striped square (20, 110)   6 large blue striped triangle (110, 112)
BY_HAND = [
    {"ann_id": i, "size": size, "colour": colour, "texture": texture, "shape": shape, "centre": centre, "area": area}
    for i, (size, colour, texture, shape, centre, area) in enumerate(
        [
            ("large", "red", "plain", "square", [20, 20], 800),
            ("small", "red", "plain", "circle", [100, 20], 300),
            ("small", "blue", "striped", "circle", [40, 60], 320),
            ("large", "blue", "dotted", "circle", [90, 70], 900),
            ("small", "red", "striped", "square", [20.5, 110], 310),
            ("large", "blue", "striped", "triangle", [110, 112], 850),
        ],
        start=1,
    )
]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the triangle", [6]),
        ("big blue circle", [4]),
        ("the circle", [2, 3, 4]),
        ("the circle with dots", [4]),
        ("the red square that is plain and large", [1]),
        ("the thing that is little and blue", [3]),
        ("the circle that is not blue", [2]),
        ("the striped thing which is not a circle", [5, 6]),
        ("the large thing that is neither red nor dotted", [6]),
        ("the blue circle without stripes", [4]),
        ("the leftmost circle", [3]),
        ("circle furthest to the right", [2]),
        ("the circle furthest to the right", [2]),
        ("the topmost blue object", [3]),
        ("the lowest red thing", [5]),
        ("the biggest circle", [4]),
        ("the smallest striped thing", [5]),
        ("the second circle from the left", [4]),
        ("third thing from bottom", [4]),
        ("the red thing that is third from the left", [2]),
        ("the fourth triangle from the left", []),
        ("the circle left of the large blue circle", [3]),
        ("the square that is under the small blue circle", [5]),
        ("thing to right of the small red circle", [6]),
        ("the circle above the blue circle that is to the right of the striped circle", [2, 3]),
        ("the red thing that is above the circle left of the triangle that is above", None),
        ("the circle that is to the right of the square above the striped square", [2, 3, 4]),
        ("the square left of the circle", None),
        ("the green circle", []),
        ("the second circle", None),
        ("the round thing", None),
        ("the circle of the left", None),
        ("the circle from the left", None),
        ("", None),
    ],
)
def test_parser_by_hand(text: str, answer: list[int] | None):
    if answer is None:
        with pytest.raises(expression_parser.NotUnderstood):
            expression_parser.resolve(text, BY_HAND)
    else:
        assert expression_parser.resolve(text, BY_HAND) == answer


def test_the_checker_shares_no_code_with_the_generator():
    tree = ast.parse(Path(expression_parser.__file__).read_text())
    imported = {node.module if isinstance(node, ast.ImportFrom) else alias.name for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}  # fmt: skip
    assert imported <= {"__future__", "collections.abc", "dataclasses", "typing"}
