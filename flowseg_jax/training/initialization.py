"""What a run starts from: fresh parameters, and those of earlier models and converted components in their places.

`init_from` is a tuple of `[component=]DIR`; a later entry replaces what an earlier one brought. Nothing is matched by
guesswork: an
array of another shape is an error, an array that the model has no place for is one too (but for the parts that models differ
in on purpose), and every parameter that no entry brought is named.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flowseg_jax import sharding
from flowseg_jax.checkpoints.find import find_model
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.checkpoints.pretrained import load_pretrained, read_model_config
from flowseg_jax.checkpoints.quantized import place
from flowseg_jax.errors import UserError, did_you_mean, listed
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.quantization import quantized
from flowseg_jax.system.console import log
from flowseg_jax.training import lora as adapters
from flowseg_jax.training.adapters import read_settings
from flowseg_jax.training.lora import LoraConfig

# Where a converted component stands in a model. Families that are not listed name their parameters as a whole model does.
COMPONENT_PREFIX = {"qwen3": "llm", "phi3": "llm", "llama": "llm", "siglip2": "siglip", "sam": "sam"}
# Parts that a source may have without the model: switched off here, or of another stage.
OPTIONAL_PARAMS = re.compile(r"(category_head|boundary|mask_decoder/layers/(semantic|condition)_refinement)/")


@dataclasses.dataclass(frozen=True)
class InitSource:
    """One entry of `init_from`.

    Attributes:
        text: as the user wrote it.
        directory: the model directory or the component's.
        stored: its manifest, {name: [shape, dtype]}.
        places: {our name: its name} of what it brings.
        unused: names of optional parts that the model lacks.
        adapters: of a directory of adapters, the settings that it was trained with and what its base was; else {}.
    """

    text: str
    directory: Path
    stored: Mapping[str, list]
    places: Mapping[str, str]
    unused: tuple[str, ...]
    adapters: Mapping[str, Any]

    @classmethod
    def open(cls, text: str, shapes: Mapping[str, tuple[int, ...]]) -> InitSource:
        """Matches an entry with the model's parameters, `shapes`; nothing large is read.

        Raises:
            UserError: no such directory or component, or arrays that the model has no place for: ten of them and the count.
        """
        component, equals, path = text.partition("=")
        if not equals or not component.isidentifier():
            component, path = "", text
        components = {name.split("/")[0] for name in shapes}
        if component and component not in components:
            raise UserError(f"init_from {text!r}: the model has no part {component!r}{did_you_mean(component, components)}")
        path = find_model(path, None)  # also RUN@STEP
        config = read_model_config(path, allow_component=True)
        stored, part = config["manifest"], config.get("component") or {}
        family = part.get("family")
        place = COMPONENT_PREFIX.get(family, "")
        if place and component and component != place:
            raise UserError(f"init_from {text!r}: {path} is a {family} component and belongs to {place}")
        names = {f"{place}/{name}" if place else name: name for name in stored}
        if component:
            names = {ours: name for ours, name in names.items() if ours.split("/")[0] == component}
        if not names:
            raise UserError(f"init_from {text!r}: {path} holds no {component or 'parameters'}")
        unused = tuple(ours for ours in names if ours not in shapes and OPTIONAL_PARAMS.match(ours))
        faults = [f"no place for {ours} {tuple(stored[n][0])}" for ours, n in names.items() if ours not in {*shapes, *unused}]
        places = {ours: name for ours, name in names.items() if ours in shapes}
        faults += [
            f"{ours} is {tuple(stored[name][0])}, the model's is {shapes[ours]}"
            for ours, name in places.items()
            if tuple(stored[name][0]) != shapes[ours]
        ]
        if faults:
            raise UserError(f"init_from {text!r} does not fit the model: {listed(faults, between='; ')}")
        return cls(text, Path(path), stored, places, unused, part["config"] if family == adapters.FAMILY else {})

    def check_adapters(self, lora: LoraConfig) -> None:
        """Raises a UserError where adapters would compute something else in a run with these settings."""
        if not self.adapters:
            return
        theirs, _ = read_settings(self.adapters, str(self.directory))
        for name in ("rank", "alpha", "rslora", "dora"):
            if (value := getattr(theirs, name)) != getattr(lora, name):
                raise UserError(
                    f"init_from {self.text!r}: these adapters have lora.{name}={value}, the run has {getattr(lora, name)}"
                )

    def load(self, abstract: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, jax.Array]:
        """{our name: array}, each read straight into the sharding and dtype of `abstract`."""
        ours = {name: our for our, name in self.places.items()}
        whole = sharding.replicated(mesh)
        like = {
            name: abstract[ours[name]] if name in ours else jax.ShapeDtypeStruct(shape, kind, sharding=whole)
            for name, (shape, kind) in self.stored.items()
        }
        found = flatten_params(load_pretrained(self.directory, unflatten_params(like), allow_component=True).params)
        return {our: found[name] for our, name in self.places.items()}

    def load_int8(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, jax.Array], dict[str, int]]:
        """`load` where some of `abstract` are int8: no device ever holds more than it will keep.

        Returns:
            The arrays, the scales of int8 weights among them; {int8 weight: `rounded_checksum` of what it was made of}.
        """
        flat = flatten_params(load_pretrained(self.directory, dtype=None, allow_component=True).params)  # in the host's memory
        found, sums = {}, {}
        for our, name in self.places.items():
            made = {our: flat.pop(name)}
            if abstract[our].dtype == jnp.int8:
                sums[our] = adapters.rounded_checksum(made[our])
                made = quantized(our, made[our])
            found |= {path: place(x, abstract[path]) for path, x in made.items()}
        return found, sums


def initial_params(
    cfg: FlowSegConfig,
    seed: int,
    init_from: Sequence[str],
    mesh: Mesh,
    lora: LoraConfig | None = None,
    frozen: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """All parameters of a new run, created or read where they belong; says what came from where and what is fresh.

    Args:
        seed: of fresh parameters; they do not depend on what else is read.
        init_from: `[component=]DIR`, in the order in which they are applied.
        lora: the adapters that the run has.
        frozen: how those that are not trained are stored; the others are float32.

    Returns:
        The parameters, and {int8 weight: `rounded_checksum` of what it was made of}.

    Raises:
        UserError: an entry that does not fit, or none for what is to be int8, before anything is read; adapters of another
            base, once that is read.
    """
    lora = lora or LoraConfig()
    _, state = adapters.abstract_model(cfg, lora)
    shardings = flatten_params(sharding.param_shardings(state, mesh))
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
        for name, x in flatten_params(flowseg.params_dict(state)).items()
    }
    shapes = {name: x.shape for name, x in abstract.items()}
    abstract |= frozen or {}
    sources = [InitSource.open(text, shapes) for text in init_from]
    for source in sources:
        source.check_adapters(lora)
    from_source = {our: source for source in sources for our in source.places}  # the last one that has it
    fresh = [name for name in shapes if name not in from_source]
    if random := [name for name in fresh if abstract[name].dtype == jnp.int8]:
        raise UserError(
            f"optimizer.frozen_dtype is int8, and init_from brings no {random[0]}: name a model that has it, or train it"
        )

    def create() -> dict[str, jax.Array]:
        flat = flatten_params(flowseg.init_model(cfg, seed)[1]) | adapters.initial_adapters(shapes, seed)
        cast = {name: flat[name].astype(abstract[name].dtype) for name in fresh}
        return {name: jax.lax.with_sharding_constraint(x, shardings[name]) for name, x in cast.items()}

    # Hundreds of random number generators that run once: LLVM would take twice as long to optimise them.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    params, sums = jax.jit(create, compiler_options=options)() if fresh else {}, {}
    in_int8 = any(x.dtype == jnp.int8 for x in abstract.values())
    for source in sources:
        mine = {our for our in source.places if from_source[our] is source}
        if mine:
            found, rounded = source.load_int8(abstract) if in_int8 else (source.load(abstract, mesh), {})
            scales = {f"{our}_scale" for our in mine & rounded.keys()}
            params |= {our: x for our, x in found.items() if our in mine | scales}
            sums |= {our: value for our, value in rounded.items() if our in mine}
        unused = f"; not used: {_groups(source.unused)}" if source.unused else ""
        log(f"init_from {source.text}: {len(mine)} parameters{unused}")
    if sources and fresh:
        log(f"not found, initialised afresh: {_groups(fresh)}")
    if bases := [source for source in sources if source.adapters]:
        base = {name: x for name, x in params.items() if not adapters.is_adapter(name)}
        found = adapters.base_digests(base, sums)
        for source in bases:
            adapters.check_base(source.adapters["base"], found, f"init_from {source.text}")
    return unflatten_params({name: params[name] for name in abstract}), sums


def _groups(names: Sequence[str]) -> str:
    """Parameter names with their last parts, which are many and alike, put together: "decoder/norm/{bias,scale}"."""
    leaves: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition("/")
        leaves.setdefault(parent, []).append(leaf)
    each = [f"{p}/{kept[0]}" if len(kept) == 1 else f"{p}/{{{','.join(kept)}}}" for p, kept in leaves.items()]
    return ", ".join(name.lstrip("/") for name in each)
