"""Carries the arrays of tiny Hugging Face models (weights or gradients) into our parameter trees. For parity tests only.

Every function takes a dict of numpy arrays under Hugging Face names and returns our nested dict; as the maps are linear, they
carry gradients as well as weights.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import torch
from flax import nnx

from flowseg_jax.models.sam import SamConfig

Arrays = dict[str, np.ndarray]


def randomise(module: torch.nn.Module, seed: int, scale: float = 0.08) -> torch.nn.Module:
    """Gives every parameter (norms, biases and relative positions too) a value that no default has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(base + scale * torch.randn(p.shape, generator=generator))
    return module.eval()


def weights(module: torch.nn.Module) -> Arrays:
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def gradients(module: torch.nn.Module) -> Arrays:
    """Gradients by name; zeros where none flowed."""
    return {n: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy() for n, p in module.named_parameters()}


def build(make: Callable[[], nnx.Module], params: dict) -> nnx.Module:
    """The module with these parameters; names and shapes must agree exactly."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    expected = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(state))
    actual = jax.tree.map(lambda x: x.shape, params)
    assert actual == expected, f"\n{actual}\n{expected}"
    return nnx.merge(graphdef, params)


def error(actual: jax.Array, expected: np.ndarray, floor: float = 1e-30) -> float:
    """Largest difference relative to the largest expected magnitude (at least `floor`)."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), floor))


def tree_error(actual: dict, expected: dict) -> tuple[float, str]:
    """The worst leaf's error and its path. A leaf far below the rest (a gradient that is zero but for rounding, as of a key
    bias) is measured against a thousandth of the largest leaf."""
    floor = 1e-3 * max(np.abs(x).max() for x in jax.tree.leaves(expected))
    errors = jax.tree.map(lambda a, e: error(a, e, floor), actual, expected)
    return max((e, jax.tree_util.keystr(path)) for path, e in jax.tree_util.tree_leaves_with_path(errors))


def _linear(a: Arrays, name: str) -> dict:
    return {"kernel": a[f"{name}.weight"].T} | ({"bias": a[f"{name}.bias"]} if f"{name}.bias" in a else {})


def _conv(a: Arrays, name: str) -> dict:
    return {"kernel": a[f"{name}.weight"].transpose(2, 3, 1, 0), "bias": a[f"{name}.bias"]}


def _norm(a: Arrays, name: str) -> dict:
    return {"scale": a[f"{name}.weight"]} | ({"bias": a[f"{name}.bias"]} if f"{name}.bias" in a else {})


def _stack(layers: list[dict]) -> dict:
    return jax.tree.map(lambda *xs: np.stack(xs), *layers)


def siglip(a: Arrays, layers: int) -> dict:
    def layer(i: int) -> dict:
        p = f"encoder.layers.{i}."
        return {
            "self_attn": {n: _linear(a, f"{p}self_attn.{n}") for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
            "mlp": {n: _linear(a, f"{p}mlp.{n}") for n in ("fc1", "fc2")},
            "layer_norm1": _norm(a, p + "layer_norm1"),
            "layer_norm2": _norm(a, p + "layer_norm2"),
        }

    a = {name.removeprefix("vision_model."): x for name, x in a.items()}
    return {
        "patch_embedding": _conv(a, "embeddings.patch_embedding"),
        "position_embedding": a["embeddings.position_embedding.weight"],
        "layers": _stack([layer(i) for i in range(layers)]),
    }


def sam(a: Arrays, cfg: SamConfig) -> dict:
    def layer(i: int) -> dict:
        p = f"layers.{i}."
        w, b = np.split(a[p + "attn.qkv.weight"], 3), np.split(a[p + "attn.qkv.bias"], 3)
        projections = {f"{n}_proj": {"kernel": w[j].T, "bias": b[j]} for j, n in enumerate("qkv")}
        return {
            "attn": projections
            | {
                "proj": _linear(a, p + "attn.proj"),
                "rel_pos_h": a[p + "attn.rel_pos_h"],
                "rel_pos_w": a[p + "attn.rel_pos_w"],
            },
            "mlp": {n: _linear(a, f"{p}mlp.{n}") for n in ("lin1", "lin2")},
            "layer_norm1": _norm(a, p + "layer_norm1"),
            "layer_norm2": _norm(a, p + "layer_norm2"),
        }

    stacks: dict[str, list[dict]] = {}
    for i in range(cfg.num_hidden_layers):
        name, index = cfg.stack_and_index(i)
        assert len(stacks.setdefault(name, [])) == index
        stacks[name].append(layer(i))
    return {"patch_embed": _conv(a, "patch_embed.projection"), "pos_embed": a["pos_embed"][0]} | {
        name: _stack(layers) for name, layers in stacks.items()
    }


def language(a: Arrays, layers: int, q_width: int, kv_width: int) -> dict:
    """Qwen3, Llama (separate matrices) and Phi-3 (fused) alike."""

    def layer(i: int) -> dict:
        p = f"model.layers.{i}."
        if p + "self_attn.qkv_proj.weight" in a:
            qkv = np.split(a[p + "self_attn.qkv_proj.weight"], [q_width, q_width + kv_width])
            attention = dict(zip("qkv", qkv, strict=True))
            mlp = dict(zip(("gate", "up"), np.split(a[p + "mlp.gate_up_proj.weight"], 2), strict=True))
        else:
            attention = {n: a[f"{p}self_attn.{n}_proj.weight"] for n in "qkv"}
            mlp = {n: a[f"{p}mlp.{n}_proj.weight"] for n in ("gate", "up")}
        attention["o"], mlp["down"] = a[p + "self_attn.o_proj.weight"], a[p + "mlp.down_proj.weight"]
        norms = [n for n in ("q_norm", "k_norm") if f"{p}self_attn.{n}.weight" in a]
        return {
            "input_layernorm": _norm(a, p + "input_layernorm"),
            "self_attn": {f"{n}_proj": {"kernel": m.T} for n, m in attention.items()}
            | {n: _norm(a, f"{p}self_attn.{n}") for n in norms},
            "post_attention_layernorm": _norm(a, p + "post_attention_layernorm"),
            "mlp": {f"{n}_proj": {"kernel": m.T} for n, m in mlp.items()},
        }

    head = {"lm_head": a["lm_head.weight"]} if "lm_head.weight" in a else {}
    return head | {
        "embed_tokens": a["model.embed_tokens.weight"],
        "layers": _stack([layer(i) for i in range(layers)]),
        "norm": _norm(a, "model.norm"),
    }
