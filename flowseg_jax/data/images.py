"""Pixels on the host: decoding, the two encoders' input sizes, and packed target masks."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import stat
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Real, UInt8
from PIL import ExifTags, Image

from flowseg_jax.errors import UserError, brief
from flowseg_jax.system.paths import is_remote, resolve_path

MAX_PIXELS = 89_478_485  # a quarter of a GiB of RGB; PIL warns about larger ones, for us they are an error
MAX_SIDE = 65_535  # a longer side takes gigabytes in PIL, however short the other one is
MAX_FILE_BYTES = 1 << 30
BLACK = 16  # a picture whose brightest value is below it (of 255) looks black
SIDES = (128, 320, 640, 1024, 2048)  # what original heights and widths are padded to; beyond the last: its multiples

ROTATED = "images with an EXIF rotation, read as they are stored"
FRAMES = "images of several frames or pages: the first one is read"
SIXTEEN = "images of 16 bits a colour: the upper 8 are read"

_TURNS = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def size_bucket(side: int) -> int:
    """The padded side for an image side, in pixels: the next of `SIDES`, or the next multiple of the largest."""
    return next((s for s in SIDES if side <= s), -(-side // SIDES[-1]) * SIDES[-1])


def decode(data: bytes, *, name: str, exif: bool = False, notes: Counter[str] | None = None) -> Image.Image:
    """Decodes a JPEG, PNG or other PIL image to RGB; of several frames, the first.

    Args:
        data: the encoded file.
        name: what to call it in errors.
        exif: apply the EXIF rotation. Data sets are annotated on the stored pixels, so their readers do not.
        notes: counts, in words, what was special about it.

    Raises:
        UserError: not an image, truncated, more than MAX_PIXELS pixels or MAX_SIDE pixels a side, or values of more than 8 bits
            that no rule turns into 8 (`eight_bits`).
    """
    notes = Counter() if notes is None else notes
    with _one_error(name, data):
        image, sixteen = _open(data)
        rgb = _to_rgb(image, sixteen, notes)
        turn = _TURNS.get(_orientation(image))
        if exif:
            rgb = rgb if turn is None else rgb.transpose(turn)
        elif turn is not None:
            notes[ROTATED] += 1
        if _has_frames(image):  # last: a GIF looks at its second frame to tell
            notes[FRAMES] += 1
        return rgb


def decode_stored(data: bytes, *, name: str) -> Image.Image:
    """Decodes an image whose pixels are numbers, not colours (a mask, segment ids), in the mode that the file has.

    Raises:
        UserError: as `decode`; also for 16 bits a colour, of which PIL keeps 8. Grey of 16 bits is kept.
    """
    with _one_error(name, data):
        image, sixteen = _open(data)
        if sixteen:
            raise UserError("16 bits a colour, of which only 8 can be read; save it as grey, or with 8 bits a colour")
        return image


def to_rgb(image: Image.Image, *, name: str, notes: Counter[str] | None = None) -> Image.Image:
    """An image of PIL as RGB, by the rules and with the errors of `decode`; its EXIF rotation is not applied."""
    with _one_error(name):
        _check_size(image)
        sixteen = _is_sixteen(image)
        image.load()
        return _to_rgb(image, sixteen, Counter() if notes is None else notes)


@contextlib.contextmanager
def _one_error(name: str, data: bytes = b"") -> Iterator[None]:
    """Whatever goes wrong inside becomes one UserError that names the image."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # what matters of it is an error or a note here
            yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: {_TOO_MANY}") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: not an image file (its first bytes are {data[:8]!r})") from None
    except MemoryError:
        raise UserError(f"{name}: the image takes more memory than there is; scale it down before use") from None
    except Exception as error:  # a decoder raises anything: struct.error, RuntimeError, NotImplementedError, KeyError, ...
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{name}: truncated or damaged image ({reason})") from None


_TOO_MANY = f"more than {MAX_PIXELS} pixels; scale the image down before use"


def _check_size(image: Image.Image) -> None:
    if max(image.size) > MAX_SIDE:
        raise UserError(
            f"{image.width}x{image.height}, a side of more than {MAX_SIDE} pixels; cut or scale the image before use"
        )
    if image.width * image.height > MAX_PIXELS:
        raise UserError(_TOO_MANY)


def _open(data: bytes) -> tuple[Image.Image, bool]:
    """The decoded image in its own mode, and whether it has 16 bits a colour (PIL keeps the upper 8)."""
    if not data:
        raise UserError("the image file is empty")
    try:
        return _open_once(data)
    except UserError:
        raise
    except Exception:
        bare = _without_texts(data)  # PIL refuses a PNG for what is written beside its pixels
        if bare is None:
            raise
        return _open_once(bare)


def _open_once(data: bytes) -> tuple[Image.Image, bool]:
    image = Image.open(io.BytesIO(data))
    _check_size(image)
    if image.format == "PNG" and not all(right for kind, _, right in _chunks(data) if kind in (b"IHDR", b"PLTE", b"IDAT")):
        raise UserError("damaged image (a checksum of its pixels is wrong)")  # PIL does not look at the last one
    if image.format == "EPS":
        raise UserError("an EPS file is a program, which is not run; save it as PNG")
    if any(tile[0] == "fits_gzip" for tile in image.tile):
        raise UserError("a compressed FITS file, which takes PIL minutes; save it as PNG")
    sixteen = _is_sixteen(image)
    image.load()
    _check_size(image)  # of an icon, only now is the size known
    return image, sixteen


def _is_sixteen(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has 16 bits a colour, of which PIL keeps the upper 8."""
    return not image.mode.startswith("I") and ";16" in str(getattr(image, "tile", ""))


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """(kind, whole chunk, whether its checksum is right) of a PNG; one that is cut off is right: PIL misses what it needs."""
    at = len(_PNG)
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        right = end > len(png) or zlib.crc32(memoryview(png)[at + 4 : end - 4]) == int.from_bytes(png[end - 4 : end], "big")
        yield png[at + 4 : at + 8], png[at:end], right
        at = end


def _without_texts(data: bytes) -> bytes | None:
    """A PNG without its colour profile, and without texts that are compressed, damaged or longer than a MiB; else None."""
    if not data.startswith(_PNG):
        return None

    def counts(kind: bytes, chunk: bytes, right: bool) -> bool:
        compressed = kind == b"zTXt" or (kind == b"iTXt" and chunk[8:].partition(b"\0")[2][:1] != b"\0")
        text = kind in (b"tEXt", b"zTXt", b"iTXt")
        return kind != b"iCCP" and not (text and (compressed or not right or len(chunk) > 1 << 20))

    bare = _PNG + b"".join(chunk for kind, chunk, right in _chunks(data) if counts(kind, chunk, right))
    return bare if len(bare) < len(data) else None


_PNG = b"\x89PNG\r\n\x1a\n"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or where it cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF is written by anything; that it is damaged says nothing about the pixels
        return 1


def _has_frames(image: Image.Image) -> bool:
    try:
        return image.format != "PSD" and bool(getattr(image, "is_animated", False))  # a PSD's are the layers of one picture
    except Exception:  # what follows the first frame is damaged
        return True


def _to_rgb(image: Image.Image, sixteen: bool, notes: Counter[str]) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values, note = eight_bits(np.asarray(image))
        notes[note] += 1
        return Image.fromarray(values).convert("RGB")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if sixteen:
        if max(high for _, high in rgb.getextrema()) < BLACK:
            raise UserError("colours of 16 bits of which the upper 8 are black; save it with 8 bits a colour")
        notes[SIXTEEN] += 1
    return rgb


def eight_bits(values: Real[np.ndarray, "h w"]) -> tuple[UInt8[np.ndarray, "h w"], str]:
    """Grey values of more than 8 bits as 8, and what was done, in words.

    The range says what the file does not. Whole numbers up to 255 are taken as they are, up to 4095 (12 bits) they are divided
    by 16, up to 65535 by 256. Floats from 0 to 1 are multiplied by 255, up to 255 they are rounded.

    Raises:
        UserError: other values, or those that would all come out black without being 0.
    """
    low, high = values.min(), values.max()
    floats = values.dtype.kind == "f"
    out = None
    if 0 <= low <= high:  # neither is NaN
        if floats and high <= 1:
            out, note = values * np.float32(255), "images of floats from 0 to 1: multiplied by 255"
        elif floats and high <= 255:
            out, note = values, "images of floats up to 255: rounded"
        elif not floats and high <= 255:
            out, note = values, "grey images of more than 8 bits, values up to 255: taken as they are"
        elif not floats and high <= 4095:
            out, note = values >> 4, "grey images of more than 8 bits, values up to 4095: divided by 16"
        elif not floats and high <= 65535:
            out, note = values >> 8, "grey images of more than 8 bits, values up to 65535: divided by 256"
    if out is not None:
        out = (out + np.float32(0.5) if floats else out).astype(np.uint8)
    if out is None or (high > 0 and out.max() < BLACK):
        kind = "floats" if floats else "whole numbers"
        raise UserError(f"pixels are {kind} from {low:g} to {high:g}, which no rule turns into colours; save it with 8 bits")
    return out, note


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file. UserError if it cannot be read, is no file, or has more than MAX_FILE_BYTES."""
    if is_remote(path):
        return _read_remote(path)
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_FILE_BYTES:
            return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # a path with a null byte in it is a ValueError
        raise UserError(f"{path}: cannot read the image ({getattr(error, 'strerror', error)})") from None
    if stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: {found.st_size} bytes, more than an image may have ({MAX_FILE_BYTES})")
    raise UserError(f"{path}: cannot read the image (it is no file)")


def _read_remote(path: str | os.PathLike[str]) -> bytes:
    try:
        file = resolve_path(path)
        if (size := file.stat().length) <= MAX_FILE_BYTES:
            return file.read_bytes()
    except UserError:
        raise
    except Exception as error:  # clients of object stores have their own
        raise UserError(f"{path}: cannot read the image ({getattr(error, 'strerror', None) or brief(error)})") from None
    raise UserError(f"{path}: {size} bytes, more than an image may have ({MAX_FILE_BYTES})")


def load(path: str | os.PathLike[str], *, exif: bool = False, notes: Counter[str] | None = None) -> Image.Image:
    """Reads and decodes an image file; see `decode`."""
    return decode(read_bytes(path), name=str(path), exif=exif, notes=notes)


def load_stored(path: str | os.PathLike[str]) -> Image.Image:
    """Reads and decodes an image file whose pixels are numbers; see `decode_stored`."""
    return decode_stored(read_bytes(path), name=str(path))


def scaled_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(h', w') after scaling the longest side to `side`: rounded half up as SAM's processor does, never below one pixel."""
    longest = max(height, width)
    return max(int(height * side / longest + 0.5), 1), max(int(width * side / longest + 0.5), 1)


def resize_and_pad(image: Image.Image, side: int) -> tuple[UInt8[np.ndarray, "s s 3"], tuple[int, int]]:
    """The mask encoder's input and (h', w'): longest side scaled to `side` (bilinear), 0 at the bottom and right."""
    h, w = scaled_size(image.height, image.width, side)
    if (w, h) != image.size:
        image = image.resize((w, h), Image.Resampling.BILINEAR)
    padded = np.zeros((side, side, 3), np.uint8)
    padded[:h, :w] = np.asarray(image)
    return padded, (h, w)


def resize_to_square(image: Image.Image, side: int) -> UInt8[np.ndarray, "v v 3"]:
    """The vision encoder's input: resized to a square (bilinear), aspect not kept."""
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.array(image)


def square(image: Image.Image, side: int) -> UInt8[np.ndarray, "v v 3"]:
    """The vision encoder's input of stage 2: centred on a grey square (127), then resized (X-SAM's `expand2square`).

    An image whose square would have more than MAX_PIXELS pixels is scaled down first.
    """
    most = math.isqrt(MAX_PIXELS)
    if max(image.size) > most:
        h, w = scaled_size(image.height, image.width, most)
        image = image.resize((w, h), Image.Resampling.BILINEAR)
    longest = max(image.size)
    canvas = Image.new("RGB", (longest, longest), (127, 127, 127))
    canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return resize_to_square(canvas, side)


@dataclasses.dataclass(frozen=True)
class LargeScaleJitter:
    """One draw of X-SAM's large-scale jitter: the image scaled to fit a square of `scale` times the input's side, then
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
    def of(cls, height: int, width: int, side: int, scale: float) -> LargeScaleJitter:
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
