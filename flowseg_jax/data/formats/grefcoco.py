"""gRefCOCO: the RefCOCO layout whose refs name any number of objects, in `grefs(unc).json`.

Oddities handled here: `ann_id` is a list; an expression that refers to nothing has [-1] there and says so in `no_target`;
crowd regions are no targets. Refs without a target and refs with several are both kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from flowseg_jax.data.checks import MAX_CHARACTERS
from flowseg_jax.data.formats.reading import ImageFolders, field, read_json
from flowseg_jax.data.formats.refcoco import IMAGE_DIRS, Grouped, Instances, find_root, read_pickle
from flowseg_jax.data.records import Example, RecordErrors
from flowseg_jax.errors import UserError, quoted

_NEEDS = "a gRefCOCO layout needs instances.json and grefs(<split_by>).json side by side"
NO_TARGET = -1


def refs_file(root: Path, split_by: str) -> Path:
    """The refs: JSON as published, else a pickle, else a pickle under RefCOCO's name. UserError if there is none."""
    names = (f"grefs({split_by}).json", f"grefs({split_by}).p", f"refs({split_by}).p")
    for name in names:
        if (root / name).is_file():
            return root / name
    raise UserError(f"{root}: none of {', '.join(names)} is here; pass the folder that holds instances.json and one of them")


def _read_refs(path: Path) -> list[Any]:
    if path.suffix == ".p":
        return read_pickle(path)
    refs = read_json(path)
    if not isinstance(refs, list):
        raise UserError(f"{path}: expected a list of refs, got {type(refs).__name__}")
    return refs


def _object_ids(ref: dict[str, Any], where: str) -> list[int]:
    """The ids that a ref names, empty if it refers to nothing."""
    ids = field(ref, "ann_id", (list, int), where)
    ids = ids if isinstance(ids, list) else [ids]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool):
            raise UserError(f"{where}.ann_id: expected a list of whole numbers, got {quoted(ids)}")
    nothing = ids in ([], [NO_TARGET])
    if "no_target" in ref:
        if field(ref, "no_target", bool, where) != nothing:
            raise UserError(f"{where}: ann_id {quoted(ids)} contradicts no_target {ref['no_target']}")
    elif not ids:
        raise UserError(f"{where}.ann_id: an empty list; a ref without a target has [{NO_TARGET}] or no_target true")
    return [] if nothing else ids


class GRefCoco(Grouped):
    """An opened gRefCOCO layout: arguments, attributes and errors as those of `RefCoco`.

    `root` may hold the folder as `grefcoco`; `split_by` is unc by default.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split_by: str | None = None,
        images: str | Path | None = None,
        max_characters: int = MAX_CHARACTERS,
        problems: RecordErrors | None = None,
    ):
        problems = problems or RecordErrors()
        root = find_root(root, "grefcoco")
        path = refs_file(root, split_by or "unc")
        folders = ImageFolders.of(root, IMAGE_DIRS, images)
        super().__init__(Instances(root / "instances.json", folders, problems, _NEEDS), path)
        self.source = f"grefcoco layout {path.name}"
        self._special: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
        for i, ref in enumerate(_read_refs(path)):
            with problems.record():
                self._take(ref, f"{path}: refs[{i}]", path, max_characters)
        self.finish(problems)

    def _take(self, ref: Any, place: str, path: Path, max_characters: int) -> None:
        ref_id = field(ref, "ref_id", int, place)
        where = f"{path}: ref {ref_id}"
        image_id, split = self.instances.check_ref(ref, where, max_characters)
        ids = _object_ids(ref, where)
        for ann_id in ids:
            self.instances.check_object(ann_id, image_id, where)
        unique = list(dict.fromkeys(ids))
        targets = tuple(i for i in unique if not self.instances.annotations[i].get("iscrowd"))
        if unique and not targets:
            raise UserError(f"{where}.ann_id: nothing but crowd regions {quoted(unique)}; name an object or [{NO_TARGET}]")
        self.add(ref, ref_id, image_id, split, targets, where)
        special = self._special[split, image_id]
        special["crowd regions among the objects of a ref: not part of its target"] += len(unique) - len(targets)
        special["objects that a ref names twice: taken once"] += len(ids) - len(unique)

    def example(self, split: str, index: int, notes: Counter[str]) -> Example:
        """Image `index` of the split, in the order of their first refs; see `Instances.example`."""
        example = super().example(split, index, notes)
        notes.update(+self._special[split, example.image_id])
        return example
