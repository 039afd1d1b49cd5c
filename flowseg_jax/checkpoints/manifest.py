"""What a tree of arrays holds: names, shapes, dtypes, checksums; and one error that lists how two trees differ."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from flowseg_jax.errors import UserError, listed, plain
from flowseg_jax.system.json_files import expect, number

Tree = Any
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8")
DTYPES += ("uint64", "uint32", "uint16", "uint8", "bool")
CHUNK = 1 << 22  # elements that the host's checksum takes at a time


def flatten_params(tree: Tree) -> dict[str, Any]:
    """`{"a/b/0/kernel": leaf}` of any tree, lists and dataclasses included."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten_params(flat: Mapping[str, Any]) -> dict:
    """The nested dict with the names of `flatten_params`; all keys are strings, as in stored parameters."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def manifest(tree: Tree) -> dict[str, list]:
    """`{name: [shape, dtype]}` of every array or abstract array, as JSON values."""
    return {name: [list(jnp.shape(x)), str(jnp.result_type(x))] for name, x in flatten_params(tree).items()}


def check_manifest(want: Mapping[str, list], have: Mapping[str, list], source: str) -> None:
    """Raises one UserError for the names of manifest `have` that are missing, unexpected or misshapen: ten and the count.

    Dtypes may differ: what is read is cast to what the model wants.
    """
    faults = [f"missing {name} {tuple(want[name][0])}" for name in want if name not in have]
    faults += [f"unexpected {name} {tuple(have[name][0])}" for name in have if name not in want]
    for name in want:
        if name in have and list(have[name][0]) != list(want[name][0]):
            faults.append(f"{name} is {tuple(have[name][0])}, the model's is {tuple(want[name][0])}")
    if faults:
        raise UserError(f"{source} does not fit the model: {listed(faults, between='; ')}")


def check_arrays(entries: Any, sums: Any, where: str) -> None:
    """Raises a UserError unless a manifest and its checksums, which were read, can be those of arrays."""
    for key, group in (("manifest", entries), ("checksums", sums)):
        expect(isinstance(group, dict), group, f"{where}: {key}", "a group of keys")
    for name, kind in entries.items():
        ok = isinstance(kind, list) and len(kind) == 2 and isinstance(kind[0], list) and len(kind[0]) <= 16
        ok = ok and all(number(n, whole=True, least=0, most=1 << 40) for n in kind[0])
        ok = ok and isinstance(kind[1], str) and (kind[1] in DTYPES or kind[1].startswith("key<"))
        expect(ok, kind, f"{where}: manifest.{name[:80]}", "a shape and a dtype")
        ok = number(sums.get(name), whole=True, least=0, most=(1 << 32) - 1)
        expect(ok, sums.get(name), f"{where}: checksums.{name[:80]}", "a number of 32 bits")
    if lost := sorted(set(sums) - set(entries)):
        raise UserError(f"{where}: checksums.{plain(lost[0])} is of an array that the manifest lacks")


def checksums(tree: Tree) -> dict[str, int]:
    """A 32-bit checksum of every array, independent of how it is sharded.

    It is the sum, modulo 2^32, of each element's bit pattern times an odd number that depends on its index: any one changed
    byte changes it, and so do two exchanged elements. Arrays in host memory are summed by NumPy, the others where they are.
    """
    sums, remote = {}, {}
    for name, x in flatten_params(tree).items():
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if _on_host(x):
            sums[name] = _host_checksum(np.asarray(x))
        else:
            remote[name] = x
    sums |= {name: int(value) for name, value in jax.device_get(device_checksums(remote)).items()}
    return sums


def verify(tree: Tree, expected: Mapping[str, int]) -> None:
    """Raises a ValueError that names the first array whose checksum is not the expected one."""
    found = checksums(tree)
    wrong = [name for name in found if found[name] != expected.get(name)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"the bytes of {wrong[0]}{more} have changed since they were written")


def device_checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`checksums` on the device: uint32 scalars. No temporary is larger than a fused reduction's.

    The scalars are on every device of the arrays' mesh: each of several processes can read them, also for arrays of which it
    holds a part.
    """
    meshes = [x.sharding.mesh for x in arrays.values() if isinstance(x.sharding, NamedSharding)]
    return _compiled_checksums(NamedSharding(meshes[0], PartitionSpec()) if meshes else None)(arrays)


@functools.cache
def _compiled_checksums(placed: NamedSharding | None) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    def one(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        x = jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize >= 4 else f"uint{8 * x.dtype.itemsize}")
        index, stride = jnp.zeros(x.shape, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= x.shape[axis]
        return jnp.sum(x.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)

    return jax.jit(lambda arrays: jax.tree.map(one, arrays), out_shardings=placed)


def _host_checksum(x: np.ndarray) -> int:
    flat = np.ascontiguousarray(x).reshape(-1)
    flat = flat.view(np.uint32 if x.dtype.itemsize >= 4 else f"uint{8 * x.dtype.itemsize}")
    total = 0
    for start in range(0, flat.size, CHUNK):
        bits = flat[start : start + CHUNK].astype(np.uint32)
        index = np.arange(start, start + bits.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(bits * (index * np.uint32(2) + np.uint32(1)), dtype=np.uint32))
    return total % 2**32


def _on_host(x: Any) -> bool:
    devices: Iterable[Any] = x.devices() if isinstance(x, jax.Array) else ()
    return not isinstance(x, jax.Array) or (x.is_fully_addressable and all(device.platform == "cpu" for device in devices))
