from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from convert_weights.configs_to_hf import to_hf
from flowseg_jax.errors import UserError
from flowseg_jax.models.language import LanguageModel
from flowseg_jax.models.language_config import LanguageConfig
from tests.helpers import hf_convert

SIZES = dict(
    vocab_size=71,
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    attn_implementation="eager",
)
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
REFERENCES = {
    # head_dim 10: heads * head_dim = 60 is not the width 36
    "qwen3 tied": (Qwen3ForCausalLM, Qwen3Config, dict(head_dim=10, tie_word_embeddings=True, rms_norm_eps=1e-6)),
    "phi3 window": (Phi3ForCausalLM, Phi3Config, dict(sliding_window=5, tie_word_embeddings=False, rms_norm_eps=1e-5)),
    # Of the three frequencies the first stays, the second lies between, the third is divided.
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        dict(tie_word_embeddings=False, rms_norm_eps=1e-5, rope_parameters=ROPE | LLAMA3),
    ),
}
LENGTHS = (13, 9)  # right-padded to 13


@pytest.fixture(scope="module", params=REFERENCES)
def reference(request):
    model, config, extra = REFERENCES[request.param]
    return hf_convert.randomise(model(config(**SIZES | {"rope_parameters": dict(ROPE)} | extra)), seed=len(request.param))


def config_of(reference):
    return LanguageConfig.from_hf(reference.config.to_dict())


def params_of(arrays, cfg):
    return hf_convert.language(
        arrays, cfg.num_hidden_layers, cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    )


def model_of(cfg, params):
    return hf_convert.build(lambda: LanguageModel(cfg, rngs=nnx.Rngs(0)), params)


def padded_rows():
    tokens = np.random.default_rng(0).integers(1, 71, (2, 13))
    real = np.arange(13) < np.array(LENGTHS)[:, None]
    return np.where(real, tokens, 0), real, np.broadcast_to(np.arange(13), (2, 13)), np.where(real, 0, -1)


def run_reference(reference, tokens, real):
    return reference(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(real).long(), output_hidden_states=True)


def test_right_padded_rows_equal_hugging_face(reference):
    """From the inside out: the embedding, what comes after each layer (the first n layers are a model of n), the logits."""
    cfg = config_of(reference)
    arrays = hf_convert.weights(reference)
    tokens, real, positions, segments = padded_rows()
    with torch.no_grad():
        expected = run_reference(reference, tokens, real)
        # Hugging Face's last state is normalised, the others are not.
        states = [*(reference.model.norm(x) for x in expected.hidden_states[:-1]), expected.hidden_states[-1]]
    for layers in range(1, cfg.num_hidden_layers + 1):
        part = dataclasses.replace(cfg, num_hidden_layers=layers)
        model = model_of(part, params_of(arrays, part))
        hidden = jax.jit(lambda t, model=model: model(model.embed(t), positions, segments))(tokens)
        assert hf_convert.error(hidden[real], states[layers].numpy()[real]) < 1e-5, f"after layer {layers}"
        assert np.isfinite(hidden).all()
    assert (np.asarray(model.embed(tokens)) == expected.hidden_states[0].numpy()).all()
    logits = hidden @ model.lm_head_weight().weight.T
    assert hf_convert.error(logits[real], expected.logits.numpy()[real]) < 1e-5


def test_gradients_equal_hugging_face(reference):
    cfg = config_of(reference)
    cfg = dataclasses.replace(cfg, remat={"qwen3": "full", "phi3": "none", "llama": "dots"}[cfg.model_type])
    tokens, real, positions, segments = padded_rows()
    probe = np.random.default_rng(1).normal(size=(2, 13, cfg.vocab_size)).astype(np.float32) * real[..., None]
    reference.zero_grad()
    (run_reference(reference, tokens, real).logits * torch.tensor(probe)).sum().backward()
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(cfg, rngs=nnx.Rngs(0))))

    def loss(params):
        model = nnx.merge(graphdef, params)
        return (model(model.embed(tokens), positions, segments) @ model.lm_head_weight().weight.T * probe).sum()

    actual = jax.jit(jax.grad(loss))(params_of(hf_convert.weights(reference), cfg))
    worst = hf_convert.tree_error(actual, params_of(hf_convert.gradients(reference), cfg))
    assert worst[0] < 1e-4, worst


def test_conversations_after_one_prefix_equal_separate_runs(reference):
    """Positions continue from the prefix in every conversation; the window of 5 reaches back into it over the gap."""
    cfg = config_of(reference)
    model = model_of(cfg, params_of(hf_convert.weights(reference), cfg))
    rng = np.random.default_rng(2)
    prefix, talks = 6, (4, 7, 3)
    embeds = rng.normal(size=(1, prefix + sum(talks) + 2, cfg.hidden_size)).astype(np.float32)
    parts = [np.arange(prefix)] + [prefix + np.arange(n) for n in talks] + [np.zeros(2, int)]
    ids = [0] * prefix + [i + 1 for i, n in enumerate(talks) for _ in range(n)] + [-1] * 2
    segments = np.array(ids)[None]
    packed = np.asarray(jax.jit(model.__call__)(embeds, np.concatenate(parts)[None], segments))
    for i, n in enumerate(talks):
        own = np.flatnonzero((segments[0] == 0) | (segments[0] == i + 1))
        position = torch.arange(prefix + n)[None]
        with torch.no_grad():
            alone = reference(inputs_embeds=torch.tensor(embeds[:, own]), position_ids=position, output_hidden_states=True)
        assert hf_convert.error(packed[:, own], alone.hidden_states[-1].numpy()) < 1e-5, f"conversation {i}"


def test_more_padding_changes_nothing():
    cfg = LanguageConfig.tiny(50)
    model = LanguageModel(cfg, rngs=nnx.Rngs(0))
    embeds = np.random.default_rng(3).normal(size=(1, 8, cfg.hidden_size)).astype(np.float32)
    positions, segments = np.arange(8)[None], np.array([[0, 0, 0, 1, 1, 2, 2, 2]])
    call = jax.jit(model.__call__)
    short = call(embeds, positions, segments)
    junk = np.full((1, 5, cfg.hidden_size), 1e3, np.float32)
    long = call(
        np.concatenate([embeds, junk], 1),
        np.concatenate([positions, np.zeros((1, 5), int)], 1),
        np.concatenate([segments, np.full((1, 5), -1)], 1),
    )
    assert hf_convert.error(long[:, :8], short) < 1e-6
    assert np.isfinite(long).all()


def test_placeholder_ids_read_the_first_row():
    model = LanguageModel(LanguageConfig.tiny(50), rngs=nnx.Rngs(0))
    rows = model.embed(jnp.array([[-200, -1, 0, 49]]))
    table = model.lm_head_weight().weight
    assert (np.asarray(rows[0]) == np.asarray(table)[[0, 0, 0, 49]]).all()


def test_bfloat16_stays_bfloat16_and_near(reference):
    cfg = config_of(reference)
    model = model_of(cfg, params_of(hf_convert.weights(reference), cfg))
    tokens, real, positions, segments = padded_rows()
    with torch.no_grad():
        expected = run_reference(reference, tokens, real).hidden_states[-1].numpy()
    half = jax.jit(model.__call__)(model.embed(tokens).astype(jnp.bfloat16), positions, segments)
    assert half.dtype == jnp.bfloat16
    error = hf_convert.error(half.astype(jnp.float32)[real], expected[real])
    print(f"bfloat16 error: {error:.1e}")
    assert error < 0.05


def count(width, layers, q, kv, head_norm, mlp):
    return width + layers * (2 * width * q + 2 * width * kv + 2 * head_norm + 3 * width * mlp + 2 * width)


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (LanguageConfig.qwen3_4b(), 151672 * 2560 + count(2560, 36, 4096, 1024, 128, 9728)),
        (LanguageConfig.qwen3_1b7(), 151672 * 2048 + count(2048, 28, 2048, 1024, 128, 6144)),
        (LanguageConfig.qwen3_8b(), 2 * 151672 * 4096 + count(4096, 36, 4096, 1024, 128, 12288)),
        (LanguageConfig.qwen3_14b(), 2 * 151672 * 5120 + count(5120, 40, 5120, 1024, 128, 17408)),
        (LanguageConfig.qwen3_32b(), 2 * 151672 * 5120 + count(5120, 64, 8192, 1024, 128, 25600)),
        (LanguageConfig.llama3_8b(), 2 * 128259 * 4096 + count(4096, 32, 4096, 1024, 0, 14336)),
        (LanguageConfig.phi3_mini(), 2 * 32014 * 3072 + count(3072, 32, 3072, 3072, 0, 8192)),
        (LanguageConfig.smollm2_135m(), 49155 * 576 + count(576, 30, 576, 192, 0, 1536)),
    ],
    ids=["qwen3_4b", "qwen3_1b7", "qwen3_8b", "qwen3_14b", "qwen3_32b", "llama3_8b", "phi3_mini", "smollm2_135m"],
)
def test_preset_has_the_checkpoints_parameters(cfg, expected):
    state = nnx.state(nnx.eval_shape(lambda: LanguageModel(cfg, rngs=nnx.Rngs(0))))
    assert sum(x.size for x in jax.tree.leaves(state)) == expected


def test_every_parameter_names_its_axes():
    state = nnx.state(nnx.eval_shape(lambda: LanguageModel(LanguageConfig.tiny(50), rngs=nnx.Rngs(0))))
    for path, p in nnx.to_flat_state(state):
        assert len(p.get_metadata()["logical_axes"]) == len(p.shape), path


def test_from_hf_reads_published_configs():
    """The fields as the checkpoints' own config.json state them, in the spelling of transformers 4."""
    qwen = dict(
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=2560,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
        rope_theta=5000000,
        rope_scaling=None,
        rms_norm_eps=1e-6,
        sliding_window=None,
        use_sliding_window=False,
        tie_word_embeddings=True,
        attention_bias=False,
        hidden_act="silu",
    )
    assert LanguageConfig.from_hf(qwen) == dataclasses.replace(LanguageConfig.qwen3_4b(), vocab_size=151936)
    phi = dict(
        model_type="phi3",
        vocab_size=32064,
        hidden_size=3072,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=8192,
        rope_theta=10000.0,
        rope_scaling=None,
        rms_norm_eps=1e-5,
        sliding_window=2047,
        tie_word_embeddings=False,
        attention_bias=False,
        hidden_act="silu",
    )
    assert LanguageConfig.from_hf(phi) == dataclasses.replace(LanguageConfig.phi3_mini(), vocab_size=32064)
    llama = dict(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        rope_theta=500000.0,
        rope_scaling=LLAMA3 | {"original_max_position_embeddings": 8192},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        hidden_act="silu",
    )
    preset = dataclasses.replace(LanguageConfig.llama3_8b(), vocab_size=128256)
    assert LanguageConfig.from_hf(llama) == preset
    written = to_hf("llama", preset)
    assert LanguageConfig.from_hf(written) == preset
    assert LlamaConfig.from_dict(written).rope_parameters == llama["rope_scaling"] | {"rope_theta": 500000.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type='gemma3'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_scaling='longrope'"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, r"config.json \(qwen3\): rope_parameters: factor is missing"),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            r"rope_scaling=\(8.0, 1.0, 1.0, 128.0\) must be",
        ),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 9}, "head_dim=9"),
    ],
)
def test_config_that_would_change_the_numbers_is_refused(change, message):
    config = dict(model_type="qwen3", vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=4)
    config |= dict(intermediate_size=8, rms_norm_eps=1e-6, rope_theta=1e4, num_key_value_heads=2, head_dim=4)
    LanguageConfig.from_hf(config)
    with pytest.raises(UserError, match=message):
        LanguageConfig.from_hf(config | change)
