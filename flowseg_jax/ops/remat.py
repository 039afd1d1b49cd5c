"""The results that a layer may keep for its backward pass instead of computing them again."""

from __future__ import annotations

from typing import TypeVar

from jax.ad_checkpoint import checkpoint_name

Tree = TypeVar("Tree")
ATTENTION = "attention"  # results of attention: small, and expensive to make


def keepable(tree: Tree) -> Tree:
    """The same arrays, which the rematerialisation policy "attention" keeps."""
    return checkpoint_name(tree, ATTENTION)
