"""Our prompts are, token for token, what transformers' `apply_chat_template` makes, with every kind of tokenizer we support.

The kinds differ in what could go wrong: the bos, tokens that swallow spaces, a space before the first word, holes in ids.
"""

from __future__ import annotations

import itertools

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flowseg_jax.data import collate
from flowseg_jax.data.prompts import CHAT_TEMPLATES, Conversation, PromptTemplates, as_jinja
from flowseg_jax.data.records import Turn
from flowseg_jax.data.tokenizer import MAX_ROWS, SEG_TOKENS, extend_tokenizer, load_tokenizer, train_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.types import IMAGE_TOKEN_INDEX

IM, PHI = CHAT_TEMPLATES["qwen3_instruct"], CHAT_TEMPLATES["phi3_chat"]
WORDS = ("Which pixels show the red cup?", "The cup is here.", "And its size, in px?", "12 by 7; tall.")


def byte_level(special: list[str], *, prefix: bool = False, ids: list[int] | None = None) -> tokenizers.Tokenizer:
    """The kind of Qwen and SmolLM2: bytes, here without merges. `ids`: of the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab=dict(zip(alphabet, ids or range(256), strict=True)), merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


def sentence_pieces(special: list[str], *, rstrip: bool) -> tokenizers.Tokenizer:
    """The kind of Phi-3: a space before every piece, bytes for what is not known; its tokens swallow the space after them."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?.,;<>0123456789/"
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocab)}, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<s>", "</s>"])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=rstrip) for token in special])
    return made


def bos_first(made: tokenizers.Tokenizer, bos: str) -> tokenizers.Tokenizer:
    made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))])
    return made


QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PHI3 = ["<|user|>", "<|end|>", "<|assistant|>"]
HOLES = [*range(200), *range(300, 356)]  # 256, 257, ... are free
# name: (tokenizer, its bos, the chats it is for, whether its own template writes the bos, whether a bos must stand first)
KINDS = {
    "qwen": (lambda: byte_level(QWEN), None, IM, False, False),
    "smollm2": (lambda: byte_level(QWEN), "<|im_start|>", IM, False, False),
    "bos that the template names": (lambda: byte_level(QWEN), "<|endoftext|>", IM, True, True),
    "bos that nobody writes": (lambda: byte_level(QWEN), "<|endoftext|>", IM, False, False),
    "space before the first word": (lambda: byte_level(QWEN, prefix=True), None, IM, False, False),
    "holes": (lambda: byte_level(QWEN, ids=HOLES), None, IM, False, False),
    "phi3": (lambda: sentence_pieces(PHI3, rstrip=True), "<s>", PHI, False, False),
    "phi3 of april": (lambda: bos_first(sentence_pieces(PHI3, rstrip=True), "<s>"), "<s>", PHI, True, True),
    "phi3 whose tokenizer adds it": (lambda: bos_first(sentence_pieces(PHI3, rstrip=True), "<s>"), "<s>", PHI, False, False),
}
SYSTEMLESS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"


def save(directory, kind: str, template: str | None):
    make, bos, *_ = KINDS[kind]
    hf = PreTrainedTokenizerFast(tokenizer_object=make(), **({"bos_token": bos} if bos else {}))
    hf.chat_template = template
    hf.save_pretrained(str(directory / "plain"))
    extend_tokenizer(directory / "plain", directory / "ours")
    return directory / "ours"


def ours(tokenizer, prompts: PromptTemplates, texts: int) -> list[int]:
    """The first `texts` of `WORDS` after one visual slot; an odd number ends where an answer begins."""
    turns = [Turn(*WORDS[i : i + 2]) for i in range(0, 2 * (texts // 2), 2)]
    prefix = collate.encode_prefix(prompts, tokenizer, 1)
    if not turns:
        return [*prefix, *collate.encode_question(Conversation((Turn(WORDS[0], ""),)), prompts, tokenizer)]
    return [*prefix, *collate.encode_conversation(Conversation(tuple(turns)), prompts, tokenizer, "it").input_ids]


def theirs(directory, template: str | None, texts: int) -> list[int]:
    """What transformers makes of the same words, with a placeholder where the image stands."""
    hf = AutoTokenizer.from_pretrained(str(directory))
    hf.add_tokens(["<image>"], special_tokens=True)
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, WORDS[:texts], strict=False)]
    messages[0]["content"] = "<image>" + messages[0]["content"]
    ids = hf.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=False)
    image = hf.convert_tokens_to_ids("<image>")
    return [IMAGE_TOKEN_INDEX if i == image else i for i in ids]


PREFIXED = (
    "space before the first word"  # of an answer, too: it is a text of its own, so that a word has the same ids everywhere
)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_apply_chat_template(tmp_path, kind):
    _, bos, chat, writes, first = KINDS[kind]
    directory = save(tmp_path, kind, as_jinja(chat, bos=writes))
    for name, candidate in CHAT_TEMPLATES.items():
        if candidate.special_tokens != chat.special_tokens:
            continue
        prompts = PromptTemplates(name)
        tokenizer = load_tokenizer(directory, needed=prompts.special_tokens)
        for texts in (1,) if kind == PREFIXED else (1, 2, 4):
            made = ours(tokenizer, prompts, texts)
            assert made == theirs(directory, as_jinja(candidate, bos=writes), texts)
        mark = tokenizer.hf.convert_tokens_to_ids(bos) if bos else None
        assert (made[0] == mark) == (first or kind == "smollm2") and made[1] != made[0]


def test_a_template_of_the_language_models_own(tmp_path):
    """It ends every turn with a newline, as ChatML does; up to that, and from the first turn on, the tokens are the same."""
    directory = save(tmp_path, "smollm2", SYSTEMLESS)
    prompts = PromptTemplates("qwen3_instruct")
    made = ours(load_tokenizer(directory, needed=prompts.special_tokens), prompts, 4)
    assert made == theirs(directory, None, 4)[: len(made)]
    assert made[:2] == list(load_tokenizer(directory).encode("<|im_start|>u"))


@pytest.mark.parametrize(
    ("kind", "template", "written"),
    [
        ("phi3", None, False),
        ("phi3 whose tokenizer adds it", None, True),
        ("phi3 whose tokenizer adds it", "{{ messages }}", False),  # a template decides, `apply_chat_template` adds nothing
        ("phi3", "{{ '<s>' }}{{ messages }}", True),
        ("phi3", "{{ bos_token }}{{ messages }}", True),
        ("phi3", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", False),  # is not run
        ("qwen", "{{ bos_token }}{{ messages }}", False),
        ("smollm2", None, False),
    ],
)
def test_who_writes_the_bos(tmp_path, kind, template, written):
    tokenizer = load_tokenizer(save(tmp_path, kind, template))
    assert (tokenizer.bos is not None) == written
    prompts = PromptTemplates("phi3_chat" if kind.startswith("phi3") else "qwen3_instruct")
    assert (collate.encode_prefix(prompts, tokenizer, 0)[0] == tokenizer.bos) == written


def test_our_own_tokenizer(tmp_path):
    train_tokenizer(WORDS, tmp_path, vocab=300)
    tokenizer = load_tokenizer(tmp_path, needed=IM.special_tokens)
    assert ours(tokenizer, PromptTemplates(), 1) == theirs(tmp_path, as_jinja(IM, bos=False), 1)


@pytest.mark.parametrize(
    ("ids", "rows", "marks"),
    [
        ([*range(255), 400], 401, [256, 257, 258]),  # the special tokens fall into the hole
        (HOLES, 356, [256, 257, 258]),
        ([*range(10, 262), 500, 501, 502, 503], 507, [504, 505, 506]),  # counted on, they would be letters
        (list(range(256)), 259, [256, 257, 258]),
    ],
)
def test_ids_with_holes(tmp_path, ids, rows, marks):
    """The table is as long as the largest id needs, and no two tokens share an id."""
    PreTrainedTokenizerFast(tokenizer_object=byte_level([], ids=ids)).save_pretrained(str(tmp_path / "plain"))
    before = AutoTokenizer.from_pretrained(str(tmp_path / "plain")).get_vocab()
    extended = extend_tokenizer(tmp_path / "plain", tmp_path / "ours")
    tokenizer = load_tokenizer(tmp_path / "ours")
    vocabulary = tokenizer.hf.get_vocab()
    assert extended == tokenizer.vocab == max(vocabulary.values()) + 1 == rows
    assert vocabulary == before | dict(zip(SEG_TOKENS, marks, strict=True))
    assert len(set(vocabulary.values())) == len(vocabulary) == 259
    assert tokenizer.encode("a<SEG>b") == (before["a"], tokenizer.seg, before["b"])
    assert tokenizer.hf.decode([tokenizer.seg, rows - 1, before["a"]]).startswith("<SEG>")
    assert max(tokenizer.encode("".join(map(chr, range(400))) + "".join(SEG_TOKENS))) < tokenizer.vocab


def test_two_tokens_of_one_id_are_refused(tmp_path):
    """Added tokens are counted on: with these ids, the special tokens of the chat are letters as well."""
    made = byte_level(QWEN, ids=[*range(250), *range(256, 262)])
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(str(tmp_path / "plain"))
    extend_tokenizer(tmp_path / "plain", tmp_path / "ours")
    with pytest.raises(UserError, match=r"'<\|im_start\|>' has the id 260 of '.'; give a tokenizer in which each has its own"):
        load_tokenizer(tmp_path / "ours", needed=IM.special_tokens)


def test_an_id_without_bounds_is_refused(tmp_path):
    made = byte_level([], ids=[*range(255), MAX_ROWS])
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="largest id is 16777216, expected one from 0 to 16,777,215"):
        extend_tokenizer(tmp_path, tmp_path / "ours")
