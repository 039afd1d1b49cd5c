"""What `python -m benchmarks` measures: the table of components, with what each one's ratio shall be.

A component is a function of the module that the table names. It builds a `Pair`: our call and the peer's call on the same
inputs and the same weights. The table itself imports neither, so that it can be listed at once.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowseg_jax.errors import UserError, did_you_mean

Call = Callable[[], Any]
Wrap = Callable[[Any], Any]
FLOAT32, BFLOAT16 = "float32", "bfloat16"


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a ratio (our time / the peer's) shall be at most, and what it is meant to become."""

    bar: float
    aim: float | None = None

    def verdict(self, ratio: float) -> str:
        if ratio > self.bar:
            return "missed"
        return "met" if self.aim is None or ratio > self.aim else "aim met"


@dataclasses.dataclass(frozen=True)
class TimedComponent:
    """A line of the table.

    Attributes:
        name: on the command line, and of the function in `module`.
        module: of this package.
        text: what is computed.
        bars: by dtype.
        dtypes: that it can be measured in.
        peer: what our call is held against.
    """

    name: str
    module: str
    text: str
    bars: Mapping[str, Bar] = dataclasses.field(default_factory=dict)
    dtypes: tuple[str, ...] = (FLOAT32,)
    peer: str = "torch"


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two calls that compute the same.

    Attributes:
        ours: returns JAX arrays in any structure.
        peer: given what to wrap the peer's functions or modules with (`torch.compile`, or nothing), makes its call. The call
            returns what `peer_output` reads.
        tolerance: how far outputs may be apart, as a share of the peer's largest value.
        our_output, peer_output: what a call's result is compared by. Neither is timed.
        compiled: whether the peer has anything to wrap.
        facts: goes into the result as it is.
    """

    ours: Call
    peer: Callable[[Wrap], Call]
    tolerance: float
    our_output: Callable[[Any], Any] = lambda result: result
    peer_output: Callable[[Any], Any] = lambda result: result
    compiled: bool = True
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _both(bar: float, aim: float, bar16: float, aim16: float) -> dict[str, Any]:
    return {"bars": {FLOAT32: Bar(bar, aim), BFLOAT16: Bar(bar16, aim16)}, "dtypes": (FLOAT32, BFLOAT16)}


def _one(bar: float, aim: float | None = None) -> dict[str, Bar]:
    return {FLOAT32: Bar(bar, aim)}


COMPONENTS: dict[str, TimedComponent] = {
    component.name: component
    for component in (
        TimedComponent("sam_window", "encoders", "SAM ViT-L window block, 64 x 64 patches", **_both(1.15, 1.0, 1.15, 1.0)),
        TimedComponent("sam_global", "encoders", "SAM ViT-L global block, 4,096 patches", **_both(1.3, 1.0, 1.3, 1.0)),
        TimedComponent("siglip", "encoders", "SigLIP2-so400m block, 729 patches", **_both(1.3, 1.1, 2.0, 1.6)),
        TimedComponent("llm_prefill", "encoders", "Qwen3-4B block, a prompt of 1,800 tokens", **_both(1.3, 1.1, 2.0, 1.6)),
        TimedComponent("llm_decode", "encoders", "Qwen3-4B block, one token after 1,800 cached", **_both(1.3, 1.1, 2.0, 1.6)),
        TimedComponent("pixel_decoder_layer", "msda", "layer of the pixel decoder, 21,504 tokens", _one(0.5, 0.4)),
        TimedComponent("msda", "msda", "deformable attention alone, 21,504 queries", _one(0.5, 0.4)),
        TimedComponent("msda_grad", "msda", "the same and its three gradients", _one(0.7, 0.5)),
        TimedComponent("decoder_layer", "decoder", "Mask2Former layer, 200 queries, 16,384 keys", _one(0.8, 0.7)),
        TimedComponent("decoder_layer_grad", "decoder", "the same and all gradients", _one(1.2, 1.0)),
        TimedComponent("bar", "decoder", "boundary refinement of 8 masks, 128 x 128", _one(0.5, 0.3)),
        TimedComponent(
            "point_losses_grad", "losses", "point selection, BCE and dice of 32 masks, and the gradient", _one(1.3, 1.0)
        ),
        TimedComponent("matcher", "losses", "10 levels of 32 targets and 200 queries", _one(1.5, 1.0), peer="scipy"),
        TimedComponent("matcher_batch", "losses", "the same for 16 images", _one(1.0, 0.7), peer="scipy"),
        TimedComponent("resize", "losses", "50 masks, 128 to 1,024 pixels", _one(1.0, 0.7)),
        TimedComponent("forward", "whole", "image and one expression to masks, two layers per encoder", _one(1.1, 0.95)),
        TimedComponent(
            "train_step", "whole", "train step, one image, four expressions, two layers per encoder", _one(1.2, 1.0)
        ),
        TimedComponent("seven_expressions", "whole", "one image, seven expressions: image pass shared", _one(0.25, 0.18)),
        TimedComponent("seven_shared", "whole", "the same beside our own path one by one", _one(0.2), peer="one by one"),
    )
}


def choose(names: Sequence[str]) -> list[TimedComponent]:
    """The components of those names, all where there are none. UserError names the nearest for one that does not exist."""
    for name in names:
        if name not in COMPONENTS:
            raise UserError(f"no component {name!r}{did_you_mean(name, COMPONENTS)}")
    return [COMPONENTS[name] for name in names or COMPONENTS]


def build(component: TimedComponent, size: str, dtype: str) -> Pair:
    """Makes the inputs, weights and both calls, at size "full" or "tiny".

    Raises:
        UserError: torch or transformers is not installed.
    """
    from benchmarks.components.sizes import SIZES

    try:
        module = importlib.import_module(f"benchmarks.components.{component.module}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"benchmarks need {error.name}: install the extra test (make venv, or pip install -e '.[test]')"
        ) from None
    return getattr(module, component.name)(SIZES[size], dtype)
