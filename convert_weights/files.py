"""Checkpoint files and directories: which file is the model, and what is wrong with it before anything is read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert_weights import refusals
from convert_weights.sources import TensorSource
from flowseg_jax.errors import UserError, listed, plain

# In transformers' order (`PreTrainedModel.from_pretrained`): the first that is there is the model.
STANDARD = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
# What trainers leave beside a model.
NO_MODEL = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state|random_states|trainer_state|adapter_)[\w-]*\.\w+")
MAX_JSON = 64 << 20  # bytes of a config or an index


def open_source(path: str | os.PathLike[str]) -> TensorSource:
    """Opens a checkpoint: a file, or the directory that it lies in.

    Of a directory with several sets of weights the one is taken that transformers takes: one safetensors file, safetensors
    shards with their index, `pytorch_model.bin`, its shards. What is left aside is in the source's notes.

    Args:
        path: `.safetensors`, `.bin`, `.pth`, `.pt`, `.gguf` or an index of shards; or a directory with a model under
            transformers' names, or with exactly one index or one file of these kinds. Else the name of a hub repository, where
            the hub can be reached.

    Raises:
        UserError: nothing there, several candidates, files that are damaged or incomplete; an adapter, quantised weights, the
            shards of a training run, git-lfs pointers.
    """
    path = resolve_source(path)
    if path.is_file():
        source = _open_file(path)
        beside = [name for name in refusals.adapters(path.parent) if name != path.name]
        notes = [f"not used: the adapter beside {path} ({listed(beside)})"] if beside else []
        return _with_notes(source, notes)
    try:
        taken, others = _choose(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    source = _open_file(path / taken)
    return _with_notes(source, [f"taken: {taken}; not used beside it: {listed(others)}"] if others else [])


def _with_notes(source: TensorSource, notes: Sequence[str]) -> TensorSource:
    source.notes = [*notes, *source.notes]
    return source


def _choose(directory: Path) -> tuple[str, list[str]]:
    """The file or index of a directory that is the model, and what else it holds that could be taken for one."""
    files = {file.name for file in directory.iterdir() if file.is_file()}
    indices = sorted(name for name in files if name.endswith(".index.json"))
    weights = sorted(
        (name for name in files if name.endswith(SUFFIXES) and not NO_MODEL.fullmatch(name)),
        key=lambda name: (SUFFIXES.index(Path(name).suffix), name),
    )
    whole = [name for name in weights if not re.search(r"-of-\d+\.", name)]
    taken = next((name for name in STANDARD if name in files), None)
    if taken is None and len(indices) == 1:
        taken = indices[0]
    if taken is None and not indices and len(whole) == 1 and len(weights) == 1:
        taken = whole[0]
    refusals.refuse_adapter(directory, taken)
    if taken is None:
        refusals.refuse_training_state(directory)
        if not indices and len(weights) > len(whole):
            raise UserError(f"{directory} holds shards without their index (*.index.json): download the index as well")
        found = [*indices, *whole]
        raise UserError(
            f"{directory} holds {len(found) or 'no'} checkpoint files{f': {listed(found)}; name one of them' if found else ''}"
        )
    own = {taken, *(_shards(directory / taken).values() if taken in indices else ())}
    others = [name for name in (*STANDARD, *indices, *weights, *refusals.training_state(directory)) if name not in own]
    return taken, [name for name in dict.fromkeys(others) if (directory / name).exists()]


def _open_file(file: Path) -> TensorSource:
    if file.name.endswith(".index.json"):
        return _open_shards(file)
    refusals.refuse_training_file(file)
    if file.suffix == ".gguf":
        from convert_weights.gguf_source import GgufSource

        refusals.refuse_pointer(file)
        return GgufSource(file)
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file} is no checkpoint: expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    return _open_files([file], str(file))


def _open_files(files: list[Path], name: str) -> TensorSource:
    if all(file.suffix == ".safetensors" for file in files):
        from convert_weights.safetensors_source import SafetensorsSource

        return SafetensorsSource(files, name)
    from convert_weights.torch_source import TorchSource

    return TorchSource(files, name)


def _open_shards(index: Path) -> TensorSource:
    places = _shards(index)
    files = sorted(set(places.values()))
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise UserError(f"{index.parent} lacks {len(missing)} of {len(files)} shards: {listed(missing)}; download them again")
    source = _open_files([index.parent / file for file in files], str(index.parent))
    absent = [name for name in places if name not in source.entries]
    if absent:
        raise UserError(f"{index} names {len(absent)} tensors that its shards do not hold: {listed(absent)}; download it again")
    return source


def _shards(index: Path) -> dict[str, str]:
    """{tensor: the shard that an index says it is in}, each a file beside the index."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{index} is no index of shards (weight_map is missing or no table of names): download it again")
    for file in set(places.values()):
        if file in ("", ".", "..") or re.search(r"[/\\\0]", file) or not file.endswith(SUFFIXES):
            raise UserError(f"{index} names the shard {plain(file)!r}: a shard is a file beside its index, no other path")
    return places


def resolve_source(path: str | os.PathLike[str]) -> Path:
    """A path that exists: the given one, or the download of the hub repository of that name.

    Raises:
        UserError: no such path, and no repository either, or no hub within reach.
    """
    found = Path(path).expanduser()
    if found.exists():
        return found.absolute()
    name = os.fspath(path)
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise UserError(f"{name}: no such file or directory")
    try:
        import huggingface_hub

        wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # no hub, no such repository, a gated one: many types, one remedy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}: no such file or directory, and no download from the hub ({reason}); download it where there is a "
            "connection, and give its directory"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises a UserError that names it."""
    refusals.refuse_pointer(file)
    try:
        if file.stat().st_size > MAX_JSON:
            raise UserError(f"{file} is larger than {MAX_JSON >> 20} MiB: that is no config and no index")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read: {plain(str(error))}; download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object")
    return value
