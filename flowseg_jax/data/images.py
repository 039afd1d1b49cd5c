"""Pixels on the host: decoding, the two encoders' input sizes, and packed target masks."""

from __future__ import annotations

import dataclasses
import io
import os
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from flowseg_jax.errors import UserError

MAX_PIXELS = 89_478_485  # a quarter of a GiB of RGB; PIL warns about larger ones, for us they are an error
SIDES = (128, 320, 640, 1024, 2048)  # what original heights and widths are padded to; beyond the last: its multiples


def size_bucket(side: int) -> int:
    """The padded side for an image side, in pixels: the next of `SIDES`, or the next multiple of the largest."""
    return next((s for s in SIDES if side <= s), -(-side // SIDES[-1]) * SIDES[-1])


def decode(data: bytes, *, name: str, exif: bool = False) -> Image.Image:
    """Decodes a JPEG, PNG or other PIL image to RGB.

    Args:
        data: the encoded file.
        name: what to call it in errors.
        exif: apply the EXIF rotation. Data sets are annotated on the stored pixels, so their readers do not.

    Raises:
        UserError: not an image, truncated, or more than MAX_PIXELS pixels.
    """
    if not data:
        raise UserError(f"{name}: the image file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged just below
            image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        if exif:
            image = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise UserError(f"{name}: more than {MAX_PIXELS} pixels; scale the image down before use") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: not an image file (its first bytes are {data[:8]!r})") from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL reports damaged files through all three
        raise UserError(f"{name}: truncated or damaged image ({error})") from None
    return _to_rgb(image)


def is_rotated(data: bytes) -> bool:
    """Whether an image file that `decode` accepts asks in its EXIF to be shown rotated or mirrored."""
    return Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # PIL would clip 16-bit grey to white instead of scaling it
        image = Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def load(path: str | os.PathLike[str], *, exif: bool = False) -> Image.Image:
    """Reads and decodes an image file; see `decode`."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # a path with a null byte in it is a ValueError
        raise UserError(f"{path}: cannot read the image ({getattr(error, 'strerror', error)})") from None
    return decode(data, name=str(path), exif=exif)


def scaled_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(h', w') after scaling the longest side to `side`: rounded half up as SAM's processor does, never below one pixel."""
    longest = max(height, width)
    return max(int(height * side / longest + 0.5), 1), max(int(width * side / longest + 0.5), 1)


def fit(image: Image.Image, side: int) -> tuple[UInt8[np.ndarray, "s s 3"], tuple[int, int]]:
    """The mask encoder's input and (h', w'): longest side scaled to `side` (bilinear), 0 at the bottom and right."""
    h, w = scaled_size(image.height, image.width, side)
    if (w, h) != image.size:
        image = image.resize((w, h), Image.Resampling.BILINEAR)
    padded = np.zeros((side, side, 3), np.uint8)
    padded[:h, :w] = np.asarray(image)
    return padded, (h, w)


def stretch(image: Image.Image, side: int) -> UInt8[np.ndarray, "v v 3"]:
    """The vision encoder's input: resized to a square (bilinear), aspect not kept."""
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.array(image)


def square(image: Image.Image, side: int) -> UInt8[np.ndarray, "v v 3"]:
    """The vision encoder's input of stage 2: centred on a grey square (127), then resized (the scaffold's `expand2square`)."""
    longest = max(image.size)
    canvas = Image.new("RGB", (longest, longest), (127, 127, 127))
    canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return stretch(canvas, side)


@dataclasses.dataclass(frozen=True)
class Jitter:
    """One draw of large-scale jitter (scaffold 1.1): the image scaled to fit a square of `scale` times the input's side, then
    its centre cut to at most that side; the rest is padding at the bottom and right.

    Attributes:
        size: (height, width) of the scaled image.
        top, left: of the cut.
        cut: (height, width) of the cut, which is what is real of the input.
    """

    size: tuple[int, int]
    top: int
    left: int
    cut: tuple[int, int]

    @classmethod
    def of(cls, height: int, width: int, side: int, scale: float) -> Jitter:
        h, w = scaled_size(height, width, max(int(side * scale + 0.5), 1))
        cut = min(h, side), min(w, side)
        return cls((h, w), (h - cut[0]) // 2, (w - cut[1]) // 2, cut)

    def image(self, image: Image.Image, side: int) -> UInt8[np.ndarray, "s s 3"]:
        """The mask encoder's input (bilinear)."""
        h, w = self.size
        resized = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
        return self._place(resized[None], side)[0]

    def pack_masks(self, masks: UInt8[np.ndarray, "n h w"], side: int) -> UInt8[np.ndarray, "n s s8"]:
        """The target masks that belong to it, packed; an object outside of the cut has none of its pixels."""
        _, height, width = masks.shape
        h, w = self.size
        return np.packbits(self._place(masks.take(_nearest(height, h), axis=1).take(_nearest(width, w), axis=2), side), axis=-1)

    def _place(self, arrays: np.ndarray, side: int) -> np.ndarray:
        h, w = self.cut
        out = np.zeros((len(arrays), side, side, *arrays.shape[3:]), np.uint8)
        out[:, :h, :w] = arrays[:, self.top : self.top + h, self.left : self.left + w]
        return out


def _nearest(size_in: int, size_out: int) -> np.ndarray:
    """Which input row or column each output one takes: PIL's nearest neighbour, its rounding (a running sum) included."""
    steps = np.full(size_out, size_in / size_out)
    steps[0] /= 2
    return np.minimum(np.cumsum(steps).astype(np.intp), size_in - 1)


def pack_masks(masks: UInt8[np.ndarray, "n h w"], side: int) -> UInt8[np.ndarray, "n s s8"]:
    """Target masks at the mask encoder's size, packed along the width (`np.packbits`, big end first), padding 0.

    Nearest-neighbour resize by the image's own scale. A mask so small that every sampled pixel misses it keeps one pixel: a
    target that exists must not turn into an empty one.
    """
    number, height, width = masks.shape
    h, w = scaled_size(height, width, side)
    small = masks if h == height else masks.take(_nearest(height, h), axis=1)
    small = small if w == width else small.take(_nearest(width, w), axis=2)
    padded = np.zeros((number, side, side), np.uint8)
    padded[:, :h, :w] = small
    for i in np.flatnonzero(~small.any(axis=(1, 2))):
        ys, xs = np.nonzero(masks[i])
        if len(ys):
            middle = len(ys) // 2
            padded[i, int(ys[middle]) * h // height, int(xs[middle]) * w // width] = 1
    return np.packbits(padded, axis=-1)


def unpack_masks(packed: UInt8[np.ndarray, "... s s8"]) -> UInt8[np.ndarray, "... s s"]:
    """The inverse of the packing of square masks: 0/1 masks."""
    return np.unpackbits(packed, axis=-1, count=packed.shape[-2])
