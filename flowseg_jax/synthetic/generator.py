"""Makes the `shapes` benchmark: scenes in parallel, each from its own seed, then one RefCOCO directory, renamed into place."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flowseg_jax.data.workers import Spawn, init_worker
from flowseg_jax.errors import UserError, did_you_mean
from flowseg_jax.synthetic import refcoco_writer
from flowseg_jax.synthetic.expressions import (
    FAMILIES,
    NO_TARGET_FAMILY,
    ExpressionGenerator,
    GeneratedExpression,
    draw_families,
)
from flowseg_jax.synthetic.render import render
from flowseg_jax.synthetic.scene import PALETTES, Scene, compose, draw_attributes, is_held_out, place
from flowseg_jax.synthetic.statistics import Statistics

PRESETS: dict[str, tuple[Mapping[str, float], tuple[int, int]]] = {
    "default": (dict(zip(FAMILIES, (0.40, 0.20, 0.20, 0.08, 0.07, 0.05), strict=True)), (4, 8)),
    "hard": (dict(zip(FAMILIES, (0.20, 0.15, 0.30, 0.12, 0.08, 0.15), strict=True)), (6, 10)),
}
MIN_IMAGES = 16
SPLIT_SHARES = {"val": 0.06, "testA": 0.03, "testB": 0.03}
VAL_SENTENCES, FULL_VAL_FROM = 300, 400  # sets of at least 400 images hold at least 300 val sentences
REFS, SENTENCES = (3, 4), (2, 3)  # per image, per ref
ATTEMPTS = 3000
REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class GeneratorConfig:
    """What every scene of a set has in common."""

    seed: int
    size: int
    objects: tuple[int, int]
    mix: Mapping[str, float]
    quality: int
    palette: str = "all"


def say(line: str) -> None:
    print(line, flush=True)


def generate(
    out: Path,
    images: int,
    seed: int,
    *,
    mix: Mapping[str, float] | None = None,
    objects: tuple[int, int] | None = None,
    preset: str = "default",
    size: int = 128,
    quality: int = 92,
    palette: str = "all",
    workers: int | None = None,
    report: Callable[[str], None] = say,
) -> Statistics:
    """Writes a benchmark in the RefCOCO layout to the new directory `out`.

    The result depends on (images, seed, mix, objects, size, quality, palette) only, not on `workers`.

    Args:
        out: directory to create; an existing non-empty one is an error.
        images: number of images over all splits, at least 16.
        seed: any integer.
        mix: share of each expression family (`FAMILIES`, and "no-target": expressions that refer to nothing, which make the
            layout that of gRefCOCO); None takes the preset's. Shares are normalised.
        objects: fewest and most objects of a scene, within 4..10; None takes the preset's.
        preset: "default" or "hard".
        size: side of the images in pixels.
        quality: JPEG quality.
        palette: what objects look like: "all", or "few" shapes and colours and no texture.
        workers: processes; None takes the number of cores for larger sets.
        report: receives progress lines, at least one every ten seconds.

    Returns:
        Counts by split and family, and how far a reader of head nouns gets.

    Raises:
        UserError: for arguments that cannot be met, or an `out` that exists or cannot be written.
    """
    out = Path(out)
    config = _config(seed, mix, objects, preset, size, quality, palette)
    splits = assign_splits(images, seed)
    if workers is None:
        workers = 1 if images < 256 else os.cpu_count() or 1
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    with whole_directory(out, "the benchmark") as partial:
        (partial / "images").mkdir()
        make = functools.partial(make_record, config=config, folder=partial / "images")
        with contextlib.nullcontext() if workers == 1 else _pool(workers) as executor:
            jobs = range(images), splits
            made = map(make, *jobs) if executor is None else executor.map(make, *jobs, chunksize=16)
            try:
                records = list(_with_progress(made, images, report))
            except BaseException:
                if executor is not None:
                    executor.shutdown(cancel_futures=True)
                raise
        report("shapes: writing the annotations")
        statistics = refcoco_writer.write(partial, records, config.seed, config.mix)
    report(f"{statistics}\nwrote {out}")
    return statistics


def _config(
    seed: int,
    mix: Mapping[str, float] | None,
    objects: tuple[int, int] | None,
    preset: str,
    size: int,
    quality: int,
    palette: str,
) -> GeneratorConfig:
    if preset not in PRESETS:
        raise UserError(f"unknown shapes preset {preset!r}{did_you_mean(preset, PRESETS)}")
    check_palette(palette)
    default_mix, default_objects = PRESETS[preset]
    mix, objects = dict(mix or default_mix), tuple(objects or default_objects)
    known = (*FAMILIES, NO_TARGET_FAMILY)
    for family, share in mix.items():
        if family not in known:
            raise UserError(f"unknown expression family {family!r}{did_you_mean(family, known)}")
        if not (math.isfinite(share) and share >= 0):
            raise UserError(f"share of family {family!r} must be a number of at least 0, got {share}")
    total = sum(mix.values())
    if not total > mix.get(NO_TARGET_FAMILY, 0):
        raise UserError("the shares of the families that refer to an object are all 0; give at least one a positive share")
    if not 4 <= objects[0] <= objects[1] <= 10:
        raise UserError(f"objects must be a range within 4..10, got {objects[0]}..{objects[1]}")
    if not 64 <= size <= 4096:
        raise UserError(f"image size must be within 64..4096 pixels, got {size}")
    if not 1 <= quality <= 100:
        raise UserError(f"JPEG quality must be within 1..100, got {quality}")
    # In an order of ours, so that the order in which a user lists the shares does not change the draws.
    return GeneratorConfig(seed, size, objects, {f: mix[f] / total for f in known if mix.get(f)}, quality, palette)


def check_palette(palette: str) -> None:
    """Raises a UserError for a palette that is not known."""
    if palette not in PALETTES:
        raise UserError(f"unknown palette {palette!r}{did_you_mean(palette, PALETTES)}")


def assign_splits(images: int, seed: int) -> list[str]:
    """The split of every image: val 6 % (300 sentences or more from 400 images on), testA 3 %, testB 3 %, the rest train."""
    if images < MIN_IMAGES:
        raise UserError(f"shapes needs at least {MIN_IMAGES} images so that every split has some, got {images}")
    counts = {split: max(1, round(share * images)) for split, share in SPLIT_SHARES.items()}
    if images >= FULL_VAL_FROM:
        counts["val"] = max(counts["val"], -(-VAL_SENTENCES // (REFS[0] * SENTENCES[0])))
    splits = [split for split, count in counts.items() for _ in range(count)]
    splits += ["train"] * (images - len(splits))
    random.Random(f"shapes splits {seed}").shuffle(splits)
    return splits


def make_record(index: int, split: str, *, config: GeneratorConfig, folder: Path) -> refcoco_writer.ImageRecord:
    """Makes one image: draws scene and expressions, saves the JPEG in `folder`, returns what the annotation files need."""
    rng = random.Random(f"shapes scene {config.seed} {index}")
    held_out = split == "testB"
    mix = dict(config.mix)
    absent = mix.pop(NO_TARGET_FAMILY, 0)
    groups = _draw_groups(rng, mix, refs=2 if held_out else rng.choice(REFS))
    for _ in range(ATTEMPTS):
        scene = _draw_scene(rng, config, held_out)
        refs = scene and _refer(rng, scene, groups, held_out)
        if refs:
            break
    else:
        raise UserError(f"no scene found for the expression families {groups} (image {index}); use a mix with more families")
    if absent:
        refs = [*refs, *_no_target_refs(rng, scene, absent / (1 - absent), refs)]
    record = refcoco_writer.record(index, split, scene, refs, rng)
    render(scene, rng).save(folder / record.file_name, quality=config.quality)
    return record


def _draw_groups(rng: random.Random, mix: Mapping[str, float], refs: int) -> list[list[str]]:
    """Families of the sentences, a list for each ref. Drawn before the scene and kept, so rejection cannot bend the mix."""
    return [draw_families(rng, mix, rng.choice(SENTENCES)) for _ in range(refs)]


def _draw_scene(rng: random.Random, config: GeneratorConfig, held_out: bool) -> Scene | None:
    count = rng.randint(*config.objects)
    triples = draw_attributes(rng, count, lambda *t: held_out or not is_held_out(*t), config.palette)
    if not triples or (held_out and sum(is_held_out(*t) for t in triples) < 2):
        return None
    items = place(rng, triples, config.size)
    return items and compose(items, config.size)


def _refer(rng: random.Random, scene: Scene, groups: list[list[str]], held_out: bool) -> list[list[GeneratedExpression]] | None:
    """Finds a target with look-alikes and distinct expressions for every group; None when the scene has no room for them."""
    known = ExpressionGenerator(scene)
    triples = [(item.colour, item.shape, item.texture) for item in scene.items]
    eligible = {
        i
        for i, triple in enumerate(triples)
        if (not held_out or is_held_out(*triple))
        and any(i != j and sum(a == b for a, b in zip(triple, other, strict=True)) >= 2 for j, other in enumerate(triples))
    }
    if len(eligible) < len(groups):
        return None
    sizes, slots = [len(g) for g in groups], [family for g in groups for family in g]
    targets = {family: known.table(family).keys() for family in set(slots)}
    for _ in range(8):
        rng.shuffle(slots)
        families = iter(slots)
        free, refs = set(eligible), []
        for wanted in ([next(families) for _ in range(n)] for n in sizes):
            options = sorted(free.intersection(*(targets[family] for family in wanted)))
            if not options:
                break
            target = rng.choice(options)
            expressions = _distinct(rng, known, wanted, target)
            if expressions is None:
                break
            free.remove(target)
            refs.append(expressions)
        else:
            return refs
    return None


def _distinct(
    rng: random.Random, known: ExpressionGenerator, families: list[str], target: int
) -> list[GeneratedExpression] | None:
    chosen: dict[str, GeneratedExpression] = {}
    for family in families:
        for _ in range(4):
            expression = known.draw(rng, family, target)
            bare = expression.text.replace("the ", "")  # an article more or less is no other expression
            if bare not in chosen:
                chosen[bare] = expression
                break
        else:
            return None
    return list(chosen.values())


def _no_target_refs(
    rng: random.Random, scene: Scene, ratio: float, refs: list[list[GeneratedExpression]]
) -> list[list[GeneratedExpression]]:
    """Refs of one expression that refers to nothing: about `ratio` for every expression that refers to something."""
    known, found = ExpressionGenerator(scene), {}
    wanted = ratio * sum(map(len, refs))
    count = int(wanted) + (rng.random() < wanted % 1)
    for _ in range(40 * count):  # most draws are of something that is there
        expression = known.draw_no_target(rng) if len(found) < count else None
        if expression:
            found.setdefault(expression.text.replace("the ", ""), [expression])
    return list(found.values())


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, Spawn(), initializer=init_worker, initargs=(signal.SIGINT,))


def _with_progress(made: Iterable, total: int, report: Callable[[str], None]) -> Iterable:
    start = last = time.monotonic()
    report(f"shapes: making {total} images")
    for done, record in enumerate(made, 1):
        yield record
        now = time.monotonic()
        if now - last >= REPORT_SECONDS:
            last, rate = now, done / (now - start)
            report(f"shapes: {done}/{total} images, {rate:.0f} images/s, {(total - done) / rate:.0f} s left")


@contextlib.contextmanager
def whole_directory(out: Path, what: str) -> Iterator[Path]:
    """A new hidden directory beside `out`, which becomes `out` when the block ends well and vanishes when it does not.

    Raises:
        UserError: `out` holds something, or `what` cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists; delete it or choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out}: cannot create the directory: {error.strerror}") from error
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())
        os.rename(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot write {what}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
