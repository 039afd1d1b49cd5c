"""Small trees of arrays to store, and ways to spoil what was stored."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from flowseg_jax.checkpoints.manifest import checksums


def make_params():
    w = jax.random.normal(jax.random.key(1), (60, 100))
    return {"a": {"w": w, "b": jnp.ones(7, jnp.bfloat16)}, "layers": {"0": {"x": jnp.zeros(3)}, "1": {"x": jnp.arange(3.0)}}}


def make_state():
    params = make_params()
    return {"params": params, "opt": optax.adamw(1e-3).init(params), "step": jnp.asarray(3), "key": jax.random.key(0)}


def abstract_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and checksums(a) == checksums(b)


def largest(directory: str | os.PathLike) -> Path:
    return max((path for path in Path(directory).rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
