"""Long and large pictures: refused before they are decoded, or decoded in bounded memory."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.data import collate, images, masks
from flowseg_jax.data.records import Annotation
from flowseg_jax.errors import UserError
from flowseg_jax.types import BatchShape
from tests.data.test_decoding import png16


def header(width, height, kind):
    """A file that claims a size, with next to nothing after it."""
    if kind == "png":
        return png16(np.zeros((1, 1, 3)), 2).replace(struct.pack(">II", 1, 1), struct.pack(">II", width, height), 1)
    if kind == "bmp":
        return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"P6 %d %d 255\n" % (width, height)


def fix(png):
    """The PNG with the right checksum of its header."""
    return png[:29] + struct.pack(">I", zlib.crc32(png[12:29])) + png[33:]


@pytest.mark.parametrize("size", [(1, 60_000_000), (60_000_000, 1), (89, 1_000_000), (65_536, 1)])
@pytest.mark.parametrize("kind", ["png", "bmp", "ppm"])
def test_an_extreme_side_is_refused_before_anything_is_decoded(monkeypatch, size, kind):
    data = header(*size, kind)
    data = fix(data) if kind == "png" else data
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(UserError, match=f"^x: {size[0]}x{size[1]}, a side of more than 65535 pixels; cut or scale the image"):
        images.decode(data, name="x")


def test_masks_are_decoded_a_picture_full_of_pixels_at_a_time(monkeypatch):
    """A hundred objects of a large picture are not in memory at once."""
    rng = np.random.default_rng(0)
    full = (rng.random((9, 40, 30)) > 0.5).astype(np.uint8)
    annotations = [Annotation(i, 0, masks.encode(mask)) for i, mask in enumerate(full)]
    picture, shape = Image.new("RGB", (30, 40)), BatchShape(1, 8, 1, 9, 32, 16)
    jitter = images.LargeScaleJitter.of(40, 30, 32, 1.5)
    want = [collate.prepare_pixels(picture, annotations, shape, j).masks for j in (None, jitter)]
    np.testing.assert_array_equal(want[0], images.pack_masks(full, 32))
    seen, decode = [], masks.decode
    monkeypatch.setattr(masks, "decode", lambda rles, *size: seen.append(len(rles)) or decode(rles, *size))
    monkeypatch.setattr(images, "MAX_PIXELS", 2 * 40 * 30)
    for j, one in zip((None, jitter), want, strict=True):
        np.testing.assert_array_equal(collate.prepare_pixels(picture, annotations, shape, j).masks, one)
    assert seen == 2 * [2, 2, 2, 2, 1]
    assert collate.prepare_pixels(picture, (), shape).masks.shape == (0, 32, 4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_longest_shapes_take_no_more_memory_than_a_large_picture(tmp_path):
    """The address space of a process of its own is the judge: 1.5 GiB above what it had."""
    for name, size in {"tall.png": (1365, 65_535), "wide.png": (65_535, 1365), "thin.png": (1, 65_535)}.items():
        Image.new("L", size, 99).save(tmp_path / name, compress_level=1)
    code = f"""
import resource
from flowseg_jax.data import collate, images
from flowseg_jax.types import BatchShape
from flowseg_jax.data.records import Annotation
from pycocotools import mask as coco
import numpy as np
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + (3 << 29)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name in ("tall.png", "wide.png", "thin.png"):
    image = images.load("{tmp_path}/" + name)
    size = [image.height, image.width]
    rle = coco.frPyObjects(dict(size=size, counts=[0, size[0] * size[1]]), *size)["counts"].decode()
    for square in (False, True):
        shape = BatchShape(1, 8, 1, 1, 256, 384)
        pixels = collate.prepare_pixels(image, [Annotation(1, 0, rle)] * 3, shape, square=square)
        assert pixels.siglip_image.shape == (384, 384, 3) and pixels.masks.shape == (3, 256, 32)
        assert pixels.masks.any(axis=(1, 2)).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_square_of_a_long_picture_is_close_to_the_exact_one(monkeypatch):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 300, 3), np.uint8)).resize((600, 80))
    exact = images.square(picture, 48)
    monkeypatch.setattr(images, "MAX_PIXELS", 300 * 300)
    assert np.abs(images.square(picture, 48).astype(int) - exact).max() < 40 and images.square(picture, 48)[0, 0, 0] == 127
