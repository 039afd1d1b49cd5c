"""FlowSeg in JAX and Flax: language-conditioned segmentation with bidirectional semantic flow.

    import flowseg_jax
    segmentor = flowseg_jax.load(DIRECTORY)                 # of a model that was trained here or converted
    (prediction,) = segmentor.segment("image.png", ["the red circle"])

`models/flowseg.py` is the whole network, `training/loop.py` a training run, `evaluation/benchmark.py` an evaluation. What this
module names is imported when it is used: `import flowseg_jax` imports neither JAX nor Flax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FlowSegConfig", "Segmentor", "__version__", "load"]

if TYPE_CHECKING:
    from flowseg_jax.inference.loading import load
    from flowseg_jax.inference.segmentor import Segmentor
    from flowseg_jax.models.config import FlowSegConfig

_MODULES = {
    "FlowSegConfig": "flowseg_jax.models.config",
    "Segmentor": "flowseg_jax.inference.segmentor",
    "load": "flowseg_jax.inference.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
