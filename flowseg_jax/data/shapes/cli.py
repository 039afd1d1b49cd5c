"""`python -m flowseg_jax.data shapes --out DIR --images N --seed S`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowseg_jax.data.shapes.expressions import FAMILIES
from flowseg_jax.data.shapes.generator import PRESETS, generate
from flowseg_jax.errors import UserError


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the `shapes` command; the parsed namespace carries `run`, a function of the namespace."""
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
    return parser


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
