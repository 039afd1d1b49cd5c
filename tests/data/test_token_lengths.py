"""Token lengths: stored once, the same as counted, and a check by them that says what a check image by image would say."""

import dataclasses
import shutil

import numpy as np
import pytest

from flowseg_jax.data import checksums, prepare, token_lengths
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.held_out import HeldOutKeys
from flowseg_jax.data.mixture import build_mixture
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.token_budget import TokenBudget
from flowseg_jax.data.token_lengths import FOLDER, TokenLengths, check_member, count_phrases
from flowseg_jax.data.tokenizer import Tokenizer
from flowseg_jax.data.train_dataset import open_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.types import PAD, BatchShape
from tests.helpers import minirefcoco as mini

PROMPTS = PromptTemplates()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return prepare.prepare(mini.write(root / "layout"), root / "set", tokenizer_vocab=300, log=lambda _: None)


@pytest.fixture
def prepared(original, tmp_path):
    return PreparedDataset.open(shutil.copytree(original.directory, tmp_path / "set"))


@pytest.fixture(scope="module")
def tokenizer(original):
    return open_tokenizer(original, PROMPTS)


@pytest.fixture
def counted(monkeypatch):
    """Texts that were tokenised as a batch."""
    seen = []
    lengths = Tokenizer.lengths
    monkeypatch.setattr(Tokenizer, "lengths", lambda self, texts: seen.extend(texts) or lengths(self, texts))
    return seen


def test_sentences_are_counted_once_for_a_tokenizer(prepared, tokenizer, counted):
    first = TokenLengths(prepared, "train", tokenizer)
    samples = [s for e in prepared.index("train") for s in e.samples]
    want = [len(tokenizer.encode(f"<p>{s.sentence}</p>")) for s in samples]
    assert first.samples[:]["phrase"].tolist() == want and len(counted) >= len({s.sentence for s in samples})
    counted.clear()
    again = TokenLengths(PreparedDataset.open(prepared.directory), "train", tokenizer)
    assert not counted and again.samples[:].tolist() == first.samples[:].tolist()
    counts, phrases = again.phrases()
    assert counts.tolist() == [len(e.samples) for e in prepared.index("train")] and phrases.tolist() == want
    expected = count_phrases(prepared.index("train"), tokenizer)
    assert all(np.array_equal(a, b) for a, b in zip((counts, phrases), expected, strict=True))
    assert len(list((prepared.directory / FOLDER).iterdir())) == 1
    TokenLengths(prepared, "val", tokenizer)
    assert len(list((prepared.directory / FOLDER).iterdir())) == 2


def test_where_nothing_can_be_stored_each_run_counts(prepared, tokenizer, counted):
    (prepared.directory / FOLDER).touch()  # nothing can be made in it
    for _ in range(2):
        counted.clear()
        assert len(TokenLengths(prepared, "train", tokenizer).samples) == 15 and counted


def test_stored_lengths_that_changed_are_refused(prepared, tokenizer):
    TokenLengths(prepared, "train", tokenizer)
    (folder,) = (prepared.directory / FOLDER).iterdir()
    data = (folder / "samples.npy").read_bytes()
    for wrong in (data[:-1] + b"x", b""):
        (folder / "samples.npy").write_bytes(wrong)
        with pytest.raises(
            UserError, match=f"^{folder}: the stored token counts are damaged; remove that folder, and they are counted again$"
        ):
            TokenLengths(prepared, "train", tokenizer)
    checksums.write(folder, ["samples.npy", "names.npy"], {})
    with pytest.raises(UserError, match="the stored token counts are damaged"):
        TokenLengths(prepared, "train", tokenizer)
    shutil.rmtree(folder)
    assert len(TokenLengths(prepared, "train", tokenizer).samples) == 15


def needed(entry, prepared, tokenizer, bound, phrases, named):
    """The tokens of one image by a loop over its samples."""
    each = sorted((len(tokenizer.encode(f"<p>{s.sentence}</p>")) for s in entry.samples), reverse=True)[:phrases]
    names = [prepared.categories[c] for c in {c for c in entry.categories if c != PAD}] if named else []
    return bound.upper_bound(each, bound.phrase_lengths(names))


@pytest.mark.parametrize("phrases", [1, 2, 8])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("left_out", [(), (1,)])
def test_the_check_is_exact(prepared, tokenizer, phrases, named, left_out, monkeypatch):
    monkeypatch.setattr(token_lengths, "ENTRIES_AT_ONCE", 2)
    index = prepared.index("train")
    held_out = HeldOutKeys(index[record].held_out_by[1] for record in left_out)
    (member,) = build_mixture([(prepared, 0.0)], held_out=held_out)
    bound = TokenBudget(PROMPTS, tokenizer, 6)
    tokens = {e.file_name: needed(e, prepared, tokenizer, bound, phrases, named) for e in member.entries()}
    assert len(tokens) == 3 - len(left_out)
    worst = max(tokens.values())
    shape = BatchShape(2, worst, phrases, 8, 32, 16, 4)
    check_member(member, tokenizer, bound, shape, phrases, named, True)
    name = next(name for name, n in tokens.items() if n == worst)
    with pytest.raises(UserError, match=f"^{name}: may need {worst} tokens, more than the text length {worst - 1};"):
        check_member(member, tokenizer, bound, dataclasses.replace(shape, text_length=worst - 1), phrases, named, True)


def test_sums_of_the_longest():
    rng = np.random.default_rng(0)
    each = [rng.integers(0, 50, n).tolist() for n in rng.integers(0, 9, 200)]
    owner = np.repeat(np.arange(200), [len(one) for one in each])
    for most in (1, 3, 20):
        found = token_lengths._sum_of_longest(owner, np.concatenate(each).astype(np.int64), most, 200)
        assert found.tolist() == [sum(sorted(one, reverse=True)[:most]) for one in each]
