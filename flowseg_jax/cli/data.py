"""`flowseg data COMMAND`: everything that is done to data before training."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowseg_jax.cli.parser import Command, Parser, run_command
from flowseg_jax.errors import UserError

COMMANDS = {
    "prepare": Command("flowseg_jax.cli.data:prepare", "turn an on-disk layout into a data set that training reads"),
    "upgrade": Command("flowseg_jax.cli.data:upgrade", "write a prepared data set of the format before this one anew"),
    "validate": Command(
        "flowseg_jax.cli.data:validate", "read a data set: what is broken, incomplete or leaks into evaluation"
    ),
    "preview": Command("flowseg_jax.cli.data:preview", "an HTML page of samples of a data set"),
    "add-special-tokens": Command(
        "flowseg_jax.cli.data:add_special_tokens", "add <SEG>, <p> and </p> to a language model's tokenizer"
    ),
    "make-shapes": Command("flowseg_jax.cli.data:make_shapes", "generate the shapes benchmark in the RefCOCO layout"),
    "make-multitask": Command(
        "flowseg_jax.cli.data:make_multitask", "generate shapes in the layouts of ReasonSeg, COCO panoptic and LLaVA"
    ),
    "make-toy": Command(
        "flowseg_jax.cli.data:make_toy", "generate twenty images that teach a new word, to try fine-tuning with"
    ),
}
RENAMED = {
    "shapes": "make-shapes",
    "companions": "make-multitask",
    "lesson": "make-toy",
    "tokenizer": "add-special-tokens",
}
RENAMED_FLAGS = {"--processes": "--num-workers", "--workers": "--num-workers", "--images": "--num-images"}
LAYOUTS = "refcoco, refcoco+, refcocog, grefcoco, reasonseg, coco-panoptic, coco-instances, llava, jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return run_command("flowseg data", "Everything that is done to data before training.", COMMANDS, argv, RENAMED)


def _parser(command: str) -> Parser:
    return Parser(prog=f"flowseg data {command}", description=COMMANDS[command].help, renamed=RENAMED_FLAGS)


def _add_layout_flags(parser: Parser) -> None:
    parser.add_argument("--split-by", help="which refs(<split_by>).p, e.g. unc, google, umd")
    parser.add_argument("--images", metavar="DIR", type=Path, help="folder of the images (default: the usual places)")
    parser.add_argument("--file", help="which JSON of chats, where a llava folder holds several")
    longest = "characters that an expression, a question or an explanation may have at most (default: docs/data.md)"
    parser.add_argument("--max-characters", metavar="N", type=int, help=longest)


def _layout_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What only some layouts have; None where it is not given."""
    return {key: getattr(arguments, key) for key in ("split_by", "images", "file", "max_characters")}


def _add_source(parser: Parser) -> None:
    parser.add_argument("layout", metavar="LAYOUT", help=f"what it looks like: {LAYOUTS}")
    parser.add_argument("source", metavar="DIR", type=Path, help="its root")
    _add_layout_flags(parser)


def _add_seed(parser: Parser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="another one draws other images (default: 0)")


def prepare(argv: Sequence[str]) -> int:
    parser = _parser("prepare")
    parser.add_argument("--source", type=Path, required=True, help="root of the layout (or the .jsonl file)")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--layout", default="refcoco", help=f"what the source looks like (default: refcoco): {LAYOUTS}")
    _add_layout_flags(parser)
    parser.add_argument("--splits", nargs="+", help="only these splits")
    parser.add_argument("--on-error", default="stop", help="stop (default) at a damaged record, or record: list them and go on")
    parser.add_argument("--num-workers", metavar="N", type=int, help="processes that read and write (default: one per core)")
    parser.add_argument("--tokenizer-vocab", type=int, help="train a byte-level BPE tokenizer of this many ids, e.g. 512")
    arguments = parser.parse_args(argv)
    from flowseg_jax.data import prepare as module

    module.prepare(
        arguments.source,
        arguments.out,
        layout=arguments.layout,
        **_layout_options(arguments),
        splits=arguments.splits,
        tokenizer_vocab=arguments.tokenizer_vocab,
        on_error=arguments.on_error,
        processes=arguments.num_workers,
    )
    return 0


def upgrade(argv: Sequence[str]) -> int:
    parser = _parser("upgrade")
    parser.add_argument("old", metavar="OLD", type=Path, help="a prepared data set of the format before this one")
    parser.add_argument("new", metavar="NEW", type=Path, help="the folder to make")
    arguments = parser.parse_args(argv)
    from flowseg_jax.data.upgrade import upgrade

    upgrade(arguments.old, arguments.new)
    print(f"{arguments.new}: the same data set in today's format")
    return 0


def add_special_tokens(argv: Sequence[str]) -> int:
    parser = _parser("add-special-tokens")
    parser.add_argument("--source", type=Path, required=True, help="tokenizer directory of the language model")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    arguments = parser.parse_args(argv)
    from flowseg_jax.data import tokenizer

    print(f"{arguments.out}: {tokenizer.extend_tokenizer(arguments.source, arguments.out)} ids")
    return 0


def validate(argv: Sequence[str]) -> int:
    parser = _parser("validate")
    _add_source(parser)
    parser.add_argument("--splits", nargs="+", help="only these splits")
    parser.add_argument("--quick", action="store_true", help="only look whether the image files exist")
    more = "more sets; leakage is looked for between all"
    parser.add_argument("--with", dest="others", nargs="+", default=[], metavar="LAYOUT=DIR", help=more)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report here too")
    arguments = parser.parse_args(argv)
    from flowseg_jax.data import validate as module

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def opened(name: str, root: str | Path, **options: object) -> module.Opened:
        log(f"{root}: opening as {name}")
        return module.open_set(name, root, **options)

    others = [item.partition("=") for item in arguments.others]
    for name, _, root in others:
        if not (name and root):
            raise UserError(f"--with takes LAYOUT=DIR, got {name or root!r}")
    sets = [opened(arguments.layout, arguments.source, splits=arguments.splits, **_layout_options(arguments))]
    sets += [opened(name, root) for name, _, root in others]
    report = module.validate(sets, arguments.quick, log)
    print(module.render(report))
    if arguments.json:
        try:
            arguments.json.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {arguments.json}: {error.strerror}; choose another place for --json") from error
    return 0 if report.ok else 1


def preview(argv: Sequence[str]) -> int:
    parser = _parser("preview")
    _add_source(parser)
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--split", help="only this split (default: all)")
    parser.add_argument("--samples", type=int, default=12, help="of each split (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="which samples are drawn (default: 0)")
    arguments = parser.parse_args(argv)
    from flowseg_jax.data import formats, records
    from flowseg_jax.data import preview as module

    problems = records.RecordErrors(keep=True)
    layout = formats.open_layout(arguments.layout, arguments.source, problems, **_layout_options(arguments))
    splits = layout.splits if arguments.split is None else (arguments.split,)
    path = module.preview(layout, arguments.out, splits, problems, samples=arguments.samples, seed=arguments.seed)
    print(f"{path}{records.damaged(problems.found)}")
    return 1 if problems.found else 0


def make_shapes(argv: Sequence[str]) -> int:
    from flowseg_jax.synthetic.expressions import FAMILIES, NO_TARGET_FAMILY
    from flowseg_jax.synthetic.generator import PRESETS, generate

    parser = _parser("make-shapes")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--num-images", metavar="N", type=int, required=True, help="number of images over all splits")
    _add_seed(parser)
    mixes = f"mix of expressions and number of objects: {', '.join(PRESETS)} (default: default)"
    parser.add_argument("--preset", default="default", help=mixes)
    families = f"overrides the preset's mix; families: {', '.join((*FAMILIES, NO_TARGET_FAMILY))}"
    parser.add_argument("--mix", nargs="+", metavar="FAMILY=SHARE", help=families)
    parser.add_argument("--objects", nargs=2, type=int, metavar=("MIN", "MAX"), help="objects of a scene, within 4..10")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels (default: 128)")
    parser.add_argument("--quality", type=int, default=92, help="JPEG quality (default: 92)")
    _add_palette(parser)
    parser.add_argument("--num-workers", metavar="N", type=int, help="processes (default: one per core)")
    arguments = parser.parse_args(argv)
    generate(
        arguments.out,
        arguments.num_images,
        arguments.seed,
        mix=_mix(arguments.mix) if arguments.mix else None,
        objects=tuple(arguments.objects) if arguments.objects else None,
        preset=arguments.preset,
        size=arguments.size,
        quality=arguments.quality,
        palette=arguments.palette,
        workers=arguments.num_workers,
    )
    return 0


def _add_palette(parser: Parser) -> None:
    from flowseg_jax.synthetic.scene import PALETTES

    looks = f"what objects look like: {', '.join(PALETTES)} (default: all); few: four shapes and colours, no texture"
    parser.add_argument("--palette", default="all", help=looks)


def _mix(items: Sequence[str]) -> dict[str, float]:
    """["attribute=0.4", "two-hop=0.6"] -> {"attribute": 0.4, "two-hop": 0.6}."""
    mix = {}
    for item in items:
        family, _, share = item.partition("=")
        try:
            mix[family] = float(share)
        except ValueError:
            raise UserError(f"--mix takes FAMILY=SHARE, got {item!r}") from None
    return mix


def make_multitask(argv: Sequence[str]) -> int:
    from flowseg_jax.synthetic import multi_task

    parser = _parser("make-multitask")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    _add_seed(parser)
    _add_palette(parser)
    numbers = ", ".join(f"{number} {name}" for name, number in multi_task.DEFAULTS.items())
    parser.add_argument("--scale", type=float, default=1.0, help=f"multiplies the numbers of images ({numbers}), default 1.0")
    arguments = parser.parse_args(argv)
    if not (math.isfinite(arguments.scale) and arguments.scale > 0):
        raise UserError(f"--scale must be a number above 0, got {arguments.scale}")
    numbers = {name: round(arguments.scale * n) for name, n in multi_task.DEFAULTS.items()}
    multi_task.write_datasets(arguments.out, seed=arguments.seed, palette=arguments.palette, **numbers)
    return 0


def make_toy(argv: Sequence[str]) -> int:
    parser = _parser("make-toy")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--num-images", metavar="N", type=int, default=20, help="default 20")
    _add_seed(parser)
    arguments = parser.parse_args(argv)
    from flowseg_jax.synthetic import toy_dataset

    toy_dataset.write(arguments.out, arguments.num_images, arguments.seed)
    print(f"wrote {arguments.num_images} images and {arguments.out / 'toy.jsonl'}")
    return 0
