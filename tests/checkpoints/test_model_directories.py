"""The corners of model directories: what a kill left, what may be there already, what is stored beside the arrays."""

from __future__ import annotations

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from flowseg_jax.checkpoints import pretrained, storage, stored_config, streaming
from flowseg_jax.checkpoints.streaming import LazyArray
from flowseg_jax.errors import UserError
from flowseg_jax.system import json_files
from tests.helpers.trees import make_params, same


@pytest.fixture
def tokenizer(tmp_path):
    directory = tmp_path / "tok"
    (directory / "parts" / "deep").mkdir(parents=True)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "parts" / "deep" / "merges.txt").write_bytes(bytes(range(256)) * 5000)  # more than is hashed at a time
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model directory that no test changes."""
    return pretrained.save_pretrained(tmp_path_factory.mktemp("saved") / "model", make_params(), {"width": 1}, None)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def lazy(array) -> LazyArray:
    return LazyArray(array.shape, array.dtype, lambda: array)


def test_a_tokenizer_is_copied_with_its_folders_and_each_file_has_a_checksum(tmp_path, tokenizer):
    path = pretrained.save_pretrained(tmp_path / "model", make_params(), {}, tokenizer)
    files = ("parts/deep/merges.txt", "tokenizer.json")
    stored = json.loads((path / "config.json").read_text())["tokenizer_checksums"]
    assert stored == {name: hashlib.sha256((tokenizer / name).read_bytes()).hexdigest() for name in files}
    assert list(stored) == list(files)
    assert all((path / "tokenizer" / name).read_bytes() == (tokenizer / name).read_bytes() for name in files)
    (path / "tokenizer" / files[0]).write_text("other")
    (path / "tokenizer" / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer has changed since it was saved \('a.json' is not the file of then\)"):
        pretrained.load_pretrained(path)
    (path / "tokenizer" / "a.json").unlink()
    with pytest.raises(UserError, match="'parts/deep/merges.txt' is not the file of then"):
        pretrained.load_pretrained(path)


def test_what_a_kill_left_is_cleared_away_and_what_it_moved_comes_back(tmp_path, tokenizer, monkeypatch):
    pretrained.save_pretrained(tmp_path / "model", make_params(), {"n": 1}, tokenizer)
    (tmp_path / "model").rename(tmp_path / ".model.old")
    (tmp_path / ".model.tmp" / "params" / "junk").mkdir(parents=True)
    with monkeypatch.context() as patch:  # the write fails: the model that was to be replaced is in its place again

        def full(*_):
            assert ".model.lock" in names(tmp_path) and ".lock" not in names(tmp_path / "model")
            assert names(tmp_path / ".model.tmp") == ["params"] and "junk" not in names(tmp_path / ".model.tmp" / "params")
            raise OSError(28, "No space left on device")

        patch.setattr(pretrained, "copy_tree", full)
        with pytest.raises(UserError, match="could not be written"):
            pretrained.save_pretrained(tmp_path / "model", make_params(), {"n": 2}, tokenizer, overwrite=True)
    assert names(tmp_path) == ["model", "tok"]
    assert pretrained.load_pretrained(tmp_path / "model").model_config == {"n": 1}
    (tmp_path / ".model.old").mkdir()  # a kill between the two renamings, and then a model in that place
    pretrained.save_pretrained(tmp_path / "model", make_params(), {"n": 3}, tokenizer, overwrite=True)
    assert names(tmp_path) == ["model", "tok"]
    assert pretrained.load_pretrained(tmp_path / "model").model_config == {"n": 3}


def test_where_a_model_may_be_written(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    pretrained.require_empty_directory(tmp_path / "empty")
    pretrained.require_empty_directory(tmp_path / "nothing")
    with pytest.raises(UserError, match="file exists: remove it or choose another name"):
        pretrained.require_empty_directory(tmp_path / "file")
    pretrained.require_empty_directory(tmp_path, overwrite=True)


def test_nothing_tells_where_a_model_was_saved_and_whole_numbers_stay(tmp_path):
    params = {"w": jnp.ones(3), "n": jnp.arange(3), "h": jnp.ones(2, jnp.float16)}
    path = pretrained.save_pretrained(tmp_path / "model", params, {}, None)
    assert (path / "params" / "commit_success.txt").read_text() == "complete\n"
    config = json.loads((path / "config.json").read_text())
    assert config["manifest"] == {"w": [[3], "bfloat16"], "n": [[3], "int32"], "h": [[2], "bfloat16"]}
    assert config["extra"] == {} and config["versions"]["jax"]
    (path / "tokenizer").mkdir()
    loaded = pretrained.load_pretrained(path).params
    assert {name: x.dtype for name, x in loaded.items()} == {"w": np.float32, "n": np.int32, "h": np.float32}
    with pytest.raises(TypeError):  # no JSON value: nothing is begun
        pretrained.save_pretrained(tmp_path / "other", params, {}, None, {"a": object()})
    assert names(tmp_path) == ["model"]


def test_a_component_and_a_segmentor_need_no_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 64)  # bytes: several chunks an array
    arrays = {"a/w": np.arange(60, dtype=np.float32).reshape(12, 5), "b": np.float32(3), "c": np.arange(7, dtype=np.int32)}
    made = []
    component = {"family": "sam", "config": {"width": 2}}
    save = lambda name, **kind: pretrained.save_pretrained_streaming(  # noqa: E731
        tmp_path / name, {name: lazy(np.asarray(x)) for name, x in arrays.items()}, None, None, **kind
    )
    path = save("sam", component=component, progress=made.append)
    assert sorted(made) == sorted(arrays)
    with pytest.raises(UserError, match=r"holds a component \(sam\), not a whole model: build one around it"):
        pretrained.load_pretrained(path)
    with pytest.raises(UserError, match="sam exists"):
        save("sam", component=component)
    save("sam", component=component, overwrite=True)
    loaded = pretrained.load_pretrained(path, dtype=None, allow_component=True)
    assert (loaded.component, loaded.model_config, loaded.extra) == (component, {}, {})
    assert same(loaded.params, {"a": {"w": arrays["a/w"]}, "b": arrays["b"], "c": arrays["c"]})
    segmentor = pretrained.save_pretrained(tmp_path / "seg", make_params(), {"components": "segmentor"}, None)
    assert pretrained.load_pretrained(segmentor).component is None
    whole = pretrained.save_pretrained(tmp_path / "whole", make_params(), {"components": "full"}, None)
    with pytest.raises(UserError, match="whole is incomplete: it lacks tokenizer"):
        pretrained.load_pretrained(whole)


def test_a_remote_directory_is_copied_once_for_what_reads_files_alone(tmp_path, tokenizer, monkeypatch):
    assert storage.local_directory(epath.Path(tokenizer)) == tokenizer
    storage.local_directory.cache_clear()
    monkeypatch.setattr(storage, "is_remote", lambda _: True)
    copy = storage.local_directory(epath.Path(tokenizer))
    assert copy != tokenizer and copy.name == "tok" and copy.parent.name.startswith("flowseg_jax-")
    assert names(copy) == ["parts", "tokenizer.json"] and storage.local_directory(epath.Path(tokenizer)) is copy
    assert (copy / "parts" / "deep" / "merges.txt").read_bytes() == (tokenizer / "parts/deep/merges.txt").read_bytes()
    storage.local_directory.cache_clear()
    with pytest.raises(FileExistsError):
        storage.copy_tree(epath.Path(tokenizer), epath.Path(copy))


@pytest.mark.parametrize("version", [0, True, 1.0, "3", None, 4])
def test_a_version_that_never_was_is_not_an_earlier_one(saved, tmp_path, version):
    config = json.loads((saved / "config.json").read_text()) | {"format_version": version}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = json_files.short(version)
    with pytest.raises(UserError, match=rf"has format version {shown}, this flowseg_jax reads 3: convert it again"):
        stored_config.read_model_config(tmp_path)
    with pytest.raises(UserError, match=rf"has format version {shown}: convert it again"):
        stored_config.seal(tmp_path)


def test_what_a_config_lacks_is_named_and_what_is_no_config_is_told(saved, tmp_path):
    (tmp_path / "params").mkdir()
    config = json.loads((saved / "config.json").read_text())
    for spoilt, message in (
        ({"model": 3, "manifest": []}, "it lacks model, manifest, tokenizer"),
        ({"component": {"family": "sam", "config": 3}}, "config.json: component is .*, expected its family and config"),
        ({"component": {"family": 3, "config": {}}}, "config.json: component is .*, expected its family and config"),
    ):
        whole = config | spoilt
        (tmp_path / "config.json").write_text(json.dumps(whole | {json_files.ITSELF: json_files.checksum(whole)}))
        with pytest.raises(UserError, match=message):
            stored_config.read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="was not written by flowseg_jax; convert such weights"):
        stored_config.read_model_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="is not a model directory: it has no config.json"):
        stored_config.seal(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json cannot be read: "):
        stored_config.seal(tmp_path)
    with pytest.raises(UserError, match="no model directory .*gone"):
        stored_config.seal(tmp_path / "gone")


def test_a_config_that_cannot_be_sealed_is_one_line(tmp_path, tokenizer):
    path = pretrained.save_pretrained(tmp_path / "model", make_params(), {}, tokenizer)
    (path / "config.json.part").mkdir()
    with pytest.raises(UserError, match=r"config\.json cannot be written: .*Is a directory"):
        stored_config.seal(path)
    (path / "config.json.part").rmdir()
    assert stored_config.seal(str(path)) == path and "config.json.part" not in names(path)
