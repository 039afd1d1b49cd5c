"""What int8 weights save and cost: bytes of the parameters, and processor time of an answer, both models in turns.

    python -m benchmarks.quantization                                    # the shipped model
    python -m benchmarks.quantization --checkpoint=MODEL --turns=9 --json=FILE

Both answer the same expressions about the shipped scenes. What int8 costs in accuracy, `flowseg eval --quantize=int8` says.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("benchmarks.command_line:quantization")

import statistics
import sys
import time
from collections.abc import Sequence

from benchmarks import ratio
from benchmarks.command_line import quantization_parser
from benchmarks.table import ROOT
from flowseg_jax.inference.loading import load
from flowseg_jax.inference.segmentor import Segmentor
from flowseg_jax.system.console import log

TEXTS = ("red circle", "the star", "blue square")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = quantization_parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    models = {"float32": load(arguments.checkpoint), "int8": load(arguments.checkpoint, quantize="int8")}
    scenes = sorted((ROOT / "examples" / "scenes").glob("*.png"))
    spent: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(arguments.turns + 1):
        for name, model in models.items():
            seconds = answer(model, scenes)
            if turn:  # everything is compiled
                spent[name].append(1000 * seconds / len(scenes))
    ms = {name: statistics.median(each) for name, each in spent.items()}
    size = {name: model.nbytes for name, model in models.items()}
    log(
        f"parameters: {size['float32'] / 2**20:.2f} MiB in float32, {size['int8'] / 2**20:.2f} MiB with int8 matrices,"
        f" {size['int8'] / size['float32']:.2f} of it; {len(scenes)} images, {len(TEXTS)} expressions each:"
        f" {ms['float32']:.1f} and {ms['int8']:.1f} ms of processor time an image, {ms['int8'] / ms['float32']:.2f} times"
    )
    if arguments.json:
        ratio.write_json(arguments.json, {"bytes": size, "milliseconds": ms})
    return 0


def answer(model: Segmentor, scenes: Sequence) -> float:
    """Processor seconds of the texts about all scenes."""
    began = time.process_time()
    for scene in scenes:
        model.segment(scene, TEXTS)
    return time.process_time() - began
