"""Adapters in the format of PEFT, `adapter_config.json` and `adapter_model.safetensors`, read and written.

The modules' names are those of the base's Hugging Face class, and so they come from the same tables as its weights. Two things
differ. Where a class fuses matrices (Phi-3's `qkv_proj`), PEFT has one A for all of them and we have one for each: an import
gives every part the same A and its rows of B. An export writes that back; parts whose A's differ become one adapter with the
ranks added up, whose B is zero outside of its blocks, and an import takes such blocks apart again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from convert_weights.directory import ModelDirectory
from convert_weights.families import FAMILIES, CheckpointFamily
from convert_weights.safetensors_source import SafetensorsSource
from convert_weights.table import ParamSlice, expand
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.checkpoints.pretrained import read_model_config, require_empty_directory
from flowseg_jax.checkpoints.storage import fresh_directory
from flowseg_jax.errors import UserError, did_you_mean, listed, plain
from flowseg_jax.system import json_files, locks
from flowseg_jax.system.json_files import expect, number
from flowseg_jax.training.adapters import load_adapters, save_adapters
from flowseg_jax.training.lora import LoraConfig, adapted, base_digests, check_base, is_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAGNITUDE = "lora_magnitude_vector"  # PEFT's name of DoRA's lengths
PREFIX = "base_model.model."  # PEFT's, before the names of the base
COMPONENT_FAMILY = {"siglip": "siglip2", "sam": "sam"}  # the language model's family is its model_type
# Keys of a PEFT config that say nothing about what an adapter computes, or are read below. Any other one must be unset.
KNOWN = frozenset(
    "auto_mapping base_model_name_or_path revision inference_mode task_type peft_type peft_version r lora_alpha lora_dropout "
    "use_rslora use_dora bias target_modules exclude_modules rank_pattern alpha_pattern init_lora_weights layers_pattern "
    "layers_to_transform megatron_core loftq_config eva_config qalora_group_size runtime_config".split()
)
FRESH = (True, False, "gaussian", "eva", "orthogonal")  # ways of initialising that leave the base's weights as they are


@dataclasses.dataclass(frozen=True)
class Base:
    """A component of a model directory, and what its linear layers are called by Hugging Face.

    Attributes:
        component: "llm", "siglip" or "sam".
        directory: its parameters.
        modules: {module's name: its parts in our stacks, one of each fused matrix}.
    """

    component: str
    directory: ModelDirectory
    modules: Mapping[str, list[ParamSlice]]
    _lengths: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)  # what is read once: by the stack's path

    @classmethod
    def open(cls, model: str | os.PathLike, component: str) -> Base:
        """Raises UserError for a directory that is none or lacks the component."""
        family = _family(model, component)
        directory = ModelDirectory(model, family)
        shapes = {name: entry.shape for name, entry in directory.entries.items()}
        modules: dict[str, list[ParamSlice]] = {}
        for part in expand(next(iter(family.layouts.values()))(directory.cfg), directory.cfg, shapes):
            if part.layer is not None and part.target.endswith("/kernel"):
                modules.setdefault(part.source.removesuffix(".weight"), []).append(part)
        return cls(component, directory, modules)

    def layer(self, part: ParamSlice) -> str:
        """The path of the linear layer that a part belongs to, in a whole model."""
        return f"{self.component}/{part.target.removesuffix('/kernel')}"

    def column_lengths(self, part: ParamSlice) -> np.ndarray:
        """float32 [out]: the lengths of the columns of the base's matrix, with which DoRA begins."""
        if part.target not in self._lengths:
            stack = self.directory.read(part.target)
            self._lengths[part.target] = [np.linalg.norm(np.asarray(x, np.float32), axis=0) for x in stack]
        return self._lengths[part.target][part.layer]

    def digests(self) -> dict[str, str]:
        return base_digests({f"{self.component}/{name}": self.directory.read(name) for name in self.directory.entries})


def _family(model: str | os.PathLike, component: str) -> CheckpointFamily:
    config = read_model_config(model, allow_component=True)
    if component not in ("llm", *COMPONENT_FAMILY):
        raise UserError(f"--component={component}{did_you_mean(component, ('llm', *COMPONENT_FAMILY))}")
    if component in COMPONENT_FAMILY:
        return FAMILIES[COMPONENT_FAMILY[component]]
    stored = config.get("component")
    name = stored["family"] if stored else config["model"].get("llm", {}).get("model_type")
    if name not in ("qwen3", "phi3", "llama"):
        raise UserError(f"{model} holds no language model ({plain(str(name))}): choose --component=siglip or sam")
    return FAMILIES[name]


def import_adapters(
    source: str | os.PathLike, model: str | os.PathLike, out: str | os.PathLike, component: str = "llm"
) -> Path:
    """Reads PEFT's directory `source`, whose base is a component of the model directory `model`, into a directory of adapters.

    Raises:
        UserError: files that are missing or damaged, another kind of adapter, settings that we do not compute, layers that the
            base does not have, or a stack of which only some layers have adapters.
    """
    require_empty_directory(out)
    source, base = Path(source), Base.open(model, component)
    settings = read_config(source / CONFIG)
    tensors = SafetensorsSource([source / WEIGHTS], str(source / WEIGHTS))
    rank, dora = settings["r"], bool(settings["use_dora"])
    stacks: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    numbers = float(settings["lora_alpha"]), float(settings["lora_dropout"])
    cfg = LoraConfig((), rank, *numbers, bool(settings["use_rslora"]), dora)
    for module, names in _tensors_of(tensors, base.modules, dora).items():
        parts = base.modules[module]
        a, b = (tensors.read(names[half]).astype(np.float32) for half in "AB")
        wanted = (len(a), parts[0].torch_shape[1]), (sum(part.torch_shape[0] for part in parts), len(a))
        if (a.shape, b.shape) != wanted:
            raise UserError(f"{tensors.name}: {plain(module)} has A {a.shape} and B {b.shape}, its base needs {wanted}")
        factor = _scale(settings, module, len(a)) / cfg.scale
        for part, (mine, rows) in zip(parts, _split(a, factor * b, parts, rank, tensors.name, module), strict=True):
            stacks.setdefault(base.layer(part), {})[part.layer] = {"a": mine.T, "b": rows.T}
        if dora:
            lengths = tensors.read(names[MAGNITUDE]).astype(np.float32)
            if lengths.shape != (len(b),):
                raise UserError(f"{tensors.name}: {plain(names[MAGNITUDE])} is {lengths.shape}, its base needs {(len(b),)}")
            for part in parts:
                before = base.column_lengths(part)
                ratio = lengths[part.start : part.start + len(before)] / np.where(before > 0, before, 1)
                stacks[base.layer(part)][part.layer]["magnitude"] = np.where(before > 0, ratio - 1, 0)
    learned = {}
    for layer, found in stacks.items():
        count = base.directory.entries[f"{layer.partition('/')[2]}/kernel"].shape[0]
        if len(found) != count:
            raise UserError(
                f"{tensors.name}: only {len(found)} of the {count} layers of {layer} have adapters; a stack has all"
            )
        for name in found[0]:
            learned[f"{layer}/lora/{name}"] = np.stack([found[i][name] for i in range(count)])
    cfg = dataclasses.replace(cfg, targets=tuple(sorted(stacks)))
    return Path(save_adapters(out, unflatten_params(learned), cfg, base.digests(), {"peft": str(source.name)}))


def read_config(path: Path) -> dict[str, Any]:
    """PEFT's config with its defaults. Raises UserError for one that is damaged, or asks for what is not computed here."""
    try:
        config = json_files.read(path)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no directory of PEFT's: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {plain(str(error))}") from None
    expect(isinstance(config, dict), config, str(path), "a group of keys")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {json_files.short(config.get('peft_type'))}, only LORA is read")
    values: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "init_lora_weights": True,
    } | config
    values |= {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    strange = [key for key, value in config.items() if key not in KNOWN and value]
    strange += [
        key
        for key, ok in (("bias", values["bias"] == "none"), ("init_lora_weights", values["init_lora_weights"] in FRESH))
        if not ok
    ]
    if strange:
        shown = (f"{plain(key)}={json_files.short(config[key])}" for key in strange)
        raise UserError(f"{path}: {listed([*shown])} is not computed here; merge such an adapter into its base by PEFT")
    expect(number(values["r"], whole=True, least=1, most=1 << 16), values["r"], f"{path}: r", "a rank from 1")
    expect(number(values["lora_alpha"], least=1e-6, most=1e6), values["lora_alpha"], f"{path}: lora_alpha", "a positive number")
    expect(
        number(values["lora_dropout"], least=0, most=0.999), values["lora_dropout"], f"{path}: lora_dropout", "a share below 1"
    )
    for name, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        pattern = values[name]
        ok = isinstance(pattern, dict) and all(number(x, whole=whole, least=1e-6, most=1e6) for x in pattern.values())
        ok = ok and all(re.fullmatch(r"[\w.]+", key) for key in pattern)
        expect(ok, pattern, f"{path}: {name}", "a positive number for each module's name, without regular expressions")
    return values


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies a module's product by. The rank is that of the tensors, whatever `rank_pattern` says."""
    names = settings["alpha_pattern"]
    alpha = next((names[key] for key in names if module == key or module.endswith(f".{key}")), settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)


def _tensors_of(tensors: SafetensorsSource, modules: Mapping[str, Any], dora: bool) -> dict[str, dict[str, str]]:
    """{module: names of its A, B and lengths}. Raises UserError for tensors that belong to no linear layer of the base."""
    found: dict[str, dict[str, str]] = {}
    lost = []
    for name in tensors.entries:
        kinds = rf"(?:lora_([AB])(?:\.default)?\.weight|({MAGNITUDE})(?:\.default)?(?:\.weight)?)"
        matched = re.fullmatch(rf"(?:base_model\.model\.)?(.+)\.{kinds}", name)
        module = matched and next((m for m in (matched[1], f"model.{matched[1]}") if m in modules), None)
        if module is None:
            lost.append(name)
        else:
            found.setdefault(module, {})[matched[2] or MAGNITUDE] = name
    wanted = {"A", "B", MAGNITUDE} if dora else {"A", "B"}
    lost += [name for names in found.values() for name in names.values() if names.keys() != wanted]
    if lost or not found:
        what = f"has no place for {listed(sorted(lost))}" if lost else "holds no adapters"
        raise UserError(f"{tensors.name} {what}: the base has {listed(sorted({_pattern(m) for m in modules}))}")
    return found


def _split(
    a: np.ndarray, b: np.ndarray, parts: list[ParamSlice], rank: int, source: str, module: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A [r, in] and B [out, r] of every part of a fused matrix, in PyTorch's layout."""
    rows = [b[part.start : part.start + part.torch_shape[0]] for part in parts]
    if len(a) == rank:
        yield from ((a, mine) for mine in rows)
        return
    blocks = [slice(i * rank, (i + 1) * rank) for i in range(len(parts))]
    if len(a) != rank * len(parts) or any(
        np.delete(mine, np.r_[block], 1).any() for mine, block in zip(rows, blocks, strict=True)
    ):
        raise UserError(f"{source}: {plain(module)} has rank {len(a)}, the others {rank}: give all modules the same rank")
    yield from ((a[block], mine[:, block]) for mine, block in zip(rows, blocks, strict=True))


def export_adapters(
    adapters: str | os.PathLike, model: str | os.PathLike, out: str | os.PathLike, component: str = "llm"
) -> tuple[Path, list[str]]:
    """Writes the adapters of one component as a directory of PEFT's, which appears complete or not at all.

    Returns:
        The directory, and the names of what was trained and is not in it: other components, and parameters beside adapters.

    Raises:
        UserError: directories that cannot be read or written, adapters of another base, or none of this component.
    """
    target, base = Path(out).absolute(), Base.open(model, component)
    learned, cfg, digests = load_adapters(adapters)
    flat = flatten_params(learned)
    layers = [layer for layer, part in adapted(flat).items() if part == component]
    if not layers:
        raise UserError(f"{adapters} has no adapters of {component}, but of {listed(sorted({*adapted(flat).values()}))}")
    check_base({component: digests[component]}, base.digests(), str(adapters))
    tensors, ranks, alphas = {}, {}, {}
    for module, parts in base.modules.items():
        mine = [base.layer(part) for part in parts]
        if not any(layer in layers for layer in mine):
            continue
        halves = [_halves(flat, layer, part, cfg.rank) for layer, part in zip(mine, parts, strict=True)]
        a, b = _joined(halves)
        if len(a) != cfg.rank:
            key = module.rpartition(".")[2]
            ranks[key], alphas[key] = len(a), cfg.scale * (math.sqrt(len(a)) if cfg.rslora else len(a))
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        if cfg.dora:
            lengths = [(1 + _magnitude(flat, base.layer(part), part)) * base.column_lengths(part) for part in parts]
            tensors[f"{PREFIX}{module}.{MAGNITUDE}"] = np.concatenate(lengths).astype(np.float32)
    names = sorted({_pattern(name.removeprefix(PREFIX).partition(".lora_")[0]) for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if component == "llm" else None,
        "base_model_name_or_path": None,
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "use_rslora": cfg.rslora,
        "use_dora": cfg.dora,
        "target_modules": "|".join(names),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "inference_mode": True,
    }
    with locks.held(target, beside=True):
        require_empty_directory(target)
        with fresh_directory(target) as folder:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            (folder / WEIGHTS).chmod(0o644)  # the library writes it for its owner alone
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target, [name for name in flat if not (is_adapter(name) and name.split("/")[0] == component)]


def _halves(flat: Mapping[str, np.ndarray], layer: str, part: ParamSlice, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [r, in] and B [out, r] of one layer; of a part that has no adapter, B is zero."""
    if f"{layer}/lora/a" not in flat:
        rows, columns = part.torch_shape
        return np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32)
    a, b = (np.asarray(flat[f"{layer}/lora/{half}"][part.layer], np.float32) for half in "ab")
    return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)


def _magnitude(flat: Mapping[str, np.ndarray], layer: str, part: ParamSlice) -> np.ndarray | float:
    """DoRA's relative lengths of one layer, less 1; 0 for a part that has no adapter."""
    name = f"{layer}/lora/magnitude"
    return np.asarray(flat[name][part.layer], np.float32) if name in flat else 0.0


def _joined(halves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """One adapter for a fused matrix: with the A that all parts share, or else with blocks."""
    (first, _), *_ = halves
    if all(np.array_equal(a, first) for a, _ in halves):
        return first, np.concatenate([b for _, b in halves])
    a = np.concatenate([a for a, _ in halves])
    b = np.zeros((sum(len(b) for _, b in halves), len(a)), np.float32)
    starts = itertools.accumulate((len(b) for _, b in halves), initial=0)
    for i, ((mine, rows), start) in enumerate(zip(halves, starts, strict=False)):
        b[start : start + len(rows), i * len(mine) : (i + 1) * len(mine)] = rows
    return a, b


def _pattern(module: str) -> str:
    r"""`model\.layers\.\d+\.self_attn\.q_proj`: a module in all layers, as a regular expression."""
    return r"\.".join(r"\d+" if name.isdigit() else re.escape(name) for name in module.split("."))
