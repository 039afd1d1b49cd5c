"""What all readers share: JSON, typed fields, tables by id, images by name. Every error names file and field."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flowseg_jax.data import images
from flowseg_jax.data.checks import check_storable, check_text, visible_text
from flowseg_jax.data.records import RecordErrors
from flowseg_jax.errors import UserError, brief, quoted
from flowseg_jax.system import paths

MOST_DRAWN = 20_000_000_000  # pixels of all objects of an image, each as large as the image


def root_folder(root: str | Path) -> Path:
    """The root of a layout. UserError unless it is a folder."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    return root


def visible(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match, by name, without hidden ones: `._a.jpg` is what macOS leaves beside `a.jpg`."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def read_json(path: Path, needs: str = "", notes: Counter[str] | None = None) -> Any:
    """The content of a JSON file; `needs` says in the error of a missing file what the layout should hold.

    With `notes`, a file that is not UTF-8 is read as cp1252 and counted there.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: missing{needs and f'; {needs}'}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            if notes is None:
                raise
            text = data.decode("cp1252")
            notes["annotation files in cp1252 instead of UTF-8"] += 1
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({brief(error)})") from None


def field(entry: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`entry[key]` after checking that it is there and of the right type; a number must be finite."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object with fields, got {quoted(entry)}")
    if key not in entry:
        raise UserError(f"{where}: field {key!r} is missing")
    value = entry[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = "/".join(k.__name__ for k in kinds)
        raise UserError(f"{where}.{key}: expected {names}, got {quoted(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}.{key}: {value} is no number")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 62:
        raise UserError(f"{where}.{key}: {quoted(value)} is out of range")
    return value


def crowd(entry: dict[str, Any], where: str) -> bool:
    """Whether an object is a crowd region; one that does not say so is none."""
    return flag(entry, "iscrowd", where) if "iscrowd" in entry else False


def flag(entry: dict[str, Any], key: str, where: str) -> bool:
    """A field that is 0 or 1."""
    value = field(entry, key, (int, bool), where)
    if value not in (0, 1):
        raise UserError(f"{where}.{key}: expected 0 or 1, got {value}")
    return bool(value)


def check_work(objects: int, height: int, width: int, where: str) -> None:
    """Raises a UserError where so many objects, each of which is drawn as large as the image, would take minutes."""
    if objects * height * width > MOST_DRAWN:
        raise UserError(f"{where}: {objects} objects in an image of {height}x{width} (height x width) are too many to draw")


def by_id(table: Any, entries: str, path: Path, problems: RecordErrors) -> dict[int, dict[str, Any]]:
    """The objects of the list `table[entries]` by their id; one that occurs twice is an error, the first one counts."""
    result: dict[int, dict[str, Any]] = {}
    for i, entry in enumerate(field(table, entries, list, str(path))):
        with problems.record():
            key = field(entry, "id", int, f"{path}: {entries}[{i}]")
            if key in result:
                raise UserError(f"{path}: {entries}[{i}].id: {key} occurs twice")
            result[key] = entry
    return result


def category_names(entries: dict[int, dict[str, Any]], path: Path) -> tuple[str, ...]:
    """The names of categories by id, in the order of their ids.

    A model is asked for categories by their names, so each must have one of its own. Spaces and characters without a shape
    make no difference between two names.

    Raises:
        UserError: no name, one that no model can read (`checks.check_text`), or one that another category has.
    """
    names: dict[int, str] = {}
    owner: dict[str, int] = {}
    for key in sorted(entries):
        where = f"{path}: category {key}"
        name = field(entries[key], "name", str, where)
        names[key] = check_text(name, f"{where}.name")
        if owner.setdefault(visible_text(name), key) != key:
            raise UserError(
                f"{where}.name: {name[:40]!r} is the name of category {owner[visible_text(name)]} too, "
                "and categories are told apart by their names; rename one of them"
            )
    return tuple(names.values())


def hashed_id(*parts: str) -> int:
    """A number of 62 bits that stands for the texts."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()[:8]) >> 2


class ImageFolders:
    """Where the images of a layout may lie; the first folder that has a name counts."""

    def __init__(self, folders: Iterable[Path]):
        self._folders = list(folders)

    @classmethod
    def of(cls, root: Path, usual: Sequence[str], images: str | Path | None) -> ImageFolders:
        """The folder that the user names, else the usual places in and beside `root`."""
        return cls([Path(images)] if images is not None else [root / place for place in usual])

    def find(self, name: str, where: str) -> Path:
        """The file of image `name`. UserError if it is missing or leads out of the folders; `where` names the field."""
        check_storable(name, where)
        for folder in self._folders:
            path = paths.inside(folder, name, where)
            try:
                if path.is_file():
                    return path
            except OSError as error:
                raise UserError(f"{where}: {quoted(name)} is no file name ({error.strerror})") from None
        raise UserError(f"{where}: image {quoted(name, 300)} is missing (looked in {', '.join(map(str, self._folders))})")


def image_bytes(path: Path, notes: Counter[str]) -> tuple[bytes, int, int]:
    """An image file's bytes, height and width, after decoding it once; what is special about it is counted in `notes`.

    Raises:
        UserError: it cannot be read or decoded.
    """
    data = images.read_bytes(path)
    image = images.decode(data, name=str(path), notes=notes)
    return data, image.height, image.width


def path_of(entry: dict[str, Any], folders: ImageFolders, where: str) -> Path:
    """The file of an entry of a COCO `images` table."""
    return folders.find(field(entry, "file_name", str, where), f"{where}.file_name")


def image_of(entry: dict[str, Any], folders: ImageFolders, where: str, notes: Counter[str]) -> tuple[str, bytes, int, int]:
    """(name, bytes, height, width) of an entry of a COCO `images` table, whose size must be the file's."""
    path = path_of(entry, folders, where)
    name = entry["file_name"]
    height, width = (field(entry, key, int, where) for key in ("height", "width"))
    data, *size = image_bytes(path, notes)
    if size != [height, width]:
        raise UserError(f"{where}: height x width {height}x{width} differs from the image file's {size[0]}x{size[1]} ({path})")
    return name, data, height, width
