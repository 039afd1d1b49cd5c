"""What a model directory says of its model, and models of the hub, against a stand-in of its client."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from flowseg_jax.checkpoints import find, hub, model_card
from flowseg_jax.checkpoints.model_card import ModelCard
from flowseg_jax.checkpoints.pretrained import copy_pretrained, read_model_config, seal
from flowseg_jax.errors import UserError
from flowseg_jax.inference.selection import Candidate, SelectionConfig, select_prediction
from flowseg_jax.system import console

SHIPPED = find.SHIPPED_MODEL


@pytest.fixture
def directory(tmp_path):
    return Path(copy_pretrained(SHIPPED, tmp_path / "model"))


def card_of(directory):
    return ModelCard.of_model(read_model_config(directory)["extra"], directory)


def edit(directory, card):
    config = json.loads((directory / "config.json").read_text())
    config["extra"]["model_card"] = card
    (directory / "config.json").write_text(json.dumps(config))


def test_the_card_is_covered_by_the_checksums(directory):
    card = card_of(directory)
    edit(directory, {"notice": "knows everything"})
    with pytest.raises(UserError, match=r"config.json has changed since it was saved"):
        read_model_config(directory)
    seal(directory)
    assert card_of(directory) == ModelCard(notice="knows everything") != card
    edit(directory, None)
    config = json.loads((directory / "config.json").read_text())
    del config["extra"]["model_card"]
    (directory / "config.json").write_text(json.dumps(config))
    seal(directory)
    assert card_of(directory) == ModelCard()  # a directory of before


@pytest.mark.parametrize(
    "card, message",
    [
        ([], r"extra.model_card is .* a group of keys"),
        ({"notice": 3}, r"model_card.notice is 3, expected a text"),
        ({"trained_on": "x" * 3000}, r"model_card.trained_on .* a text"),
        ({"can_be_asked": "x" * 2001}, r"model_card.can_be_asked .* a text"),
        ({"words": "abc"}, r"model_card.words is 'abc'"),
        ({"words": ["a"] * 100_001}, r"model_card.words is .* a list of words"),
        ({"no_target": []}, r"model_card.no_target is .*, expected a group of keys"),
        ({"no_target": {"threshold": -0.1}}, r"model_card.no_target.threshold is -0.1, expected a number from 0 to 100"),
        ({"no_target": {"false_alarms": True}}, r"model_card.no_target.false_alarms is .*, expected a number from 0 to 100"),
        ({"words": [1]}, r"model_card.words"),
        ({"no_target": {"missed": 100.1}}, r"model_card.no_target.missed is 100.1, expected a number from 0 to 100"),
        ({"no_target": {"missed": "few"}}, r"model_card.no_target.missed is 'few', expected a number"),
    ],
)
def test_a_card_that_is_none(directory, card, message):
    edit(directory, card)
    seal(directory)
    with pytest.raises(UserError, match=message):
        card_of(directory)


def test_the_largest_card_that_there_can_be():
    most = {"notice": "x" * 2000, "words": ["a"] * 100_000, "no_target": {"threshold": 0, "false_alarms": 100, "missed": 0}}
    card = ModelCard.of_model({"model_card": most}, "x")
    assert (len(card.notice), len(card.words), card.no_target) == (2000, 100_000, most["no_target"])


def test_hostile_text_stays_on_its_line():
    card = ModelCard.of_model({"model_card": {"notice": "a\x1b[2J\nb"}}, "x")
    assert len(card.notice.splitlines()) == 1 and "\x1b" not in card.notice


def test_the_shipped_model_says_what_it_knows_once(monkeypatch):
    card, said = card_of(SHIPPED), []
    monkeypatch.setattr(console, "note", said.append)
    model_card._tell_once.cache_clear()
    for _ in range(2):
        card.tell(SHIPPED)
    assert len(said) == 1 and "drawn shapes only" in said[0] and "shapes_tiny" in said[0]
    assert len(card.words) == 61 and card.no_target["threshold"] == read_model_config(SHIPPED)["extra"]["no_target_threshold"]
    assert any("15.0 % false alarms, 15.7 % missed" in line for line in card.lines())


def test_a_card_for_people():
    no_target = {"threshold": 0.5, "missed": 2, "measured_on": "x"}
    card = ModelCard(notice="A model of shapes.", trained_on="drawings.", can_be_asked="shapes.", no_target=no_target)
    assert card.lines() == [
        "A model of shapes.",
        "It was trained on drawings.",
        "It can be asked for shapes.",
        'Scores below 0.50 mean "not found": 0.0 % false alarms, 2.0 % missed (x).',
    ]
    assert ModelCard().lines() == []


def test_words_that_it_was_never_trained_on_are_not_found():
    import numpy as np

    card = card_of(SHIPPED)
    assert card.unknown_words("The Banana, left of the red bananas; banana") == ("banana", "bananas")
    assert card.unknown_words("the square that is not yellow!") == () == ModelCard().unknown_words("banana")
    image, mask = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), bool)

    def answer(text, threshold):
        unknown, chosen_by = card.unknown_words(text), SelectionConfig(no_target_threshold=threshold)
        return select_prediction("x", text, image, [Candidate(0, 0.99, mask)], chosen_by, unknown_words=unknown)

    banana = answer("banana", 0.9)
    assert not banana.found and banana.to_json()["unknown_words"] == ["banana"] and banana.candidates[0].mask.all()
    assert "not found" in banana.summary() and "never trained on 'banana'" in banana.summary() and "banana" in repr(banana)
    assert answer("banana", 0.0).found and answer("red star", 0.9).found  # 0 switches it off
    assert "unknown_words" not in answer("red star", 0.9).to_json()


def test_a_calibrated_threshold_becomes_the_models_own(directory):
    weights = read_model_config(directory)["checksums"]
    model_card.write_no_target(directory, threshold=0.25, false_alarms=10.0, missed=5.5, measured_on="val")
    config = read_model_config(directory)
    assert config["extra"]["no_target_threshold"] == 0.25 and config["checksums"] == weights
    assert card_of(directory).notice and 'Scores below 0.25 mean "not found": 10.0 % false alarms, 5.5 % missed (val).' in (
        card_of(directory).lines()
    )


def test_a_copy_is_whole_or_not_there(directory, tmp_path):
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "params", "tokenizer"]
    with pytest.raises(UserError, match="exists: remove it"):
        copy_pretrained(SHIPPED, directory)
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match="it has no config.json"):
        copy_pretrained(directory, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ---------------------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_a_name_of_the_hub(here):
    (here / "runs").mkdir()
    assert [hub.is_repo_id(name) for name in ("org/name", "Org-1/na.me_2")] == [True, True]
    for name in ("name", "./org/name", "/org/name", "a/b/c", "gs://org/name", "org/", "../name", "runs/typo", "org/na me"):
        assert not hub.is_repo_id(name)
    assert find.find_model("runs/typo", None) == here / "runs" / "typo"


def test_a_model_of_the_hub(here, monkeypatch):
    asked = []

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        asked.append((repo_id, revision, allow_patterns))
        return str(SHIPPED)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find.find_model("org/name", None) == SHIPPED
    assert asked == [("org/name", None, ["config.json", "tokenizer/*", "params/*"])]


def failing(error):
    def call(*_, **__):
        raise error

    return call


def http_error(status):
    error = OSError("401 Client Error. (Request ID: x)")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    "error, message",
    [
        (http_error(404), "there is no such model, or it is private"),
        (http_error(401), r"not allowed \(401\); log in by `hf auth login`"),
        (type("ConnectError", (OSError,), {})("x"), "the hub is not reached, and no copy is here"),
        (RuntimeError("some\nthing"), "some thing"),
    ],
)
def test_a_hub_that_has_it_not(here, monkeypatch, error, message):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
    with pytest.raises(
        UserError, match=rf"^org/name: no such directory here, and it cannot be had from http://127.0.0.1:1: {message}"
    ):
        find.find_model("org/name", None)


def test_offline_is_one_line(here):
    """The client itself, which the tests run offline (HF_HUB_OFFLINE)."""
    with pytest.raises(UserError, match="org/name: no such directory here.*the hub is not reached") as error:
        find.find_model("org/name", None)
    assert "\n" not in str(error.value)


def test_an_upload_is_what_a_download_reads(here, monkeypatch):
    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            assert (repo_id, private, exist_ok) == ("org/name", True, True)
            (here / "remote").mkdir()

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            (here / "remote" / path_in_repo).write_bytes(path_or_fileobj)

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            assert allow_patterns == hub.FILES
            shutil.copytree(folder_path, here / "remote", dirs_exist_ok=True)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.upload(SHIPPED, "org/name", private=True) == "https://hub/org/name"
    assert card_of(here / "remote") == card_of(SHIPPED)
    readme = (here / "remote" / "README.md").read_text()
    assert (
        readme.startswith("---\nlibrary_name: flowseg_jax") and "drawn shapes only" in readme and 'load("org/name")' in readme
    )
