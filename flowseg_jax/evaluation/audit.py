"""What a results file says, recomputed from its samples, and whether one model is better than another.

flowseg analyze audit FILE.jsonl
flowseg analyze compare A.jsonl B.jsonl
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowseg_jax.errors import UserError
from flowseg_jax.evaluation import metrics, results
from flowseg_jax.evaluation.protocols import IOU_THRESHOLDS, PROTOCOLS, Protocol
from flowseg_jax.evaluation.tasks import category_tables as by_category
from flowseg_jax.system import json_files

NEEDED = ("image_id", "ann_id", "sentence_id", "text", "text_form", "sentence", "family", "count", "failed", "failure")
NEEDED += ("area", "score", "no_target_threshold")
NEEDED += tuple(
    f"{of}{raster}{what}" for of in ("", "oracle_") for raster in ("", "single_cover_") for what in ("intersection", "union")
)
RESAMPLES, INTERVAL = 10_000, (2.5, 97.5)
_COLUMNS = {"ciou": "cIoU", "giou": "gIoU", "oracle_ciou": "o-cIoU", "oracle_giou": "o-gIoU"}  # o-: the oracle's
_COLUMNS |= {"n_acc": "N-acc", "t_acc": "T-acc"}
_COLUMNS |= {f"{x:g}": f"P@{x:g}" for x in IOU_THRESHOLDS}


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a `<split>.jsonl`, whatever they say.

    Raises:
        UserError: no such file, a line that is no JSON object (with its number), or no line at all.
    """
    path, records = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a sentence may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name the .jsonl that eval.py wrote") from None
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            record = json_files.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: no sample but {type(record).__name__}; name the .jsonl that eval.py wrote")
        records.append(record)
    if not records:
        raise UserError(f"{path}: holds no sample")
    return records


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The samples of a `<split>.jsonl` with expressions.

    Raises:
        UserError: what `read_lines` raises, or a line that is no such sample (with its number and field).
    """
    return samples(path, read_lines(path))


def samples(path: str | Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`records`, checked to be samples with expressions; raises as `read_records`."""
    path = Path(path)
    if on_categories(records):
        raise UserError(
            f"{path}: results on categories, without expressions: `audit` makes their tables, {path.with_suffix('.json').name} "
            "has them too"
        )
    for number, record in enumerate(records, 1):
        if missing := [key for key in NEEDED if key not in record]:
            raise UserError(f"{path}:{number}: no sample of this version: it lacks {', '.join(missing)}; evaluate again")
        if wrong := _impossible(record):
            raise UserError(f"{path}:{number}: {wrong}; evaluate again")
    return records


def on_categories(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are lines of a generic evaluation."""
    return bool(records) and all({"image_id", "failed"} <= record.keys() and "ann_id" not in record for record in records)


def category_tables(path: str | Path, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{protocol: its table} of a generic evaluation, from the counts of its images.

    Mask AP needs the objects, which `--save-masks` leaves in the lines. The categories are named in the `.json` beside.

    Raises:
        UserError: no such `.json`, or counts that cannot be (with the line's number).
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    try:
        result = json_files.read(beside)
        categories, things = result["categories"], result["things"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{beside}: cannot be read ({error!r}); it names the categories: keep the files of an evaluation together"
        ) from None
    for number, record in enumerate(records, 1):
        try:
            by_category.check(record, len(categories))
            by_category.tables([record], categories, things)
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            raise UserError(f"{path}:{number}: no counts of {len(categories)} categories ({error!r}); evaluate again") from None
    return by_category.tables(records, categories, things)


def _impossible(record: Mapping[str, Any]) -> str:
    """What no evaluation writes, "" for a sample as it should be."""
    pairs = [key.removesuffix("intersection") for key in NEEDED if key.endswith("intersection")]
    for pair in pairs:
        i, u = record[f"{pair}intersection"], record[f"{pair}union"]
        if not (type(i) is type(u) is int and 0 <= i <= u):
            return f"{pair}intersection {json_files.short(i)} and {pair}union {json_files.short(u)} are no areas"
    return results.impossible(record)


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{protocol: its table} of every protocol that these predictions answer (`metrics.answers`)."""
    return {name: metrics.summarise(records, p) for name, p in PROTOCOLS.items() if metrics.supports_protocol(records, p)}


def render(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables as text, a line a protocol and one an expression family."""
    columns = [key for key in _COLUMNS if any(_value(table, key) is not None for table in found.values())]
    lines = [f"{'protocol':20s} {'':14s} {'n':>7s} " + " ".join(f"{_COLUMNS[key]:>7s}" for key in columns)]

    def line(name: str, part: str, row: Mapping[str, Any]) -> str:
        values = [_value(row, key) for key in columns]
        cells = " ".join(f"{'':7s}" if value is None else f"{value:7.2f}" for value in values)
        return f"{name:20s} {part:14s} {row['n']:7d} {cells}".rstrip()

    for name, table in found.items():
        lines += [line(name, "all", table), *(line("", family, row) for family, row in table["families"].items())]
        if first := table.get("first_text"):
            lines += [line("", "first text", first)]
            lines += [line("", f"  {family}", row) for family, row in first["families"].items()]
    return "\n".join(lines)


def _value(row: Mapping[str, Any], key: str) -> float | None:
    """A figure of a table, None where its protocol does not have it."""
    return row["p_at"].get(key, row.get(key))


@dataclasses.dataclass(frozen=True)
class Difference:
    """One figure of two models on the same samples.

    Attributes:
        first, second: percent.
        low, high: interval of second - first that holds 95 % of the resamples.
        better: share of the resamples in which the second is the higher.
    """

    first: float
    second: float
    low: float
    high: float
    better: float

    def __str__(self) -> str:
        sign = "no difference shown" if self.low <= 0 <= self.high else "a difference"
        return (
            f"{self.first:.2f} -> {self.second:.2f}: {self.second - self.first:+.2f} "
            f"[{self.low:+.2f}, {self.high:+.2f}], higher in {self.better:.1%} of the resamples ({sign})"
        )


def pair(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Both models' records of each sample, image by image, in an order that neither file decides.

    Raises:
        UserError: the two do not hold the same samples.
    """
    key = lambda r: (r["image_id"], r["ann_id"], r["sentence_id"], r["text"])  # noqa: E731
    ours, theirs = ({key(r): r for r in records} for records in (first, second))
    if ours.keys() != theirs.keys():
        only = [len(a.keys() - b.keys()) for a, b in ((ours, theirs), (theirs, ours))]
        raise UserError(
            f"not the same samples: {only[0]} are in the first file only, {only[1]} in the second only; "
            "compare two evaluations of one split"
        )
    return [(ours[k], theirs[k]) for k in sorted(ours)]


def compare(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    protocol: Protocol,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Difference]:
    """cIoU and gIoU of two models with paired bootstrap intervals.

    Images are drawn, not samples: the sentences of an image are not independent of each other.

    Raises:
        UserError: the two do not hold the same samples, or none that the protocol counts, or were evaluated with other texts.
    """
    for records in (first, second):
        if (form := records[0]["text_form"]) != protocol.text:
            known = ", ".join(name for name, p in PROTOCOLS.items() if p.text == form)
            raise UserError(
                f"protocol {protocol.name} shows the model other texts than these samples were evaluated with; "
                f"they answer {known}: choose one of them, or evaluate with --protocol={protocol.name}"
            )
    first, second = (metrics.counted(records, protocol) for records in (first, second))
    rows = pair(first, second)
    images = {image: i for i, image in enumerate(dict.fromkeys(ours["image_id"] for ours, _ in rows))}
    # A row an image: sums of w I, w U, w IoU and w.
    sums = np.zeros((2, len(images), 4))
    for row in rows:
        for model, record in enumerate(row):
            w, (i, u) = metrics.sample_weight(record, protocol), metrics.intersection_union(record, protocol)
            sums[model, images[record["image_id"]]] += w * i, w * u, w * metrics.sample_iou(record, protocol), w
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(resamples):
        often = np.bincount(rng.integers(len(images), size=len(images)), minlength=len(images))
        drawn.append(_figures(np.einsum("i,mis->ms", often, sums), protocol))
    spread = np.array(drawn)  # [resamples, model, figure]
    whole = _figures(sums.sum(1), protocol)
    differences = {}
    for f, name in enumerate(("ciou", "giou")):
        change = spread[:, 1, f] - spread[:, 0, f]
        low, high = np.percentile(change, INTERVAL)
        differences[name] = Difference(*map(float, (*whole[:, f], low, high, (change > 0).mean())))
    return differences


def _figures(sums: np.ndarray, protocol: Protocol) -> np.ndarray:
    """[model, (cIoU, gIoU)] in percent from [model, (I, U, sum of IoU, n)]."""
    i, u, values, n = sums.T
    ciou = np.where(u > 0, i / np.maximum(u, 1), protocol.both_empty)
    return 100 * np.stack([ciou, values / n], -1)
