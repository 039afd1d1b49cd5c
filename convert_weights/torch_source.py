"""PyTorch's own files (`pytorch_model*.bin`, `.pth`). The one place that imports torch, and only when such a file is read."""

from __future__ import annotations

import ctypes
import mmap
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert_weights import refusals
from convert_weights.sources import TensorInfo
from convert_weights.torch_archive import check_archive, check_old_file, is_archive
from flowseg_jax.errors import UserError, listed, plain

NESTED = ("state_dict", "model", "module")  # keys under which training frameworks put the weights
DTYPES = {
    name: np.dtype(name)
    for name in "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool".split()
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}  # fmt: skip


class TorchSource:
    """Tensors of one or several `torch.save` files, mapped into memory and not loaded.

    Raises:
        UserError: no torch, a damaged file, a pickle that wants anything but tensors, names that two files share.
    """

    def __init__(self, files: list[Path], name: str):
        self.name = name
        self.notes: list[str] = []
        self.entries: dict[str, TensorInfo] = {}
        self._tensors: dict[str, Any] = {}
        self._mapped: set[str] = set()
        for file in files:
            state, beside, mapped = _load(file)
            if beside:
                self.notes.append(f"{file}: the weights were taken, not {listed(beside)} beside them")
            self._mapped |= set(state) if mapped else set()
            for key, tensor in state.items():
                if key in self._tensors:
                    raise UserError(f"{file} and another file of {name} both hold {plain(key)}: leave one of the two out")
                self._tensors[key] = tensor
                self.entries[key] = TensorInfo(tuple(tensor.shape), DTYPES[_name(tensor)])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        import torch

        tensor, dtype = self._tensors[name], self.entries[name].dtype
        part = (tensor[start:stop] if tensor.ndim else tensor).resolve_neg()
        bits = part.contiguous().view(torch.uint16) if dtype == ml_dtypes.bfloat16 else part
        out = np.array(bits.numpy().view(dtype) if dtype == ml_dtypes.bfloat16 else bits.numpy(), copy=True)
        if name in self._mapped:
            _release(part)
        return out


def _load(file: Path) -> tuple[dict[str, Any], list[str], bool]:
    """The tensors of a file, the names of what they lay beside (an optimizer's state, say), and whether they are mapped."""
    refusals.refuse_pointer(file)
    try:
        import torch
    except ImportError:
        raise UserError(f"{file} is a PyTorch file and torch is not installed: pip install torch, or use safetensors") from None
    try:
        mapped = is_archive(file)  # the format before PyTorch 1.6 is none, and cannot be mapped
        check_archive(file) if mapped else check_old_file(file)
        with warnings.catch_warnings(action="ignore"):  # about pickles that are refused below
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|function|class) ([\w.]+)", str(error))
        what = f" (it asks for {plain(wanted.group(1))})" if wanted else ""
        raise UserError(
            f"{file} is refused: it is a pickle that asks for more than tensors{what} and could run any code; get the weights "
            "as safetensors, or save them again as a plain dict of tensors"
        ) from None
    except UserError:
        raise
    except Exception as error:  # whoever wrote the file decides what its reading raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} cannot be read, it is damaged or truncated: {plain(reason)}; download it again") from None
    beside: list[str] = []
    for key in NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            beside += [name if isinstance(name, str) else f"a {type(name).__name__}" for name in state if name != key]
            state = state[key]
    if not isinstance(state, Mapping):
        raise UserError(f"{file} holds a {type(state).__name__}, not a dict of tensors")
    other = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)]
    if other:
        raise UserError(f"{file} holds {len(other)} other things than tensors: {listed(other)}; save its weights alone")
    odd = {key: _name(tensor) for key, tensor in state.items() if _name(tensor) not in DTYPES}
    if odd:
        refusals.refuse_dtypes(file, odd)
    # A Parameter is a tensor to its optimizer, and refuses to be an array.
    return {key: tensor.detach() for key, tensor in state.items()}, beside, mapped


def _name(tensor: Any) -> str:
    """A tensor's dtype, or what else keeps it from being an array."""
    import torch

    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "meta" if tensor.device.type != "cpu" else str(tensor.dtype).removeprefix("torch.")


def _release(tensor: Any) -> None:
    """Gives the pages of a mapped tensor back, so that memory in use does not grow to the size of the file.

    Only for tensors of a mapped file, whose pages are read again when they are needed again.
    """
    if not sys.platform.startswith("linux"):
        return
    page, start, storage = mmap.PAGESIZE, tensor.data_ptr(), tensor.untyped_storage()
    # A tensor can claim more values than its storage holds (strides of zero): what lies after the file is not ours to give.
    end = min(start + tensor.numel() * tensor.element_size(), storage.data_ptr() + storage.nbytes())
    first, last = -(-start // page) * page, end // page * page
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
