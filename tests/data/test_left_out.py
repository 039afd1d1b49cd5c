"""What `prepare --on-error record` leaves out is left out, in every layout, and the rest opens, trains and evaluates.

Each case damages a data set at one place. `validate`, `prepare` and the list in `problems.txt` must then tell the same, line by
line, and what is stored must be what the undamaged set holds without the damaged record.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from flowseg_jax.cli.data import main
from flowseg_jax.data import masks, prepare, validate
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.eval_dataset import EvalDataset
from flowseg_jax.data.formats import open_layout
from flowseg_jax.data.mixture import build_mixture
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.records import Example, examples
from flowseg_jax.data.tokenizer import load_tokenizer
from flowseg_jax.data.train_dataset import TrainDataset
from flowseg_jax.data.train_examples import TrainOptions
from flowseg_jax.errors import UserError
from flowseg_jax.types import BatchShape
from tests.data.test_fuzz import LAYOUTS, mutate, own_data
from tests.helpers import minicoco, minigrefcoco, minillava, minireasonseg, minirefcoco

SHAPE = BatchShape(batch=2, text_length=2000, max_phrases=3, max_masks=6, sam_size=32, siglip_size=16, max_names=4)
POISON = {  # what a text becomes -> what is said of it
    "mark": (lambda text: f"{text} <P> x", "contains the special token '<p>'"),
    "mark of a chat": (lambda text: f"<|user|>{text}", "contains the special token '<|user|>'"),
    "half a character": (lambda text: f"{text} \ud83d", "half of a character pair ('\\ud83d')"),
    "blank": (lambda text: " \u200b", "is blank"),
    "long": (lambda text: text + 700 * " abc", "characters, more than 2,000: shorten it, or raise --max-characters"),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    samples = [s for s in minillava.samples() if isinstance(s.get("image"), str)][:4]
    return {
        "refcoco": minirefcoco.write(root / "refcoco"),
        "grefcoco": minigrefcoco.write(root / "grefcoco"),
        "reasonseg": minireasonseg.write(root / "reasonseg"),
        "coco-panoptic": minicoco.write(root / "panoptic", "panoptic"),
        "coco-instances": minicoco.write(root / "instances", "instances"),
        "llava": minillava.write(root / "llava", table=samples),
        "jsonl": own_data(root / "own"),
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    prepare.train_dataset_tokenizer(["the dog", "a cat on the left"] * 9, directory, 300)
    return load_tokenizer(directory)


def texts(found: list[Example]) -> Counter[str]:
    """All that is said in examples."""
    said = Counter(e.text for example in found for e in example.expressions)
    said.update(e.answer for example in found for e in example.expressions if e.answer)
    said.update(text for example in found for turn in example.turns for text in (turn.question, turn.answer))
    return said


def stored(prepared: PreparedDataset) -> list[Example]:
    return [source[i] for source in map(prepared.source, prepared.splits) for i in range(len(source))]


def poison(layout: str, root: Path, rng: random.Random, change) -> tuple[list[str], str]:
    """Changes a text of the data set on disk; (all texts of its record as they were, how the message about it begins)."""
    if layout in ("refcoco", "grefcoco"):
        path = next(p for p in root.iterdir() if "refs(" in p.name)
        refs = pickle.loads(path.read_bytes(), encoding="latin1") if path.suffix == ".p" else json.loads(path.read_text())
        ref = rng.choice([ref for ref in refs if ref["split"] == "train"])
        j = rng.randrange(len(ref["sentences"]))
        gone = [sentence["sent"] for sentence in ref["sentences"]]
        ref["sentences"][j]["sent"] = change(gone[j])
        path.write_bytes(pickle.dumps(refs, 2) if path.suffix == ".p" else json.dumps(refs).encode())
        return gone, f"{path}: ref {ref['ref_id']}.sentences[{j}].sent: "
    if layout == "reasonseg":
        path = root / "train" / f"{rng.choice(['10_a', '9_b'])}.json"
        entry = json.loads(path.read_bytes().decode("cp1252"))
        j = rng.randrange(len(entry["text"]))
        gone = list(map(str.strip, entry["text"]))
        explained = {"10_a": ["Dogs bark."], "9_b": ["One drinks from a cup."] * 3}[path.stem]
        entry["text"][j] = change(entry["text"][j])
        path.write_text(json.dumps(entry))
        return gone + explained, f"{path}: text[{j}]: "
    if layout == "llava":
        (path,) = root.glob("*.json")
        table = json.loads(path.read_text())
        i = rng.randrange(len(table))
        turns = open_layout(layout, root).example("train", i, Counter()).turns
        said = [text for turn in turns for text in (turn.question, turn.answer)]
        gone, j = said, rng.randrange(len(said))
        start = 1 if table[i]["conversations"][0]["from"] == "gpt" else 0
        turn = table[i]["conversations"][start + j]
        turn["value"] = change(turn["value"])
        path.write_text(json.dumps(table))
        return gone, f"{path}: [{i}] (id {table[i]['id']}).conversations[{start + j}].value: "
    path = root / "own.jsonl"
    lines = list(map(json.loads, path.read_text().splitlines()))
    i = rng.randrange(len(lines))
    gone, j = list(lines[i]["expressions"]), rng.randrange(len(lines[i]["expressions"]))
    lines[i]["expressions"][j] = change(gone[j])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return gone, f"{path}:{i + 1}: expressions[{j}]: "


def prepare_and_compare(layout: str, root: Path, out: Path) -> tuple[PreparedDataset | None, list[str]]:
    """The set without its damaged records and what was wrong; None where nothing can be left of it."""

    def attempt(**options):
        try:
            return prepare.prepare(root, out, layout=layout, log=said.append, **options), ""
        except UserError as error:
            assert not out.exists() and not any("problems.txt" in line for line in said)
            return None, str(error)

    said: list[str] = []
    try:
        (report,) = validate.validate([validate.open_set(layout, root)]).sets
        problems = report.problems
    except UserError as error:  # nothing can be read of it
        for on_error in ("stop", "record"):
            prepared, message = attempt(on_error=on_error)
            assert prepared is None and (message == str(error) or on_error == "stop")
        return None, [str(error)]
    prepared, message = attempt()
    if not problems:
        assert prepared or "nothing is left of its examples" in message, message
        return prepared, []
    assert prepared is None and message in problems  # `validate` and `prepare` say the same
    shutil.rmtree(out.parent / f".{out.name}.partial", ignore_errors=True)
    prepared, message = attempt(on_error="record")
    if prepared is None:
        assert "nothing is left of its examples" in message and problems[0][:100] in message
    else:
        assert (out / "problems.txt").read_text(encoding="utf-8").splitlines() == problems
        assert prepared.metadata["problems"] == len(problems)
        assert any(str(out / "problems.txt") in line and problems[0][:100] in line for line in said)
    return prepared, problems


def use(prepared: PreparedDataset, tokenizer) -> None:
    """Trains on and evaluates all of a prepared set, as far as batches go."""
    prepared = PreparedDataset.open(prepared.directory)
    if "train" in prepared.splits:
        options = TrainOptions(objects="referred", explanation_prob=1.0)
        data = TrainDataset(
            build_mixture([(prepared, 0.0)]), SHAPE, PromptTemplates(), 0, visual_tokens=6, tokenizer=tokenizer, options=options
        )
        for step in range(-(-data.epoch // SHAPE.batch)):
            data.batch(step)
    for split in prepared.splits:
        if prepared.task in ("referring", "reasoning"):
            data = EvalDataset(prepared, split, tokenizer, sides=(32, 16), batch=2, visual_tokens=6)
            asked = sum(len(row) for batch in data for one in batch.rounds for row in one.samples)
            assert asked == data.samples == prepared.splits[split]["samples"]
    for example in stored(prepared):
        found = masks.decode([a.rle for a in example.annotations], example.height, example.width)
        assert found.any(axis=(1, 2)).all()


TEXTS = [(layout, case) for layout in ("refcoco", "grefcoco", "reasonseg", "jsonl") for case in POISON]
TEXTS += [("llava", case) for case in POISON if case not in ("blank", "long")]  # chats are cut to whole pairs, and to the text


@pytest.mark.parametrize(("layout", "case"), TEXTS)
def test_a_text_that_cannot_be_used(originals, tokenizer, tmp_path, layout, case):
    change, words = POISON[case]
    opened = open_layout(layout, originals[layout])
    before = texts([e for split in opened.splits for e in examples(opened, split)])
    root = tmp_path / "source"
    shutil.copytree(originals[layout], root)
    gone, field = poison(layout, root, random.Random(f"{layout} {case}"), change)
    prepared, (problem,) = prepare_and_compare(layout, root, tmp_path / "out")
    assert problem.startswith(field) and words in problem
    assert texts(stored(prepared)) == before - Counter(gone)
    use(prepared, tokenizer)


@pytest.mark.parametrize("case", POISON)
def test_an_explanation_that_cannot_be_used(originals, tmp_path, case):
    change, words = POISON[case]
    root = tmp_path / "source"
    shutil.copytree(originals["reasonseg"], root)
    path = root / "explanatory" / "train.json"
    entries = json.loads(path.read_text())
    entries[0]["outputs"] = change(entries[0]["outputs"])
    path.write_text(json.dumps(entries))
    prepared, (problem,) = prepare_and_compare("reasonseg", root, tmp_path / "out")
    assert problem.startswith(f"{path}: [0].outputs: ") and words in problem
    answers = {e.answer for example in stored(prepared) for e in example.expressions}
    assert answers == {"", "One drinks from a cup."}  # the question is kept without its explanation


@pytest.mark.parametrize("case", POISON)
@pytest.mark.parametrize("layout", ["refcoco", "coco-panoptic", "coco-instances", "jsonl"])
def test_a_category_name_that_cannot_be_used(originals, tmp_path, layout, case):
    """A name is no record: the whole set is refused, but a line of one's own file names its category itself."""
    change, words = POISON[case]
    root = tmp_path / "source"
    shutil.copytree(originals[layout], root)
    if layout == "jsonl":
        path = root / "own.jsonl"
        lines = list(map(json.loads, path.read_text().splitlines()))
        lines[0]["category"] = change("dog")
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        where = f"{path}:1: category: "
    else:
        path = root / "instances.json" if layout == "refcoco" else next((root / "annotations").glob("*_train2017.json"))
        table = json.loads(path.read_text())
        entry = table["categories"][1]
        entry["name"] = change(entry["name"])
        path.write_text(json.dumps(table))
        where = f"{path}: category {entry['id']}.name: "
    prepared, (problem,) = prepare_and_compare(layout, root, tmp_path / "out")
    assert problem.startswith(where) and words in problem
    assert (prepared is not None) == (layout == "jsonl")


def spoil(layout: str, root: Path) -> str:
    """Damages every record; words of the first reason."""
    if layout == "jsonl":
        lines = map(json.loads, (root / "own.jsonl").read_text().splitlines())
        (root / "own.jsonl").write_text("".join(json.dumps(line | {"expressions": 3}) + "\n" for line in lines))
        return "own.jsonl:1: expressions: 3 is not of type 'array'"
    if layout == "llava":
        (path,) = root.glob("*.json")
        path.write_text(json.dumps([{k: v for k, v in s.items() if k != "id"} for s in json.loads(path.read_text())]))
        return "[0]: field 'id' is missing"
    if layout == "reasonseg":
        for path in (root / "val").glob("*.json"):
            path.unlink()
        return "10_a.json: missing, yet there is 10_a.jpg"
    path = root / "instances.json" if "ref" in layout else next((root / "annotations").glob("*_train2017.json"))
    table = json.loads(path.read_text())
    table["images"] = [image | {"id": str(image["id"])} for image in table["images"]]
    path.write_text(json.dumps(table))
    return "images[0].id: expected int, got '1'"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_reasons_are_told_where_nothing_is_left(originals, tmp_path, capsys, layout):
    root = tmp_path / "source"
    shutil.copytree(originals[layout], root)
    reason = spoil(layout, root)
    for command in (
        ["validate", layout, str(root)],
        ["preview", layout, str(root), "--out", str(tmp_path / "page")],
        ["prepare", "--layout", layout, "--source", str(root), "--out", str(tmp_path / "out"), "--on-error", "record"],
    ):
        with pytest.raises(UserError) as caught:
            main(command)
        message = str(caught.value)
        assert "holds no" in message and f" damaged: {root}" in message and reason in message and "\n" not in message
        assert len(message) < 1500 and "problems.txt" not in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_preview_tells_the_first_problems(originals, tmp_path, capsys):
    root = tmp_path / "source"
    shutil.copytree(originals["jsonl"], root)
    _, field = poison("jsonl", root, random.Random(0), POISON["mark"][0])
    assert main(["preview", "jsonl", str(root), "--out", str(tmp_path / "page")]) == 1
    assert f"; 1 damaged: {field}contains the special token" in capsys.readouterr().out


def test_longer_texts_where_they_are_wanted(tmp_path, tokenizer):
    """`--max-characters` lets them in, and training says which key must make room for them."""
    root = own_data(tmp_path / "own")
    lines = list(map(json.loads, (root / "own.jsonl").read_text().splitlines()))
    lines[0]["expressions"][0] = "one " * 600  # 2,399 characters without the space at the end
    (root / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["prepare", "--layout", "jsonl", "--source", str(root), "--out", str(tmp_path / "out")]
    with pytest.raises(
        UserError, match=r"own\.jsonl:1: expressions\[0\]: 2,399 characters, more than 2,000: .* data.text_length"
    ):
        main(command)
    with pytest.raises(UserError, match="2,399 characters, more than 2,398"):
        main([*command, "--max-characters", "2398"])
    with pytest.raises(UserError, match="layout llava has no option 'max_characters'"):
        main(["validate", "llava", str(root), "--max-characters", "9"])
    assert main([*command, "--max-characters", "2399"]) == 0
    prepared = PreparedDataset.open(tmp_path / "out")
    with pytest.raises(UserError, match=r"a\.jpg: may need \d+ tokens, more than the text length 600; raise data.text_length"):
        TrainDataset(
            build_mixture([(prepared, 0.0)]),
            dataclasses.replace(SHAPE, text_length=600),
            PromptTemplates(),
            0,
            visual_tokens=6,
            tokenizer=tokenizer,
            options=TrainOptions(objects="referred"),
        )


def some_damage(originals, tokenizer, tmp_path, count: int, seed: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        layout = LAYOUTS[number % len(LAYOUTS)]
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        root = tmp_path / "source"
        shutil.copytree(originals[layout], root)
        kind, key, path = mutate(root, rng)
        try:
            prepared, problems = prepare_and_compare(layout, root, tmp_path / "out")
            if prepared is not None:
                use(prepared, tokenizer)
        except Exception as error:
            raise AssertionError(f"case {number}: {layout}, {kind} of {key!r} in {path.name}") from error
        found["refused" if prepared is None else "left out" if problems else "whole"] += 1
    return found


def test_any_damage(originals, tokenizer, tmp_path):
    found = some_damage(originals, tokenizer, tmp_path, 21, seed=0)
    assert found["left out"] > 3 and found["refused"] > 2 and found.total() == 21


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_damages(originals, tokenizer, tmp_path, capsys):
    found = some_damage(originals, tokenizer, tmp_path, 500, seed=1)
    with capsys.disabled():
        print("\n" + ", ".join(f"{count} {what}" for what, count in found.most_common()))
