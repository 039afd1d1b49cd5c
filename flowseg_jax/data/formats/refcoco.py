"""RefCOCO, RefCOCO+ and RefCOCOg in the layout of `lichengunc/refer`: `instances.json`, `refs(unc).p`, images.

Oddities handled here: the pickles come from Python 2 (latin-1); a ref's own `file_name` carries an annotation suffix, so the
image name is taken from `instances.json`; `sent` is the cleaned sentence; an object's mask is the union of its polygons.
Pickles are read by `plain_pickle`, so a hostile file can neither run code nor fill the memory.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowseg_jax.data import masks
from flowseg_jax.data.checks import MAX_CHARACTERS, check_storable, check_text
from flowseg_jax.data.formats import plain_pickle
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
from flowseg_jax.data.records import Annotation, Example, Expression, RecordErrors
from flowseg_jax.errors import UserError, brief, did_you_mean, listed
from flowseg_jax.system import paths

# How LISA, X-SAM and Sa2VA call the folder of each data set, and where each of them keeps the images.
FOLDERS = {
    "refcoco": ("refcoco",),
    "refcoco+": ("refcoco+", "refcocop", "refcoco_plus"),
    "refcocog": ("refcocog",),
    "grefcoco": ("grefcoco",),
}
IMAGE_DIRS = (
    "images",
    "images/train2014",
    "../images",
    "../images/train2014",
    "../images/mscoco/images/train2014",
    "train2014",
    "../train2014",
    "../coco2014/train2014",
    "../../glamm_data/images/coco2014/train2014",
)
_SPLIT_ORDER = ("train", "val", "testA", "testB", "test")
_NEEDS = "a RefCOCO layout needs instances.json and refs(<split_by>).p side by side"


def read_pickle(path: Path) -> list[Any]:
    """The refs of a pickle file, which may construct nothing but plain containers.

    Raises:
        UserError: it cannot be read, is damaged, wants to construct something, or is not a list.
    """
    try:
        refs = plain_pickle.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: not a readable refs pickle ({brief(error)})") from None
    if not isinstance(refs, list):
        raise UserError(f"{path}: expected a list of refs, got {type(refs).__name__}")
    return refs


def find_root(root: str | Path, name: str) -> Path:
    """The folder of data set `name`: `root` itself if it holds `instances.json`, else the one inside that peers call so."""
    root = root_folder(root)
    if not (root / "instances.json").is_file():
        for folder in FOLDERS[name]:
            if (root / folder / "instances.json").is_file():
                return root / folder
    return root


def refs_file(root: Path, split_by: str | None) -> Path:
    """The refs pickle to read: the given one, or the only one (of several, unc before umd)."""
    found = {m.group(1): p for p in sorted(root.glob("refs(*).p")) if (m := re.fullmatch(r"refs\((.+)\)\.p", p.name))}
    if not found:
        raise UserError(f"{root}: no refs(<split_by>).p here; pass the folder that holds instances.json and refs(unc).p")
    if split_by is not None:
        if split_by not in found:
            raise UserError(f"{root}: no refs({split_by}).p{did_you_mean(split_by, found)}")
        return found[split_by]
    for preferred in (*(("unc", "umd") if len(found) > 1 else ()), *found):
        if preferred in found:
            return found[preferred]
    raise AssertionError("unreachable: `found` is not empty")


class Instances:
    """An opened `instances.json` whose images referring expressions are about.

    Attributes:
        path: the file.
        annotations: by id; each lies in an image and has a category and a segmentation.
        categories: names, in the order of their ids.
    """

    def __init__(self, path: Path, folders: ImageFolders, problems: RecordErrors, needs: str = _NEEDS):
        self.path, self._folders = path, folders
        table = read_json(path, needs)
        self.images = by_id(table, "images", path, problems)
        categories = by_id(table, "categories", path, problems)
        self._category_index = {key: i for i, key in enumerate(sorted(categories))}
        self.categories = category_names(categories, path)
        self.annotations: dict[int, dict[str, Any]] = {}
        self._of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for key, annotation in by_id(table, "annotations", path, problems).items():
            with problems.record():
                where = f"{path}: annotation {key}"
                image_id = field(annotation, "image_id", int, where)
                if image_id not in self.images:
                    raise UserError(f"{where}.image_id: there is no image {image_id}")
                if field(annotation, "category_id", int, where) not in self._category_index:
                    raise UserError(f"{where}.category_id: there is no category {annotation['category_id']}")
                field(annotation, "segmentation", (list, dict), where)
                crowd(annotation, where)
                self.annotations[key] = annotation
                self._of_image[image_id].append(annotation)

    def check_ref(self, ref: Any, where: str, max_characters: int) -> tuple[int, str]:
        """(image id, split) of a ref after checking that its image exists and its sentences are sentences."""
        image_id = field(ref, "image_id", int, where)
        if image_id not in self.images:
            raise UserError(f"{where}.image_id: {self.path.name} has no image {image_id}")
        sentences = field(ref, "sentences", list, where)
        if not sentences:
            raise UserError(f"{where}.sentences: an object without an expression")
        for j, sentence in enumerate(sentences):
            spot = f"{where}.sentences[{j}]"
            field(sentence, "sent_id", int, spot)
            check_text(field(sentence, "sent", str, spot), f"{spot}.sent", max_characters)
            if "family" in sentence:
                check_storable(field(sentence, "family", str, spot), f"{spot}.family")
        return image_id, paths.check_name(field(ref, "split", str, where), f"{where}.split")

    def check_object(self, ann_id: int, image_id: int, where: str) -> None:
        """Raises a UserError unless annotation `ann_id` exists and lies in the image."""
        if ann_id not in self.annotations:
            raise UserError(f"{where}.ann_id: expression without an object: {self.path.name} has no annotation {ann_id}")
        if self.annotations[ann_id]["image_id"] != image_id:
            raise UserError(
                f"{where}.ann_id: annotation {ann_id} lies in image {self.annotations[ann_id]['image_id']}, not {image_id}"
            )

    def image_file(self, image_id: int) -> tuple[str, Path]:
        """Name and file of an image. UserError if it is missing."""
        path = path_of(self.images[image_id], self._folders, f"{self.path}: image {image_id}")
        return self.images[image_id]["file_name"], path

    def example(
        self, image_id: int, refs: Mapping[int, tuple[dict[str, Any], tuple[int, ...]]], notes: Counter[str]
    ) -> Example:
        """The image with all of its objects, and the sentences of `refs`: ref id -> (ref, ids of its annotations).

        Raises:
            UserError: the image is missing, damaged or of another size; a mask is damaged; a referred object's mask is empty.
        """
        name, data, height, width = image_of(self.images[image_id], self._folders, f"{self.path}: image {image_id}", notes)
        referred = {ann_id for _, targets in refs.values() for ann_id in targets}
        annotations: list[Annotation] = []
        place: dict[int, int] = {}
        for entry in self._of_image[image_id]:
            where = f"{self.path}: annotation {entry['id']}.segmentation"
            rle = masks.rasterise(entry["segmentation"], height, width, where)
            if rle is None:
                if entry["id"] in referred:
                    raise UserError(f"{where}: empty mask, yet an expression refers to it")
                notes["objects with an empty mask that no expression refers to: left out"] += 1
                continue
            place[entry["id"]] = len(annotations)
            category = self._category_index[entry["category_id"]]
            other = {}  # how evaluations draw it that do not take the union
            if entry["id"] in referred:
                parts = entry["segmentation"], height, width, where
                other = {"rle_single_cover": masks.single_cover(*parts), "rle_filled_polygons": masks.fill_polygons(*parts)}
            annotations.append(Annotation(entry["id"], category, rle, crowd(entry, where), **other))
        expressions = tuple(
            Expression(s["sent"].strip(), s["sent_id"], ref_id, tuple(sorted(place[t] for t in targets)), s.get("family", ""))
            for ref_id, (ref, targets) in refs.items()
            for s in ref["sentences"]
        )
        return Example(image_id, name, height, width, data, tuple(annotations), expressions)


Refs = dict[int, tuple[dict[str, Any], tuple[int, ...]]]


class Grouped:
    """Refs by split and image: what `RefCoco` and `GRefCoco` share once each ref is checked."""

    task = "referring"

    def __init__(self, instances: Instances, refs_path: Path):
        self.instances, self._refs_path = instances, refs_path
        self.categories = instances.categories
        self.annotation_files = (instances.path, refs_path)
        self._refs: dict[str, dict[int, Refs]] = defaultdict(lambda: defaultdict(dict))

    def add(self, ref: dict[str, Any], ref_id: int, image_id: int, split: str, targets: tuple[int, ...], where: str) -> None:
        """Takes in a checked ref. UserError if its id occurred in this image already."""
        refs = self._refs[split][image_id]
        if ref_id in refs:
            raise UserError(f"{where}.ref_id: {ref_id} occurs twice")
        refs[ref_id] = ref, targets

    def finish(self, problems: RecordErrors) -> None:
        """Raises a UserError if there are no refs, with the first of the problems that they had."""
        if not self._refs:
            raise problems.nothing_left(f"{self._refs_path}: holds no refs")
        self._refs = {split: dict(by_image) for split, by_image in self._refs.items()}
        self._order = {split: list(by_image) for split, by_image in self._refs.items()}

    @property
    def splits(self) -> tuple[str, ...]:
        rank = {name: i for i, name in enumerate(_SPLIT_ORDER)}
        return tuple(sorted(self._refs, key=lambda s: (rank.get(s, len(rank)), s)))

    def size(self, split: str) -> int:
        """Number of images that the split's refs use."""
        if split not in self._order:
            raise UserError(
                f"{self._refs_path}: unknown split {split!r}{did_you_mean(split, self.splits)}; it has {listed(self.splits)}"
            )
        return len(self._order[split])

    def image_file(self, split: str, index: int) -> tuple[str, Path]:
        """Name and file of image `index` of the split. UserError if it is missing."""
        return self.instances.image_file(self._order[split][index])

    def example(self, split: str, index: int, notes: Counter[str]) -> Example:
        """Image `index` of the split, in the order of their first refs; see `Instances.example`."""
        image_id = self._order[split][index]
        return self.instances.example(image_id, self._refs[split][image_id], notes)


class RefCoco(Grouped):
    """An opened RefCOCO layout.

    Args:
        root: folder with `instances.json` and `refs(<split_by>).p`, or the one that holds this folder.
        name: which data set, a key of `FOLDERS`, where `root` holds several.
        split_by: which refs file; by default the only one (of several, unc before umd).
        images: folder of the images; by default the usual places inside and beside the root.
        max_characters: that a sentence may have.
        problems: what is done about a damaged record.

    Attributes:
        categories: names, in the order of their ids.
        splits: names of the splits that the refs use.
        annotation_files: the files that were read (for digests).

    Raises:
        UserError: a file is missing or damaged, or a ref or sentence does not lead to an object. Images and masks are checked
            by `example`.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        name: str = "refcoco",
        split_by: str | None = None,
        images: str | Path | None = None,
        max_characters: int = MAX_CHARACTERS,
        problems: RecordErrors | None = None,
    ):
        problems = problems or RecordErrors()
        root = find_root(root, name)
        path = refs_file(root, split_by)
        super().__init__(Instances(root / "instances.json", ImageFolders.of(root, IMAGE_DIRS, images), problems), path)
        self.source = f"refcoco layout {path.name}"
        for i, ref in enumerate(read_pickle(path)):
            with problems.record():
                ref_id = field(ref, "ref_id", int, f"{path}: refs[{i}]")
                where = f"{path}: ref {ref_id}"
                image_id, split = self.instances.check_ref(ref, where, max_characters)
                if isinstance(ref.get("ann_id"), list):
                    raise UserError(f"{where}.ann_id: a list of objects; this is gRefCOCO, open it with the layout grefcoco")
                ann_id = field(ref, "ann_id", int, where)
                self.instances.check_object(ann_id, image_id, where)
                self.add(ref, ref_id, image_id, split, (ann_id,), where)
        self.finish(problems)
