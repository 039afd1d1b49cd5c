"""The `config.json` of a model directory: what it must hold, its checksums and those of the tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import IO, Any

from etils import epath

from flowseg_jax.checkpoints.manifest import check_arrays
from flowseg_jax.checkpoints.run_checkpoint import is_checkpoint, read_checkpoint_config
from flowseg_jax.errors import UserError, short_reason
from flowseg_jax.system import json_files
from flowseg_jax.system.json_files import ITSELF, expect
from flowseg_jax.system.paths import made_by, resolve_path

FORMAT = "flowseg_jax model"
FORMAT_VERSION = 3  # 1: without checksums of config and tokenizer; 1 and 2: other names (`checkpoints.upgrade`)
TOKENIZER = "tokenizer_checksums"  # the key of config.json


def read_model_config(directory: str | os.PathLike, *, allow_component: bool = False) -> dict[str, Any]:
    """The whole `config.json` of a model directory, checked: `model`, `extra`, `manifest`, `checksums`, versions, revision.

    A run's checkpoint, `RUN/checkpoints/STEP`, is a model too, and has the first four.

    Args:
        allow_component: accept the directory of a component as well, which has `component` in place of `model`.
    """
    path = resolve_path(directory)
    if not path.is_dir():
        raise UserError(f"no model directory {path}{made_by(directory)}")
    if is_checkpoint(path):
        return read_checkpoint_config(path)
    config = read_json(path)
    accept = f"accept it by `flowseg seal {path}`"
    if is_earlier(config):
        raise UserError(
            f"{path} has format version {config['format_version']}, with the names of an earlier flowseg_jax: write it anew by "
            f"`flowseg upgrade {path} NEW`"
        )
    if (version := config.get("format_version")) != FORMAT_VERSION:
        found = json_files.short(version)
        raise UserError(f"{path} has format version {found}, this flowseg_jax reads {FORMAT_VERSION}: convert it again")
    component = config.get("component")
    check_config(path, config, component, "component", has_tokenizer(config), accept)
    if component is not None and not allow_component:
        raise UserError(
            f"{path} holds a component ({component['family'][:40]}), not a whole model: build one around it by "
            "flowseg convert flowseg llm=DIR siglip=DIR sam=DIR OUT"
        )
    return config


def is_earlier(config: Mapping[str, Any]) -> bool:
    version = config.get("format_version")
    return isinstance(version, int) and not isinstance(version, bool) and 1 <= version < FORMAT_VERSION


def check_config(
    path: epath.Path, config: Mapping[str, Any], component: Any, key: str, needs_tokenizer: bool, accept: str
) -> None:
    """Raises a UserError unless `config` is whole and fits the files beside it. `component` stands under `key` in it.

    The checksums of the config itself and of the tokenizer exist since format 2.
    """
    sealed = config["format_version"] > 1
    if sealed and config.get(ITSELF) != json_files.checksum(config):
        raise UserError(
            f"{path / 'config.json'} has changed since it was saved (its checksum differs): restore it, or, if the change is "
            f"meant, {accept}"
        )
    lacking = [key for key in ("model", "extra", "manifest", "checksums") if not isinstance(config.get(key), dict)]
    needed = ("params", "tokenizer") if needs_tokenizer else ("params",)
    lacking += [name for name in needed if not (path / name).is_dir()]
    if lacking:
        raise UserError(f"model directory {path} is incomplete: it lacks {', '.join(lacking)}")
    check_arrays(config["manifest"], config["checksums"], str(path / "config.json"))
    if component is not None:
        ok = (
            isinstance(component, dict)
            and isinstance(component.get("family"), str)
            and isinstance(component.get("config"), dict)
        )
        expect(ok, component, f"{path / 'config.json'}: {key}", "its family and config")
    if not sealed:
        return
    kept, there = config.get(TOKENIZER), tokenizer_checksums(path)
    expect(isinstance(kept, dict), kept, f"{path / 'config.json'}: {TOKENIZER}", "a group of keys")
    if kept != there:
        names = sorted(name for name in {*there, *kept} if there.get(name) != kept.get(name))
        raise UserError(
            f"{path / 'tokenizer'} has changed since it was saved ({json_files.short(names[0])} is not the file of then): "
            f"restore it, or, if the change is meant, {accept}"
        )


def read_json(path: epath.Path) -> dict[str, Any]:
    """The content of a directory's config.json, if it is one of ours."""
    try:
        config = json_files.read(path / "config.json")
    except FileNotFoundError:
        _refuse_run(path)
        raise UserError(f"{path} is not a model directory: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read: {short_reason(error)}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        _refuse_run(path)
        raise UserError(f"{path / 'config.json'} was not written by flowseg_jax; convert such weights by convert_weights")
    return config


def _refuse_run(path: epath.Path) -> None:
    """Raises a UserError for a run, its checkpoints or one of them."""
    run = next((p for p in (path, path.parent, path.parent.parent) if (p / "checkpoints").is_dir()), None)
    if run is not None and (path == run or (run / "checkpoints") in (path, path.parent)):
        what = "is a run" if path == run else "holds what a run continues from"
        raise UserError(f"{path} {what}, not a model: name the run by --workdir={run}")


def has_tokenizer(config: Mapping[str, Any]) -> bool:
    """Whether it is a model with language: a component may lack a tokenizer, and so may a segmentor."""
    model = config.get("model")
    return config.get("component") is None and not (isinstance(model, dict) and model.get("components") == "segmentor")


def tokenizer_checksums(path: epath.Path) -> dict[str, str]:
    """{file of the tokenizer: its SHA-256}; hidden files, which systems leave there, are no part of it."""
    found: dict[str, str] = {}

    def walk(folder: epath.Path, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            else:
                with entry.open("rb") as stream:
                    found[prefix + entry.name] = _sha256(stream)

    if (path / "tokenizer").is_dir():
        walk(path / "tokenizer", "")
    return dict(sorted(found.items()))


def _sha256(stream: IO[bytes]) -> str:
    total = hashlib.sha256()
    while part := stream.read(1 << 20):
        total.update(part)
    return total.hexdigest()


def sealed(path: epath.Path, config: Mapping[str, Any]) -> str:
    """The text of a config.json: `config` with the checksums of the tokenizer that lies in `path`, and its own."""
    whole = {**config, "format_version": FORMAT_VERSION, TOKENIZER: tokenizer_checksums(path)}
    return json.dumps({**whole, ITSELF: json_files.checksum(whole)}, indent=1) + "\n"


def seal(directory: str | os.PathLike) -> epath.Path:
    """Accepts `config.json` and the tokenizer as they are now: renews their checksums. The arrays keep theirs.

    Raises:
        UserError: no model directory, one of a newer format, or one that cannot be written.
    """
    path = resolve_path(directory)
    if not path.is_dir():
        raise UserError(f"no model directory {path}{made_by(directory)}")
    config = read_json(path)
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} has format version {json_files.short(config.get('format_version'))}: convert it again")
    _write(path, config)
    read_model_config(path, allow_component=True)
    return path


def update_extra(directory: str | os.PathLike, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replaces `extra` of a model directory by what `change` makes of it; nothing else changes.

    Raises:
        UserError: no model directory, a damaged one, or one that cannot be written.
    """
    path = resolve_path(directory)
    config = read_model_config(path)
    _write(path, config | {"extra": change(config["extra"])})


def _write(path: epath.Path, config: Mapping[str, Any]) -> None:
    try:
        part = path / "config.json.part"
        part.write_text(sealed(path, config), encoding="utf-8")
        part.replace(path / "config.json")
    except OSError as error:
        raise UserError(f"{path / 'config.json'} cannot be written: {short_reason(error)}") from None
