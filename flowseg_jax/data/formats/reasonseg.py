"""ReasonSeg as LISA publishes it: train/, val/ and test/ with NAME.jpg beside NAME.json, and explanatory/train.json.

Oddities handled here: some JSON files are cp1252; an image has several questions about one target; outlines may be marked to
be ignored, and which of two overlapping outlines counts depends on their areas; some images have no target at all. Outlines lie
on the picture as LISA's reader (cv2.imread) shows it, which turns and mirrors it as its EXIF says; so does this reader, unless
the file says that they were drawn on the pixels as they are stored.
"""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from flowseg_jax.data import images, masks
from flowseg_jax.data.checks import MAX_CHARACTERS, check_text
from flowseg_jax.data.formats.reading import check_work, field, hashed_id, image_bytes, read_json, root_folder, visible
from flowseg_jax.data.records import Annotation, Example, Expression, RecordErrors
from flowseg_jax.errors import UserError, did_you_mean, listed, quoted
from flowseg_jax.types import PAD

SPLITS = ("train", "val", "test")
TARGET, IGNORE = 1, 255


def find_root(root: str | Path) -> Path:
    """The folder that holds the splits: `root` or the folder ReasonSeg inside. UserError if neither has one."""
    root = root_folder(root)
    for folder in (root, root / "ReasonSeg"):
        if any((folder / split).is_dir() for split in SPLITS):
            return folder
    raise UserError(f"{root}: none of the folders {', '.join(SPLITS)} is here; pass the folder that holds them")


def _pairs(folder: Path, problems: RecordErrors) -> list[str]:
    images, jsons = ({path.stem for path in visible(folder, f"*.{ending}")} for ending in ("jpg", "json"))
    names = []
    for name in sorted(images | jsons):
        with problems.record():
            if name != name.encode(errors="ignore").decode():
                raise UserError(f"{folder}: the file name {quoted(name)} is not UTF-8; rename it")
            if name not in jsons:
                raise UserError(f"{folder / name}.json: missing, yet there is {name}.jpg; every image needs its questions")
            if name not in images:
                raise UserError(
                    f"{folder / name}.jpg: missing, yet there is {name}.json; every file of questions needs its image"
                )
            names.append(name)
    if not names:
        raise problems.nothing_left(f"{folder}: holds no NAME.jpg with its NAME.json; fill or remove the folder")
    return names


def _points(shape: dict[str, Any], height: int, width: int, where: str) -> np.ndarray:
    points = field(shape, "points", list, where)
    if not points:
        raise UserError(f"{where}.points: an outline without points")
    reach = 2 * max(height, width)  # annotators overshoot the border; what is images away is damage
    for i, point in enumerate(points):
        if not isinstance(point, list) or len(point) != 2 or any(type(v) not in (int, float) for v in point):
            raise UserError(f"{where}.points[{i}]: expected [x, y], got {quoted(point)}")
        if not all(-reach <= v <= side + reach for v, side in zip(point, (width, height), strict=True)):  # so is NaN
            raise UserError(f"{where}.points[{i}]: {quoted(point)} is not a position in a {width}x{height} image")
    return np.array(points, dtype=np.int32)


def _paint(mask: UInt8[np.ndarray, "h w"], points: np.ndarray, value: int) -> None:
    cv2.polylines(mask, [points], True, value, 1)
    cv2.fillPoly(mask, [points], value)


def paint(shapes: list[Any], height: int, width: int, where: str, notes: Counter[str]) -> UInt8[np.ndarray, "h w"]:
    """The outlines of an image painted as LISA does: from the largest to the smallest, each over those before it.

    Args:
        shapes: the field `shapes`: objects with `label` and `points`.
        height, width: the image's size, pixels.
        where: file and field, for the message.
        notes: counts outlines of fewer than three points.

    Returns:
        TARGET, IGNORE or 0 at each pixel.

    Raises:
        UserError: a shape is damaged.
    """
    outlines = []
    for i, shape in enumerate(shapes):
        label = field(shape, "label", str, f"{where}[{i}]").lower()
        if label == "flag":
            continue
        points = _points(shape, height, width, f"{where}[{i}]")
        if len(points) < 3:
            notes["outlines of one or two points: painted as a dot or a line"] += 1
        outlines.append((points, IGNORE if "ignore" in label else TARGET))
    check_work(len(outlines), height, width, where)
    areas = []
    for points, _ in outlines:
        alone = np.zeros((height, width), np.uint8)
        _paint(alone, points, 1)
        areas.append(np.count_nonzero(alone))
    mask = np.zeros((height, width), np.uint8)
    for i in np.argsort(areas, kind="stable")[::-1]:  # of equal areas the first one of the file is painted last, as in LISA
        _paint(mask, *outlines[i])
    return mask


def _texts(entry: Any, where: str, max_characters: int) -> list[str]:
    texts = field(entry, "text", (list, str), where)
    texts = [texts] if isinstance(texts, str) else texts
    if not texts:
        raise UserError(f"{where}: text: no question about the image")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{where}: text[{i}]: expected a question, got {quoted(text)}")
    return [check_text(text, f"{where}: text[{i}]", max_characters) for i, text in enumerate(texts)]


def _same_size(entry: dict[str, Any], height: int, width: int, where: str) -> bool:
    """Whether the size that the annotators saw, as far as the file gives it, is this one."""
    return all(
        field(entry, key, int, where) == size
        for key, size in (("imageHeight", height), ("imageWidth", width))
        if entry.get(key) is not None
    )


def _picture(path: Path, entry: dict[str, Any], where: str, notes: Counter[str]) -> tuple[bytes, int, int]:
    """The image that the outlines lie on: encoded, height, width. One that its EXIF turns is turned and stored as PNG."""
    found: Counter[str] = Counter()
    data, height, width = image_bytes(path, found)
    how = "stored"
    if images.ROTATED in found:
        turned = images.decode(data, name=str(path), exif=True)
        if _same_size(entry, turned.height, turned.width, where) or not _same_size(entry, height, width, where):
            buffer, how = io.BytesIO(), "turned by its EXIF"
            turned.save(buffer, "PNG")
            data, height, width = buffer.getvalue(), turned.height, turned.width
            del found[images.ROTATED]
            found["images turned as their EXIF says"] += 1
    if not _same_size(entry, height, width, where):
        raise UserError(
            f"{where}: imageHeight x imageWidth {entry.get('imageHeight')}x{entry.get('imageWidth')} differs from the "
            f"image file's {height}x{width} as it is {how}; put the image that was annotated there"
        )
    notes.update(found)
    return data, height, width


class ReasonSeg:
    """An opened ReasonSeg layout.

    An image has annotation 0, its target, and annotation 1 if pixels are to be ignored. One without target pixels is left out.
    Questions are the expressions: id is their place in the file, family is "long" for sentences and "short" for phrases.
    An explanation answers the question that it was written for, or all questions of its image if it was written for none.

    Args:
        root: folder with train/, val/ and test/ (those that exist are the splits), or the one that holds it as ReasonSeg.
        max_characters: that a question or an explanation may have.
        problems: what is done about a damaged record.

    Attributes:
        splits: names of the splits.
        annotation_files: every NAME.json and explanatory/train.json, where it is used (for digests).

    Raises:
        UserError: no split, an image without its JSON file or the reverse, or explanations that cannot be used. What is in the
            images and their JSON files is checked by `example`.
    """

    task = "reasoning"
    categories: tuple[str, ...] = ()
    source = "reasonseg layout"

    def __init__(self, root: str | Path, *, max_characters: int = MAX_CHARACTERS, problems: RecordErrors | None = None):
        problems = problems or RecordErrors()
        self._max_characters = max_characters
        self._root = find_root(root)
        self._names = {s: _pairs(self._root / s, problems) for s in SPLITS if (self._root / s).is_dir()}
        self.splits = tuple(self._names)
        files = [self._root / split / f"{name}.json" for split, names in self._names.items() for name in names]
        self._explanations: dict[str, list[tuple[str, str]]] = {}  # image of train -> (question, explanation)
        path = self._root / "explanatory" / "train.json"
        if "train" in self._names and path.is_file():
            files.append(path)
            self._read_explanations(path, problems)
        self.annotation_files = tuple(files)

    def _read_explanations(self, path: Path, problems: RecordErrors) -> None:
        entries = read_json(path)
        if not isinstance(entries, list):
            raise UserError(f"{path}: expected a list of explanations, got {type(entries).__name__}")
        known = {f"{name}.jpg" for name in self._names["train"]}
        for i, entry in enumerate(entries):
            with problems.record():
                where = f"{path}: [{i}]"
                name, query, outputs = (field(entry, key, str, where) for key in ("image", "query", "outputs"))
                if name not in known:
                    raise UserError(f"{where}.image: {quoted(name)} is not in train; add the image or remove the entry")
                outputs = check_text(outputs, f"{where}.outputs", self._max_characters)
                self._explanations.setdefault(name, []).append((query.strip().lower(), outputs))

    def size(self, split: str) -> int:
        """Number of images of the split, those without a target included."""
        if split not in self._names:
            raise UserError(
                f"{self._root}: unknown split {split!r}{did_you_mean(split, self.splits)}; it has {listed(self.splits)}"
            )
        return len(self._names[split])

    def image_file(self, split: str, index: int) -> tuple[str, Path]:
        """Name and file of image `index` of the split."""
        name = f"{self._names[split][index]}.jpg"
        return name, self._root / split / name

    def example(self, split: str, index: int, notes: Counter[str]) -> Example | None:
        """Image `index` of the split in the order of the names; None if it has no target."""
        name = self._names[split][index]
        path = self._root / split / f"{name}.json"
        entry = read_json(path, notes=notes)
        texts = _texts(entry, str(path), self._max_characters)
        family = "long" if field(entry, "is_sentence", bool, str(path)) else "short"
        shapes = field(entry, "shapes", list, str(path))
        data, height, width = _picture(path.with_name(f"{name}.jpg"), entry, str(path), notes)
        mask = paint(shapes, height, width, f"{path}: shapes", notes)
        if not (mask == TARGET).any():
            notes["images without a target region: left out"] += 1
            return None
        annotations = [Annotation(0, PAD, masks.encode(mask == TARGET))]
        if (mask == IGNORE).any():
            annotations.append(Annotation(1, PAD, masks.encode(mask == IGNORE), ignore=True))
        answers = self._answers(split, f"{name}.jpg", texts, notes)
        expressions = tuple(Expression(t, i, 0, (0,), family, a) for i, (t, a) in enumerate(zip(texts, answers, strict=True)))
        number = hashed_id(f"{split}/{name}")  # it does not depend on which others there are
        return Example(number, f"{name}.jpg", height, width, data, tuple(annotations), expressions)

    def _answers(self, split: str, file_name: str, texts: list[str], notes: Counter[str]) -> list[str]:
        explanations = self._explanations.get(file_name) if split == "train" else None
        if not explanations:
            return [""] * len(texts)
        by_query = dict(explanations)
        if len(by_query) < len(explanations):
            notes["images with two explanations of the same question: the last one counts"] += 1
        unasked = by_query.keys() - {text.lower() for text in texts}
        if len(unasked) == len(by_query):
            notes["images whose explanation answers none of their questions: given to all of them"] += 1
            return [explanations[-1][1]] * len(texts)
        if unasked:
            notes["explanations of a question that is not asked, beside one that is: not used"] += len(unasked)
        return [by_query.get(text.lower(), "") for text in texts]
