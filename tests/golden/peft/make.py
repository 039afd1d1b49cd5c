"""Records what PEFT computes: tiny Qwen3 and Phi-3 models with adapters, their outputs and the adapters' gradients.

    pip install torch transformers peft
    python tests/golden/peft/make.py          # or the names of some

Beside this file it writes `qwen3/`, `phi3/` and `dora/` (DoRA on a Phi-3): the base as transformers saves it, the adapter as
PEFT saves it, and `recorded.npz` with the token ids, the last hidden states, and the gradients of sum(hidden * weight).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
SIZES = dict(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    attn_implementation="eager",
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
MODELS = {
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config,
        dict(head_dim=6, tie_word_embeddings=True),
        ["q_proj", "v_proj", "o_proj", "down_proj"],
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, dict(tie_word_embeddings=False), ["qkv_proj", "gate_up_proj", "o_proj"]),
    "dora": (Phi3ForCausalLM, Phi3Config, dict(tie_word_embeddings=False), ["qkv_proj", "o_proj"]),
}


def main() -> None:
    for name in sys.argv[1:] or MODELS:
        model_class, config_class, extra, targets = MODELS[name]
        out = HERE / name
        shutil.rmtree(out, ignore_errors=True)
        generator = torch.Generator().manual_seed(len(name))
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: B023, E731
        base = model_class(config_class(**SIZES, **extra))
        with torch.no_grad():
            for path, p in base.named_parameters():
                p.copy_((1.0 if "norm" in path else 0.0) + 0.2 * draw(*p.shape))
        base.save_pretrained(out / "base")
        kind = {"use_rslora": name == "phi3", "use_dora": name == "dora"}
        config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, **kind, task_type="CAUSAL_LM")
        model = get_peft_model(base, config).eval()
        with torch.no_grad():
            for path, p in model.named_parameters():
                if "lora_magnitude_vector" in path:
                    p.mul_(1 + 0.2 * draw(*p.shape))
                elif ".lora_" in path:
                    p.copy_(0.3 * draw(*p.shape))
        model.save_pretrained(out / "adapter", save_embedding_layers=False)
        tokens = torch.randint(1, SIZES["vocab_size"], (2, 7), generator=generator)
        hidden = model.base_model.model.model(input_ids=tokens).last_hidden_state
        weight = draw(*hidden.shape)
        (hidden * weight).sum().backward()
        gradients = {path.replace(".default", ""): p.grad.numpy() for path, p in model.named_parameters() if ".lora_" in path}
        arrays = {"tokens": tokens.numpy(), "hidden": hidden.detach().numpy(), "weight": weight.numpy()} | gradients
        np.savez_compressed(out / "recorded.npz", **arrays)
        for file in [*out.rglob("README.md"), *out.rglob("generation_config.json")]:
            file.unlink()


if __name__ == "__main__":
    main()
