"""`flowseg adapters merge | import | export`: LoRA adapters and their base, and PEFT's format."""

from __future__ import annotations

from collections.abc import Sequence

from flowseg_jax.cli.parser import Command, Parser, run_command

COMMANDS = {
    "merge": Command("flowseg_jax.cli.adapters:merge", "a model directory with adapters merged into it"),
    "import": Command("flowseg_jax.cli.adapters:import_", "PEFT's adapters as ours"),
    "export": Command("flowseg_jax.cli.adapters:export", "our adapters of one component as PEFT's"),
}


def main(argv: Sequence[str]) -> int:
    return run_command("flowseg adapters", "LoRA adapters. See docs/finetune.md.", COMMANDS, argv)


def merge(argv: Sequence[str]) -> int:
    parser = Parser(prog="flowseg adapters merge", description="Writes a model directory with adapters merged into it.")
    parser.add_argument("model", metavar="MODEL", help="the model directory that the adapters were trained on")
    parser.add_argument("adapters", metavar="ADAPTERS", help="RUN/adapters, or what `flowseg adapters import` wrote")
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    a = parser.parse_args(argv)
    from flowseg_jax.training.adapters import merge_directories

    print(f"{merge_directories(a.model, a.adapters, a.out)}: {a.model} with the adapters of {a.adapters}")
    return 0


def _component_flag(parser: Parser) -> None:
    parser.add_argument("--component", metavar="NAME", default="llm", help="llm, siglip or sam; default %(default)s")


def import_(argv: Sequence[str]) -> int:
    parser = Parser(prog="flowseg adapters import", description="Reads adapter_config.json and adapter_model.safetensors.")
    parser.add_argument("peft", metavar="PEFT", help="the directory that PEFT's save_pretrained wrote")
    parser.add_argument("model", metavar="MODEL", help="the model, or its language model, as a model directory")
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    _component_flag(parser)
    a = parser.parse_args(argv)
    from convert_weights.peft import import_adapters

    print(f"{import_adapters(a.peft, a.model, a.out, a.component)}: the adapters of {a.peft}")
    return 0


def export(argv: Sequence[str]) -> int:
    parser = Parser(prog="flowseg adapters export", description="Writes adapter_config.json and adapter_model.safetensors.")
    parser.add_argument("adapters", metavar="ADAPTERS", help="RUN/adapters")
    parser.add_argument("model", metavar="MODEL", help="the model directory that the adapters were trained on")
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    _component_flag(parser)
    a = parser.parse_args(argv)
    from convert_weights.peft import export_adapters
    from flowseg_jax.errors import listed

    out, rest = export_adapters(a.adapters, a.model, a.out, a.component)
    print(f"{out}: the adapters of {a.component}" + (f"; trained too, and not in it: {listed(rest)}" if rest else ""))
    return 0
