"""LoRA: products of low rank beside the frozen matrices of SAM, SigLIP and the language model.

An adapter is two parameters of the model, `<linear layer>/lora/a` and `.../lora/b` (DoRA: and `.../lora/magnitude`), in a stack
with the layers' axis first like the weight beside them (`models.layers.LowRankAdapter` computes with them). So what holds for
parameters holds for adapters: the table of learning rates, sharding, checkpoints, the scan over layers. `merge_adapters` adds
them to the weights, which gives a plain model. https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowseg_jax import fields
from flowseg_jax.checkpoints.manifest import checksums, flatten_params, unflatten_params
from flowseg_jax.errors import UserError, listed
from flowseg_jax.models import flowseg
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.layers import DropoutKeys, Linear, LowRankAdapter, length_ratio

ADAPTED_COMPONENTS = ("sam", "siglip", "llm")
FAMILY = "lora"  # of a directory of adapters, among those of components


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Attributes:
    targets: regular expressions; the linear layers of SAM, SigLIP and the language model whose whole path one of them matches
        ("llm/layers/self_attn/q_proj") get adapters, in all layers of their stack. (): no adapters, everything as without LoRA.
    rank: r.
    alpha: the product is scaled by alpha / r, with `rslora` by alpha / sqrt(r) (https://arxiv.org/abs/2312.03732).
    dropout: probability with which an element of an adapter's input is dropped in training.
    rslora: see `alpha`.
    dora: each column of an adapted weight also learns its length (https://arxiv.org/abs/2402.09353): a third parameter,
        `<linear layer>/lora/magnitude`, the length relative to that of the base less 1.
    """

    targets: tuple[str, ...] = ()
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}: it must be at least 1 (lora.targets=() trains without adapters)")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha is {self.alpha}: it must be above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}: it must be at least 0 and below 1")
        for pattern in self.targets:
            if len(pattern) > fields.LONGEST_TEXT:
                raise UserError(
                    f"lora.targets: {pattern[:20]!r}... is longer than {fields.LONGEST_TEXT} characters: make it several"
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"lora.targets: {pattern!r} is no regular expression: {error}") from None

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def abstract_model(model: FlowSegConfig, cfg: LoraConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """`flowseg.abstract_model` with adapters. Raises UserError as `add_adapters`."""
    graphdef, state = flowseg.abstract_model(model)
    if not cfg.targets:
        return graphdef, state
    network = nnx.merge(graphdef, state)
    add_adapters(network, cfg)
    return nnx.split(network)


def add_adapters(network: nnx.Module, cfg: LoraConfig) -> None:
    """Gives the targets abstract adapters, in place; a parameter's logical axes are those of the weight beside it.

    Raises:
        UserError: a target that matches no linear layer.
    """
    linears = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(network) if isinstance(node, Linear)}
    linears = {path: node for path, node in linears.items() if path.split("/")[0] in ADAPTED_COMPONENTS}
    for pattern in cfg.targets:
        matched = [path for path in linears if re.fullmatch(pattern, path)]
        if not matched:
            raise UserError(f"lora.targets: {pattern!r} matches no linear layer; there are {listed(sorted(linears), 40)}")
        for path in matched:
            kernel = linears[path].kernel
            layers, d_in, d_out = kernel.shape
            stack, axis_in, axis_out = kernel.get_metadata()["logical_axes"]
            a, b = (
                nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), logical_axes=axes, beside=kernel.shape)
                for shape, axes in (
                    ((layers, d_in, cfg.rank), (stack, axis_in, None)),
                    ((layers, cfg.rank, d_out), (stack, None, axis_out)),
                )
            )
            magnitude = nnx.Param(jax.ShapeDtypeStruct((layers, d_out), jnp.float32), logical_axes=(stack, None))
            linears[path].lora = LowRankAdapter(a, b, cfg.scale, cfg.dropout, magnitude if cfg.dora else None)


def initial_adapters(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, jax.Array]:
    """Fresh adapters for the paths of `shapes` that are adapters: A as PEFT draws it, all else zero: the model is its base."""
    key, found = jax.random.key(seed), {}
    for path, shape in shapes.items():
        if path.endswith("/lora/a"):
            bound = 1 / math.sqrt(shape[-2])
            found[path] = jax.random.uniform(
                jax.random.fold_in(key, zlib.crc32(path.encode())), shape, minval=-bound, maxval=bound
            )
        elif is_adapter(path):
            found[path] = jnp.zeros(shape)
    return found


def is_adapter(path: str) -> bool:
    return path.endswith(("/lora/a", "/lora/b", "/lora/magnitude"))


def is_scale(path: str) -> bool:
    """Whether a parameter is the scales of an int8 weight."""
    return path.endswith("/kernel_scale")


def adapted(paths: Iterable[str]) -> dict[str, str]:
    """{linear layer that has an adapter: its component}."""
    return {path.removesuffix("/lora/a"): path.split("/")[0] for path in paths if path.endswith("/lora/a")}


def freeze_base(rates: Mapping[str, float | None]) -> dict[str, float | None]:
    """The learning-rate multipliers of all parameters, where components with adapters learn through these alone.

    Raises:
        UserError: adapters that `optimizer.param_groups` freezes.
    """
    components = set(adapted(rates).values())
    if still := [path for path, rate in rates.items() if is_adapter(path) and rate is None]:
        raise UserError(
            f"optimizer.param_groups freezes the adapters that lora.targets asks for, {still[0]} among them: begin the table "
            "with ('.*/lora/.*', 1.0)"
        )
    return {path: None if path.split("/")[0] in components and not is_adapter(path) else rate for path, rate in rates.items()}


def with_dropout(network: nnx.Module) -> nnx.GraphDef:
    """The graph definition of the network in training, where `dropout_keys` stand beside the parameters."""
    for _, node in nnx.iter_graph(network):
        if isinstance(node, LowRankAdapter):
            node.keys = DropoutKeys(None)
    return nnx.split(network)[0]


def dropout_keys(layers: Mapping[str, int], keys: jax.Array) -> dict[str, Any]:
    """The keys of a step as a tree beside the parameters.

    Args:
        layers: {linear layer that has an adapter: layers of its stack}.
        keys: of the rows of the batch, [B].

    Returns:
        A nested dict of keys [L, B].
    """

    def each(path: str, count: int) -> jax.Array:
        salted = jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(path.encode())))(keys)
        return jax.vmap(lambda layer: jax.vmap(lambda key: jax.random.fold_in(key, layer))(salted))(jnp.arange(count))

    return unflatten_params({f"{path}/lora/keys": each(path, count) for path, count in layers.items()})


def merge_adapters(params: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """A plain model's parameters: every adapter's product is added to the weight beside it, which keeps its dtype and sharding.

    An int8 weight becomes a bfloat16 one, with its scales multiplied in. One layer at a time is computed in float32.
    """
    flat = flatten_params(params)
    plain = {path: x for path, x in flat.items() if not is_adapter(path) and not is_scale(path)}

    def one(parts: dict[str, jax.Array]) -> jax.Array:
        base = parts["kernel"].astype(jnp.float32)
        if "kernel_scale" in parts:
            base *= parts["kernel_scale"]
        whole = base
        if "lora/a" in parts:
            a, b = parts["lora/a"], parts["lora/b"]
            whole = base + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            if "lora/magnitude" in parts:
                whole *= (1 + parts["lora/magnitude"]) * length_ratio(base, a, b, scale)
        return whole.astype(jnp.bfloat16 if "kernel_scale" in parts else parts["kernel"].dtype)

    names = ("kernel", "kernel_scale", "lora/a", "lora/b", "lora/magnitude")
    for path in dict.fromkeys([*adapted(flat), *(path.removesuffix("/kernel_scale") for path in flat if is_scale(path))]):
        kernel = flat[f"{path}/kernel"]
        merge = jax.jit(lambda parts: jax.lax.map(one, parts), out_shardings=getattr(kernel, "sharding", None))
        plain[f"{path}/kernel"] = merge({name: flat[f"{path}/{name}"] for name in names if f"{path}/{name}" in flat})
    return unflatten_params(plain)


def base_digests(frozen: Mapping[str, Any], rounded_sums: Mapping[str, int] | None = None) -> dict[str, str]:
    """{component: SHA-256} of the parameters that are not trained: by which adapters know their base.

    It is that of the values in bfloat16, so a base is the same in either dtype and however it is sharded; and the same in int8,
    given `rounded_sums`.

    Args:
        frozen: parameters by name.
        rounded_sums: {path of an int8 weight: `rounded_checksum` of what it was made of}.
    """
    sums: dict[str, dict[str, int]] = {}
    for path, x in flatten_params(frozen).items():
        if not is_scale(path):
            found = (rounded_sums or {}).get(path)
            sums.setdefault(path.split("/")[0], {})[path] = rounded_checksum(x) if found is None else found
    return {part: hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() for part, found in sums.items()}


def rounded_checksum(x: Any) -> int:
    """The checksum of an array's values in bfloat16; of those of an array of whole numbers, as they are."""
    return checksums({"": x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x})[""]


def check_base(wanted: Mapping[str, str], found: Mapping[str, str], source: str) -> None:
    """Raises a UserError unless the components in `wanted`, by which `source` was made, are those that there are."""
    if other := [part for part, digest in wanted.items() if found.get(part) != digest]:
        raise UserError(
            f"{source} was trained on another base, its {', '.join(other)} is not this one: name the model that it was trained "
            "from first in init_from"
        )
