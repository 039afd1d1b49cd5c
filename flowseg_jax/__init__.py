"""FlowSeg in JAX and Flax: language-conditioned segmentation with bidirectional semantic flow.

`models/flowseg.py` is the whole network, `training/loop.py` a training run, `evaluation/benchmark.py` an evaluation.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowseg_jax.inference.segmentor import Segmentor


def load(directory: str | os.PathLike[str]) -> Segmentor:
    """The segmentor of a model directory, trained here or written by `convert_weights`: `load(DIR).segment(image, texts)`.

    Raises:
        UserError: not a model directory, a damaged one, or one whose tokenizer does not fit the model.
    """
    from flowseg_jax.inference import segmentor  # here, so that importing the package stays cheap

    return segmentor.load(directory)
