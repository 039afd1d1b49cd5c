"""`flowseg plan --eval`: what it costs to answer expressions, for devices that need not be there.

Two programs of an evaluation (`evaluation.evaluator`) are compiled as they are run: the encoding of an image, and a round of
expressions about it. Every device has an image of its own and all parameters, matrices in bfloat16. Reading images, bringing
masks to an image's own size and counting them come on top.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from flowseg_jax import sharding
from flowseg_jax.aot import hlo
from flowseg_jax.aot.plan import XLA_OPT_LEVELS, bytes_on_one_device, compiler_effort, try_to_compile
from flowseg_jax.aot.plan_lines import flop, gib
from flowseg_jax.aot.pricing import PricedStep, price
from flowseg_jax.aot.topology import open_topology
from flowseg_jax.aot.tpu_cost import cycles
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.data.eval_plan import PHRASE_BUCKETS, bucket_shape
from flowseg_jax.data.published import COUNTS
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation.benchmark import make_evaluator
from flowseg_jax.evaluation.evaluator import BY_IMAGE
from flowseg_jax.models import flowseg, quantization
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.sharding import replicated
from flowseg_jax.system.console import heartbeat
from flowseg_jax.system.hardware import DEVICE_SPECS
from flowseg_jax.training import flops
from flowseg_jax.types import ExpressionQueries, ImageInputs

EXPRESSIONS = PHRASE_BUCKETS[-1]  # of a round
TOKENS = 24  # of an expression: the template's, and as many words as RefCOCO's have
SETS = ("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")
SPLITS = [key for key in COUNTS if key[:2] in SETS and key[2] != "train"]
GPU = "NVIDIA H100 80GB HBM3"


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One program on one device.

    Attributes:
        flops: of the model.
        memory: bytes of arguments, temporaries and results; None if the compiler refused.
        priced: its cycles; None without estimates.
        compile_seconds: wall time.
        refusal: the compiler's words if it refused for want of memory.
    """

    flops: float
    memory: int | None
    priced: PricedStep | None
    compile_seconds: float
    refusal: str | None


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """What an evaluation would take.

    Attributes:
        topology, note: as asked for, and what kind of statement this is.
        device_kind, devices: what was compiled for.
        parameters: bytes of a device.
        usable: bytes that a program may use; None where there is nothing to judge by.
        programs: "encode_image" and "round".
    """

    topology: str
    note: str
    device_kind: str
    devices: int
    parameters: int
    usable: int | None
    programs: Mapping[str, ProgramReport]

    @property
    def fits(self) -> bool:
        return all(x.refusal is None and (self.usable is None or x.memory <= self.usable) for x in self.programs.values())

    def seconds(self, name: str) -> float | None:
        """Of a program by its priced cycles, everything hidden that can be."""
        found = self.programs[name].priced
        return found and found.hidden / found.device.clock

    @property
    def expressions_per_second(self) -> float | None:
        """A second and chip, of images with one full round each."""
        image, one_round = map(self.seconds, self.programs)
        return image and one_round and EXPRESSIONS / (image + one_round)

    @property
    def minutes(self) -> float | None:
        """Of the eight RefCOCO splits, at most."""
        image, one_round = map(self.seconds, self.programs)
        return image and one_round and split_seconds(image, one_round) / self.devices / 60

    @property
    def gpu_minutes(self) -> float:
        """The same on one H100 that is never short of its roofline: arithmetic at its peak, all parameters read once a call."""
        gpu = DEVICE_SPECS[GPU]
        return split_seconds(*(max(x.flops / gpu.peak, self.parameters / gpu.memory) for x in self.programs.values())) / 60

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "topology": self.topology,
            "device_kind": self.device_kind,
            "devices": self.devices,
            "fits": self.fits,
            "parameter_bytes": self.parameters,
            "programs": {
                name: {
                    "flops": x.flops,
                    "bytes_per_device": x.memory,
                    "priced_cycles": x.priced and round(x.priced.hidden),
                    "priced_cycles_nothing_hidden": x.priced and round(x.priced.exposed),
                    "priced_by_part": x.priced and {part: round(row["cycles"]) for part, row in x.priced.by_part().items()},
                    "without_a_price": x.priced and x.priced.unpriced(),
                    "compile_seconds": round(x.compile_seconds, 1),
                    "refusal": x.refusal,
                }
                for name, x in self.programs.items()
            },
            "expressions_per_second_and_device": self.expressions_per_second,
            "refcoco_minutes": self.minutes,
            "refcoco_minutes_h100_roofline": self.gpu_minutes,
        }

    def text(self) -> str:
        """The report for people."""
        images, sentences = split_sizes()
        report = [
            f"{self.topology}: {self.devices} x {self.device_kind}, one image a device, matrices in bfloat16",
            self.note,
            f"parameters on each device: {gib(self.parameters)}" + (f" of {gib(self.usable)} usable" if self.usable else ""),
            *(line for name, x in self.programs.items() for line in _lines(name, x)),
        ]
        if self.minutes:
            report += [
                f"expressions a second and chip: {self.expressions_per_second:.1f}, of images with {EXPRESSIONS} each",
                f"the {len(SPLITS)} RefCOCO splits, {images:,} images and {sentences:,} sentences: at most {self.minutes:.1f} "
                f"minutes on {self.devices} chips by these prices; nothing of this was measured on a device",
            ]
        report += [
            "the same splits on one H100 by roofline arithmetic alone (peak FLOP/s, parameters read once a call): at least "
            f"{self.gpu_minutes:.1f} minutes",
            f"verdict: {'fits' if self.fits else 'does not fit'}",
        ]
        return "\n".join(report)


def split_sizes() -> tuple[int, int]:
    """Images and sentences of the eight RefCOCO splits as published."""
    return tuple(sum(COUNTS[key][what].value for key in SPLITS) for what in ("images", "sentences"))


def split_seconds(image: float, one_round: float) -> float:
    """Device seconds of the eight splits. An image has at most one round that is not full."""
    images, sentences = split_sizes()
    return images * image + (sentences / EXPRESSIONS + images) * one_round


def plan_eval(config: ConfigDict, topology: str, *, effort: str = "O0") -> EvalReport:
    """Compiles an image's encoding and a round of a config's model for a topology, and reports.

    Raises:
        UserError: an unknown topology or effort, a compiler that is not installed, a model that answers no expressions.
    """
    if effort not in XLA_OPT_LEVELS:
        raise UserError(f"--xla-opt-level={effort}: choose {', '.join(XLA_OPT_LEVELS)}")
    model = FlowSegConfig.from_dict(config.model.to_dict())
    model.require_full_model("--eval")
    found = open_topology(topology)
    mesh = sharding.make_mesh({"data": -1}, found.devices)
    _, abstract = quantization.abstract_model(model, "bfloat16")
    places = flatten_params(sharding.param_shardings(abstract, mesh))
    flat = flatten_params(flowseg.params_dict(abstract))
    params = unflatten_params({path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path]) for path, x in flat.items()})
    by_image = NamedSharding(mesh, BY_IMAGE)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=by_image)  # noqa: E731
    side, small = model.sam.image_size, model.siglip.image_size
    pixels = ImageInputs(array(jnp.uint8, side, side, 3), array(jnp.int32, 2), array(jnp.uint8, small, small, 3))
    prefix = jax.ShapeDtypeStruct((1 + model.num_visual_tokens,), jnp.int32, sharding=replicated(mesh))
    k, length = bucket_shape(EXPRESSIONS, EXPRESSIONS * TOKENS)
    queries = ExpressionQueries(*[array(jnp.int32, length)] * 5, array(jnp.bool_, k))
    with compiler_effort(effort), heartbeat(f"tracing and lowering an evaluation for {topology}"):
        lowered = make_evaluator(model, mesh, quantize="bfloat16").lower(params, pixels, prefix, queries)
    work = model_flops(model, prefix.shape[0], length)
    with compiler_effort(effort):
        programs = {name: _report(name, one, work[name], found.devices[0].device_kind) for name, one in lowered.items()}
    return EvalReport(
        found.name,
        found.note,
        found.devices[0].device_kind,
        len(found.devices),
        bytes_on_one_device(params),
        found.usable,
        programs,
    )


def model_flops(model: FlowSegConfig, prefix: int, length: int) -> dict[str, float]:
    """FLOPs of an image's encoding, its prefix of so many tokens included, and of a round of so many tokens."""
    shape, llm = flops.levels(model), model.llm.hidden_size
    side, decoder = (model.sam.grid_size + 1) // 2, model.mask_decoder
    image = (
        flops.sam(model.sam, max(*model.connector_hidden_layers, model.sam.num_hidden_layers - 1))
        + flops.siglip(model.siglip, model.siglip.num_hidden_layers - 1)
        + flops.projector(model.siglip.num_patches, model.siglip.hidden_size, llm)
        + flops.projector(side**2, 4 * model.sam.hidden_size, llm)
        + flops.connector(model.connector, model.sam.grid_size)
        + flops.pixel_decoder(model.pixel_decoder, shape)
        + (before := flops.language(model.llm, prefix))
    )
    one_round = (
        flops.language(model.llm, prefix + length)
        + before * -1
        + flops.projector(length, llm, decoder.embed_dim)
        + flops.mask_decoder(decoder, model.semantic_flow.mode, shape, EXPRESSIONS, 2)
    ).forward
    masks = EXPRESSIONS * decoder.num_queries * flops.mask_pixels(model.pixel_decoder, shape)
    return {"encode_image": image.forward, "round": one_round + 2.0 * masks * (decoder.mask_dim or decoder.embed_dim)}


def _report(name: str, lowered: jax.stages.Lowered, work: float, device_kind: str) -> ProgramReport:
    started = time.perf_counter()
    with heartbeat(f"compiling {name}"):
        compiled, refusal = try_to_compile(lowered)
    seconds = time.perf_counter() - started
    if compiled is None:
        return ProgramReport(work, None, None, seconds, refusal)
    text, memory, device = compiled.as_text(), compiled.memory_analysis(), DEVICE_SPECS.get(device_kind)
    estimate = cycles(text)
    priced = estimate and device and device.clock and price(estimate, hlo.collective_stats(text), device, work)
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes
    return ProgramReport(work, int(np.sum(sizes)), priced or None, seconds, None)


def _lines(name: str, x: ProgramReport) -> list[str]:
    what = {"encode_image": "an image", "round": f"a round of {EXPRESSIONS} expressions"}[name]
    if x.refusal is not None:
        return [f"{what}: does not fit. The compiler: {x.refusal}"]
    given = f"{what}: {flop(x.flops)}, {gib(x.memory)} in all, compiled in {x.compile_seconds:.0f} s"
    if x.priced is None:
        return [given]
    priced, parts = x.priced, x.priced.by_part()
    return [
        f"{given}; priced {priced.hidden / 1e6:,.1f} million cycles, {priced.exposed / 1e6:,.1f} with nothing hidden, "
        f"MFU {priced.mfu['high']:.0%}",
        "  by part: " + ", ".join(f"{part} {row['cycles'] / 1e6:,.1f}" for part, row in parts.items() if row["cycles"] >= 5e4),
        f"  without a price: {', '.join(f'{name} {count:,}' for name, count in priced.unpriced().items()) or 'none'}",
    ]
