"""A head that is tied to the embedding table, in all the forms in which files have one."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from convert_weights import configs_from_hf
from convert_weights.convert import import_params
from flowseg_jax.checkpoints import pretrained
from flowseg_jax.cli import convert
from flowseg_jax.errors import UserError
from tests.helpers import tiny_checkpoints as tiny

BF16 = np.dtype(ml_dtypes.bfloat16)
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def qwen3():
    model = tiny.huggingface("qwen3")
    return tiny.state(model), configs_from_hf.component_config("qwen3", model.config.to_dict())


def truncated(x: np.ndarray) -> np.ndarray:
    """To bfloat16 towards zero, as some tools do it."""
    return (x.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(BF16)


FORMS = {
    "equal": lambda table: table.copy(),
    "fewer rows": lambda table: table[:270].copy(),
    "more rows": lambda table: np.concatenate([table, np.ones((8, 24), np.float32)]),
    "bfloat16": lambda table: table.astype(BF16),
    "bfloat16 towards zero": truncated,
    "float16, fewer rows": lambda table: table[:270].astype(np.float16),
    "float64": lambda table: table.astype(np.float64),
}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_tied_up_to_padding_rows_and_rounding(qwen3, form):
    tensors, cfg = qwen3
    ours = import_params("qwen3", tensors | {HEAD: FORMS[form](tensors[TABLE])}, cfg)
    assert "lm_head" not in ours
    assert np.array_equal(ours["embed_tokens"], tensors[TABLE])


def test_a_table_in_a_smaller_dtype_than_its_head(qwen3):
    tensors, cfg = qwen3
    small = tensors[TABLE].astype(BF16)
    ours = import_params("qwen3", tensors | {TABLE: small, HEAD: tensors[TABLE]}, cfg)
    assert np.array_equal(ours["embed_tokens"], small)


def test_the_table_alone_under_the_heads_name(qwen3):
    """transformers ties both to whichever is there."""
    tensors, cfg = qwen3
    moved = {(HEAD if name == TABLE else name): x for name, x in tensors.items()}
    assert np.array_equal(import_params("qwen3", moved, cfg)["embed_tokens"], tensors[TABLE])
    untied = configs_from_hf.component_config("qwen3", tiny.huggingface("qwen3", tie_word_embeddings=False).config.to_dict())
    with pytest.raises(UserError, match=r"missing model.embed_tokens.weight \(280, 24\)$"):
        import_params("qwen3", moved, untied)


def test_another_matrix_is_refused_with_both_remedies(qwen3):
    tensors, cfg = qwen3
    for change in (np.s_[3, 1], np.s_[-1, -1], np.s_[3:5]):
        other = tensors[TABLE].copy()
        other[change] *= 1.02
        for dtype in (np.float32, BF16):
            with pytest.raises(UserError, match=r"lm_head.weight \(280, 24\) differs from .* in \d of 280 rows") as caught:
                import_params("qwen3", tensors | {HEAD: other.astype(dtype)}, cfg)
            assert "if lm_head.weight is an outdated copy, leave it out of the file" in str(caught.value).lower()
    with pytest.raises(UserError, match=r"differs from .* in 280 of 280 rows"):
        import_params("qwen3", tensors | {HEAD: np.ones((280, 25), np.float32)}, cfg)
    with pytest.raises(UserError, match=r"differs from .* in 1 of 280 rows"):
        import_params("qwen3", tensors | {HEAD: np.where(np.arange(280)[:, None] == 7, np.nan, tensors[TABLE])}, cfg)


def test_a_missing_head_may_be_a_tied_one(qwen3):
    tensors, _ = qwen3
    untied = configs_from_hf.component_config("qwen3", tiny.huggingface("qwen3", tie_word_embeddings=False).config.to_dict())
    message = r"missing lm_head.weight \(280, 24\); if lm_head.weight is tied to model.embed_tokens.weight, set tie_word_emb"
    with pytest.raises(UserError, match=message):
        import_params("qwen3", tensors, untied)


def test_only_rows_of_words_count(tmp_path):
    """The tokenizer has 259 ids: what stands in the rows after them is padding, which trainers fill as they like."""
    source = tmp_path / "hf"
    model = tiny.huggingface("qwen3")
    model.save_pretrained(source)
    tiny.save_tokenizer(source)
    tensors = {name: x.clone() for name, x in model.state_dict().items()}
    tensors[HEAD] = tensors[TABLE].clone()
    tensors[HEAD][259:] = 0
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    assert convert.main(["qwen3", str(source), str(tmp_path / "out")]) == 0
    params = pretrained.load_pretrained(tmp_path / "out", dtype=None, allow_component=True).params
    assert "lm_head" not in params and np.array_equal(params["embed_tokens"], tensors[TABLE][:262].numpy())
    tensors[HEAD][258] = 0
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match=r"in 1 of 259 rows"):
        convert.main(["qwen3", str(source), "--check"])


def test_a_directory_that_transformers_ties_stays_tied(tmp_path):
    """`.bin` files list both names. transformers and we agree on what the logits are."""
    model = tiny.huggingface("llama").eval()
    (tmp_path / "hf").mkdir()
    torch.save({**model.state_dict(), HEAD: model.state_dict()[TABLE].clone()}, tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(model.config.to_dict()))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert convert.main(["llama", str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    loaded = pretrained.load_pretrained(tmp_path / "out", dtype=None, allow_component=True)
    assert loaded.component["config"]["tie_word_embeddings"] and "lm_head" not in loaded.params
