"""Damaged pictures: valid files of every format that PIL reads, and bare headers, changed at random.

Each is a clear error, changes nothing, or is another picture that is exactly what PIL alone makes of the file. Sixty thousand:

    python -m pytest tests/data/test_image_fuzz.py -m slow
"""

from __future__ import annotations

import io
import random
import struct
import time
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFile

from flowseg_jax.data import images
from flowseg_jax.errors import UserError

SIZE = (24, 17)  # width, height
CPU_SECONDS = 20  # of one picture; more is a hang
PNG = b"\x89PNG\r\n\x1a\n"


# --- valid files


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.copy().save(buffer, kind, **options)  # PIL remembers the options of the last format
    return buffer.getvalue()


def seeds() -> dict[str, bytes]:
    """Valid files by name. They are made by PIL where it writes the format, else here."""
    width, height = SIZE
    y, x = np.mgrid[:height, :width]
    rgb = Image.fromarray(np.stack([x * 10, y * 14, (x + y) * 5 + 40], -1).astype(np.uint8))
    grey, palette, bits = rgb.convert("L"), rgb.quantize(16), rgb.convert("1")
    wide = Image.fromarray((np.asarray(grey).astype(np.uint16) << 8) + 7)
    floats = Image.fromarray(np.asarray(grey).astype(np.float32))
    alpha = rgb.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "a camera", 72.0
    other = rgb.transpose(Image.Transpose.ROTATE_180)

    def several():
        return {"save_all": True, "append_images": [other.copy()]}

    found = {
        "avif": saved(rgb, "AVIF"),
        "blp": saved(palette, "BLP"),
        "bmp": saved(rgb, "BMP"),
        "bmp palette": saved(palette, "BMP"),
        "dds": saved(alpha, "DDS"),
        "dds dxt1": saved(alpha, "DDS", pixel_format="DXT1"),
        "dib": saved(rgb, "DIB"),
        "eps": saved(rgb, "EPS"),
        "gif": saved(palette, "GIF"),
        "gif frames": saved(palette, "GIF", save_all=True, append_images=[other.quantize(16)]),
        "icns": saved(alpha.resize((32, 32)), "ICNS"),
        "ico": saved(alpha, "ICO", sizes=[SIZE]),
        "ico bmp": saved(alpha, "ICO", sizes=[SIZE], bitmap_format="bmp"),
        "im": saved(rgb, "IM"),
        "jpeg": saved(rgb, "JPEG", exif=exif),
        "jpeg progressive": saved(rgb, "JPEG", progressive=True),
        "jpeg cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "jpeg2000": saved(rgb, "JPEG2000"),
        "jpeg2000 16": saved(wide, "JPEG2000"),
        "mpo": saved(rgb, "MPO", **several()),
        "msp": saved(bits, "MSP"),
        "pcx": saved(rgb, "PCX"),
        "png": saved(rgb, "PNG", exif=exif),
        "png 16": saved(wide, "PNG"),
        "png bits": saved(bits, "PNG"),
        "png palette": saved(palette, "PNG", transparency=0),
        "png frames": saved(rgb, "PNG", **several()),
        "pbm": saved(bits, "PPM"),
        "pgm 16": saved(wide, "PPM"),
        "ppm": saved(rgb, "PPM"),
        "ppm plain": b"P3 3 2 255\n" + b" ".join(b"%d" % (i * 13) for i in range(18)) + b"\n",
        "pfm": saved(floats, "PPM"),
        "qoi": saved(rgb, "QOI"),
        "sgi": saved(rgb, "SGI"),
        "spider": saved(floats, "SPIDER"),
        "tga": saved(rgb, "TGA"),
        "tga rle": saved(rgb, "TGA", compression="tga_rle"),
        "tiff": saved(rgb, "TIFF", exif=exif),
        "tiff 16": saved(wide, "TIFF"),
        "tiff floats": saved(floats, "TIFF", compression="tiff_lzw"),
        "tiff pages": saved(rgb, "TIFF", **several()),
        "webp": saved(rgb, "WEBP", exif=exif),
        "webp frames": saved(rgb, "WEBP", lossless=True, **several()),
        "xbm": saved(bits, "XBM"),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4"):
        found[f"tiff {compression}"] = saved(bits if compression == "group4" else rgb, "TIFF", compression=compression)
    raw, planes = rgb.tobytes(), b"".join(band.tobytes() for band in rgb.split())
    found["cur"] = found["ico bmp"].replace(b"\0\0\1\0", b"\0\0\2\0", 1)
    found["dcx"] = struct.pack("<4I", 0x3ADE68B1, 16, 0, 0) + found["pcx"]
    cards = ("SIMPLE  =                    T", "BITPIX  = 8", "NAXIS   = 2", f"NAXIS1  = {width}", f"NAXIS2  = {height}", "END")
    found["fits"] = "".join(f"{card:80}" for card in cards).encode().ljust(2880) + grey.tobytes()
    found["gbr"] = struct.pack(">5I", 20, 1, width, height, 1) + grey.tobytes()
    found["psd"] = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, 8, 3) + bytes(12) + bytes(2) + planes
    found["sun"] = struct.pack(">8I", 0x59A66A95, width, height, 24, len(raw), 3, 0, 0) + raw
    lines = [f'"{"ab" * (width // 2)}"' for _ in range(height)]
    head = f'/* XPM */\nstatic char *x[] = {{\n"{width} {height} 2 1",\n"a c #ff0000",\n"b c #00ff40",\n'
    found["xpm"] = (head + ",\n".join(lines) + "\n};\n").encode()
    found["xvthumb"] = b"P7 332\n#END_OF_COMMENTS\n%d %d 255\n" % SIZE + grey.tobytes()
    found["ftex"] = b"FTEX" + struct.pack("<7i", 1, width, height, 1, 1, 1, 32) + struct.pack("<i", len(raw)) + raw
    found["fli"] = struct.pack("<IHHHHHHI", 128, 0xAF11, 1, width, height, 8, 3, 70).ljust(128, b"\0") + struct.pack(
        "<IHH8xIHB", 27, 0xF1FA, 1, 11, 13, 0
    )
    return found


HEADERS = (  # that make PIL try a format
    b"AVIF\0\0\0\x1cftypavif",
    b"BLP1",
    b"BLP2",
    b"BUFR",
    b"DDS \x7c\0\0\0",
    b"FTC\0",
    b"GRIB\0\0\0\1",
    b"\x89HDF\r\n\x1a\n",
    b"\0\0\0\0\0\0\0\4",  # MCIDAS
    b"\0\0\1\xb3",  # MPEG
    b"DanM",
    b"LinS",
    b"\200\350\0\0",  # PIXAR
    b"\x1c\x02\x14\0\1\0",  # IPTC
    b"\xd7\xcd\xc6\x9a\0\0",  # WMF
    b"\1\0\0\0",
    b"%!PS-Adobe-3.0\n",
    b"II*\0\x08\0\0\0",
    b"MM\0*\0\0\0\x08",
    b"II+\0\x08\0\0\0",
    b"\xff\xd8\xff\xe1",
    b"\0\0\0\x0cjP  \r\n\x87\n",
    b"\xff\x4f\xff\x51",
    b"8BPS\0\1",
    b"icns",
    PNG + b"\0\0\0\rIHDR",
    b"RIFF\x40\0\0\0WEBPVP8 ",
    b"GIF89a",
    b"qoif",
    b"#define im_width 9\n",
    b"Image type: L\r\nImage size (x*y): 9*9\r\n",
)


# --- changes


def with_sums(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums again, as far as they can be told."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : end - 4]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at = end
    return out + data[at:]


def change(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """(changed file, whether its checksums, if it has any, were made right again)."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not out:
            break
        reach = len(out) if rng.random() < 0.5 else min(len(out), 80)
        at, kind = rng.randrange(reach), rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:  # a number of two or four bytes
            value = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\1\0\0"))
            length = rng.choice((2, 4))
            out[at : at + length] = value[:length]
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + rng.randrange(1, 12)]
        elif kind == 5:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 12)))
        else:
            end = rng.randrange(at, len(out) + 1)
            out[at:at] = out[at:end][:200]
    summed = data.startswith(PNG) and rng.random() < 0.5
    return (with_sums(bytes(out)) if summed else bytes(out)), summed


# --- what becomes of it


def alone(data: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """(values as PIL reads them, RGB as PIL makes it) of a file; None where PIL refuses it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            image.load()
            return np.asarray(image), np.asarray(image.convert("RGB"))
    except Exception:
        return None


def is_faithful(picture: np.ndarray, values: np.ndarray, rgb: np.ndarray) -> bool:
    """Whether a picture is what a file's values say: as PIL converts it, or of wide values all by one rule and not black."""
    if values.dtype in (np.uint8, bool):
        return np.array_equal(picture, rgb)
    wide, grey = values.astype(np.float64), picture[..., 0].astype(np.float64)
    rules = (wide, wide // 16, wide // 256, np.floor(wide + 0.5), np.floor(wide * 255 + 0.5))
    black = wide.max() > 0 and grey.max() < 16
    return not black and (picture == picture[..., :1]).all() and min(np.abs(rule - grey).max() for rule in rules) <= 1


def outcome(data: bytes, before: np.ndarray | None, *, summed: bool, stored: bool) -> str:
    started = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a line of the decoder's would be a surprise on the screen
            got = images.decode_stored(data, name="x") if stored else images.decode(data, name="x", notes=Counter())
    except UserError as error:
        said = str(error)
        if not said.startswith("x: ") or "\n" in said or len(said) > 300:
            return f"trace: {said!r}"
        found = "clear error"
    except Exception as error:
        return f"trace: {type(error).__name__} {error}"
    else:
        theirs = alone(data)
        picture = np.asarray(got)
        if not stored and before is not None and np.array_equal(picture, before):
            found = "no effect"
        elif theirs is None:  # what stands beside the pixels of a PNG was left out; what is left must be the picture
            found = "silent change"
        elif before is not None and data.startswith(PNG) and not summed and not stored:
            found = "silent change"  # the checksums said it
        elif stored:
            found = "another picture" if picture.tobytes() == theirs[0].tobytes() else "silent change"  # NaN is NaN
        else:
            found = "another picture" if is_faithful(picture, *theirs) else "silent change"
    return "hang" if time.process_time() - started > CPU_SECONDS else found


def fuzz(count: int, seed: int, most: int) -> tuple[Counter, list[str]]:
    """(outcomes, what to look at) of so many changed files of at most `most` pixels."""
    files = seeds()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", most)
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
        pictures: dict[str, np.ndarray] = {}
        for name, data in files.items():
            try:
                pictures[name] = np.asarray(images.decode(data, name=name))
            except UserError:
                assert name in ("eps", "fli"), name
        found, bad, names = Counter(), [], [*files]
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            if number % 8 == 7:
                name, summed = "header", False
                head = rng.choice(HEADERS)
                data = head + bytes(rng.choice((0, 1, 255, rng.randrange(256))) for _ in range(rng.randrange(400)))
            else:
                name = names[number % len(names)]
                data, summed = change(files[name], rng)
            what = outcome(data, pictures.get(name), summed=summed, stored=rng.random() < 0.2)
            found[what.partition(":")[0]] += 1
            if what.partition(":")[0] in ("trace", "hang", "silent change"):
                bad.append(f"case {number} of seed {seed}, {name}: {what}")
    return found, bad


def test_a_sample_of_damaged_pictures():
    found, bad = fuzz(1600, seed=0, most=2_000_000)
    assert not bad, bad[:5]
    assert found["clear error"] > 400 and found["no effect"] > 50 and found["another picture"] > 50, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sixty_thousand_damaged_pictures(capsys):
    found, bad = fuzz(60_000, seed=1, most=images.MAX_PIXELS)
    with capsys.disabled():
        print("\n" + ", ".join(f"{count:,} {what}" for what, count in found.most_common()))
    assert not bad, bad[:20]
    assert sum(found.values()) == 60_000


def test_every_seed_is_read_as_pil_reads_it():
    """So that the fuzzer starts from whole files, all formats but two that PIL cannot show without help among them."""
    readable = {name for name, data in seeds().items() if alone(data) is not None}
    formats = {Image.open(io.BytesIO(data)).format for name, data in seeds().items() if name in readable}
    assert len(formats) >= 30, sorted(formats)


def test_the_judge_notices(monkeypatch):
    """A picture that is not the file's, a black one, an exception and a line of two are each told from a clear error."""
    files = seeds()
    png, wide = files["png"], files["png 16"]
    before = np.asarray(images.decode(png, name="x"))
    assert outcome(png, before, summed=False, stored=False) == "no effect"
    for fake, data, want in (
        (lambda *_a, **_k: Image.new("RGB", SIZE, (1, 2, 3)), png, "silent change"),
        (lambda *_a, **_k: Image.new("RGB", SIZE), wide, "silent change"),
        (lambda *_a, **_k: 1 / 0, png, "trace"),
        (lambda *_a, **_k: (_ for _ in ()).throw(UserError("x: two\nlines")), png, "trace"),
    ):
        monkeypatch.setattr(images, "decode", fake)
        assert outcome(data, before, summed=True, stored=False).startswith(want)
