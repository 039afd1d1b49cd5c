"""What becomes of pictures that are not 8-bit JPEGs and PNGs: wide values, damaged metadata, extreme shapes, several frames."""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from flowseg_jax.cli.data import main
from flowseg_jax.data import images
from flowseg_jax.data.formats import open_layout
from flowseg_jax.errors import UserError
from flowseg_jax.inference import inputs
from tests.helpers import minillava, minireasonseg

RAMP = np.linspace(0, 1, 20 * 30).reshape(20, 30)


def encoded(picture, kind, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(data: bytes) -> tuple[np.ndarray, Counter]:
    notes: Counter[str] = Counter()
    rgb = np.asarray(images.decode(data, name="x", notes=notes))
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0], notes


def twelve_bits(values: np.ndarray) -> bytes:
    """A TIFF that says that it has 12 bits a sample, two of them in three bytes."""
    flat = values.astype(np.uint32).ravel()
    pairs = flat[0::2] << 12 | flat[1::2]
    packed = b"".join(int(p).to_bytes(3, "big") for p in pairs)
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 200), (277, 1), (278, height), (279, len(packed))]
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8) + body + bytes(4)
    return head.ljust(200, b"\0") + packed


def png16(values: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits a sample; colour type 2 (RGB), 4 (grey and alpha) or 6 (RGBA). Values [h, w, samples]."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- values of more than 8 bits

WIDE = {
    "16 bits, png": (lambda: encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"), "divided by 256"),
    "12 bits in 16, png": (lambda: encoded(Image.fromarray((RAMP * 4095).astype(np.uint16)), "PNG"), "divided by 16"),
    "8 bits in 16, png": (lambda: encoded(Image.fromarray((RAMP * 255).astype(np.uint16)), "PNG"), "taken as they are"),
    "16 bits, tiff": (lambda: encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "TIFF"), "divided by 256"),
    "12 bits, tiff": (lambda: twelve_bits((RAMP * 4095).astype(np.uint16)), "divided by 16"),
    "32 bits, tiff": (lambda: encoded(Image.fromarray((RAMP * 65535).astype(np.int32)), "TIFF"), "divided by 256"),
    "16 bits, pgm": (lambda: b"P5 30 20 65535\n" + (RAMP * 65535).astype(">u2").tobytes(), "divided by 256"),
    "floats to 1": (lambda: encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "multiplied by 255"),
    "floats to 255": (lambda: encoded(Image.fromarray((RAMP * 255).astype(np.float32)), "TIFF"), "rounded"),
}


@pytest.mark.parametrize("case", WIDE)
def test_wide_values_become_the_same_eight_bits(case):
    make, note = WIDE[case]
    got, notes = grey(make())
    assert np.abs(got.astype(int) - RAMP * 255).max() <= 1
    assert got.min() == 0 and got.max() == 255
    assert [note in words for words in notes] == [True]


@pytest.mark.parametrize(
    "values",
    [
        RAMP * 1.5,  # as 0..255 it would be black
        RAMP * 0.01,
        RAMP * 256.0,
        RAMP - 0.5,
        np.where(RAMP > 0.5, np.nan, RAMP),
        np.where(RAMP > 0.5, np.inf, RAMP),
        (RAMP * 15).astype(np.int32),
        (RAMP * 70_000).astype(np.int32),
        (RAMP * 300).astype(np.int32) - 5,
    ],
    ids=["1.5", "0.01", "256", "negative", "nan", "inf", "up to 15", "70000", "below 0"],
)
def test_values_that_no_rule_fits_are_an_error_not_a_black_picture(values):
    data = encoded(Image.fromarray(values.astype(np.float32 if values.dtype.kind == "f" else np.int32)), "TIFF")
    with pytest.raises(UserError, match=r"^a.tif: pixels are (floats|whole numbers) from .* which no rule turns into colours"):
        images.decode(data, name="a.tif")


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_nothing_but_zeros_is_black(kind):
    assert not grey(encoded(Image.fromarray(np.zeros((4, 4), kind)), "TIFF"))[0].any()


@pytest.mark.parametrize(("colour", "samples"), [(2, 3), (4, 2), (6, 4)])
def test_colours_of_sixteen_bits(colour, samples):
    values = np.repeat(RAMP[..., None] * 65535, samples, -1).astype(np.uint16)
    got, notes = grey(png16(values, colour))
    np.testing.assert_array_equal(got, values[..., 0] >> 8)
    assert notes == {images.SIXTEEN: 1}
    dark = values >> 4  # 12 bits: PIL keeps the upper half of the 16, nearly nothing
    dark[..., -1] |= 0xFFFF if colour == 4 else 0
    with pytest.raises(UserError, match="a.png: colours of 16 bits of which the upper 8 are black; save it with 8 bits"):
        images.decode(png16(dark, colour), name="a.png")
    with pytest.raises(UserError, match="a.png: 16 bits a colour, of which only 8 can be read"):  # a mask must be exact
        images.decode_stored(png16(values, colour), name="a.png")


def test_an_image_in_memory_follows_the_same_rules():
    got = images.to_rgb(Image.fromarray((RAMP * 65535).astype(np.uint16)), name="x")
    assert np.abs(np.asarray(got)[..., 1].astype(int) - RAMP * 255).max() <= 1
    with pytest.raises(UserError, match="x: pixels are floats"):
        images.to_rgb(Image.fromarray((RAMP * 900).astype(np.float32)), name="x")
    lazy = Image.open(io.BytesIO(encoded(Image.new("RGB", (64, 64), (9, 9, 9)), "PNG")[:80]))
    with pytest.raises(UserError, match="x: truncated or damaged image"):
        images.to_rgb(lazy, name="x")


# --- metadata

TURNED = (0x0112, 3, 1, struct.pack("<HH", 6, 0))  # by 90 degrees


def with_exif(*entries, extra=b"") -> bytes:
    """A JPEG of 64x48 with these EXIF entries (tag, type, count, value)."""
    jpeg = encoded(Image.new("RGB", (64, 48), (200, 40, 40)), "JPEG")
    fields = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4) + extra
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (with_exif(TURNED, (0x011A, 10, 1, struct.pack("<I", 38)), extra=struct.pack("<ii", -1, 0)), (48, 64)),  # -1/0
        (with_exif(TURNED, (0x011A, 2, 4, b"abc\0")), (48, 64)),  # a text in a number's place
        (with_exif((0x0112, 2, 4, b"six\0")), (64, 48)),
        (with_exif((0x0112, 3, 1, struct.pack("<HH", 99, 0))), (64, 48)),
        (with_exif((0x0112, 5, 1, struct.pack("<I", 9999))), (64, 48)),  # leads out of the EXIF
    ],
)
def test_only_the_orientation_counts_and_exif_that_cannot_be_read_is_none(data, size):
    assert images.decode(data, name="x", exif=True).size == size
    notes: Counter[str] = Counter()
    assert images.decode(data, name="x", notes=notes).size == (64, 48)
    assert notes == ({images.ROTATED: 1} if size == (48, 64) else {})


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pil_turns_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8)), "PNG", exif=exif)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(images.decode(data, name="x", exif=True)), np.asarray(want))


def large_texts():
    """PNGs of whole pixels whose texts or profile PIL refuses."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    plain = encoded(picture, "PNG")

    def beside(kind, body, place=33, sum_of=None):
        chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ bool(sum_of))
        return plain[:place] + chunk + plain[place:]

    def text(**options):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("k", "x" * 2_000_000, **options)
        return encoded(picture, "PNG", pnginfo=info)

    end = len(plain) - 12
    return {
        "profile": beside(b"iCCP", b"big\0\0" + zlib.compress(bytes(1_500_000))),
        "compressed": beside(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 1_500_000)),
        "after the pixels": beside(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 1_500_000), end),
        "international": text(zip=True),
        "many": beside(b"tEXt", b"k\0" + b"x" * 2_000_000),
        "sum": beside(b"tEXt", b"k\0hello", sum_of="another text"),
        "exif": encoded(picture, "PNG", pnginfo=raw_profile()),
    }, picture


def raw_profile():
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n   12\nzzzz\n")
    return info


def test_what_is_written_beside_the_pixels_of_a_png_does_not_matter(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 1_500_000)  # PIL's is 64 MiB
    files, picture = large_texts()
    for name, data in files.items():
        for exif in (False, True):
            np.testing.assert_array_equal(np.asarray(images.decode(data, name=name, exif=exif)), np.asarray(picture), name)


def test_a_png_whose_pixels_are_damaged_stays_damaged():
    data = large_texts()[0]["profile"]
    with pytest.raises(UserError, match="truncated or damaged"):
        images.decode(data[:-400], name="x")


def test_a_changed_pixel_of_a_png_is_told_by_its_checksum():
    """PIL stops reading when it has all rows, before the checksum of the last piece: it would show another picture."""
    data = encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG")
    first, last = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    silent = 0
    for at in range(first, last, 3):
        changed = data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :]
        try:
            silent += not np.array_equal(Image.open(io.BytesIO(changed)), Image.open(io.BytesIO(data)))
        except Exception:
            pass
        for decode in (images.decode, images.decode_stored):
            with pytest.raises(UserError, match=r"^x: (damaged image \(a checksum of its pixels|truncated or damaged)"):
                decode(changed, name="x")
    assert silent > 5  # for PIL


# --- errors


@pytest.mark.parametrize(
    "error",
    [
        struct.error("short read"),
        RuntimeError("codec\n  configuration error"),
        NotImplementedError("unsupported"),
        SyntaxError("bad"),
        OverflowError("big"),
        MemoryError(),
        KeyError(7),
        RecursionError("deep"),
        ZeroDivisionError("0"),
        AssertionError(),
        SystemError("tile cannot extend"),
        OSError("broken data stream"),
        Exception("x" * 5000),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("place", ["open", "load", "convert"])
def test_whatever_a_decoder_raises_is_one_clear_line(monkeypatch, error, place):
    data = encoded(Image.new("L", (4, 4)), "PNG")

    def fail(*_args, **_options):
        raise error

    owner = {"open": Image, "load": PngImagePlugin.PngImageFile, "convert": Image.Image}[place]
    monkeypatch.setattr(owner, place, fail)
    with pytest.raises(UserError, match=r"^a.png: (truncated or damaged image \(|the image takes more memory)") as caught:
        images.decode(data, name="a.png")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 220


def test_no_warning_of_the_decoder_reaches_the_user():
    data = with_exif((0x0112, 5, 1, struct.pack("<I", 9999)))
    palette = Image.new("P", (4, 4))
    palette.info["transparency"] = bytes(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.decode(data, name="x", exif=True)
        images.decode(encoded(palette, "PNG", transparency=bytes([0, 9])), name="x")


def test_a_program_is_not_run():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\n%%EOF\n"
    with pytest.raises(UserError, match="a.eps: an EPS file is a program, which is not run; save it as PNG"):
        images.decode(eps, name="a.eps")


def test_only_files_of_a_size_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe.png: cannot read the image \(it is no file\)"):
        images.load(tmp_path / "pipe.png")
    (tmp_path / "a.png").write_bytes(bytes(11))
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 10)
    with pytest.raises(UserError, match=r"a.png: 11 bytes, more than an image may have \(10\)"):
        images.load(tmp_path / "a.png")


# --- several frames, hidden files


def frames(kind):
    pictures = [Image.new("RGB", (8, 6), color) for color in ((200, 0, 0), (0, 200, 0))]
    return encoded(pictures[0], kind, save_all=True, append_images=pictures[1:])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read_and_counted(kind):
    notes: Counter[str] = Counter()
    got = np.asarray(images.decode(frames(kind), name="x", notes=notes))
    assert (got[..., 0] > 150).all() and (got[..., 1] < 50).all() and notes == {images.FRAMES: 1}


def own_set(root, data, name="a.png"):
    (root / name).write_bytes(data)
    line = {"image": name, "expressions": ["x"], "mask": [[1, 1, 5, 1, 5, 5]]}
    (root / "own.jsonl").write_text(json.dumps(line) + "\n")
    return root


@pytest.mark.parametrize(
    ("data", "note"),
    [(frames("GIF"), images.FRAMES), (WIDE["12 bits in 16, png"][0](), "values up to 4095: divided by 16")],
    ids=["frames", "12 bits"],
)
def test_validate_and_prepare_note_it(tmp_path, capsys, data, note):
    root = own_set(tmp_path, data)
    assert main(["validate", "jsonl", str(root)]) == 0
    assert note in capsys.readouterr().out
    assert main(["prepare", "--layout", "jsonl", "--source", str(root), "--out", str(tmp_path / "out")]) in (0, None)
    assert note in json.loads((tmp_path / "out" / "metadata.json").read_text())["notes"].__str__()


def test_hidden_files_are_no_pictures(tmp_path):
    root = own_set(tmp_path, encoded(Image.new("RGB", (8, 6)), "PNG"))
    double = b"\0\5\x16\7\0\2\0\0Mac OS X        "
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "._own.jsonl", ".hidden.jpg"):
        (root / name).write_bytes(double)
    assert [job.image.name for job in inputs.jobs_from_images(root, ["x"], "--text")] == ["a.png"]
    assert open_layout("jsonl", root).size("train") == 1


def test_hidden_files_are_no_pictures_of_other_layouts(tmp_path):
    double = b"\0\5\x16\7\0\2\0\0Mac OS X        "
    reason, chats = minireasonseg.write(tmp_path / "reason"), minillava.write(tmp_path / "llava")
    size = open_layout("reasonseg", reason).size("train")
    for path in [*reason.rglob("*.jpg"), *reason.rglob("*.json"), *chats.glob("*.json")]:
        path.with_name(f"._{path.name}").write_bytes(double)
    assert open_layout("reasonseg", reason).size("train") == size
    assert open_layout("llava", chats).size("train") == len(minillava.SAMPLES)
