"""A segmentor that answers for hours: its memory and the number of its compilations stay bounded.

python -m pytest tests/inference/test_soak.py -m slow
"""

from __future__ import annotations

import gc
import os

import jax
import numpy as np
import pytest
from PIL import Image

from flowseg_jax.inference import loading

CALLS = 300
WORDS = ("red", "blue", "circle", "square", "the", "left", "of", "large", "small", "a", "two", "below", "star", "ring")
SIDES = (128, 320, 640, 1024, 2048)  # heights and widths that share a program; beyond: each multiple of the last


def call(number: int) -> tuple[Image.Image, list[str]]:
    """A picture of 1 to 3,000 pixels a side, small ones as likely as large ones, and 1 to 12 texts of 1 to 30 words."""
    rng = np.random.default_rng(number)
    height, width = np.exp(rng.uniform(0, np.log(3000), 2)).astype(int)
    small = rng.integers(0, 256, (8, 8, 3), np.uint8)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 31))) for _ in range(rng.integers(1, 13))]
    return Image.fromarray(small).resize((int(width), int(height))), texts


def bucket(side: int) -> int:
    return next((s for s in SIDES if side <= s), -(-side // SIDES[-1]) * SIDES[-1])


def resident() -> int:
    """MiB of this process in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_hundred_calls_of_random_sizes_and_texts(capsys):
    segmentor = loading.load("checkpoints/shapes_tiny")
    compiled: list[str] = []
    listen = lambda name, _seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    shapes: set[tuple[int, int, int]] = set()
    memory, programs = [], []
    for turn in range(3):  # the second and the third time, nothing is new
        for number in range(CALLS):
            image, texts = call(number)
            found = segmentor.segment(image, texts)
            assert [p.candidates[0].mask.shape for p in found] == [(image.height, image.width)] * len(texts)
            for left in range(len(texts), 0, -8):  # eight texts a round
                room = next(k for k in (1, 2, 4, 8) if min(left, 8) <= k)
                shapes.add((room, bucket(image.height), bucket(image.width)))
            if turn == 0 and number + 1 in (100, 200):
                memory.append(resident())
                programs.append(len(compiled))
        memory.append(resident())
        programs.append(len(compiled))
    with capsys.disabled():
        print(f"\nafter 100, 200, 300, 600 and 900 calls: {memory} MiB resident, {programs} compilations; {len(shapes)} shapes")
    assert segmentor._upsample._cache_size() == len(shapes) <= 4 * 6 * 6
    assert segmentor._prefill._cache_size() == 1 and segmentor._predict._cache_size() <= 4 * 12
    assert programs[2] == programs[3] == programs[4] <= 4 * 6 * 6 + 4 * 12 + 20
    assert memory[4] - memory[3] < 32, memory
