"""How many tokens each sample of a split takes, counted once for a tokenizer and stored with the prepared set.

Counting reads and tokenises every sentence, which takes minutes for millions of them. What is stored depends on the data set
and the tokenizer alone, not on a batch's limits or prompts: these are held against the stored lengths at every start.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from flowseg_jax.data import checksums
from flowseg_jax.data.array_file import ArrayFile, write_header
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.index import IndexEntry
from flowseg_jax.data.mixture import MixtureComponent
from flowseg_jax.data.prompts import check_phrase, special_token
from flowseg_jax.data.token_budget import TokenBudget, answer_lengths, phrase_lengths
from flowseg_jax.data.tokenizer import Tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.types import PAD, BatchShape

VERSION = 1  # of what is counted; raised when it changes
FOLDER = "token_lengths"
SAMPLE = np.dtype([("phrase", "<u4"), ("answer", "<u4")])  # tokens of each; a phrase with a special token has 0
NAMES = np.dtype("<u4")
ENTRIES_AT_ONCE = 2048


class TokenLengths:
    """Lengths of the samples of a split: opened, or counted where they were not yet.

    They lie in the prepared set's folder. Where that cannot be written to, each run counts for itself.

    Args:
        prepared: the data set.
        split: which split.
        tokenizer: that counts.

    Attributes:
        samples: `SAMPLE` of each sample, in the index's order.
        names: uint32 of each image, the tokens of the names of all categories that it has objects of.

    Raises:
        UserError: the index or the stored lengths are damaged.
    """

    def __init__(self, prepared: PreparedDataset, split: str, tokenizer: Tokenizer):
        self._sizes = {
            "samples.npy": (SAMPLE, prepared.splits[split]["samples"]),
            "names.npy": (NAMES, prepared.splits[split]["images"]),
        }
        self._index = prepared.index(split)
        folder = lengths_folder(prepared, split, tokenizer)
        if folder.is_dir():
            self._open(folder)
            return
        with _new_folder(folder.parent) as temporary:
            self._count(prepared, split, tokenizer, temporary)
            self._open(temporary)
            with contextlib.suppress(OSError):  # another process was first, or this is a folder of the run's own
                os.rename(temporary, folder)

    def _open(self, folder: Path) -> None:
        remedy = "remove that folder, and they are counted again"
        try:
            checksums.check(folder, self._sizes, checksums.read(folder))
            self.samples, self.names = (ArrayFile(folder / name, *size, remedy) for name, size in self._sizes.items())
        except UserError:
            raise UserError(f"{folder}: the stored token counts are damaged; {remedy}") from None

    def _count(self, prepared: PreparedDataset, split: str, tokenizer: Tokenizer, folder: Path) -> None:
        from flowseg_jax.system.console import log, progress  # not in the workers, which count nothing

        images = prepared.splits[split]["images"]
        log(f"{prepared.directory}: the tokens of the sentences of {split!r} are counted, once for this tokenizer")
        name_lengths = phrase_lengths(tokenizer, prepared.categories)
        with contextlib.ExitStack() as stack:
            samples, names = (stack.enter_context((folder / name).open("wb")) for name in self._sizes)
            for file, size in zip((samples, names), self._sizes.values(), strict=True):
                write_header(file, *size)
            bar, done = stack.enter_context(progress("counting tokens", images, "images")), 0
            for some, lengths in _count_samples(self._index, tokenizer):
                samples.write(lengths.tobytes())
                classes = ({c for c in e.categories if c != PAD} for e in some)
                names.write(np.array([sum(name_lengths[c] for c in each) for each in classes], NAMES).tobytes())
                done += len(some)
                bar.update(done)
        checksums.write(folder, self._sizes, {})

    def phrases(self) -> tuple[np.ndarray, np.ndarray]:
        """As `count_phrases` counts them."""
        parts = [part["phrase"].astype(np.int64) for _, part in self.samples.chunks()]
        return self._index.columns("samples")[:, 0], np.concatenate(parts, dtype=np.int64) if parts else np.zeros(0, np.int64)


def count_phrases(entries: Iterable[IndexEntry], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """int64 [images]: samples of each image; int64 [samples]: tokens of each prompt, 0 of one with a special token."""
    counts, lengths = [], [np.zeros(0, np.int64)]
    for some, found in _count_samples(entries, tokenizer):
        counts += [len(entry.samples) for entry in some]
        lengths.append(found["phrase"].astype(np.int64))
    return np.array(counts, np.int64), np.concatenate(lengths)


def _count_samples(entries: Iterable[IndexEntry], tokenizer: Tokenizer) -> Iterator[tuple[list[IndexEntry], np.ndarray]]:
    """Some entries at a time, and `SAMPLE` of each of their samples."""
    remaining = iter(entries)
    while some := list(itertools.islice(remaining, ENTRIES_AT_ONCE)):
        prompts = sorted({s.prompt for e in some for s in e.samples})
        lengths = dict(zip(prompts, phrase_lengths(tokenizer, prompts), strict=True))
        lengths.update((prompt, 0) for prompt in prompts if special_token(prompt, tokenizer))
        answers = sorted({s.answer for e in some for s in e.samples})
        known = dict(zip(answers, answer_lengths(tokenizer, answers), strict=True))
        yield some, np.array([(lengths[s.prompt], known[s.answer]) for e in some for s in e.samples], SAMPLE)


def lengths_folder(prepared: PreparedDataset, split: str, tokenizer: Tokenizer) -> Path:
    """Where the lengths are stored: named by everything that they depend on."""
    about = [VERSION, prepared.digest, split, tokenizer.definition, tokenizer.reserved]
    return prepared.directory / FOLDER / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _new_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, elsewhere where nobody may write there; removed at the end unless it was renamed."""
    try:
        parent.mkdir(exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".counting-", dir=parent)
    except OSError:
        folder = tempfile.mkdtemp(prefix="flowseg-")
    try:
        os.chmod(folder, 0o755)
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_member(
    member: MixtureComponent,
    tokenizer: Tokenizer,
    bound: TokenBudget,
    shape: BatchShape,
    phrases: int,
    named: bool,
    all_objects: bool,
) -> None:
    """Refuses sentences with special tokens, and a shape that some image would overflow, before training instead of in it.

    Args:
        member: data of task "referring" or "reasoning", and its images that are trained on.
        tokenizer: of the model.
        bound: how long a text can get.
        shape: of the batch.
        phrases: at most so many of one image at a time.
        named: a conversation names the image's categories.
        all_objects: every object of an image is a target.

    Raises:
        UserError: naming the image and what it needs.
    """
    index, task = member.prepared.index(member.split), member.prepared.task
    lengths = TokenLengths(member.prepared, member.split, tokenizer)
    worst, worst_record = 0, -1
    for records, rows in member.rows():
        first, last = int(records[0]), int(records[-1])
        start, stop = int(rows["sample"][0]), int(rows["sample"][-1]) + int(rows["samples"][-1])
        samples = lengths.samples[start:stop]
        owner = np.repeat(np.arange(len(rows)), rows["samples"])
        if len(owner) < len(samples):  # the samples of images in between that are not trained on
            counts = rows["samples"].astype(np.int64)
            before = np.cumsum(counts) - counts
            samples = samples[np.arange(len(owner)) + np.repeat(rows["sample"] - start - before, counts)]
        for place in np.unique(owner[samples["phrase"] == 0])[:1]:
            entry = index[int(records[place])]
            for sample in entry.samples:
                check_phrase(sample.sentence, tokenizer, f"{member.prepared.directory}: {entry.file_name}")
        masks = rows["objects"] + np.minimum(rows["unions"], phrases).astype(np.int64)
        crowded = (masks > shape.max_masks) & all_objects
        many = (rows["categories"] > shape.max_names) & named
        for place in np.flatnonzero(crowded | many)[:1]:
            name = index[int(records[place])].file_name
            if crowded[place]:
                raise UserError(
                    f"{name}: has {masks[place]} objects, but the batch has room for {shape.max_masks} masks; "
                    "raise data.max_masks or set data.objects='referred'"
                )
            raise UserError(
                f"{name}: has objects of {rows['categories'][place]} categories, but the batch has room for "
                f"{shape.max_names} names; raise data.max_names"
            )
        longest = _sum_of_longest(owner, samples["phrase"].astype(np.int64) + samples["answer"], phrases, len(rows))
        needed = bound.upper_bounds(longest, np.minimum(rows["samples"], phrases), task)
        if named:
            sums, counts = lengths.names[first : last + 1][records - first], rows["categories"]
            needed += np.where(counts > 0, bound.naming(sums.astype(np.int64), counts.astype(np.int64)), 0)
        place = int(needed.argmax())
        if needed[place] > worst:
            worst, worst_record = int(needed[place]), int(records[place])
    if worst > shape.text_length:
        raise UserError(
            f"{index[worst_record].file_name}: may need {worst} tokens, more than the text length {shape.text_length}; "
            "raise data.text_length or ask fewer phrases per image"
        )


def _sum_of_longest(owner: np.ndarray, lengths: np.ndarray, most: int, owners: int) -> np.ndarray:
    """int64 [owners]: of each owner's lengths, the sum of the `most` largest. `owner` rises."""
    if len(owner) and np.bincount(owner).max() > most:
        keys = np.sort((owner << 32) - lengths)  # by owner, longest first
        owner = (keys + (1 << 32) - 1) >> 32
        lengths = (owner << 32) - keys
        first = np.searchsorted(owner, owner)
        taken = np.arange(len(owner)) - first < most
        owner, lengths = owner[taken], lengths[taken]
    return np.bincount(owner, weights=lengths, minlength=owners).astype(np.int64)
