"""On-disk data sets: one module per format, all opened by `open_layout`."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowseg_jax.data.records import DatasetReader, RecordErrors
from flowseg_jax.errors import UserError, did_you_mean

# name -> (module, class, options that the name implies). Modules are imported when they are needed.
_READERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "refcoco": ("refcoco", "RefCoco", {"name": "refcoco"}),
    "refcoco+": ("refcoco", "RefCoco", {"name": "refcoco+"}),
    "refcocog": ("refcoco", "RefCoco", {"name": "refcocog"}),
    "grefcoco": ("grefcoco", "GRefCoco", {}),
    "reasonseg": ("reasonseg", "ReasonSeg", {}),
    "coco-panoptic": ("coco_panoptic", "CocoPanoptic", {}),
    "coco-instances": ("coco_instances", "CocoInstances", {}),
    "llava": ("llava", "Llava", {}),
    "jsonl": ("jsonl", "Jsonl", {}),
}
ALIASES = {
    "refcocop": "refcoco+",
    "refcoco_plus": "refcoco+",
    "coco_panoptic": "coco-panoptic",
    "coco_instances": "coco-instances",
}
LAYOUTS = tuple(_READERS)


def layout_name(name: str) -> str:
    """The name of a layout, aliases resolved. UserError for an unknown one."""
    name = ALIASES.get(name, name)
    if name not in _READERS:
        raise UserError(f"unknown layout {name!r}{did_you_mean(name, [*_READERS, *ALIASES])}; known: {', '.join(_READERS)}")
    return name


def reader(name: str) -> Callable[..., DatasetReader]:
    """The reader of a layout: called with the root, `problems` and the options that it has."""
    module, cls, options = _READERS[layout_name(name)]
    found = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    return functools.partial(found, **options)


def open_layout(name: str, root: str | Path, problems: RecordErrors | None = None, **options: Any) -> DatasetReader:
    """Opens a data set on disk.

    Args:
        name: a name of `LAYOUTS` or an alias.
        root: its folder.
        problems: what is done about damaged records; None: the first is raised.
        **options: of the reader, e.g. `split_by`, `images`; None values count as not given.

    Raises:
        UserError: an unknown layout or option, or annotation files that cannot be used.
    """
    make = reader(name)
    given = {key: value for key, value in options.items() if value is not None}
    known = inspect.signature(make).parameters
    for key in given:
        if key not in known:
            raise UserError(f"layout {layout_name(name)} has no option {key!r}{did_you_mean(key, known)}")
    return make(root, problems=problems, **given)
