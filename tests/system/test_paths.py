"""Names from files that become paths."""

import pytest

from flowseg_jax.checkpoints.pretrained import read_model_config
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.tokenizer import load_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.system.paths import check_name, inside, made_by

LEADS_OUT = ("", ".", "./", "/", "/etc/passwd", "..", "../a", "a/../../b", "a/..", "a\0b", "\0")
NO_FILE_NAMES = ("a" * 256, "é" * 128, "/".join(["a"] * 3000), "\ud800", "x" * 10**7)


@pytest.mark.parametrize("name", LEADS_OUT)
def test_what_leads_out(name, tmp_path):
    with pytest.raises(UserError, match=r"^f\.json: image: .* leads out of the folder") as caught:
        inside(tmp_path, name, "f.json: image")
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


@pytest.mark.parametrize("name", NO_FILE_NAMES, ids=range(len(NO_FILE_NAMES)))
def test_what_is_no_file_name(name, tmp_path):
    with pytest.raises(UserError, match=r"^x: .* is no file name") as caught:
        inside(tmp_path, name, "x")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["a.jpg", "a/b/c.jpg", "a b (1).jpg", "é.jpg", "..a", "a..b/c", "./a", "-", "a" * 255])
def test_what_is_inside(name, tmp_path):
    assert inside(tmp_path, name, "x") == tmp_path / name
    assert inside(tmp_path, name, "x").is_relative_to(tmp_path)


@pytest.mark.parametrize("name", [*LEADS_OUT, *NO_FILE_NAMES, "a/b", "a\\b", "a.b", " ", "a\n", "é", "a" * 65], ids=repr)
def test_names_that_cannot_name_files(name):
    with pytest.raises(UserError, match=r"^r: .* cannot name a file; use at most 64 letters, digits, _ and -$"):
        check_name(name, "r")


def test_names_that_can():
    for name in ("train", "testA", "val_2", "a-b", "0", "a" * 64):
        assert check_name(name, "x") == name


def test_what_make_makes_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = (
        (load_tokenizer, "data/smollm2/tokenizer"),
        (read_model_config, "data/smollm2"),
        (PreparedDataset.open, "data/smollm2"),
    )
    for function, place in opened:
        with pytest.raises(UserError, match="; `make smollm2` makes it$"):
            function(place)
    with pytest.raises(UserError, match="`make stages` makes it$"):
        PreparedDataset.open("data/stages/shapes/prepared")
    assert made_by("data/smollm2x") == made_by("/data/smollm2") == made_by("gs://bucket/data/stages") == ""
