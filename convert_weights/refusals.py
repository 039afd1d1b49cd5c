"""What lies in a checkpoint's folder and must not be taken for its weights: each is one clear line with the remedy.

Adapters, quantised weights, the shards of a training run and git-lfs pointers would otherwise be read as something else, or be
left out without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from flowseg_jax.errors import UserError, listed, plain

MERGE = (
    "merge the adapter first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(DIR), and convert DIR"
)
DEQUANTISE = (
    "dequantise it first: AutoModelForCausalLM.from_pretrained(DIR).dequantize().save_pretrained(OUT), or take the release in "
    "bfloat16"
)
POINTER = b"version https://git-lfs"
# What peft adds to the names of a model: adapters, and the weights that they replace or stand beside.
ADAPTER = re.compile(
    r"(^|\.)(lora_\w+|base_layer|modules_to_save|original_module|ia3_l|vera_\w+|oft_\w+|boft_\w+|hada_\w+|lokr_\w+)(\.|$)"
)
# What stands beside quantised weights: scales, zero points, permutations, states (bitsandbytes, GPTQ, AWQ, float8, compressed).
QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map|weight_scale(_inv)?|input_scale"
    r"|weight_packed|weight_shape|weight_zero_point)$|\.quant_state\."
)  # fmt: skip


def refuse_pointer(file: Path) -> None:
    """Raises a UserError if a file is what git leaves in the place of a large file that was not downloaded."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(len(POINTER))
    except OSError:
        return  # whoever reads it says what is wrong
    if start == POINTER:
        raise UserError(f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull`, or download it")


def refuse_dtypes(file: Path, dtypes: Mapping[str, str]) -> None:
    """Raises the UserError for tensors of dtypes that no parameter has: {name: dtype}."""
    kind = sorted(set(dtypes.values()))
    what = f"{file}: {len(dtypes)} tensors have the dtype {listed(kind)}, which is not supported: {listed(dtypes)}"
    if any(re.search(r"f(loat)?[468]|q?u?int[1-8]\b|bits", name, re.IGNORECASE) for name in kind):
        what += f"; the checkpoint is quantised: {DEQUANTISE}"
    raise UserError(what)


def refuse_names(source: str, names: Collection[str]) -> None:
    """Raises a UserError if the names are those of adapters or of quantised weights."""
    for pattern, what, remedy in ((ADAPTER, "an adapter", MERGE), (QUANTISED, "quantised weights", DEQUANTISE)):
        found = [name for name in names if pattern.search(name)]
        if found:
            raise UserError(f"{source} holds {what} ({len(found)} of {len(names)} tensors: {listed(found, 3)}): {remedy}")


def refuse_quantised(config: Mapping[str, Any], file: Path) -> None:
    """Raises a UserError if a config.json says that the weights beside it are quantised."""
    for values in (config, config.get("text_config"), config.get("vision_config")):
        found = values.get("quantization_config") if isinstance(values, Mapping) else None
        if found:
            method = plain(found.get("quant_method"), 40) if isinstance(found, Mapping) else "of no known form"
            raise UserError(
                f"{file}: quantization_config ({method}) says that the weights are quantised: {DEQUANTISE}; or delete the key "
                "where the weights are not quantised any more"
            )


def adapters(directory: Path) -> list[str]:
    """The files of an adapter that lies in a directory."""
    return [
        file.name for file in sorted(directory.glob("adapter_*")) if re.fullmatch(r"adapter_(config\.json|model.*)", file.name)
    ]


def refuse_adapter(directory: Path, weights: str | None) -> None:
    """Raises a UserError if an adapter lies in a directory, beside the model `weights` or alone.

    transformers (with peft) would load both; the model without its adapter is another model.
    """
    if not (found := adapters(directory)):
        return
    if weights is None:
        raise UserError(f"{directory} holds an adapter ({listed(found)}) and no model: {MERGE}")
    raise UserError(
        f"{directory} holds an adapter ({listed(found)}) beside {weights}, and what it was trained for would be lost: {MERGE}; "
        f"or give {directory / weights} to convert the model without it"
    )


def training_state(directory: Path) -> list[str]:
    """What DeepSpeed's ZeRO and PyTorch's distributed checkpoints leave in a directory."""
    return [name for name in sorted(path.name for path in directory.iterdir()) if _is_zero(name) or _is_distributed(name)]


def refuse_training_state(directory: Path) -> None:
    """Raises a UserError with the remedy if a directory holds the shards of a training run in place of a model."""
    names = [path.name for path in directory.iterdir()]
    script = "python zero_to_fp32.py {} DIR (the script lies beside global_step*, DeepSpeed brings it too), and convert DIR"
    if zero := sorted(filter(_is_zero, names)):
        root = directory.parent if re.fullmatch(r"global_step\d+", directory.name) else directory
        raise UserError(f"{directory} holds DeepSpeed's ZeRO shards ({listed(zero, 3)}), no model: {script.format(root)}")
    if parts := sorted(filter(_is_distributed, names)):
        inner = directory if ".metadata" in names or any(name.endswith(".distcp") for name in names) else directory / parts[0]
        raise UserError(
            f"{directory} holds a distributed checkpoint ({listed(parts, 3)}), no model: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {inner} model.pth, and convert model.pth"
        )


def refuse_training_file(file: Path) -> None:
    """Raises a UserError if a file is one rank's part of a training run."""
    if re.search(r"optim_states\.pt$", file.name) or file.name.startswith("zero_pp_rank_") or file.suffix == ".distcp":
        refuse_training_state(file.parent)


def _is_zero(name: str) -> bool:
    return (
        re.fullmatch(r"global_step\d+|zero_to_fp32\.py|(bf16_)?zero_pp_rank_.*|.*_optim_states\.pt|mp_rank_.*\.pt", name)
        is not None
    )


def _is_distributed(name: str) -> bool:
    return re.fullmatch(r"\.metadata|.*\.distcp|pytorch_model_fsdp_\d+|distributed_checkpoint|dcp", name) is not None


def placeholders(shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether most tensors are the empty ones that ZeRO-3 saves where weights were not gathered."""
    empty = [0 in shape for shape in shapes]
    return sum(empty) > len(empty) / 2
