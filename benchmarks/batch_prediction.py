"""How fast many images are answered: in batches beside one by one, and what a longer list costs.

    python -m benchmarks.batch_prediction          # 256 images, the shipped scenes over and over; lists of up to 10^6 lines
    python -m benchmarks.batch_prediction --images=64 --longest=4 --json=FILE

Both sides answer the same expressions about the same image files with the shipped model and write the masks as run-length
codes. They take turns, after one turn in which everything is compiled. The lists name files that are never opened: measured is
opening the list (its index), finding what is left of a run of which half is done (resuming), and the memory that both hold.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("benchmarks.command_line:batch_prediction")

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ratio
from benchmarks.command_line import batch_prediction_parser
from benchmarks.table import ROOT
from flowseg_jax.system import host
from flowseg_jax.system.console import log

TEXTS = ("red circle", "the star", "blue square")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = batch_prediction_parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    host.use_host_devices(arguments.batch_size)
    host.enable_compilation_cache()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        speed = compare(root, arguments.images, TEXTS[: arguments.texts], arguments.batch_size, arguments.turns)
        log(
            f"{arguments.images} images, {len(TEXTS[: arguments.texts])} expression(s) each, one by one and in batches of"
            f" {arguments.batch_size} on {speed['devices']} devices: {speed['one_by_one']:.1f} and"
            f" {speed['batches']:.1f} images/s,"
            f" {speed['batches'] / speed['one_by_one']:.2f} times as fast; {speed['one_by_one_ms']:.1f} and"
            f" {speed['batches_ms']:.1f} ms of processor time an image"
        )
        lists = [measure_list(root, 10**power) for power in range(2, arguments.longest + 1)]
    if arguments.json:
        ratio.write_json(arguments.json, {"speed": speed, "lists": lists})
    return 0


def compare(root: Path, count: int, texts: Sequence[str], batch_size: int, turns: int) -> dict[str, Any]:
    """Images a second and milliseconds of processor time an image of both sides, medians, in turns."""
    import functools

    import jax

    from flowseg_jax.checkpoints.find import SHIPPED_MODEL
    from flowseg_jax.evaluation.benchmark import EvalModel
    from flowseg_jax.inference import batch, image_list, inputs, loading, one_by_one, outputs

    scenes = sorted((ROOT / "examples" / "scenes").glob("*.png"))
    (root / "images").mkdir()
    for number in range(count):
        shutil.copy(scenes[number % len(scenes)], root / "images" / f"{number:06d}.png")
    alone = loading.load(SHIPPED_MODEL)
    predictor = batch.BatchPredictor(EvalModel.load(SHIPPED_MODEL), batch.selection({}, SHIPPED_MODEL), batch_size=batch_size)
    respond = functools.partial(alone.predict, top_k=1, no_target_threshold=0.0)

    def one(out: Path) -> None:
        jobs = inputs.jobs_from_images(root / "images", texts, "--text")
        with outputs.PredictionWriter(out, ("rle",), table=True) as writer:
            one_by_one.run(alone, jobs, respond, writer)

    def many(out: Path) -> None:
        predictor.run(image_list.open_list(root / "images", texts), out)

    seconds: dict[str, list[tuple[float, float]]] = {"one_by_one": [], "batches": []}
    for turn in range(turns + 1):
        for name, answer in (("one_by_one", one), ("batches", many)):
            passed = timed(answer, root / f"{name}-{turn}")
            if turn:  # everything is compiled
                seconds[name].append(passed)
    result: dict[str, Any] = {"devices": jax.local_device_count()}
    for name, each in seconds.items():
        wall, processor = map(statistics.median, zip(*each, strict=True))
        result |= {name: count / wall, f"{name}_ms": 1000 * processor / count}
    return result


def timed(work: Callable[[Path], None], out: Path) -> tuple[float, float]:
    """Seconds of a clock, and of the processor."""
    began, worked = time.perf_counter(), time.process_time()
    work(out)
    return time.perf_counter() - began, time.process_time() - worked


def measure_list(root: Path, count: int) -> dict[str, Any]:
    """Processor seconds of opening a list and of continuing a half done run, and bytes that both hold."""
    from flowseg_jax.inference import image_list, shards

    path, out = root / f"{count}.jsonl", root / f"out-{count}"
    with path.open("w") as file:
        file.writelines(f'{{"image": "photos/{i:09d}.jpg", "text": ["red circle", "the star"]}}\n' for i in range(count))
    began = time.process_time()
    listed = image_list.open_list(path, ())
    index = time.process_time() - began
    open_run = lambda: shards.PredictionShards.open(out, {"list": listed.digest}, total=count, kind="jsonl")  # noqa: E731
    with open_run() as run:
        for place in range(count // 2):
            run.add({place: [{"image": "", "text": "", "found": False}]})
    began = time.process_time()
    with open_run() as run:
        resume = time.process_time() - began
        assert len(run.places) == count - count // 2
        held = run.places.nbytes + sum(len(v) * v.itemsize for v in vars(listed).values() if hasattr(v, "itemsize"))
    path.unlink()
    log(
        f"{count:>9,} lines: index {1e6 * index / count:6.2f} us a line ({index:.3f} s),"
        f" resuming {1e6 * resume / count:6.2f} us a line ({resume:.3f} s), {held / count:.0f} bytes a line held"
    )
    return {"lines": count, "index": index, "resume": resume, "bytes": held, "cores": os.cpu_count()}
