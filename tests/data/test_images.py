"""Decoding, resizing and packing."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from flowseg_jax.data import images
from flowseg_jax.errors import UserError


def encoded(picture, kind="JPEG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


RED = Image.new("RGB", (20, 10), (200, 30, 40))


MODES = [("JPEG", m) for m in ("RGB", "L", "CMYK")] + [("PNG", m) for m in ("RGB", "L", "P", "RGBA", "LA", "1")]


@pytest.mark.parametrize(("kind", "mode"), MODES)
def test_every_mode_becomes_rgb(kind, mode):
    got = images.decode(encoded(RED.convert(mode), kind), name="x")
    assert got.mode == "RGB" and got.size == (20, 10)
    if mode in ("RGB", "CMYK"):
        assert np.abs(np.asarray(got, int) - (200, 30, 40)).max() < 12


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = (np.arange(200, dtype=np.uint16) * 300).reshape(10, 20)
    got = np.asarray(images.decode(encoded(Image.fromarray(ramp), "PNG"), name="x"))
    np.testing.assert_array_equal(got[..., 0], ramp >> 8)


def test_exif_rotation_only_where_asked():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    data = encoded(RED, exif=exif)
    assert images.decode(data, name="x").size == (20, 10)
    assert images.decode(data, name="x", exif=True).size == (10, 20)


def test_damaged_images_are_user_errors(tmp_path):
    data = encoded(Image.effect_noise((64, 64), 80).convert("RGB"))
    for cut in (0, 1, 10, 200, len(data) // 2):
        with pytest.raises(UserError, match="^a.jpg: "):
            images.decode(data[:cut], name="a.jpg")
    with pytest.raises(UserError, match="not an image file"):
        images.decode(b"<html>404</html>", name="a.jpg")
    with pytest.raises(UserError, match="cannot read the image"):
        images.load(tmp_path / "gone.jpg")


def bomb(width, height):
    """A PNG whose header promises width x height grey pixels, in a few bytes."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 9_000), (60_000, 60_000)])
def test_decompression_bombs(size, recwarn):
    with pytest.raises(UserError, match="bomb.png: more than 89478485 pixels"):
        images.decode(bomb(*size), name="bomb.png")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("size", "want"),
    [
        ((480, 640), (768, 1024)),
        ((427, 640), (683, 1024)),
        ((1, 1), (1024, 1024)),
        ((50, 8000), (6, 1024)),
        ((8000, 1), (1024, 1)),
    ],
)
def test_scaled_size(size, want):
    assert images.scaled_size(*size, 1024) == want


@pytest.mark.parametrize("size", [(1, 1), (50, 8000), (8000, 50), (60, 40), (96, 96), (97, 31)])
def test_both_encoders_get_their_sizes(size):
    picture = Image.new("RGB", (size[1], size[0]), (9, 200, 77))
    padded, (h, w) = images.resize_and_pad(picture, 96)
    assert padded.shape == (96, 96, 3) and max(h, w) == 96 and min(h, w) >= 1
    assert (padded[:h, :w] == (9, 200, 77)).all() and not padded[h:].any() and not padded[:, w:].any()
    assert images.resize_to_square(picture, 48).shape == (48, 48, 3)


def test_fit_is_pil_bilinear():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90, 3), np.uint8))
    padded, (h, w) = images.resize_and_pad(picture, 48)
    assert (h, w) == (33, 48)  # 61 * 48 / 90 = 32.53
    np.testing.assert_array_equal(padded[:h], np.asarray(picture.resize((48, 33), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("size", [(45, 80), (480, 640), (333, 97), (96, 96), (31, 500), (7, 3)])
def test_packed_masks_unpack_to_the_nearest_resize(size):
    masks = (np.random.default_rng(1).random((3, *size)) > 0.5).astype(np.uint8)
    packed = images.pack_masks(masks, 96)
    assert packed.shape == (3, 96, 12) and packed.dtype == np.uint8
    h, w = images.scaled_size(*size, 96)
    want = np.zeros((3, 96, 96), np.uint8)
    for i, mask in enumerate(masks):
        want[i, :h, :w] = np.asarray(Image.fromarray(mask).resize((w, h), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(images.unpack_masks(packed), want)
    assert packed[0, 0, 0] == sum(int(v) << (7 - i) for i, v in enumerate(want[0, 0, :8]))  # big end first


@pytest.mark.parametrize("size", [(1, 1), (50, 8000), (8000, 50)])
def test_full_masks_of_extreme_sizes(size):
    packed = images.pack_masks(np.ones((1, *size), np.uint8), 96)
    h, w = images.scaled_size(*size, 96)
    assert images.unpack_masks(packed).sum() == h * w


def test_a_tiny_mask_does_not_vanish():
    masks = np.zeros((2, 1000, 1000), np.uint8)
    masks[0, 333, 777] = 1
    full, empty = images.unpack_masks(images.pack_masks(masks, 96))
    assert full.sum() == 1 and full[333 * 96 // 1000, 777 * 96 // 1000] == 1
    assert not empty.any()


def test_the_jitter_is_that_of_xsam():
    """Fits into int(side * s + 0.5), centre-cut to the side; masks by the nearest pixel of the same geometry."""
    picture = np.random.default_rng(0).integers(0, 256, (30, 60, 3)).astype(np.uint8)
    small = images.LargeScaleJitter.of(30, 60, 40, 0.5)
    assert (small.size, small.cut, small.top, small.left) == ((10, 20), (10, 20), 0, 0)
    large = images.LargeScaleJitter.of(30, 60, 40, 2.0)
    assert (large.size, large.cut, large.top, large.left) == ((40, 80), (40, 40), 0, 20)
    from PIL import Image

    same = images.LargeScaleJitter.of(30, 60, 60, 1.0)
    np.testing.assert_array_equal(same.image(Image.fromarray(picture), 60)[:30], picture)
    mask = (picture[..., 0] > 128).astype(np.uint8)
    np.testing.assert_array_equal(images.unpack_masks(same.pack_masks(mask[None], 60))[0, :30], mask)
    doubled = images.unpack_masks(large.pack_masks(np.ones((1, 30, 60), np.uint8), 40))[0]
    assert doubled.all()


def test_square_keeps_the_aspect():
    from PIL import Image

    wide = Image.fromarray(np.full((10, 30, 3), 200, np.uint8))
    padded = images.square(wide, 30)
    assert (padded[:10] == 127).all() and (padded[10:20] == 200).all() and (padded[20:] == 127).all()
    assert (images.resize_to_square(wide, 30) == 200).all()
