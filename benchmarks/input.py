"""How fast one core makes training examples at full size, beside a PyTorch DataLoader that does the same work.

    python -m benchmarks.input                # needs torch (the extra `test`)

An example is decoded, resized for both encoders (1024 and 384 pixels), its target masks rasterised and resized, its text made
and tokenised, and everything packed into a batch. Both sides use one worker, which is their own process, and the same files:
pictures of COCO's usual size with eight objects and eight expressions, a small tokenizer. The last line says how many cores
keep stage 3 fed if all of its examples were such.
"""

from __future__ import annotations

from flowseg_jax.errors import run_cli

if __name__ == "__main__":  # before the imports: `--help` is quick, and a Ctrl-C while they last is as clean as later
    run_cli("benchmarks.command_line:input_pipeline")

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks import ratio
from benchmarks.command_line import input_parser
from benchmarks.worker import Worker, serve
from flowseg_jax import experiment as configs
from flowseg_jax.data import images, masks, prepare
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.mixture import build_mixture
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.train_dataset import TrainDataset, open_tokenizer
from flowseg_jax.data.train_examples import TrainOptions
from flowseg_jax.system import hardware
from flowseg_jax.training import flops
from flowseg_jax.training.program import TrainProgram
from flowseg_jax.types import BatchShape

PICTURES, BATCH, OBJECTS = 16, 4, 8
WIDTH, HEIGHT = 640, 480
SIDE, VISION, VISUAL_TOKENS, TEXT = 1024, 384, 1753, 2304
MFU, CHIP, CHIPS = 0.4, "TPU v5 lite", 16


def write_pictures(directory: Path) -> Path:
    """Pictures with the detail of photographs, and one line an object; returns the .jsonl file."""
    directory.mkdir()
    lines = []
    for number in range(PICTURES):
        rng = np.random.default_rng(number)
        noise = sum(
            np.asarray(Image.fromarray(rng.integers(0, 256, (HEIGHT // s, WIDTH // s, 3), np.uint8)).resize((WIDTH, HEIGHT)))
            * weight
            for s, weight in ((60, 0.6), (12, 0.25), (3, 0.15))
        )
        Image.fromarray(noise.astype(np.uint8)).save(directory / f"{number}.jpg", quality=90)
        for thing in range(OBJECTS):
            angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            x, y, reach = rng.uniform(80, WIDTH - 80), rng.uniform(80, HEIGHT - 80), rng.uniform(20, 75, 40)
            points = np.stack([x + reach * np.cos(angles), y + reach * np.sin(angles)], 1)
            expressions = [f"the {rng.choice(['small', 'large', 'left', 'right'])} thing number {thing} of the picture"]
            lines.append({"image": f"{number}.jpg", "expressions": expressions, "mask": points.round(1).ravel().tolist()})
    path = directory / "pictures.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Ours:
    """One epoch of `TrainDataset` per call."""

    def __init__(self, prepared: Path):
        data = PreparedDataset.open(prepared)
        shape = BatchShape(BATCH, TEXT, OBJECTS, 32, SIDE, VISION)
        tokenizer = open_tokenizer(data, PromptTemplates())
        options = TrainOptions(objects="referred", cache_bytes=0)
        self._data = TrainDataset(
            build_mixture([(data, 0.0)]),
            shape,
            PromptTemplates(),
            0,
            visual_tokens=VISUAL_TOKENS,
            tokenizer=tokenizer,
            options=options,
        )

    def run(self, calls: int) -> float:
        started = time.perf_counter()
        for step in range(calls * PICTURES // BATCH):
            self._data.batch(step)
        return time.perf_counter() - started

    def output(self) -> dict[str, np.ndarray]:
        batches = [self._data.batch(step) for step in range(PICTURES // BATCH)]
        targets = (images.unpack_masks(batch.packed_masks).sum((1, 2, 3), dtype=np.int64) for batch in batches)
        return checksums((b.sam_images, b.siglip_images, t) for b, t in zip(batches, targets, strict=True))


class Peer:
    """One epoch of a PyTorch DataLoader a call: the usual Dataset, with PIL, pycocotools and the same tokenizer."""

    def __init__(self, pictures: Path, prepared: Path):
        import torch
        from torch.utils.data import DataLoader, Dataset
        from transformers import AutoTokenizer

        torch.set_num_threads(1)
        tokenizer = AutoTokenizer.from_pretrained(str(prepared / "tokenizer"), local_files_only=True)
        chat = PromptTemplates().template
        by_image: dict[str, list[dict[str, Any]]] = {}
        for line in pictures.read_text().splitlines():
            by_image.setdefault((entry := json.loads(line))["image"], []).append(entry)

        class Pictures(Dataset):
            def __len__(self) -> int:
                return len(by_image)

            def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
                entries = by_image[f"{index}.jpg"]
                image = Image.open(pictures.parent / f"{index}.jpg").convert("RGB")
                h, w = images.scaled_size(HEIGHT, WIDTH, SIDE)
                pixels = torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8)
                pixels[:h, :w] = torch.from_numpy(np.array(image.resize((w, h), Image.Resampling.BILINEAR)))
                vision = torch.from_numpy(np.array(image.resize((VISION, VISION), Image.Resampling.BILINEAR)))
                codes = [masks.rasterise([e["mask"]], HEIGHT, WIDTH, "mask") for e in entries]
                full = torch.from_numpy(masks.decode(codes, HEIGHT, WIDTH))
                small = torch.nn.functional.interpolate(full[None], (h, w), mode="nearest-exact")[0]
                targets = torch.zeros(len(codes), SIDE, SIDE, dtype=torch.uint8)
                targets[:, :h, :w] = small
                ids = torch.zeros(TEXT, dtype=torch.long)
                text = [
                    f"{chat.user_prefix}Segment <p>{e['expressions'][0]}</p>.{chat.assistant_prefix}<SEG>.{chat.suffix}"
                    for e in entries
                ]
                ids_of_text = tokenizer("\n".join(text), add_special_tokens=False)["input_ids"]
                ids[VISUAL_TOKENS : VISUAL_TOKENS + len(ids_of_text)] = torch.tensor(ids_of_text)
                return {"pixels": pixels, "vision": vision, "masks": targets, "ids": ids}

        self._loader = DataLoader(Pictures(), batch_size=BATCH, num_workers=0)

    def run(self, calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            for _ in self._loader:
                pass
        return time.perf_counter() - started

    def output(self) -> dict[str, np.ndarray]:
        batches = ((b["pixels"].numpy(), b["vision"].numpy(), b["masks"].sum((1, 2, 3)).numpy()) for b in self._loader)
        return checksums(batches)


def checksums(batches: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """What must agree, whatever the order of the images: sorted means of pixels, and sorted sizes of the masks together."""
    mean = lambda x: x.reshape(len(x), -1).mean(1)  # noqa: E731
    columns = zip(*((mean(pixels), mean(vision), sizes) for pixels, vision, sizes in batches), strict=True)
    return dict(zip(("pixels", "vision", "masks"), (np.sort(np.concatenate(c)).astype(float) for c in columns), strict=True))


def images_a_second() -> float:
    """What stage 3 around Qwen3-4B consumes on all chips at the assumed MFU."""
    config = configs.read("configs/stage3_mixed.py")
    config.mesh.update(data=1, fsdp=1)
    program = TrainProgram.build(config, [jax.devices()[0]])
    run_config, state = program.run_config, program.state
    work = flops.total(flops.step_flops(run_config.model, run_config.shape, run_config.losses, state.trainable, state.frozen))
    return run_config.shape.batch / (work / (MFU * CHIPS * hardware.DEVICE_SPECS[CHIP].peak))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = input_parser().parse_args(argv)
    if arguments.serve:
        side, *paths = arguments.serve
        serve(lambda: (Ours if side == "ours" else Peer)(*map(Path, paths)))
        return 0
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        pictures = write_pictures(Path(temporary) / "pictures")
        prepared = Path(temporary) / "prepared"
        prepare.prepare(pictures, prepared, layout="jsonl", tokenizer_vocab=400, log=lambda _: None)
        me = [sys.executable, "-m", "benchmarks.input", "--serve"]
        found = ratio.compare(
            {
                "torch": stack.enter_context(Worker([*me, "torch", str(pictures), str(prepared)])),
                "ours": stack.enter_context(Worker([*me, "ours", str(prepared)])),
            },
            "torch",
            tolerance=2e-3,  # nearest neighbours on the border between two pixels
            rounds=arguments.rounds,
        )
    print(found.table())
    rate = {name: PICTURES / timing.seconds for name, timing in found.timings.items()}
    print(f"examples a second on one core: {', '.join(f'{name} {value:.1f}' for name, value in rate.items())}")
    wanted = images_a_second()
    print(
        f"stage 3 around Qwen3-4B at {MFU:.0%} MFU on {CHIPS} x {CHIP}: {wanted:.1f} images a second, "
        f"{wanted / rate['ours']:.1f} cores of this type over all hosts"
    )
    if arguments.json:
        ratio.write_json(arguments.json, found.to_json() | {"examples_a_second": rate, "needed": wanted})
    return 0 if found.quality != "C" else ratio.TOO_BUSY
