"""A fixture of other sizes than the committed one: raw material, no results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from convert_weights.parity.fixture import Fixture

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "xsam"
TURN = "<|user|>\n{}<|end|>\n<|assistant|>\n"


def phi3_config() -> dict:
    """Phi-3, four levels, a SAM grid of 13 that neither 2 nor the window divides, no size equal to another."""
    config = json.loads((GOLDEN / "config.json").read_text())
    config |= {
        "llm_kind": "phi3",
        "template": "phi3_chat",
        "image_token": None,
        "sam": {
            "image_size": 182,
            "patch_size": 14,
            "hidden_size": 40,
            "num_hidden_layers": 5,
            "num_attention_heads": 5,
            "mlp_dim": 88,
            "window_size": 4,
            "global_attn_indexes": [0, 3],
            "output_channels": 16,
        },
        "siglip": {
            "image_size": 50,
            "patch_size": 10,
            "hidden_size": 36,
            "intermediate_size": 60,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
        },
        "llm_config": {
            "model_type": "phi3",
            "vocab_size": 267,
            "hidden_size": 72,
            "intermediate_size": 104,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 10,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "sliding_window": 90,
        },
        "m2f": {
            "feature_channels": [10, 20, 40, 80],
            "num_feature_levels": 4,
            "feature_size": 96,
            "mask_feature_size": 32,
            "hidden_dim": 96,
            "encoder_layers": 3,
            "encoder_feedforward_dim": 76,
            "decoder_layers": 7,
            "dim_feedforward": 52,
            "num_attention_heads": 6,
            "num_queries": 17,
            "train_num_points": 50,
        },
        "extra_select_layers": [5, 2, 3, 4],
        "connector_hidden_dim": 28,
        "samples": [{"phrases": ["a b"]}, {"phrases": ["c", "d", "e"]}],
        "batches": {"eval": [0], "aaai_train": [1, 0]},
        "special_ids": {},
    }
    return config


def toy_tokenizer(directory: Path, specials: tuple[str, ...]) -> dict[str, int]:
    """A byte-level tokenizer without merges, as the recordings have; returns the ids of the special tokens."""
    tokenizer = json.loads((GOLDEN / "tokenizer.json").read_text())
    template = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] = [template | {"id": 256 + i, "content": token} for i, token in enumerate(specials)]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return {token: 256 + i for i, token in enumerate(specials)}


@pytest.fixture
def phi3(tmp_path, rng) -> Fixture:
    """A fixture of that configuration with two raw samples: one phrase and three."""
    config = phi3_config()
    specials = ("<|user|>", "<|end|>", "<|assistant|>", "<s>", "<SEG>", "<p>", "</p>")
    config["special_ids"] = toy_tokenizer(tmp_path, specials)
    (tmp_path / "config.json").write_text(json.dumps(config))
    turns, arrays = {}, {}
    for i, (phrases, size) in enumerate(((["a b"], (61, 90)), (["c", "d", "e"], (120, 77)))):
        turns[f"sample{i}"] = {
            "conversations": [
                {
                    "input": TURN.format(("" if k else "<image>\n") + f"Where is <p>{phrase}</p>?"),
                    "output": "It is <SEG>.<|end|>",
                    "sep": "\n",
                }
                for k, phrase in enumerate(phrases)
            ]
        }
        arrays[f"sample{i}/image_uint8"] = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        arrays[f"sample{i}/gt_masks"] = (rng.random((len(phrases), *size)) < 0.3).astype(np.uint8)
    (tmp_path / "conversations.json").write_text(json.dumps(turns))
    np.savez(tmp_path / "inputs.npz", **arrays)
    return Fixture(tmp_path)
