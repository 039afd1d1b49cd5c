"""GGUF files of Llama-like models (SmolLM2): dequantised one tensor at a time; config and tokenizer lie in the same file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.sources import TensorInfo
from flowseg_jax.errors import UserError

# config.json's key: the GGUF key after the architecture's name
CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
OPTIONAL = {"head_dim": "attention.key_length"}
CONTROL = 3  # GGUF's type of a special token


class GgufSource:
    """The tensors of a GGUF file under llama.cpp's names, in PyTorch's order of axes.

    Quantised tensors become float32 when they are read; float16 and float32 ones are as they are.

    Raises:
        UserError: no `gguf` package, a damaged file, a kind of model other than Llama.
    """

    def __init__(self, file: Path):
        try:
            import gguf
        except ImportError:
            raise UserError(f"{file} is a GGUF file and the package gguf is not installed: pip install gguf") from None
        self.name, self._file = str(file), file
        self.notes: list[str] = []
        try:
            self._reader = gguf.GGUFReader(os.fspath(file))
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        except (ValueError, OSError, KeyError, IndexError, TypeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"{file} cannot be read, it is damaged or truncated: {reason}; download it again") from None
        if self._field("general.architecture") != "llama":
            found = self._field("general.architecture")
            raise UserError(f"{file} holds a model of the architecture {found!r}; only llama is supported as GGUF")
        self.entries = {
            name: TensorInfo(tuple(int(n) for n in reversed(tensor.shape)), self._dtype(tensor))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        from gguf.quants import dequantize

        tensor, (shape, dtype) = self._tensors[name], self.entries[name]
        data = tensor.data if len(shape) < 2 else tensor.data[start:stop]
        if tensor.tensor_type.name in ("F32", "F16"):
            out = np.array(data, dtype, copy=True)
        else:
            out = dequantize(np.asarray(data), tensor.tensor_type)
        return out.reshape(-1, *shape[1:]) if len(shape) > 1 else out.reshape(shape)[start:stop]

    def config(self) -> dict[str, Any]:
        """The model's `config.json`, as Hugging Face writes it."""
        values = {key: self._field(f"llama.{name}") for key, name in CONFIG_KEYS.items()}
        missing = [CONFIG_KEYS[key] for key, value in values.items() if value is None and key != "rope_theta"]
        if missing:
            raise UserError(f"{self._file} lacks llama.{', llama.'.join(missing)}")
        optional = {key: self._field(f"llama.{name}") for key, name in OPTIONAL.items()}
        values |= {key: value for key, value in optional.items() if value is not None}
        values["rope_theta"] = values["rope_theta"] or 10000.0  # llama.cpp's default
        # GGUF stores float32: 1e-5 is read as 9.999999747378752e-06.
        values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")
        return {
            "model_type": "llama",
            "vocab_size": self.entries["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in self.entries,
            **values,
        }

    def save_tokenizer(self, directory: str | os.PathLike[str]) -> None:
        """Saves the file's tokenizer in the form that `AutoTokenizer` reads.

        Built here because transformers' own reading of a GGUF tokenizer needs torch.

        Raises:
            UserError: another kind of tokenizer than SmolLM2's.
        """
        import tokenizers
        from tokenizers import decoders, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        get = lambda name: self._field(f"tokenizer.{name}")  # noqa: E731
        kind = get("ggml.model"), get("ggml.pre")
        if kind != ("gpt2", "smollm"):
            raise UserError(
                f"{self._file}: its tokenizer is of the kind {kind}, only ('gpt2', 'smollm') is read; give --tokenizer DIR"
            )
        tokens = get("ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in get("ggml.merges")]
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        special = [token for token, kind in zip(tokens, get("ggml.token_type"), strict=True) if kind == CONTROL]
        bpe.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
        names = {"eos_token": "ggml.eos_token_id", "unk_token": "ggml.unknown_token_id", "pad_token": "ggml.padding_token_id"}
        if get("ggml.add_bos_token"):  # a bos that the file names but never writes would be put before every prompt
            names["bos_token"] = "ggml.bos_token_id"
        ids = {name: get(key) for name, key in names.items()}
        hf = PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            **{name: tokens[i] for name, i in ids.items() if i is not None},
            clean_up_tokenization_spaces=False,
        )
        hf.chat_template = get("chat_template")
        hf.save_pretrained(str(directory))

    def _field(self, name: str) -> Any:
        field = self._reader.get_field(name)
        return None if field is None else field.contents()

    @staticmethod
    def _dtype(tensor: Any) -> np.dtype:
        return np.dtype(np.float16) if tensor.tensor_type.name == "F16" else np.dtype(np.float32)
