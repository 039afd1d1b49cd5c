"""COCO panoptic: `annotations/panoptic_{train,val}2017.json`, a PNG of segment ids an image, and the images.

A PNG's pixel is the id of a segment: R + 256 G + 65536 B; 0 is void. The PNG folders lie in `annotations` or beside it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt32

from flowseg_jax.data import images as pixels
from flowseg_jax.data import masks
from flowseg_jax.data.formats.coco_instances import Coco
from flowseg_jax.data.formats.reading import ImageFolders, by_id, check_work, crowd, field, flag, image_of
from flowseg_jax.data.records import Annotation, Example, RecordErrors
from flowseg_jax.errors import UserError


def segment_ids(path: Path) -> UInt32[np.ndarray, "h w"]:
    """The segment ids that a PNG stores. UserError if it is damaged, or not an RGB PNG."""
    stored = pixels.load_stored(path)
    if stored.format != "PNG" or stored.mode != "RGB":
        raise UserError(f"{path}: expected an RGB PNG whose colours are segment ids, got {stored.format} {stored.mode}")
    rgb = np.asarray(stored, np.uint32)
    return rgb[..., 0] + (rgb[..., 1] << 8) + (rgb[..., 2] << 16)


def _some(ids: list[int]) -> str:
    return f"segment{'s' * (len(ids) > 1)} {', '.join(map(str, ids[:5]))}{', ...' * (len(ids) > 5)}"


class CocoPanoptic(Coco):
    """An opened COCO panoptic layout.

    Args:
        root: folder that holds `annotations`, or the one above it if that is called `coco`.
        images: folder of the images, or of the folders train2017 and val2017; by default the usual places.
        problems: what is done about a damaged record; its image is left out.

    Raises:
        UserError: a file is missing or damaged, or a segment has no image or category. Images and PNGs are checked by
            `example`.

    Attributes:
        things: of each category, whether it is a thing.
    """

    def __init__(self, root: str | Path, *, images: str | Path | None = None, problems: RecordErrors | None = None):
        super().__init__(root, "panoptic", None, images, problems or RecordErrors())

    def _read_categories(self, table: Any, path: Path, problems: RecordErrors) -> None:
        super()._read_categories(table, path, problems)
        found = by_id(table, "categories", path, RecordErrors(keep=True))  # what is wrong with the list has been said
        self.things = tuple(flag(found[key], "isthing", f"{path}: category {key}") for key in self._category_index)

    def _read_objects(self, table: Any, path: Path, images: dict[int, Any], problems: RecordErrors) -> dict[int, Any]:
        found: dict[int, tuple[str, np.ndarray] | None] = {}
        for i, entry in enumerate(field(table, "annotations", list, str(path))):
            with problems.record():
                image_id = self._image_id(entry, images, f"{path}: annotations[{i}]")
                where = f"{path}: annotation of image {image_id}"
                if image_id in found:
                    raise UserError(f"{path}: annotations[{i}].image_id: {image_id} has an annotation already")
                found[image_id] = None  # until it is checked
                name = field(entry, "file_name", str, where)
                rows: dict[int, tuple[int, int, bool]] = {}
                for j, segment in enumerate(field(entry, "segments_info", list, where)):
                    spot = f"{where}.segments_info[{j}]"
                    key = field(segment, "id", int, spot)
                    if not 0 < key < 1 << 24:
                        raise UserError(f"{spot}.id: {key} is no colour of a PNG (1 to 16777215; 0 is void)")
                    if key in rows:
                        raise UserError(f"{spot}.id: {key} occurs twice")
                    rows[key] = key, self._category(segment, spot), crowd(segment, spot)
                found[image_id] = name, np.array([*rows.values()], np.int32).reshape(-1, 3)
        return found

    def example(self, split: str, index: int, notes: Counter[str]) -> Example | None:
        """Image `index` of the split with its segments, crowd regions included; None if it has none.

        Raises:
            UserError: the image or PNG is missing, damaged or of another size, or the PNG's ids are not those of the JSON.
        """
        part = self._part(split)
        image_id = part.order[index]
        if image_id not in part.objects:
            notes["images without a panoptic annotation: left out"] += 1
            return None
        where = f"{part.path}: annotation of image {image_id}"
        name, data, height, width = image_of(part.images[image_id], part.folders, f"{part.path}: image {image_id}", notes)
        png, segments = part.objects[image_id]
        folder = f"panoptic_{split}{self.year}"
        path = ImageFolders([self.root / "annotations" / folder, self.root / folder]).find(png, f"{where}.file_name")
        ids = segment_ids(path)
        if ids.shape != (height, width):
            raise UserError(
                f"{where}.file_name: {path} is {ids.shape[0]}x{ids.shape[1]} (height x width), its image {height}x{width}"
            )
        painted, listed = {*np.unique(ids).tolist()} - {0}, {*segments[:, 0].tolist()}
        if listed - painted:
            raise UserError(f"{where}.segments_info: {_some(sorted(listed - painted))} without a pixel in {path}")
        if painted - listed:
            raise UserError(f"{path}: pixels of {_some(sorted(painted - listed))}, missing in {where}.segments_info")
        check_work(len(segments), height, width, f"{where}.segments_info")
        if not len(segments):
            notes["images without a segment: left out"] += 1
            return None
        annotations = tuple(
            Annotation(key, category, masks.encode((ids == key).astype(np.uint8)), bool(is_crowd))
            for key, category, is_crowd in segments.tolist()
        )
        return Example(image_id, name, height, width, data, annotations)
