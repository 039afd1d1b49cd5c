"""Tiny checkpoints for the converter's tests: random Hugging Face models, and X-SAM's tensor names with random values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers

from convert_weights import configs_from_hf
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.models.boundary import BoundaryConfig
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import ConnectorConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from flowseg_jax.models.siglip import SiglipConfig

GOLDEN = Path(__file__).parents[1] / "golden"
TEXT = {"vocab_size": 280, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The model whose names are in golden/xsam_tensor_names.json.
XSAM = FlowSegConfig(
    sam=SamConfig(192, 16, 48, 4, 3, 96, 5, (1, 3)),
    siglip=SiglipConfig(56, 14, 32, 3, 2, 64),
    llm=LanguageConfig("qwen3", 264, 64, 2, 4, 2, 16, 112, 1e6, 1e-6, True, True),
    connector=ConnectorConfig((48, 48, 48), 24),
    connector_hidden_layers=(2, 3, 4),
    pixel_decoder=PixelDecoderConfig(
        (96, 48, 24), (32, 16, 8), embed_dim=64, mask_dim=64, num_layers=2, num_heads=4, mlp_dim=96
    ),
    mask_decoder=MaskDecoderConfig(embed_dim=64, num_queries=20, num_layers=3, num_heads=4, mlp_dim=128),
    semantic_flow=SemanticFlowConfig(mode="off"),
    boundary=BoundaryConfig(enabled=False),
)


def expand(shapes: Mapping[str, list[int]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names with `{0-3,5}` in them, written out."""
    for name, shape in shapes.items():
        head, *rest = re.split(r"\{(.*)\}", name)
        if not rest:
            yield name, tuple(shape)
            continue
        for run in rest[0].split(","):
            first, _, last = run.partition("-")
            yield from ((f"{head}{i}{rest[1]}", tuple(shape)) for i in range(int(first), int(last or first) + 1))


def xsam_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 values under X-SAM's names."""
    rng = np.random.default_rng(seed)
    shapes = json.loads((GOLDEN / "xsam_tensor_names.json").read_text())["shapes"]
    return {name: rng.standard_normal(shape, np.float32) for name, shape in expand(shapes)}


def aaai_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same checkpoint under the names of X-SAM's branch AAAI26_Archive."""
    swap = {"vision_encoder.": "visual_encoder.", "segmentor.class_predictor.logit_scale": "segmentor.logit_scale"}
    swap["segmentor.class_predictor.predictor."] = "segmentor.class_predictor."
    renamed = {}
    for name, x in tensors.items():
        old = next((prefix for prefix in swap if name.startswith(prefix)), "")
        renamed[swap.get(old, "") + name.removeprefix(old)] = x
    return renamed


def huggingface(family: str, **changes) -> torch.nn.Module:
    """A tiny random model of the class that a family's checkpoints are saved from."""
    torch.manual_seed(0)
    t = transformers
    text = {**TEXT, **changes}
    if family == "qwen3":
        return t.Qwen3ForCausalLM(
            t.Qwen3Config(**{"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True, **text})
        )
    if family == "phi3":
        return t.Phi3ForCausalLM(
            t.Phi3Config(**{"num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": False, **text})
        )
    if family == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**{"num_key_value_heads": 2, "tie_word_embeddings": True, **text}))
    if family == "siglip2":
        sizes = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 2}
        return t.SiglipVisionModel(t.SiglipVisionConfig(**sizes, image_size=28, patch_size=7))
    if family == "sam":
        sizes = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2, "mlp_dim": 40, "output_channels": 8}
        return t.SamVisionModel(
            t.SamVisionConfig(**sizes, image_size=40, patch_size=8, window_size=3, global_attn_indexes=[0, 3])
        )
    swin = t.SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2, image_size=32,
                        out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    sizes = {"feature_size": 32, "mask_feature_size": 24, "hidden_dim": 32, "encoder_feedforward_dim": 20, "encoder_layers": 2}
    sizes |= {"decoder_layers": 4, "dim_feedforward": 28, "num_attention_heads": 4, "num_queries": 6, "num_labels": 5}
    return t.Mask2FormerForUniversalSegmentation(t.Mask2FormerConfig(backbone_config=swin, **sizes, **changes))


def state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A model's tensors as NumPy arrays, without the copies of tied ones."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: x.numpy() for name, x in model.state_dict().items() if name not in tied}


def save_tokenizer(directory: Path, more: int = 0) -> int:
    """A byte-level tokenizer with Qwen's special tokens and without ours; returns its number of ids, 259 + `more`."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([*SPECIAL, *(f"<|reserved_{i}|>" for i in range(more))])
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    hf.save_pretrained(str(directory))
    return len(hf)


def equal(a: Mapping, b: Mapping) -> bool:
    """Whether two trees have the same names, dtypes and values."""
    a, b = flatten_params(a), flatten_params(b)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)


def arrays(family: str, **changes) -> tuple[dict[str, np.ndarray], object]:
    """The tensors of a random Hugging Face model of a family, and our config of it."""
    model = huggingface(family, **changes)
    return state(model), configs_from_hf.component_config(family, model.config.to_dict())
