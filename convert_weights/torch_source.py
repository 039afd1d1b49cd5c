"""PyTorch's own files (`pytorch_model*.bin`, `.pth`). The one place that imports torch, and only when such a file is read."""

from __future__ import annotations

import ctypes
import mmap
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert_weights.sources import Entry
from flowseg_jax.errors import UserError

NESTED = ("state_dict", "model", "module")  # keys under which training frameworks put the weights


class TorchSource:
    """Tensors of one or several `torch.save` files, mapped into memory and not loaded.

    Raises:
        UserError: no torch, a damaged file, a pickle that wants anything but tensors, names that two files share.
    """

    def __init__(self, files: list[Path], name: str):
        self.name = name
        self.entries: dict[str, Entry] = {}
        self._tensors: dict[str, Any] = {}
        self._mapped: set[str] = set()
        for file in files:
            mapped = zipfile.is_zipfile(file)  # the format before PyTorch 1.6 is no zip archive and cannot be mapped
            state = _load(file, mapped)
            self._mapped |= set(state) if mapped else set()
            for key, tensor in state.items():
                if key in self._tensors:
                    raise UserError(f"{file} and another file of {name} both hold {key}: leave one of the two out")
                self._tensors[key] = tensor
                self.entries[key] = Entry(tuple(tensor.shape), _dtype(file, key, tensor))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        import torch

        tensor, dtype = self._tensors[name], self.entries[name].dtype
        part = tensor[start:stop] if tensor.ndim else tensor
        bits = part.contiguous().view(torch.uint16) if dtype == ml_dtypes.bfloat16 else part
        out = np.array(bits.numpy().view(dtype) if dtype == ml_dtypes.bfloat16 else bits.numpy(), copy=True)
        if name in self._mapped:
            _release(part)
        return out


def _load(file: Path, mapped: bool) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise UserError(f"{file} is a PyTorch file and torch is not installed: pip install torch, or use safetensors") from None
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles that are refused below
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|function|class) ([\w.]+)", str(error))
        what = f" (it asks for {wanted.group(1)})" if wanted else ""
        raise UserError(
            f"{file} is refused: it is a pickle that asks for more than tensors{what} and could run any code; get the weights "
            "as safetensors, or save them again as a plain dict of tensors"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{file} cannot be read, it is damaged or truncated: {reason}; download it again") from None
    for key in NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise UserError(f"{file} holds a {type(state).__name__}, not a dict of tensors")
    other = [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise UserError(f"{file} holds other things than tensors: {', '.join(other[:10])}; save its weights alone")
    return state


def _dtype(file: Path, key: str, tensor: Any) -> np.dtype:
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    try:
        return np.dtype(name)
    except TypeError:
        raise UserError(f"{file}: {key} has the dtype {name}, which is not supported") from None


def _release(tensor: Any) -> None:
    """Gives the pages of a mapped tensor back, so that memory in use does not grow to the size of the file.

    Only for tensors of a mapped file, whose pages are read again when they are needed again.
    """
    if not sys.platform.startswith("linux"):
        return
    page, start = mmap.PAGESIZE, tensor.data_ptr()
    first, last = -(-start // page) * page, (start + tensor.numel() * tensor.element_size()) // page * page
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
