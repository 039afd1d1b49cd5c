"""Training, saving, loading and checking tokenizers."""

import json
import pickle
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flowseg_jax.data.plain_tokenizer import PlainTokenizer
from flowseg_jax.data.prompts import CHAT_TEMPLATES, PromptTemplates, template_corpus
from flowseg_jax.data.tokenizer import SPECIAL_TOKENS, extend_tokenizer, load_tokenizer, train_tokenizer
from flowseg_jax.errors import UserError

TEXTS = [
    f"the {size} {colour} {shape}" for size in ("small", "large") for colour in ("red", "blue") for shape in ("circle", "star")
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([*template_corpus(), *TEXTS * 5], path, vocab=400)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory, needed=PromptTemplates().special_tokens)


def test_auto_tokenizer_loads_it(directory):
    hf = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    assert len(hf) == 400
    for token in SPECIAL_TOKENS:
        assert len(hf.encode(token, add_special_tokens=False)) == 1
        assert token in hf.all_special_tokens


def test_a_plain_tokenizer_is_what_transformers_reads(directory, tokenizer):
    plain, hf = PlainTokenizer.read(directory), AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    assert isinstance(tokenizer.hf, PlainTokenizer)
    assert plain.backend_tokenizer.to_str() == hf.backend_tokenizer.to_str()
    for name in (
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "chat_template",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ):
        assert getattr(plain, name) == getattr(hf, name), name
    assert plain.get_vocab() == hf.get_vocab() and plain.get_added_vocab() == hf.get_added_vocab()
    text = "<|im_start|>the  large <p> red</p> star , Größe 漢字 <SEG><|im_end|>"
    ids = hf.encode(text)
    assert plain.encode(text) == ids and plain.encode(text, add_special_tokens=False) == ids
    assert [plain.convert_ids_to_tokens(i) for i in ids] == hf.convert_ids_to_tokens(ids)
    for skip in (False, True):
        assert plain.decode(ids, skip_special_tokens=skip) == hf.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"chat_template": "{{ bos_token }}"},
        {"bos_token": "<s>"},
        {"eos_token": {"content": "<|im_end|>"}},
        {"clean_up_tokenization_spaces": True},
        {"extra_special_tokens": {"image": "<image>"}},
        {"extra_special_tokens": None},
    ],
)
def test_any_other_tokenizer_is_left_to_transformers(directory, tmp_path, change):
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change))
    assert PlainTokenizer.read(tmp_path) is None


def test_a_plain_tokenizer_needs_no_transformers(directory):
    code = f"import sys; from flowseg_jax.data.tokenizer import load_tokenizer as load; load({str(directory)!r})"
    code += "; assert not {'transformers', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transformers_gives_no_advice_about_pytorch(directory, tmp_path):
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"unknown": 1}))
    code = "import importlib.util as u, sys; find = u.find_spec; "
    code += "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a); "
    code += f"from flowseg_jax.data.tokenizer import load_tokenizer as load; load({str(tmp_path)!r}); "
    code += "assert 'transformers' in sys.modules; import logging; assert not logging.getLogger('transformers').filters"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "PyTorch" not in done.stdout + done.stderr


def test_ids(tokenizer):
    assert tokenizer.vocab == 400 and tokenizer.bos is None
    assert tokenizer.encode("<p>red</p><SEG>") == (
        tokenizer.phrase_start,
        *tokenizer.encode("red"),
        tokenizer.phrase_end,
        tokenizer.seg,
    )
    assert tokenizer.pad == tokenizer.encode("<|endoftext|>")[0]
    assert len({tokenizer.seg, tokenizer.phrase_start, tokenizer.phrase_end, tokenizer.pad}) == 4
    assert max(tokenizer.encode("the large red star, ünïcode 漢字 🙂")) < tokenizer.vocab


def test_a_word_has_the_same_ids_everywhere(tokenizer):
    red = tokenizer.encode("red")
    assert len(red) == 1
    assert tokenizer.encode("<p>red</p>")[1:-1] == red
    assert tokenizer.encode("the red star")[1:2] == red
    assert tokenizer.encode("Segment <p>red</p>") == (*tokenizer.encode("Segment"), *tokenizer.encode("<p>red</p>"))


def test_any_text_survives(tokenizer):
    text = " Größe 漢字 🙂\tx"
    assert tokenizer.hf.decode(tokenizer.encode(text)) == text


def test_lengths_agree_with_encode(tokenizer):
    texts = ["<p>red</p>", "the large star", ""]
    assert tokenizer.lengths(texts) == [len(tokenizer.encode(t)) for t in texts]
    assert tokenizer.lengths([]) == []


def test_the_definition_tells_tokenizers_of_the_same_size_apart(directory, tokenizer, tmp_path):
    assert load_tokenizer(directory).definition == tokenizer.definition
    train_tokenizer([*template_corpus(), *(text.replace("red", "mauve") for text in TEXTS * 5)], tmp_path, vocab=400)
    other = load_tokenizer(tmp_path)
    assert other.vocab == tokenizer.vocab and other.definition != tokenizer.definition


def test_vocabulary_must_hold_the_bytes(tmp_path):
    with pytest.raises(UserError, match="vocabulary 200 is too small"):
        train_tokenizer(TEXTS, tmp_path, vocab=200)


def foreign(path, special=("<|im_start|>", "<|im_end|>"), **options):
    """A language model's tokenizer that has never heard of segmentation."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, **options).save_pretrained(str(path))
    return path


def test_tokenizer_without_seg_is_refused_and_can_be_extended(tmp_path):
    plain = foreign(tmp_path / "plain")
    with pytest.raises(UserError, match=r"no single id for '<SEG>' .*add it with `flowseg data add-special-tokens") as caught:
        load_tokenizer(plain)
    assert "\n" not in str(caught.value)
    before = len(AutoTokenizer.from_pretrained(str(plain)))
    assert extend_tokenizer(plain, tmp_path / "extended") == before + 3
    tokenizer = load_tokenizer(tmp_path / "extended", needed=CHAT_TEMPLATES["qwen3_instruct"].special_tokens)
    assert (tokenizer.seg, tokenizer.phrase_start, tokenizer.phrase_end) == (before, before + 1, before + 2)  # X-SAM's order
    assert tokenizer.encode("red") == tuple(AutoTokenizer.from_pretrained(str(plain)).encode("red"))


def test_unknown_token_is_not_an_id(tmp_path):
    plain = foreign(tmp_path, special=("<unk>",), unk_token="<unk>")
    with pytest.raises(UserError, match="no single id for '<SEG>'"):
        load_tokenizer(plain)


def test_chat_marks_are_checked(directory):
    with pytest.raises(UserError, match=r"no single id for '<\|user\|>'"):
        load_tokenizer(directory, needed=PromptTemplates("phi3_chat").special_tokens)


def test_not_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer directory"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(UserError, match="not a readable tokenizer directory") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_was_sent_to_a_worker_has_the_same_ids_and_keeps_them(tokenizer):
    sent = pickle.loads(pickle.dumps(tokenizer))
    text = "<p>the red circle</p><SEG>"
    assert sent.encode(text) == tokenizer.encode(text) and sent.encode(text) is sent.encode(text)
    assert (sent.seg, sent.vocab, sent.definition) == (tokenizer.seg, tokenizer.vocab, tokenizer.definition)
