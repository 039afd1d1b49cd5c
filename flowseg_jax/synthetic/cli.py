"""`python -m flowseg_jax.data shapes --out DIR --images N --seed S`, `companions` and `lesson`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from flowseg_jax.errors import UserError
from flowseg_jax.synthetic import multi_task, toy_dataset
from flowseg_jax.synthetic.expressions import FAMILIES
from flowseg_jax.synthetic.generator import PRESETS, generate


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds `shapes`, `companions` and `lesson` and returns the first; a parsed namespace carries `run`, a function of it."""
    parser = subparsers.add_parser("shapes", help="generate the synthetic `shapes` benchmark in the RefCOCO layout")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--images", type=int, required=True, help="number of images over all splits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="default", help=f"mix of expressions and number of objects: {', '.join(PRESETS)}")
    families = ", ".join(FAMILIES)
    parser.add_argument("--mix", nargs="+", metavar="FAMILY=SHARE", help=f"overrides the preset's mix; families: {families}")
    parser.add_argument("--objects", nargs=2, type=int, metavar=("MIN", "MAX"), help="objects of a scene, within 4..10")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--quality", type=int, default=92, help="JPEG quality")
    parser.add_argument("--workers", type=int, help="processes (default: the number of cores)")
    parser.set_defaults(run=run)
    _add_companions(subparsers)
    _add_lesson(subparsers)
    return parser


def _add_companions(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("companions", help="generate shapes in the layouts of ReasonSeg, COCO panoptic and LLaVA")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--seed", type=int, default=0)
    numbers = ", ".join(f"{number} {name}" for name, number in multi_task.DEFAULTS.items())
    parser.add_argument("--scale", type=float, default=1.0, help=f"multiplies the numbers of images ({numbers})")
    parser.set_defaults(run=run_companions)


def _add_lesson(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("lesson", help="generate twenty pictures that teach a new word, to try fine-tuning with")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run_lesson)


def run(args: argparse.Namespace) -> int:
    """Generates what the parsed arguments ask for."""
    generate(
        args.out,
        args.images,
        args.seed,
        mix=parse_mix(args.mix) if args.mix else None,
        objects=tuple(args.objects) if args.objects else None,
        preset=args.preset,
        size=args.size,
        quality=args.quality,
        workers=args.workers,
    )
    return 0


def run_companions(args: argparse.Namespace) -> int:
    """Generates the companions that the parsed arguments ask for."""
    if not (math.isfinite(args.scale) and args.scale > 0):
        raise UserError(f"--scale must be a number above 0, got {args.scale}")
    multi_task.write_datasets(
        args.out, seed=args.seed, **{name: round(args.scale * n) for name, n in multi_task.DEFAULTS.items()}
    )
    return 0


def run_lesson(args: argparse.Namespace) -> int:
    """Writes the lesson that the parsed arguments ask for."""
    toy_dataset.write(args.out, args.images, args.seed)
    print(f"wrote {args.images} pictures and {args.out / 'lesson.jsonl'}")
    return 0


def parse_mix(items: list[str]) -> dict[str, float]:
    """["attribute=0.4", "two-hop=0.6"] -> {"attribute": 0.4, "two-hop": 0.6}."""
    mix = {}
    for item in items:
        family, _, share = item.partition("=")
        try:
            mix[family] = float(share)
        except ValueError:
            raise UserError(f"--mix takes FAMILY=SHARE, got {item!r}") from None
    return mix
