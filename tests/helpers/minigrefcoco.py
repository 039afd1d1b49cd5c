"""A miniature gRefCOCO layout with the oddities of the real one, for tests.

The images and objects of minirefcoco, plus objects 13 (image 1) and 42 (image 4). Refs: 1 has three objects out of order, 2
one object, 3 none, 4 an object and a crowd region, 5 (val) none, 6 (testA) two objects and 7 (testA) one whose id is no list.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

from tests.helpers import minirefcoco


def tables():
    """(instances, refs) of the layout, to be damaged at will."""
    instances, _ = minirefcoco.tables()
    for key, image_id, polygon in ((13, 1, minirefcoco.box(0, 30, 10, 40)), (42, 4, minirefcoco.box(60, 60, 90, 90))):
        instances["annotations"].append(
            {"id": key, "image_id": image_id, "category_id": 3, "segmentation": [polygon], "iscrowd": 0, "area": 100.0}
        )

    def ref(ref_id, image_id, ann_id, split, *sents):
        sentences = [
            {"sent": s, "raw": s, "sent_id": ref_id * 10 + i, "tokens": s.split(), "exist": ann_id != [-1]}
            for i, s in enumerate(sents)
        ]
        return {
            "ref_id": ref_id,
            "ann_id": ann_id,
            "image_id": image_id,
            "category_id": [-1] if ann_id == [-1] else [3] * len(ann_id),
            "split": split,
            "file_name": f"COCO_train2014_{image_id:012d}.jpg",
            "no_target": ann_id == [-1],
            "sentences": sentences,
            "sent_ids": [s["sent_id"] for s in sentences],
        }

    refs = [
        ref(1, 1, [13, 11, 12], "train", "all of them"),
        ref(2, 1, [12], "train", "the cat", "the Cat"),
        ref(3, 1, [-1], "train", "the zebra"),
        ref(4, 5, [51, 52], "train", "cat and the crowd"),
        ref(5, 3, [-1], "val", "a red bus"),
        ref(6, 4, [41, 42], "testA", "both things"),
        ref(7, 4, [41], "testA", "the chair"),
    ]
    refs[-1]["ann_id"] = 41
    return instances, refs


def write(root: Path, *, instances=None, refs=None, name="grefs(unc).json") -> Path:
    """Writes the layout to `root`, the refs as the file `name` (JSON or a pickle)."""
    default_instances, default_refs = tables()
    refs = default_refs if refs is None else refs
    minirefcoco.write(root, instances=instances or default_instances)
    (root / "refs(unc).p").unlink()
    data = pickle.dumps(refs, protocol=2) if name.endswith(".p") else json.dumps(refs).encode()
    (root / name).write_bytes(data)
    return root


def damaged(change) -> tuple[dict, list]:
    """The tables after `change(instances, refs)`."""
    instances, refs = copy.deepcopy(tables())
    change(instances, refs)
    return instances, refs
