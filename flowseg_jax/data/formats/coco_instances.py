"""COCO detection: `annotations/instances_{train,val}2017.json` (or 2014) and images; also what both COCO readers share.

Oddities handled here: crowd regions are uncompressed run-length codes; a few outlines cover no pixel; about one image in a
hundred has no object; the images of 2014 are called COCO_train2014_*.jpg.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from flowseg_jax.data import masks
from flowseg_jax.data.formats.reading import (
    ImageFolders,
    by_id,
    category_names,
    crowd,
    field,
    image_of,
    path_of,
    read_json,
    root_folder,
)
from flowseg_jax.data.records import Annotation, Example, RecordErrors
from flowseg_jax.errors import UserError, did_you_mean

IMAGE_DIRS = (
    "{}",
    "images/{}",
    "../{}",
    "../images/{}",
    "coco/{}",
    "../coco/{}",
    "../coco/images/{}",
    "../coco2017/{}",
    "images",
)
_SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True)
class Part:
    """One split: its annotation file, its images by id, the objects of each image, and the ids in the file's order."""

    path: Path
    images: dict[int, dict[str, Any]]
    folders: ImageFolders
    objects: dict[int, Any]
    order: list[int]


def find_files(root: str | Path, kind: str, year: str | int | None) -> tuple[Path, str, dict[str, Path]]:
    """(folder that holds `annotations`, year, split -> `<kind>_<split><year>.json`), by default of the newest year.

    `root` is that folder, the one above it if that is called `coco`, or the folder `annotations` itself.
    """
    root = root_folder(root)
    for folder in (root, root / "coco", *([root.absolute().parent] if root.absolute().name == "annotations" else [])):
        found: dict[str, dict[str, Path]] = {}
        for split in _SPLITS:
            for path in sorted((folder / "annotations").glob(f"{kind}_{split}*.json")):
                if match := re.fullmatch(rf"{kind}_{split}(\d{{4}})", path.stem):
                    found.setdefault(match[1], {})[split] = path
        if found:
            chosen = max(found) if year is None else str(year)
            if chosen not in found:
                raise UserError(f"{folder}: no {kind} annotations of the year {chosen}{did_you_mean(chosen, found)}")
            return folder, chosen, found[chosen]
    raise UserError(f"{root}: no annotations/{kind}_{{train,val}}2017.json here; pass the folder that holds annotations/")


class Coco(abc.ABC):
    """What the COCO readers share: files, splits, categories. A subclass reads the objects and makes the examples."""

    task = "generic"

    def __init__(self, root: str | Path, kind: str, year: str | int | None, images: str | Path | None, problems: RecordErrors):
        self.root, self.year, files = find_files(root, kind, year)
        self.annotation_files = tuple(files.values())
        self.source = f"coco {kind} {self.year}"
        self._category_index: dict[int, int] = {}
        self.categories: tuple[str, ...] = ()
        self._parts: dict[str, Part] = {}
        for split, path in files.items():
            table = read_json(path)
            self._read_categories(table, path, problems)
            # Only what is used is kept: the files of the train split have hundreds of megabytes.
            entries = {
                key: {name: entry[name] for name in ("file_name", "height", "width") if name in entry}
                for key, entry in by_id(table, "images", path, problems).items()
            }
            objects = self._read_objects(table, path, entries, problems)
            order = [key for key in entries if objects.get(key, ()) is not None]
            if not order:
                raise problems.nothing_left(f"{path}: holds no usable image")
            place = f"{split}{self.year}"
            given = [Path(images) / place, Path(images)] if images is not None else []
            folders = ImageFolders(given or [self.root / usual.format(place) for usual in IMAGE_DIRS])
            self._parts[split] = Part(path, entries, folders, objects, order)

    def _read_categories(self, table: Any, path: Path, problems: RecordErrors) -> None:
        found = by_id(table, "categories", path, problems)
        index = {key: i for i, key in enumerate(sorted(found))}
        names = category_names(found, path)
        if not names:
            raise problems.nothing_left(f"{path}: categories: holds no category")
        if self.categories and (index, names) != (self._category_index, self.categories):
            raise UserError(f"{path}: categories: differ from those of {self.annotation_files[0]}; use files of one release")
        self._category_index, self.categories = index, names

    @abc.abstractmethod
    def _read_objects(self, table: Any, path: Path, images: dict[int, Any], problems: RecordErrors) -> dict[int, Any]:
        """The objects by image id. None for an image with a damaged record: it is left out, as its labels are incomplete."""

    def _image_id(self, entry: Any, images: dict[int, Any], where: str) -> int:
        image_id = field(entry, "image_id", int, where)
        if image_id not in images:
            raise UserError(f"{where}.image_id: there is no image {image_id}")
        return image_id

    def _category(self, entry: Any, where: str) -> int:
        category = field(entry, "category_id", int, where)
        if category not in self._category_index:
            raise UserError(f"{where}.category_id: there is no category {category}")
        return self._category_index[category]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._parts)

    def _part(self, split: str) -> Part:
        if split not in self._parts:
            raise UserError(f"{self.root}: unknown {self.source} split {split!r}{did_you_mean(split, self.splits)}")
        return self._parts[split]

    def size(self, split: str) -> int:
        """Number of images of the split, those without an object included."""
        return len(self._part(split).order)

    def image_file(self, split: str, index: int) -> tuple[str, Path]:
        """Name and file of image `index` of the split. UserError if it is missing."""
        part = self._part(split)
        image_id = part.order[index]
        path = path_of(part.images[image_id], part.folders, f"{part.path}: image {image_id}")
        return part.images[image_id]["file_name"], path


class CocoInstances(Coco):
    """An opened COCO detection layout.

    Args:
        root: folder that holds `annotations`, or the one above it if that is called `coco`.
        images: folder of the images, or of the folders train2017 and val2017; by default the usual places.
        year: of the annotations; by default the newest that is there.
        problems: what is done about a damaged record; its image is left out.

    Raises:
        UserError: a file is missing or damaged, or an object has no image or category. Images and masks are checked by
            `example`.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        images: str | Path | None = None,
        year: str | int | None = None,
        problems: RecordErrors | None = None,
    ):
        super().__init__(root, "instances", year, images, problems or RecordErrors())

    def _read_objects(self, table: Any, path: Path, images: dict[int, Any], problems: RecordErrors) -> dict[int, Any]:
        found: dict[int, list[tuple[int, int, bool, str]] | None] = {}
        for key, entry in by_id(table, "annotations", path, problems).items():
            with problems.record():
                where = f"{path}: annotation {key}"
                image_id = self._image_id(entry, images, where)
                objects = found.setdefault(image_id, [])
                found[image_id] = None  # until this object is checked
                category, is_crowd = self._category(entry, where), crowd(entry, where)
                # As text, because lists of numbers take four times the memory.
                try:
                    outline = json.dumps(field(entry, "segmentation", (list, dict), where))
                except RecursionError:
                    raise UserError(f"{where}.segmentation: nested too deeply") from None
                if objects is not None:
                    objects.append((key, category, is_crowd, outline))
                    found[image_id] = objects
        return found

    def example(self, split: str, index: int, notes: Counter[str]) -> Example | None:
        """Image `index` of the split with its objects, crowd regions included; None if it has none.

        Raises:
            UserError: the image is missing, damaged or of another size, or a mask is damaged.
        """
        part = self._part(split)
        image_id = part.order[index]
        if image_id not in part.objects:
            notes["images without an object: left out"] += 1
            return None
        name, data, height, width = image_of(part.images[image_id], part.folders, f"{part.path}: image {image_id}", notes)
        annotations = []
        for key, category, is_crowd, outline in part.objects[image_id]:
            where = f"{part.path}: annotation {key}.segmentation"
            rle = masks.rasterise(json.loads(outline), height, width, where)
            if rle is None:
                notes["objects with an empty mask: left out"] += 1
            else:
                annotations.append(Annotation(key, category, rle, is_crowd))
        if not annotations:
            notes["images without an object: left out"] += 1
            return None
        return Example(image_id, name, height, width, data, tuple(annotations))
