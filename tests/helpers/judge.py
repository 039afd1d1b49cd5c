"""Records and tables of an evaluation once more, from the files of a data set and the saved masks alone.

Shares nothing with the package: NumPy, pycocotools and OpenCV only, one sample at a time, arrays instead of codes, and the
rules written down a second time from `docs/protocols.md`.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco

FIVE = (0.5, 0.6, 0.7, 0.8, 0.9)
RULES = {  # protocol -> raster, samples repeated as often as their sentence, value of two empty masks, what nothing counts, X
    "xsam": ("union", False, 1.0, "counts", FIVE),
    "lisa": ("sum", True, 1.0, "counts", FIVE),
    "psalm": ("fill_points", False, 1.0, "counts", FIVE),
    "grefcoco": ("union", True, 0.0, "gres", (0.7, 0.8, 0.9)),
    "grefcoco-target-only": ("union", False, 1.0, "left out", FIVE),
}


@dataclasses.dataclass
class Asked:
    """A sample as the files have it; `truth` by raster and `ignored` are bool [h, w]."""

    image_id: int
    file_name: str
    ann_id: int
    ref_id: int
    sentence_id: int
    text: str
    family: str
    count: int
    truth: dict[str, np.ndarray]
    ignored: np.ndarray


def parts(segmentation, h, w):
    """[parts, h, w]: each polygon or run-length code of an object, by pycocotools."""
    if isinstance(segmentation, dict):
        segmentation = [segmentation]
    codes = [coco.frPyObjects([s], h, w)[0] if isinstance(s, list) else uncompressed(s, h, w) for s in segmentation]
    return np.stack([coco.decode(code) for code in codes])


def uncompressed(code, h, w):
    return coco.frPyObjects(code, h, w) if isinstance(code["counts"], list) else code


def rasters(segmentation, h, w):
    """One object by every raster."""
    each = parts(segmentation, h, w)
    union = each.max(0).astype(bool)
    filled = np.zeros((h, w), np.uint8)
    polygons = isinstance(segmentation, list) and isinstance(segmentation[0], list)
    for polygon in segmentation if polygons else ():
        cv2.fillPoly(filled, [np.array(polygon).astype(np.int32).reshape(-1, 2)], 1)
    return {"union": union, "sum": each.sum(0, dtype=int) == 1, "fill_points": filled.astype(bool) if polygons else union}


def together(objects, h, w):
    """Several objects by every raster: their union, for the sum the pixels that exactly one has."""
    if not objects:
        return dict.fromkeys(("union", "sum", "fill_points"), np.zeros((h, w), bool))
    return {
        "union": np.any([o["union"] for o in objects], 0),
        "sum": np.sum([o["sum"] for o in objects], 0) == 1,
        "fill_points": np.any([o["fill_points"] for o in objects], 0),
    }


def of_refs(root: Path, split: str, joined: bool) -> list[Asked]:
    """The samples of a RefCOCO or gRefCOCO layout: distinct lower-cased sentences of a target, or `joined` the refs."""
    instances = json.loads((root / "instances.json").read_text())
    (file,) = root.glob("*refs(unc)*")
    refs = pickle.loads(file.read_bytes()) if file.suffix == ".p" else json.loads(file.read_text())
    images = {image["id"]: image for image in instances["images"]}
    objects = {a["id"]: a for a in instances["annotations"]}
    order = list(objects)
    found: dict[tuple, Asked] = {}
    for ref in refs:
        if ref["split"] != split:
            continue
        targets = ref["ann_id"]
        if isinstance(targets, list):  # gRefCOCO, in which a crowd region is no target
            targets = sorted((t for t in targets if t != -1 and not objects[t]["iscrowd"]), key=order.index)
        else:
            targets = [targets]
        image = images[ref["image_id"]]
        h, w = image["height"], image["width"]
        sentences = [s["sent"].strip().lower() for s in ref["sentences"]]
        for sentence, text in zip(ref["sentences"], sentences, strict=True):
            if joined:
                key, text = (image["id"], ref["ref_id"]), " ".join(f"{one}." for one in sentences)
            else:
                key = image["id"], *targets, text
            if key in found:
                found[key].count += 1
                continue
            truth = together([rasters(objects[t]["segmentation"], h, w) for t in targets], h, w)
            ids = image["id"], image["file_name"], targets[0] if targets else -1, ref["ref_id"], sentence["sent_id"]
            found[key] = Asked(*ids, text, sentence.get("family", ""), 1, truth, np.zeros((h, w), bool))
    return [*found.values()]


def of_reasoning(root: Path, split: str) -> list[Asked]:
    """The samples of a ReasonSeg layout, without `image_id`, which is none of the files' numbers."""
    found = []
    for path in sorted((root / split).glob("*.json")):
        entry = json.loads(path.read_text())
        h, w = cv2.imread(str(path.with_suffix(".jpg"))).shape[:2]  # turned as EXIF says
        drawn = []
        for outline in entry["shapes"]:
            alone, points = np.zeros((h, w), np.uint8), [np.array(outline["points"], np.int32)]
            cv2.polylines(alone, points, True, 1, 1)
            cv2.fillPoly(alone, points, 1)
            drawn.append((int(alone.sum()), alone.astype(bool), 255 if "ignore" in outline["label"] else 1))
        mask = np.zeros((h, w), np.uint8)
        for _, alone, value in sorted(drawn, key=lambda one: -one[0]):
            mask[alone] = value
        if not (mask == 1).any():
            continue
        truth, family = dict.fromkeys(("union", "sum"), mask == 1), "long" if entry["is_sentence"] else "short"
        asked: dict[str, Asked] = {}
        for number, text in enumerate(entry["text"]):
            text = text.strip().lower()
            if text in asked:
                asked[text].count += 1
            else:
                asked[text] = Asked(-1, path.with_suffix(".jpg").name, 0, 0, number, text, family, 1, truth, mask == 255)
        found += asked.values()
    return found


def decoded(rle):
    return coco.decode({"size": rle["size"], "counts": rle["counts"].encode()}).astype(bool)


def pair(mask, truth, ignored):
    return int((mask & truth & ~ignored).sum()), int(((mask | truth) & ~ignored).sum())


def ratio(i, u, empty=1.0):
    return i / u if u else empty


@dataclasses.dataclass
class Row:
    """A sample with what was answered: (I, U) of the selected and of the best mask by each raster, and what else counts."""

    asked: Asked
    pairs: dict[str, tuple[tuple[int, int], tuple[int, int]]]
    area: int
    score: float | None
    failed: bool

    @classmethod
    def of(cls, asked: Asked, record, failed: bool) -> Row:
        masks = decoded(record["rle"]), decoded(record["best_rle"])
        pairs = {raster: tuple(pair(m, truth, asked.ignored) for m in masks) for raster, truth in asked.truth.items()}
        return cls(asked, pairs, int((masks[0] & ~asked.ignored).sum()), record["score"], failed)

    def counts(self, protocol: str, below: float):
        """(I, U, IoU) of the answer and of the oracle."""
        raster, _, empty, nothing, _ = RULES[protocol]
        (i, u), best = self.pairs[raster]
        oracle_i, oracle_u = best if ratio(*best) > ratio(i, u) else (i, u)
        value, reachable = ratio(i, u, empty), ratio(oracle_i, oracle_u, empty)
        if nothing == "gres":
            refused = not self.failed and self.score < below
            silent = self.silent(below)
            if self.asked.ann_id == -1:
                value, reachable = float(silent), float(silent or oracle_u == 0)
                if silent:
                    i = u = oracle_i = oracle_u = 0
            elif silent:
                i, value = 0, 0.0
                if refused:
                    oracle_i, reachable = 0, 0.0
        if self.failed:
            i, value, reachable = 0, 0.0, reachable if oracle_u else 0.0
        return (i, u, value), (oracle_i, oracle_u, reachable)

    def silent(self, below: float) -> bool:
        return not self.failed and (self.area == 0 or self.score < below)


def record(row: Row, protocol: str, below: float) -> dict:
    """What the record must say, as far as files and masks tell."""
    raster, _, empty, *_ = RULES[protocol]
    drawn = "fill_points" if protocol == "psalm" else "union"  # what a run of the protocol's text is held against
    asked, truth = row.asked, row.asked.truth[drawn] & ~row.asked.ignored
    found = {
        "file_name": asked.file_name,
        "ann_id": asked.ann_id,
        "ref_id": asked.ref_id,
        "sentence_id": asked.sentence_id,
        "sentence": asked.text,
        "text": asked.text,
        "text_form": "joined" if protocol == "psalm" else "lower",
        "family": asked.family,
        "count": asked.count,
        "height": truth.shape[0],
        "width": truth.shape[1],
        "area": row.area,
        "truth_area": int(truth.sum()),
        "no_target_threshold": below,
        "failed": row.failed,
        "failure": "non-finite" if row.failed else "",
    }
    for name, key in (("", drawn), ("single_cover_", "sum")):
        selected, best = row.pairs[key]
        oracle = best if ratio(*best) > ratio(*selected) else selected
        named = [(name, selected), (f"oracle_{name}", oracle)] + [("best_", best)] * (not name)
        for prefix, (i, u) in named:
            found |= {f"{prefix}intersection": i, f"{prefix}union": u}
    (_, _, found["iou"]), (_, _, found["oracle_iou"]) = row.counts(protocol, below)
    found["best_iou"] = ratio(*row.pairs[raster][1], 0.0 if row.failed else empty)
    return found


def figures(rows: list[Row], protocol: str, below: float, once: bool = False) -> dict:
    """The figures of some samples; `once`: each one counts once, whatever the protocol repeats."""
    _, repeat, empty, nothing, thresholds = RULES[protocol]
    repeated = [row for row in rows for _ in range(row.asked.count if repeat and not once else 1)]
    answers, oracle = zip(*(row.counts(protocol, below) for row in repeated), strict=True)
    i, u, iou = map(np.array, zip(*answers, strict=True))
    best_i, best_u, best = map(np.array, zip(*oracle, strict=True))
    silent, to_nothing = (
        np.array([f(row) for row in repeated]) for f in (lambda r: r.silent(below), lambda r: r.asked.ann_id == -1)
    )
    failed = np.array([row.failed for row in repeated])
    asked_for = ~to_nothing if nothing == "gres" else np.ones(len(iou), bool)
    found = {
        "n": len(repeated),
        "ciou": 100 * ratio(i.sum(), u.sum(), empty),
        "giou": 100 * iou.mean(),
        "oracle_ciou": 100 * ratio(best_i.sum(), best_u.sum(), empty),
        "oracle_giou": 100 * best.mean(),
        "selection_gap": 100 * (best - iou).mean(),
        "p_at": {f"{x}": 100 * (iou[asked_for] >= x).mean() for x in thresholds} if asked_for.any() else {},
    }
    if nothing == "gres" and to_nothing.any():
        found["n_acc"] = 100 * silent[to_nothing].mean()
    if nothing == "gres" and asked_for.any():
        found["t_acc"] = 100 * (~silent & ~failed)[asked_for].mean()
    return found


def table(rows: list[Row], protocol: str, below: float) -> dict:
    """The whole table of a protocol."""
    if RULES[protocol][3] == "left out":
        rows = [row for row in rows if row.asked.ann_id != -1]
    families = sorted({row.asked.family for row in rows} - {""})
    failed = sum(row.failed for row in rows)
    found = {"protocol": protocol, **figures(rows, protocol, below), "failed": failed}
    found["failures"] = {"non-finite": failed} if failed else {}
    of = lambda rows, once: {  # noqa: E731
        f: figures(mine, protocol, below, once) for f in families if (mine := [r for r in rows if r.asked.family == f])
    }
    found["families"] = of(rows, False)
    if families and {*families} <= {"short", "long"} and all(row.asked.family for row in rows):
        first = [row for row in rows if row.asked.sentence_id == 0]
        found["first_text"] = figures(first, protocol, below, True) | {"families": of(first, True)}
    return found
