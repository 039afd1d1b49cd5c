"""RefCOCO, RefCOCO+ and RefCOCOg in the layout of `lichengunc/refer`: `instances.json`, `refs(unc).p`, images.

Oddities handled here: the pickles come from Python 2 (latin-1); a ref's own `file_name` carries an annotation suffix, so the
image name is taken from `instances.json`; `sent` is the cleaned sentence; an object's mask is the union of its polygons.
Pickles are read with an unpickler that constructs nothing but plain containers, so a hostile file cannot run code.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from flowseg_jax.data import images, masks
from flowseg_jax.data.records import Annotation, Example, Expression
from flowseg_jax.errors import UserError, suggest

_IMAGE_DIRS = (
    "images",
    "images/train2014",
    "../images",
    "../images/train2014",
    "../images/mscoco/images/train2014",
    "train2014",
    "../train2014",
)
_SPLIT_ORDER = ("train", "val", "testA", "testB", "test")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}; a refs file holds plain lists and dicts only")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: missing; a RefCOCO layout needs instances.json and refs(<split_by>).p side by side") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def _read_refs(path: Path) -> list[Any]:
    try:
        with path.open("rb") as file:
            refs = _PlainUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: not a readable refs pickle ({error or type(error).__name__})") from None
    if not isinstance(refs, list):
        raise UserError(f"{path}: expected a list of refs, got {type(refs).__name__}")
    return refs


def _field(entry: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`entry[key]` after checking that it is there and of the right type."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object with fields, got {str(entry)[:40]!r}")
    if key not in entry:
        raise UserError(f"{where}: field {key!r} is missing")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = "/".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{where}.{key}: expected {names}, got {str(value)[:40]!r}")
    return value


def _by_id(table: Any, entries: str, path: Path) -> dict[int, dict[str, Any]]:
    result: dict[int, dict[str, Any]] = {}
    for i, entry in enumerate(_field(table, entries, list, str(path))):
        key = _field(entry, "id", int, f"{path}: {entries}[{i}]")
        if key in result:
            raise UserError(f"{path}: {entries}[{i}].id: {key} occurs twice")
        result[key] = entry
    return result


def refs_file(root: Path, split_by: str | None) -> Path:
    """The refs pickle to read: the asked one, or the only one (of several, unc before umd)."""
    found = {m.group(1): p for p in sorted(root.glob("refs(*).p")) if (m := re.fullmatch(r"refs\((.+)\)\.p", p.name))}
    if not found:
        raise UserError(f"{root}: no refs(<split_by>).p here; pass the folder that holds instances.json and refs(unc).p")
    if split_by is not None:
        if split_by not in found:
            raise UserError(f"{root}: no refs({split_by}).p{suggest(split_by, found)}")
        return found[split_by]
    for preferred in (*(("unc", "umd") if len(found) > 1 else ()), *found):
        if preferred in found:
            return found[preferred]
    raise AssertionError("unreachable: `found` is not empty")


class RefCoco:
    """An opened RefCOCO layout.

    Args:
        root: folder with `instances.json` and `refs(<split_by>).p`.
        split_by: which refs file; by default the only one (of several, unc before umd).
        images: folder of the images; by default the usual places inside and beside `root`.

    Attributes:
        categories: names, in the order of their ids.
        splits: names of the splits that the refs use.
        annotation_files: the files that were read (for digests).

    Raises:
        UserError: a file is missing or damaged, or a ref or sentence does not lead to an object. Images and masks are checked
            when `examples` gets to them.
    """

    def __init__(self, root: str | Path, *, split_by: str | None = None, images: str | Path | None = None):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such folder")
        self._instances_path = self.root / "instances.json"
        self._refs_path = refs_file(self.root, split_by)
        self.annotation_files = (self._instances_path, self._refs_path)
        self.source = f"refcoco layout {self._refs_path.name}"
        self._image_dirs = [Path(images)] if images is not None else [self.root / d for d in _IMAGE_DIRS]
        self._notes: Counter[str] = Counter()

        table = _read_json(self._instances_path)
        self._images = _by_id(table, "images", self._instances_path)
        annotations = _by_id(table, "annotations", self._instances_path)
        categories = _by_id(table, "categories", self._instances_path)
        self._category_index = {key: i for i, key in enumerate(sorted(categories))}
        self.categories = tuple(
            _field(categories[key], "name", str, f"{self._instances_path}: category {key}") for key in sorted(categories)
        )
        self._annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for key, annotation in annotations.items():
            where = f"{self._instances_path}: annotation {key}"
            image_id = _field(annotation, "image_id", int, where)
            if image_id not in self._images:
                raise UserError(f"{where}.image_id: there is no image {image_id}")
            if _field(annotation, "category_id", int, where) not in self._category_index:
                raise UserError(f"{where}.category_id: there is no category {annotation['category_id']}")
            _field(annotation, "segmentation", (list, dict), where)
            self._annotations[image_id].append(annotation)
        self._refs = self._check_refs(annotations)

    @property
    def splits(self) -> tuple[str, ...]:
        rank = {name: i for i, name in enumerate(_SPLIT_ORDER)}
        return tuple(sorted(self._refs, key=lambda s: (rank.get(s, len(rank)), s)))

    def _check_refs(self, annotations: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, list[dict[str, Any]]]]:
        """Groups the refs: split -> image id -> refs, after checking that each leads to an object of its image."""
        grouped: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for i, ref in enumerate(_read_refs(self._refs_path)):
            where = f"{self._refs_path}: refs[{i}]"
            ref_id = _field(ref, "ref_id", int, where)
            where = f"{self._refs_path}: ref {ref_id}"
            image_id = _field(ref, "image_id", int, where)
            if isinstance(ref.get("ann_id"), list):
                raise UserError(f"{where}.ann_id: a list of objects; this is gRefCOCO, which has a layout of its own")
            ann_id = _field(ref, "ann_id", int, where)
            if image_id not in self._images:
                raise UserError(f"{where}.image_id: {self._instances_path.name} has no image {image_id}")
            if ann_id not in annotations:
                raise UserError(
                    f"{where}.ann_id: expression without an object: {self._instances_path.name} has no annotation {ann_id}"
                )
            if annotations[ann_id]["image_id"] != image_id:
                raise UserError(
                    f"{where}.ann_id: annotation {ann_id} lies in image {annotations[ann_id]['image_id']}, not {image_id}"
                )
            sentences = _field(ref, "sentences", list, where)
            if not sentences:
                raise UserError(f"{where}.sentences: an object without an expression")
            for j, sentence in enumerate(sentences):
                spot = f"{where}.sentences[{j}]"
                _field(sentence, "sent_id", int, spot)
                if not _field(sentence, "sent", str, spot).strip():
                    raise UserError(f"{spot}.sent: an empty expression")
                if not isinstance(sentence.get("family", ""), str):
                    raise UserError(f"{spot}.family: expected text, got {sentence['family']!r}")
            grouped[_field(ref, "split", str, where)][image_id].append(ref)
        if not grouped:
            raise UserError(f"{self._refs_path}: holds no refs")
        return grouped

    def _of(self, split: str) -> dict[int, list[dict[str, Any]]]:
        if split not in self._refs:
            raise UserError(
                f"{self._refs_path}: unknown split {split!r}{suggest(split, self.splits)}; it has {', '.join(self.splits)}"
            )
        return self._refs[split]

    def size(self, split: str) -> int:
        """Number of images that the split's refs use."""
        return len(self._of(split))

    def notes(self) -> Mapping[str, int]:
        """What was left out so far, counted by reason."""
        return dict(self._notes)

    def _image_bytes(self, image_id: int) -> tuple[str, bytes, int, int]:
        entry = self._images[image_id]
        where = f"{self._instances_path}: image {image_id}"
        name = _field(entry, "file_name", str, where)
        height, width = (_field(entry, key, int, where) for key in ("height", "width"))
        relative = PurePosixPath(name)
        if not name or relative.is_absolute() or ".." in relative.parts:
            raise UserError(f"{where}.file_name: {name!r} leads out of the image folder")
        for folder in self._image_dirs:
            path = folder / relative
            if path.is_file():
                break
        else:
            raise UserError(f"{where}.file_name: image {name!r} is missing (looked in {', '.join(map(str, self._image_dirs))})")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        size = images.decode(data, name=str(path)).size
        if size != (width, height):
            raise UserError(
                f"{where}: height x width {height}x{width} differs from the image file's {size[1]}x{size[0]} ({path})"
            )
        return name, data, height, width

    def examples(self, split: str) -> Iterator[Example]:
        """Yields the split's images in the order of their first ref.

        Raises:
            UserError: an image is missing, damaged or of another size; a mask is damaged; a referred object has an empty mask.
        """
        for image_id, refs in self._of(split).items():
            name, data, height, width = self._image_bytes(image_id)
            referred = {ref["ann_id"] for ref in refs}
            annotations: list[Annotation] = []
            place: dict[int, int] = {}
            for entry in self._annotations[image_id]:
                where = f"{self._instances_path}: annotation {entry['id']}.segmentation"
                rle = masks.rasterise(entry["segmentation"], height, width, where)
                if rle is None:
                    if entry["id"] in referred:
                        raise UserError(f"{where}: empty mask, yet an expression refers to it")
                    self._notes["objects with an empty mask that no expression refers to"] += 1
                    continue
                place[entry["id"]] = len(annotations)
                category = self._category_index[entry["category_id"]]
                annotations.append(Annotation(entry["id"], category, rle, bool(entry.get("iscrowd", 0))))
            expressions = tuple(
                Expression(s["sent"].strip(), s["sent_id"], ref["ref_id"], place[ref["ann_id"]], s.get("family", ""))
                for ref in refs
                for s in ref["sentences"]
            )
            yield Example(image_id, name, height, width, data, tuple(annotations), expressions)
