"""Experiment configs: ml_collections files, `--config=NAME --config.a.b=value` on the command line, JSON in checkpoints.

A config file defines `get_config()` (or `get_config(arg)`, called with ARG for `--config=NAME:ARG`) and returns a ConfigDict
with exactly the top-level keys of `TOP_LEVEL`. Sequences are tuples, so that a config survives JSON unchanged.

The command line is parsed here and not by `ml_collections.config_flags`: that reports a typo through absl's global flags with
a stack trace, lets a key be given twice, and cannot name a nearest key outside the section that was typed.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flowseg_jax.config_help import HELP
from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.fields import RENAMED_VALUES, new_name
from flowseg_jax.system import json_files
from flowseg_jax.system.paths import ROOT

TOP_LEVEL = (
    "seed",
    "num_steps",
    "batch_size",
    "log_every",
    "trackers",
    "eval_every",
    "eval_split",
    "eval_images",
    "eval_data",
    "checkpoint_every",
    "checkpoint",
    "init_from",
    "model",
    "data",
    "optimizer",
    "lora",
    "ema",
    "mesh",
)
POSITIVE = ("batch_size", "log_every", "checkpoint_every")
SHOWN = 5  # of the old names in a config


def load(argv: Sequence[str], default: str = "shapes_tiny") -> tuple[ConfigDict, list[str]]:
    """The config that a command line asks for, and the arguments that are not about it.

    Args:
        argv: arguments without the program's name. `--config=NAME` or `--config NAME` chooses a config of `configs/` by its
            name, or any file by its path (`.py`, or the `.json` that `to_json` wrote); `--config.a.b=value` or
            `--config.a.b value` overrides one key, parsed by its default's type.
        default: the config without `--config`.

    Returns:
        The locked config and the remaining arguments, in order.

    Raises:
        UserError: no such file, a broken file, an unknown key (with the nearest one), a wrong type, a key given twice.
    """
    file, overrides, rest = None, {}, []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name != "--config" and not name.startswith("--config."):
            rest.append(argument)
            continue
        if not equals:
            value = next(arguments, None)
            if value is None:
                raise UserError(f"{name} needs a value: {name}=...")
        if name == "--config":
            if file is not None:
                raise UserError(f"--config is given twice: {file} and {value}")
            file = value
        else:
            key = name.removeprefix("--config.")
            if key in overrides:
                raise UserError(f"--config.{key} is given twice: {overrides[key]} and {value}")
            overrides[key] = value
    config = read(file or default)
    for key, value in overrides.items():
        override(config, key, value)
    check(config, file or default)
    return config, rest


def read(source: str) -> ConfigDict:
    """The config of `NAME`, `FILE`, `NAME:ARG` or `FILE:ARG`: a name of `configs/`, or a path, also one beside `configs/`."""
    path, arg = _find(source), None
    if path is None and ":" in source:
        source, arg = source.rsplit(":", 1)
        path = _find(source)
    if path is None:
        names = [path.stem for path in (ROOT / "configs").glob("[!_]*.py")]
        raise UserError(f"no config {source}{did_you_mean(Path(source).stem, names)}")
    if path.suffix == ".json":
        try:
            config = from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"config file {path} is not JSON: {error}") from None
    else:
        config = _call_get_config(path, arg)
    check(config, str(path))
    return config.lock()


def check(config: ConfigDict, source: str) -> None:
    """Raises a UserError unless the top-level keys are exactly those of `TOP_LEVEL`, and the counts among them counts."""
    check_names(config, f"config {source}")
    missing, extra = [k for k in TOP_LEVEL if k not in config], [k for k in config if k not in TOP_LEVEL]
    if missing or extra:
        faults = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has the unknown {', '.join(extra)}"] * bool(extra)
        raise UserError(f"config {source} {' and '.join(faults)} (top-level keys are {', '.join(TOP_LEVEL)})")
    for key in ("seed", "num_steps", "eval_every", "eval_images", *POSITIVE):
        value, least = config[key], int(key in POSITIVE)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"config {source}: {key} must be an integer of at least {least}, got {value!r}")


def check_names(config: Mapping[str, Any], source: str) -> None:
    """Raises a UserError that says how keys and values are called now, where a config has those of an earlier version.

    Args:
        config: a ConfigDict or nested dicts.
        source: where it is from, for the message.
    """
    found = []
    for key, value in _items(config):
        value_names = RENAMED_VALUES.get(key.rpartition(".")[2], {})
        if new_name(key) != key:
            found.append(f"{key} is called {new_name(key)}")
        elif isinstance(value, str) and value in value_names:
            found.append(f"{key}={value} is called {key}={value_names[value]}")
    if found:
        more = f"; {len(found) - SHOWN} more have other names too" if len(found) > SHOWN else ""
        raise UserError(f"{source}: {'; '.join(found[:SHOWN])}{more}")


def check_keys(config: ConfigDict) -> None:
    """Raises a UserError unless the config has the keys of `config_help.HELP`; the model's are checked where it is read."""
    known, found = ([key for key in keys if not key.startswith("model.")] for keys in (HELP, dotted_keys(config)))
    if missing := [key for key in known if key not in found]:
        raise UserError(f"the config lacks {', '.join(missing)}")
    if unknown := [key for key in found if key not in known]:
        raise UserError(f"unknown config key {unknown[0]!r}{_nearest(unknown[0], known)}")


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets the dotted `key` of `config` from the command line's `text`, parsed by the type that the key has.

    A tuple is a Python literal, `(1, 2)`, or a comma-separated list, `1,2`; `none` is None where the default is None.

    Raises:
        UserError: an unknown key, a section instead of a key, or a text of another type.
    """
    *sections, last = key.split(".")
    node: Any = config
    for section in sections:
        node = node[section] if isinstance(node, ConfigDict) and section in node else None
    if not isinstance(node, ConfigDict) or last not in node:
        if new_name(key) != key:
            raise UserError(f"config key {key!r} is called {new_name(key)!r}")
        raise UserError(f"unknown config key {key!r}{_nearest(key, list(dotted_keys(config)))}")
    old = node[last]
    if isinstance(old, ConfigDict):
        raise UserError(f"config key {key!r} is a section; set one of {', '.join(f'{key}.{k}' for k in old)}")
    kind = node.get_type(last)
    try:
        value = _parse(text, old, kind)
        node[last] = value
    except (KeyError, TypeError, ValueError, SyntaxError):
        raise UserError(f"config key {key!r} takes {_describe(kind)} (default {old!r}), got {text!r}") from None


def dotted_keys(config: ConfigDict) -> Iterator[str]:
    """The dotted names of every value."""
    return (key for key, _ in _items(config))


def flat_values(config: ConfigDict) -> dict[str, Any]:
    """{dotted name: value}."""
    return dict(_items(config))


def _items(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict | dict):
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_json(config: ConfigDict, indent: int | None = 2) -> str:
    """The resolved config as JSON text; tuples become lists. Raises ValueError for a value that JSON does not have."""
    try:
        return json.dumps(config.to_dict(), indent=indent)
    except TypeError as error:
        raise ValueError(f"a config holds plain values only: {error}") from None


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`: every list becomes a tuple. Raises ValueError for text that is not a JSON object."""
    value = json_files.loads(text)
    if not isinstance(value, dict):
        raise ValueError("a config is a JSON object")
    return ConfigDict(_plain(value))


def _find(source: str) -> Path | None:
    for path in (Path(source), ROOT / source, ROOT / "configs" / f"{source}.py"):
        if path.is_file():
            return path
    return None


def _call_get_config(path: Path, arg: str | None) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(f"flowseg_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} must end in .py or .json")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError(f"config file {path} does not define get_config()")
        parameters = inspect.signature(get_config).parameters
        if arg is not None and not parameters:
            raise UserError(f"config file {path} takes no argument, got {arg!r}")
        config = get_config(arg) if arg is not None else get_config()
    except UserError:
        raise
    except Exception as error:  # the file is the user's code: whatever it raises is reported as one line about that file
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(error, path)
        where = f", line {line}" if line else ""
        raise UserError(f"config file {path}{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {path}: get_config() returned {type(config).__name__}, not a ConfigDict")
    return _tuples(config)


def _line_in(error: BaseException, path: Path) -> int | None:
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _tuples(config: ConfigDict) -> ConfigDict:
    """Turns every list into a tuple, in place; references and typed placeholders stay what they are."""
    with config.unlocked(), config.ignore_type():
        for key in list(config):
            value = config[key]
            if isinstance(value, ConfigDict):
                _tuples(value)
            elif _plain(value) != value:  # a list somewhere in it
                del config[key]
                config[key] = _plain(value)
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(_plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def _parse(text: str, old: Any, kind: type) -> Any:
    if old is None and text.lower() == "none":
        return None
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    if kind in (tuple, list):
        return _parse_tuple(text, old or ())
    return _literal(text)


def _parse_tuple(text: str, old: tuple) -> tuple:
    text = text.strip()
    if text.startswith(("(", "[")):
        value = ast.literal_eval(text)
        value = _plain(value if isinstance(value, (tuple, list)) else (value,))
    else:
        kinds = {type(item) for item in old}
        kind = kinds.pop() if len(kinds) == 1 else None
        items = [item.strip() for item in text.split(",") if item.strip()]
        value = tuple(_parse(item, None, kind) if kind in (bool, int, float, str) else _literal(item) for item in items)
    return value


def _literal(text: str) -> Any:
    """A Python literal, true, false or none; anything else is a string."""
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return _plain(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return text


def _describe(kind: type) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", tuple: "a tuple, `(1, 2)` or `1,2`"}
    return names.get(kind, f"a {kind.__name__}")


def _nearest(key: str, known: list[str]) -> str:
    """` (did you mean ...?)`: the key of that last name elsewhere, else the most similar, else the section's keys."""
    last = key.rsplit(".", 1)[-1]
    near = [name for name in known if name.rsplit(".", 1)[-1] == last]
    near = difflib.get_close_matches(key, near, n=1, cutoff=0.0) or difflib.get_close_matches(key, known, n=1)
    if not near:
        similar = difflib.get_close_matches(last, {name.rsplit(".", 1)[-1] for name in known}, n=1)
        near = [name for name in known if similar and name.rsplit(".", 1)[-1] == similar[0]][:1]
    if near:
        return f" (did you mean {near[0]!r}?)"
    section = key.partition(".")[0] + "."
    inside = [name for name in known if name.startswith(section)]
    return f" (known: {', '.join(inside or dict.fromkeys(name.partition('.')[0] for name in known))})"
