"""`flowseg adapters merge | import | export`: LoRA adapters and their base, and PEFT's format."""

from __future__ import annotations

from argparse import Namespace
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


def _peft(name: str, description: str, argv: Sequence[str], source: tuple[str, str], model: str) -> Namespace:
    """What the two commands around PEFT's format are given: from where, of which model and component, to where."""
    parser = Parser(prog=f"flowseg adapters {name}", description=description)
    parser.add_argument("source", metavar=source[0], help=source[1])
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    parser.add_argument("--component", metavar="NAME", default="llm", help="llm, siglip or sam; default %(default)s")
    return parser.parse_args(argv)


def import_(argv: Sequence[str]) -> int:
    source = "PEFT", "the directory that PEFT's save_pretrained wrote"
    model = "the model, or its language model, as a model directory"
    a = _peft("import", "Reads adapter_config.json and adapter_model.safetensors.", argv, source, model)
    from convert_weights.peft import import_adapters

    print(f"{import_adapters(a.source, a.model, a.out, a.component)}: the adapters of {a.source}")
    return 0


def export(argv: Sequence[str]) -> int:
    source, model = ("ADAPTERS", "RUN/adapters"), "the model directory that the adapters were trained on"
    a = _peft("export", "Writes adapter_config.json and adapter_model.safetensors.", argv, source, model)
    from convert_weights.peft import export_adapters
    from flowseg_jax.errors import listed

    out, rest = export_adapters(a.source, a.model, a.out, a.component)
    print(f"{out}: the adapters of {a.component}" + (f"; trained too, and not in it: {listed(rest)}" if rest else ""))
    return 0
