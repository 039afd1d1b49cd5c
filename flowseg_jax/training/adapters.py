"""Directories of adapters: what a run with LoRA trained, with its settings and digests of the base that it belongs to.

It is the directory of a component (`checkpoints.pretrained`) whose names are those of a whole model:
"llm/layers/self_attn/q_proj/lora/a", and other parameters that were trained beside adapters.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from flowseg_jax import fields
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.checkpoints.pretrained import PretrainedModel, load_pretrained, save_pretrained
from flowseg_jax.errors import UserError, listed
from flowseg_jax.training.lora import (
    FAMILY,
    LoraConfig,
    adapted,
    base_digests,
    check_base,
    is_adapter,
    merge_adapters,
)


def save_adapters(
    directory: str | os.PathLike,
    learned: Mapping[str, Any],
    cfg: LoraConfig,
    base: Mapping[str, str],
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> epath.Path:
    """Writes what was trained; raises UserError as `save_pretrained`.

    Args:
        learned: a nested dict of the trained parameters.
        cfg: the adapters' settings.
        base: `base_digests` of what was frozen; those of the components with adapters are kept.
        extra: as in `save_pretrained`.
    """
    parts = set(adapted(flatten_params(learned)).values())
    kept = {part: digest for part, digest in base.items() if part in parts}
    component = {"family": FAMILY, "config": {"lora": dataclasses.asdict(cfg), "base": kept}}
    return save_pretrained(directory, learned, None, None, extra, None, overwrite, component)


def load_adapters(directory: str | os.PathLike) -> tuple[dict[str, Any], LoraConfig, dict[str, str]]:
    """(what was trained as a nested dict of NumPy arrays, the settings, the digests of the base).

    Raises:
        UserError: no such directory, a damaged one, or one of anything else.
    """
    found = load_pretrained(directory, dtype=None, allow_component=True)
    if found.component is None or found.component["family"] != FAMILY:
        raise UserError(f"{directory} holds no adapters, but a {'model' if found.component is None else 'component'}")
    return found.params, *read_settings(found.component["config"], str(directory))


def read_settings(config: Mapping[str, Any], where: str) -> tuple[LoraConfig, dict[str, str]]:
    """The settings and the base's digests of a component's `config`. Raises UserError for values that are none."""
    base = config.get("base")
    if not isinstance(base, dict) or not all(isinstance(digest, str) for digest in base.values()):
        raise UserError(f"{where}/config.json: component.config.base is no group of digests")
    return fields.read(LoraConfig, config.get("lora"), f"{where}/config.json: component.config.lora"), base


def merge_directories(model: str | os.PathLike, adapters: str | os.PathLike, out: str | os.PathLike) -> epath.Path:
    """Writes the model directory `out`: `model` with the adapters merged, and with what else was trained beside them.

    Raises:
        UserError: a directory that cannot be read, adapters of another base, an `out` that exists.
    """
    base: PretrainedModel = load_pretrained(model, dtype=None)
    learned, cfg, digests = load_adapters(adapters)
    flat, more = flatten_params(base.params), flatten_params(learned)
    lost = [path for path in more if not is_adapter(path) and path not in flat]
    lost += [path for path in adapted(more) if f"{path}/kernel" not in flat]
    if lost:
        raise UserError(f"{adapters}: {model} has no place for {listed(lost)}")
    check_base(digests, base_digests(base.params), str(adapters))
    merged = merge_adapters(unflatten_params(flat | more), cfg.scale)
    extra = base.extra | {"adapters": dataclasses.asdict(cfg)}
    return save_pretrained(out, merged, base.model_config, base.tokenizer_dir, extra, None)
