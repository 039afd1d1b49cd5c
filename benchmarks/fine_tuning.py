"""What training each language model takes on one device, without activations: the table of docs/finetune.md, by arithmetic.

    python -m benchmarks.fine_tuning
    python -m benchmarks.fine_tuning qwen3_32b llama3_8b

GiB of parameters, gradients and moments, as `flowseg plan --state-only` prints them for stage 3 and one device: all parameters
learn, or adapters of rank 16 beside every linear layer of the three encoders do, on a base in bfloat16 or int8.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("benchmarks.command_line:fine_tuning")

from collections.abc import Sequence

from benchmarks.command_line import fine_tuning_parser
from flowseg_jax import experiment
from flowseg_jax.aot.plan import state_sizes
from flowseg_jax.system.console import log
from flowseg_jax.system.hardware import GIB

MODELS = ("qwen3_1b7", "phi3_mini", "qwen3_4b", "qwen3_8b", "qwen3_14b")
LORA = ("--config.lora.targets=llm/.*,sam/.*,siglip/.*",)
WAYS = {
    "all parameters": (),
    "LoRA, bfloat16 base": (*LORA, "--config.optimizer.frozen_dtype=bfloat16"),
    "LoRA, int8 base": (*LORA, "--config.optimizer.frozen_dtype=int8"),
}


def main(argv: Sequence[str] | None = None) -> int:
    models = fine_tuning_parser().parse_args(argv).models or MODELS
    log(f"| GiB | {' | '.join(WAYS)} |")
    log(f"|---|{'--:|' * len(WAYS)}")
    for model in models:
        sizes = []
        for flags in WAYS.values():
            config, _ = experiment.load([f"--config=stage3_mixed:{model}", *flags])
            sizes.append(sum(state_sizes(config, "cpu:1")[0].values()) / GIB)
        log(f"| `{model}` | {' | '.join(f'{size:.2f}' for size in sizes)} |")
    return 0
