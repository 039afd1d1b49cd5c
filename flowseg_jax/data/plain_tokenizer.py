"""A tokenizer that is nothing but its `tokenizer.json`, read without importing `transformers`, which takes seconds.

`train_tokenizer` saves such tokenizers. Of a class of its own (Qwen's, Llama's), `transformers` decides what the file means.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# Keys of tokenizer_config.json that are understood here. With any other one `transformers` is asked.
UNDERSTOOD = (
    *SPECIAL,
    "backend",
    "clean_up_tokenization_spaces",
    "extra_special_tokens",
    "model_max_length",
    "tokenizer_class",
)


class PlainTokenizer:
    """What `Tokenizer` asks of a Hugging Face tokenizer, in its words.

    Attributes:
        backend_tokenizer: a `tokenizers.Tokenizer`.
        bos_token, eos_token, unk_token, pad_token: strings, None where there is none.
        chat_template: None.
    """

    chat_template = None

    def __init__(self, backend: Any, special: dict[str, str | None]):
        self.backend_tokenizer = backend
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = (special.get(name) for name in SPECIAL)
        added = backend.get_added_tokens_decoder()
        self._added = {token.content: number for number, token in added.items()}

    @classmethod
    def read(cls, directory: Path) -> PlainTokenizer | None:
        """The tokenizer of a directory; None where it has to be left to `transformers`, also with its errors."""
        import tokenizers

        if {path.name for path in directory.glob("*token*")} != {"tokenizer.json", "tokenizer_config.json"}:
            return None
        if any(directory.glob("chat_template*")):
            return None
        try:
            config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
            plain = config["tokenizer_class"] in PLAIN_CLASSES and set(config) <= {*UNDERSTOOD}
            backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
            special = {name: config.get(name) for name in SPECIAL}
            named = [*(token for token in special.values() if token is not None), *config.get("extra_special_tokens", [])]
            known = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
            plain &= all(token in known for token in named)  # another one would be added to the vocabulary
            plain &= config.get("clean_up_tokenization_spaces") is False and not backend.truncation and not backend.padding
        except Exception:  # a damaged file: `tokenizers` raises bare Exceptions
            return None
        return cls(backend, special) if plain else None

    @property
    def bos_token_id(self) -> int | None:
        return self.convert_tokens_to_ids(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self.convert_tokens_to_ids(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self.convert_tokens_to_ids(self.pad_token)

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        return dict(self._added)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, token: str | None) -> int | None:
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def convert_ids_to_tokens(self, number: int) -> str | None:
        return self.backend_tokenizer.id_to_token(number)
