from __future__ import annotations

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowseg_jax.checkpoints import pretrained
from flowseg_jax.checkpoints.manifest import check_manifest, manifest
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.errors import UserError
from tests.helpers.trees import abstract_of, flip, largest, make_params, same


@pytest.fixture
def tokenizer(tmp_path):
    directory = tmp_path / "tok"
    directory.mkdir()
    (directory / "tokenizer.json").write_text("{}")
    return directory


def test_model_directory_round_trip(tmp_path, tokenizer):
    params = make_params()
    path = pretrained.save_pretrained(tmp_path / "model", params, {"width": (1, 2)}, tokenizer, {"seed": 3})
    loaded = pretrained.load_pretrained(path)
    assert loaded.model_config == {"width": [1, 2]}
    assert loaded.extra == {"seed": 3}
    assert (loaded.tokenizer_dir / "tokenizer.json").read_text() == "{}"
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in jax.tree.leaves(loaded.params))
    assert same(loaded.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
    stored = pretrained.load_pretrained(path, dtype=None).params
    assert stored["a"]["w"].dtype == jnp.bfloat16
    sharded = pretrained.load_pretrained(path, abstract_of(params)).params
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(sharded))
    assert manifest(sharded) == manifest(params)
    exact = pretrained.save_pretrained(path, params, {}, tokenizer, dtype=None, overwrite=True)
    assert same(pretrained.load_pretrained(exact, dtype=None).params, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "tok"]  # nothing temporary is left


def test_a_model_directory_appears_whole_or_not_at_all(tmp_path, tokenizer, monkeypatch):
    params = make_params()
    path = pretrained.save_pretrained(tmp_path / "model", params, {"good": 1}, tokenizer)
    with pytest.raises(UserError, match="model exists: remove it or choose another name"):
        pretrained.save_pretrained(path, params, {}, tokenizer)
    with pytest.raises(UserError, match="no tokenizer directory"):
        pretrained.save_pretrained(tmp_path / "other", params, {}, tmp_path / "nope")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "copy_tree", full)
    for target in (path, tmp_path / "other"):
        with pytest.raises(UserError, match=r"could not be written: .*No space left"):
            pretrained.save_pretrained(target, params, {}, tokenizer, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "tok"]
    assert pretrained.load_pretrained(path).model_config == {"good": 1}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: flip(largest(d / "params")), "is damaged: the bytes of a/w have changed"),
        (lambda d: os.truncate(largest(d / "params"), 50), "is damaged: "),
        (lambda d: (d / "config.json").unlink(), "is not a model directory: it has no config.json"),
        (lambda d: (d / "config.json").write_text('{"format'), "config.json cannot be read"),
        (lambda d: (d / "config.json").write_text('{"model_type": "qwen3"}'), "was not written by flowseg_jax"),
        (lambda d: shutil.rmtree(d / "params"), "is incomplete: it lacks params"),
        (lambda d: shutil.rmtree(d / "tokenizer"), "is incomplete: it lacks tokenizer"),
        (shutil.rmtree, "no model directory"),
    ],
)
def test_a_spoilt_model_directory_is_one_line(tmp_path, tokenizer, spoil, message):
    path = pretrained.save_pretrained(tmp_path / "model", make_params(), {}, tokenizer)
    spoil(path)
    with pytest.raises(UserError, match=message) as error:
        pretrained.load_pretrained(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (99, "has format version 99, this flowseg_jax reads 3: convert it again"),
        (1, "has format version 1, with the names of an earlier flowseg_jax: write it anew by `flowseg upgrade .*/model NEW`"),
    ],
)
def test_a_model_of_another_format_version(tmp_path, tokenizer, version, message):
    path = pretrained.save_pretrained(tmp_path / "model", make_params(), {}, tokenizer)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"format_version": version}))
    with pytest.raises(UserError, match=message):
        pretrained.load_pretrained(path)


def test_loading_is_strict_both_ways(tmp_path, tokenizer):
    path = pretrained.save_pretrained(tmp_path / "model", make_params(), {}, tokenizer)
    abstract = {"a": {"w": jax.ShapeDtypeStruct((60, 99), jnp.float32), "c": jax.ShapeDtypeStruct((1,), jnp.float32)}}
    with pytest.raises(UserError) as error:
        pretrained.load_pretrained(path, abstract)
    wanted = (
        "missing a/c (1,)",
        "unexpected a/b (7,)",
        "unexpected layers/1/x (3,)",
        "a/w is (60, 100), the model's is (60, 99)",
    )
    for part in wanted:
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"this does not fit the model: missing a/c \(1,\)"):
        check_manifest(manifest({"a": {"c": jnp.zeros(1)}}), {}, "this")
    check_manifest(manifest(abstract_of(make_params())), manifest(make_params()), "this")
    with pytest.raises(UserError, match=r"missing a/n10 \(1,\).* and 15 more$") as error:  # ten of them and the count
        check_manifest(manifest({"a": {f"n{i}": jnp.zeros(1) for i in range(10, 35)}}), {}, "this")
    assert str(error.value).count("missing") == 10


def edited(path, **changes):
    """Writes another config.json, without a new checksum."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: edited(d, model={"rope_theta": 5.0}), r"config\.json has changed since it was saved"),
        (lambda d: edited(d, new=1), r"config\.json has changed since it was saved"),
        (lambda d: (d / "tokenizer/tokenizer.json").write_text("{ }"), r"'tokenizer.json' is not the file of then"),
        (lambda d: (d / "tokenizer/tokenizer.json").unlink(), r"'tokenizer.json' is not the file of then"),
        (lambda d: (d / "tokenizer/vocab.json").write_text("{}"), r"'vocab.json' is not the file of then"),
    ],
)
def test_config_and_tokenizer_are_as_they_were_saved_or_are_accepted(tmp_path, tokenizer, spoil, message, capsys):
    path = pretrained.save_pretrained(tmp_path / "model", make_params(), {"rope_theta": 1e6}, tokenizer)
    spoil(path)
    with pytest.raises(UserError, match=message + r".*accept it by `flowseg seal .*/model`") as error:
        pretrained.load_pretrained(path)
    assert "\n" not in str(error.value)
    assert flowseg(["seal", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: config.json and tokenizer are accepted as they are\n"
    pretrained.load_pretrained(path)


def test_spaces_order_and_hidden_files_are_no_change(tmp_path, tokenizer):
    path = pretrained.save_pretrained(tmp_path / "model", make_params(), {"a": 1, "b": 2.0}, tokenizer)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    (path / "tokenizer/.DS_Store").write_text("")
    assert pretrained.load_pretrained(path).model_config == {"a": 1, "b": 2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest": {"a/w": [[60, -1], "float32"]}}, r"config\.json: manifest\.a/w is \[.*\], expected a shape and a dtype"),
        ({"manifest": {"a/w": [[60, 100], "float33"]}}, r"config\.json: manifest\.a/w is .*, expected a shape and a dtype"),
        ({"manifest": {"a/w": [[1 << 60], "float32"]}}, r"config\.json: manifest\.a/w is .*, expected a shape and a dtype"),
        ({"checksums": {}}, r"config\.json: checksums\.\S+ is None, expected a number of 32 bits"),
        ({"component": 3}, r"config\.json: component is 3, expected its family and config"),
    ],
)
def test_what_no_array_can_be_is_one_line_even_if_its_checksum_is_right(tmp_path, tokenizer, changes, message):
    path = pretrained.save_pretrained(tmp_path / "model", make_params(), {}, tokenizer)
    edited(path, **changes)
    with pytest.raises(UserError, match=message):
        pretrained.seal(path)


def test_a_run_is_no_model(tmp_path):
    (tmp_path / "run/checkpoints/40").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text('{"seed": 0}')
    part = "holds what a run continues from"
    for place, what in (("run", "is a run"), ("run/checkpoints", part), ("run/checkpoints/40", part)):
        with pytest.raises(UserError, match=rf"{place} {what}, not a model: name the run by --workdir=.*/run$"):
            pretrained.read_model_config(tmp_path / place)
