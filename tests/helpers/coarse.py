"""A picture as it may be compared with a recorded one: libraries may round its pixels differently, what it shows stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def coarse(path: Path) -> list[list[list[int]]]:
    """The mean colours of the 8 x 8 parts of a picture whose sides are multiples of 8."""
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float64)
    height, width = pixels.shape[:2]
    return pixels.reshape(8, height // 8, 8, width // 8, 3).mean((1, 3)).round().astype(int).tolist()
