"""Tokenizers: any local directory that `transformers.AutoTokenizer` reads, and a small byte-level BPE of our own.

The model finds phrases and outputs by token id, so `<SEG>`, `<p>`, `</p>` and the chat template's special tokens must each be
exactly one id; `load_tokenizer` refuses a tokenizer where they are not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowseg_jax.data.plain_tokenizer import PlainTokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.system import paths

SEG = "<SEG>"
PHRASE_START = "<p>"
PHRASE_END = "</p>"
IMAGE = "<image>"
SEG_TOKENS = (SEG, PHRASE_START, PHRASE_END)
MAX_ROWS = 1 << 24  # of an embedding table; the largest vocabularies have a quarter of a million ids
SPECIAL_TOKENS = (*SEG_TOKENS, IMAGE, "<|im_start|>", "<|im_end|>", "<|endoftext|>")


class Tokenizer:
    """A checked tokenizer.

    Attributes:
        hf: the Hugging Face tokenizer.
        vocab: the largest id and one (the rows that an embedding table must have): ids may have holes.
        seg, phrase_start, phrase_end: ids of the special tokens.
        bos: id that the tokenizer writes before the first turn, or None (`writes_bos`).
        pad: id after the end of a sequence (any id would do: it is masked).
        reserved: strings that a phrase must not contain, because they are special tokens.
    """

    def __init__(self, hf: Any, name: str, needed: Iterable[str] = (), *, bos: bool | None = None):
        """Checks a Hugging Face tokenizer; `bos`: whether its bos is written, None where it decides by itself."""
        self.hf = hf
        self.name = name
        vocabulary = hf.get_vocab()
        self.vocab = rows_needed(vocabulary, name)
        for token in (*SEG_TOKENS, *needed):
            ids = hf.encode(token, add_special_tokens=False)
            if len(ids) != 1 or hf.convert_ids_to_tokens(ids[0]) == hf.unk_token:
                raise UserError(
                    f"{name}: the tokenizer has no single id for {token!r} (got {ids}); "
                    f"add it with `flowseg data add-special-tokens --source {name} --out DIR`"
                )
            if other := _also_has(vocabulary, ids[0], token):
                raise UserError(
                    f"{name}: {token!r} has the id {ids[0]} of {other!r}; give a tokenizer in which each has its own"
                )
        self.seg, self.phrase_start, self.phrase_end = (hf.convert_tokens_to_ids(token) for token in SEG_TOKENS)
        self.bos = hf.bos_token_id if (writes_bos(hf) if bos is None else bos) else None
        self.pad = next((i for i in (hf.pad_token_id, hf.eos_token_id) if i is not None), 0)
        self.reserved = tuple(sorted({*SEG_TOKENS, IMAGE, *needed, *hf.get_added_vocab()}))
        self._backend = getattr(hf, "backend_tokenizer", None)  # the same ids without the wrapper's bookkeeping
        self._encode = functools.lru_cache(maxsize=1 << 16)(self._encode_uncached)

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache, and without the wrapper where its backend encodes: importing it is most of a worker's start."""
        state = {key: value for key, value in vars(self).items() if key != "_encode"}
        return state if self._backend is None else state | {"hf": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._encode = functools.lru_cache(maxsize=1 << 16)(self._encode_uncached)

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        if self._backend is None:
            return tuple(self.hf.encode(text, add_special_tokens=False))
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    @property
    def definition(self) -> str:
        """What makes the ids: the same string, the same ids for every text."""
        if self._backend is not None:
            return self._backend.to_str()
        return json.dumps([type(self.hf).__name__, sorted(self.hf.get_vocab().items())])

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of one chunk of text, special tokens included, nothing added. Cached: prompts repeat."""
        return self._encode(text)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of ids of each text, encoded as a batch."""
        if self._backend is None:
            return [len(self.encode(text)) for text in texts]
        return [len(e.ids) for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def rows_needed(vocabulary: Mapping[str, int], name: str) -> int:
    """The largest id of a tokenizer and one: with fewer rows, an embedding table could be read out of range.

    Raises:
        UserError: no ids, or one so large that no table is made for it.
    """
    rows = max(vocabulary.values(), default=-1) + 1
    if not 0 < rows <= MAX_ROWS:
        raise UserError(f"{name}: the tokenizer's largest id is {rows - 1}, expected one from 0 to {MAX_ROWS - 1:,}")
    return rows


def _also_has(vocabulary: Mapping[str, int], number: int, token: str) -> str | None:
    """Another token with the same id, if there is one."""
    return next((other for other, i in vocabulary.items() if i == number and other != token), None)


def writes_bos(hf: Any) -> bool:
    """Whether a conversation begins with the tokenizer's bos.

    Its chat template decides, as `apply_chat_template` adds nothing by itself. The template is read, not run: it is a program
    of whoever wrote it. Without a template it counts whether the tokenizer puts the bos before a text by itself.
    """
    if hf.bos_token_id is None:
        return False
    template = hf.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if template:
        return "bos_token" in template or hf.bos_token in template
    return hf.encode("x")[:1] == [hf.bos_token_id]


@contextlib.contextmanager
def no_advice() -> Iterator[None]:
    """Keeps `transformers` from saying, while it is imported, that there is no PyTorch: tokenizers need none."""
    logger, keep = logging.getLogger("transformers"), lambda record: "PyTorch was not found" not in record.getMessage()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def load_tokenizer(directory: str | os.PathLike[str], *, needed: Iterable[str] = ()) -> Tokenizer:
    """Loads a tokenizer from a local directory and checks its special tokens.

    Args:
        directory: what `AutoTokenizer.from_pretrained` reads; never a hub name.
        needed: further strings that must be one id each (`prompts.PromptTemplates.special_tokens`).

    Raises:
        UserError: no such directory, not a tokenizer, or a special token that is not exactly one id.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such tokenizer directory{paths.made_by(directory)}")
    if plain := PlainTokenizer.read(directory):
        return Tokenizer(plain, str(directory), needed)
    with no_advice():
        from transformers import AutoTokenizer  # slow to import, and only needed here
    try:
        hf = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here, all of them about the files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{directory}: not a readable tokenizer directory ({reason})") from None
    return Tokenizer(hf, str(directory), needed)


def _special(token: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, special=True, normalized=False, lstrip=token in (SEG, PHRASE_START))


def train_tokenizer(texts: Iterable[str], directory: str | os.PathLike[str], *, vocab: int = 512) -> None:
    """Trains a byte-level BPE and saves it for `AutoTokenizer`.

    A space is put before the first word of every chunk, so that a word has the same ids after `<p>` as inside a sentence: a
    small vocabulary and a small model cannot afford two spellings of "red". `<p>` and `<SEG>` swallow the space before them.

    Args:
        texts: training text without special tokens.
        directory: where to save; made if missing.
        vocab: number of ids, special tokens included.
    """
    import tokenizers

    with no_advice():
        from transformers import PreTrainedTokenizerFast

    if vocab < 256 + len(SPECIAL_TOKENS):
        raise UserError(
            f"tokenizer vocabulary {vocab} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens must fit"
        )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[_special(t) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[_special(t) for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
    )
    hf.save_pretrained(str(directory))


class Extended(NamedTuple):
    """What `add_special_tokens` made.

    Attributes:
        rows: that an embedding table needs, the special tokens' included.
        words: that it needed before.
    """

    rows: int
    words: int


def extend_tokenizer(source: str | os.PathLike[str], directory: str | os.PathLike[str]) -> int:
    """Saves a copy of a language model's tokenizer with `<SEG>`, `<p>`, `</p>` added in this order.

    The order is X-SAM's, so that ids agree with its checkpoints.

    Returns:
        The rows that its embedding table needs: the largest id and one.

    Raises:
        UserError: no readable tokenizer in `source`.
    """
    return add_special_tokens(source, directory).rows


def add_special_tokens(
    source: str | os.PathLike[str], directory: str | os.PathLike[str], chat_template: str | None = None
) -> Extended:
    """As `extend_tokenizer`; a tokenizer with a bos is given `chat_template`, if there is one."""
    with no_advice():
        from transformers import AutoTokenizer

    if not Path(source).is_dir():
        raise UserError(f"{source}: no such tokenizer directory")
    try:
        hf = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{source}: not a readable tokenizer directory ({reason})") from None
    words = rows_needed(hf.get_vocab(), str(source))
    plain = hf.backend_tokenizer.to_str() if getattr(hf, "backend_tokenizer", None) is not None else None
    hf.add_tokens(list(SEG_TOKENS), special_tokens=True)
    vocabulary = hf.get_vocab()
    if plain is not None and any(_also_has(vocabulary, vocabulary[token], token) for token in SEG_TOKENS):
        # New ids are counted on from the number of tokens. Where ids have holes, that can be the id of another token.
        _add_after(hf, plain, words)
    if chat_template is not None and hf.bos_token is not None:
        hf.chat_template = chat_template
    hf.save_pretrained(str(directory))
    return Extended(rows_needed(hf.get_vocab(), str(source)), words)


def _add_after(hf: Any, plain: str, first: int) -> None:
    """Gives the special tokens the ids from `first` on; `plain` is the tokenizer without them."""
    import tokenizers

    definition = json.loads(plain)
    vocab = definition["model"].get("vocab")
    if isinstance(vocab, dict):  # else `load_tokenizer` refuses what shares an id
        new = [token for token in SEG_TOKENS if token not in vocab]
        vocab.update({token: first + i for i, token in enumerate(new)})
        hf._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
        hf.add_tokens(list(SEG_TOKENS), special_tokens=True)
