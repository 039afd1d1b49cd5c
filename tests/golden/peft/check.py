"""Loads what `flowseg adapters export` wrote with PEFT itself, and compares its hidden states with the recorded ones.

pip install torch transformers peft
flowseg convert phi3 tests/golden/peft/dora/base BASE
flowseg adapters import tests/golden/peft/dora/adapter BASE ADAPTERS
flowseg adapters export ADAPTERS BASE OUT
python tests/golden/peft/check.py dora OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent


def main(name: str, adapter: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(HERE / name / "base", attn_implementation="eager", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    recorded = np.load(HERE / name / "recorded.npz")
    with torch.no_grad():
        found = model.base_model.model.model(input_ids=torch.tensor(recorded["tokens"])).last_hidden_state.numpy()
    error = np.abs(found - recorded["hidden"]).max() / np.abs(recorded["hidden"]).max()
    print(f"{adapter}: PEFT computes the recorded hidden states of {name}, largest difference {error:.1e} of the largest value")
    assert error < 1e-5


if __name__ == "__main__":
    main(*sys.argv[1:])
