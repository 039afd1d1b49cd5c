"""Your own data: a `.jsonl` file, one object of an image a line, as `jsonl.schema.json` describes it.

    {"image": "photos/1.jpg", "expressions": ["the left cup"], "mask": [[10, 10, 60, 10, 60, 80]]}
    {"image": "photos/1.jpg", "expressions": ["the cat"], "mask": null}
    {"image": "photos/2.jpg", "expressions": ["a dog", "the dog"], "mask": "masks/2.png", "category": "dog", "split": "val"}

All lines of an image make one example, so an image belongs to one split. Masks must be drawn on the pixels as the file stores
them: a phone stores a rotation beside the pixels (EXIF), and it is not applied.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from PIL import Image

from flowseg_jax.data import images as pixels
from flowseg_jax.data import masks
from flowseg_jax.data.checks import MAX_CHARACTERS, check_text
from flowseg_jax.data.formats.reading import ImageFolders, hashed_id, image_bytes, visible
from flowseg_jax.data.records import Annotation, Example, Expression, RecordErrors
from flowseg_jax.errors import UserError, brief, did_you_mean, listed, quoted
from flowseg_jax.system import paths

SCHEMA = "jsonl.schema.json"
SOFT = 128  # of a PNG mask in greys or colours: from this value on a pixel is the object's
_LONGEST = 160  # characters of a message of the schema, which quotes the value
_MOST_BYTES = 1 << 24  # of a line


@functools.cache
def validator() -> Draft202012Validator:
    """Checks one parsed line."""
    schema = json.loads(importlib.resources.files(__package__).joinpath(SCHEMA).read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def _message(error: ValidationError) -> str:
    message = error.message
    if error.validator == "pattern":  # a regular expression says little to most readers
        message = f"expected {error.schema['title']}, got {quoted(error.instance)}"
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    place = error.json_path.removeprefix("$").removeprefix(".")
    return f"{place}: {message}" if place else message


def parse(line: bytes, where: str) -> dict[str, Any]:
    """One line as an object that the schema allows. UserError, with `where` before it, if it is none."""
    if len(line) > _MOST_BYTES:
        raise UserError(f"{where}: a line of {len(line)} bytes; the most is {_MOST_BYTES}")
    try:
        entry = json.loads(line.decode("utf-8-sig"))
        error = best_match(validator().iter_errors(entry))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); a line is one whole object") from None
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({brief(error)})") from None
    if error is not None:
        raise UserError(f"{where}: {_message(error)}")
    return entry


def find_file(root: str | Path) -> Path:
    """The file itself, or the only one of a folder."""
    root = Path(root)
    if not root.is_dir():
        if not root.is_file():
            raise UserError(f"{root}: no such file or folder")
        return root
    found = visible(root, "*.jsonl")
    if len(found) != 1:
        raise UserError(f"{root}: {listed([p.name for p in found]) or 'no *.jsonl'} here; pass the .jsonl file itself")
    return found[0]


class Jsonl:
    """An opened `.jsonl` file.

    Args:
        root: the file, or a folder that holds exactly one.
        images: folder that the images' paths are relative to; by default the file's. Masks stay relative to the file.
        max_characters: that an expression may have.
        problems: what is done about a damaged line.

    Raises:
        UserError: a line is not as the schema says, a text in it cannot be used (`checks`), an id occurs twice, or an image
            occurs in two splits. Images and masks are checked by `example`.
    """

    task = "referring"

    def __init__(
        self,
        root: str | Path,
        *,
        images: str | Path | None = None,
        max_characters: int = MAX_CHARACTERS,
        problems: RecordErrors | None = None,
    ):
        problems = problems or RecordErrors()
        self.path = find_file(root)
        self.source = f"jsonl {self.path.name}"
        self.annotation_files = (self.path,)
        self._folders = ImageFolders.of(self.path.parent, (".",), images)
        self._masks = ImageFolders([self.path.parent])
        # split -> image -> (number, id, number of the first sentence, content) of its lines
        self._lines: dict[str, dict[str, list[tuple[int, int, int, dict[str, Any]]]]] = {}
        sentences = 0
        seen: dict[int, int] = {}
        homes: dict[str, tuple[str, int]] = {}
        for number, line in self._read():
            with problems.record():
                where = f"{self.path}:{number}"
                entry = parse(line, where)
                for j, text in enumerate(entry["expressions"]):
                    check_text(text, f"{where}: expressions[{j}]", max_characters)
                check_text(_category(entry), f"{where}: category")
                # Two ways to write a path must not hide that it is one image.
                image, split = str(PurePosixPath(entry["image"])), entry.get("split", "train")
                paths.check_name(split, f"{where}: split")
                key = entry.get("id", number)
                key = hashed_id(key) if isinstance(key, str) else int(key)
                if seen.setdefault(key, number) != number:
                    name = quoted(entry["id"]) if "id" in entry else f"{number} (the line's number)"
                    raise UserError(f"{where}: id: {name} is the id of line {seen[key]} too; give each line its own")
                home, first = homes.setdefault(image, (split, number))
                if home != split:
                    raise UserError(
                        f"{where}: split: {quoted(image)} is in {quoted(split)} here and in {quoted(home)} in line {first}; "
                        "an image belongs to one split, or the evaluation would see what was trained on"
                    )
                self._lines.setdefault(split, {}).setdefault(image, []).append((number, key, sentences, entry))
                sentences += len(entry["expressions"])
        if not self._lines:
            raise problems.nothing_left(f"{self.path}: holds no usable line")
        self._order = {split: list(by_image) for split, by_image in self._lines.items()}
        lines = [e for by_image in self._lines.values() for group in by_image.values() for *_, e in group]
        self.categories = tuple(sorted({_category(e) for e in lines if e["mask"] is not None}))
        self._category_index = {name: i for i, name in enumerate(self.categories)}

    def _read(self) -> Iterator[tuple[int, bytes]]:
        """(number, line) of the lines that are not blank."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        for number, line in enumerate(data.split(b"\n"), 1):  # not `splitlines`: JSON strings may hold other line ends
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                yield number, line

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._lines)

    def size(self, split: str) -> int:
        """Number of images of the split."""
        if split not in self._order:
            raise UserError(f"{self.path}: unknown split {split!r}{did_you_mean(split, self.splits)}")
        return len(self._order[split])

    def image_file(self, split: str, index: int) -> tuple[str, Path]:
        """Name and file of image `index` of the split. UserError if it is missing."""
        self.size(split)
        image = self._order[split][index]
        return image, self._folders.find(image, f"{self.path}:{self._lines[split][image][0][0]}: image")

    def example(self, split: str, index: int, notes: Counter[str]) -> Example:
        """Image `index` of the split, in the order of their first lines, with the objects of all of its lines.

        Raises:
            UserError: the image or a mask is missing, damaged, empty or of another size.
        """
        self.size(split)
        image = self._order[split][index]
        lines = self._lines[split][image]
        data, height, width = image_bytes(self.image_file(split, index)[1], notes)
        annotations: list[Annotation] = []
        expressions: list[Expression] = []
        for number, key, first, entry in lines:
            targets: tuple[int, ...] = ()
            if entry["mask"] is not None:
                rle = self._mask(entry["mask"], height, width, f"{self.path}:{number}: mask", notes)
                targets = (len(annotations),)
                annotations.append(Annotation(key, self._category_index[_category(entry)], rle))
            expressions += [Expression(t.strip(), i, key, targets) for i, t in enumerate(entry["expressions"], first)]
        return Example(hashed_id(image), image, height, width, data, tuple(annotations), tuple(expressions))

    def _mask(self, mask: Any, height: int, width: int, where: str, notes: Counter[str]) -> str:
        """The run-length counts of a line's mask."""
        if isinstance(mask, str):
            path = self._masks.find(mask, where)
            inside = _stored(path, notes)
            if inside.shape != (height, width):
                raise UserError(
                    f"{where}: {path} is {inside.shape[0]}x{inside.shape[1]} (height x width), its image {height}x{width}"
                )
            rle = masks.encode(inside.astype(np.uint8)) if inside.any() else None
        else:
            parts = [mask] if isinstance(mask, list) and not isinstance(mask[0], list) else mask
            rle = masks.rasterise(parts, height, width, where)
        if rle is None:
            raise UserError(f"{where}: empty, yet expressions refer to it; null says that they refer to nothing")
        return rle


def _category(entry: dict[str, Any]) -> str:
    return entry.get("category", "object").strip()


def _stored(path: Path, notes: Counter[str]) -> Bool[np.ndarray, "h w"]:
    """The object of a PNG mask, by the pixels as they are stored: palette indices, 16 bits. Alpha does not count.

    A mask of one value is that value. Of several, grey or coloured ones that reach `SOFT` are drawn, as smooth edges or a
    passage through JPEG make them: what reaches `SOFT` is the object. In all others the values are numbers, and the object is
    all that is not 0. `notes` counts what is not plainly a mask.
    """
    picture = pixels.load_stored(path)
    if picture.format != "PNG":
        raise UserError(f"{path}: expected a PNG mask, got {picture.format}, which does not keep pixels exactly")
    values = np.asarray(picture)
    if picture.mode in ("LA", "RGBA"):
        alpha, values = values[..., -1], values[..., :-1]
        if alpha.min() != alpha.max():
            notes["PNG masks whose alpha channel differs from pixel to pixel: it is not read"] += 1
    if values.ndim == 3:
        values = values.max(axis=-1)
    countable = values.astype(np.int32) if values.dtype.itemsize == 2 else values  # PIL counts 8 and 32 bits
    counts = {value: n for n, value in Image.fromarray(countable).getcolors(1 << 16) if value}
    if len(counts) > 1 and values.dtype == np.uint8 and picture.mode != "P" and max(counts) >= SOFT:
        notes[f"PNG masks of several values: {SOFT} and more is the object"] += 1
        notes[f"pixels of 1 to {SOFT - 1} in them, which are not the object"] += sum(n for v, n in counts.items() if v < SOFT)
        notes[f"pixels of {SOFT} to 254 in them, which are the object"] += sum(n for v, n in counts.items() if SOFT <= v < 255)
        return values >= SOFT
    if len(counts) > 1:
        notes["PNG masks of several numbers: all that are not 0 are the object"] += 1
    elif not counts.keys() <= {1, 255, 65535}:
        notes["PNG masks of one value that is neither 1 nor the largest: it is the object"] += 1
    return values > 0
