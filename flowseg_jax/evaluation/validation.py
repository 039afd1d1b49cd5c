"""A model that is being trained, asked the same questions now and then: what `eval_every` of a config does.

Training is handed this class and imports none of it. The model is evaluated where its parameters are, by the code of `flowseg
eval`, so the numbers are those of `flowseg eval --checkpoint=RUN@STEP` on the same images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flowseg_jax import sharding
from flowseg_jax.data.dataset import PreparedDataset
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.tokenizer import Tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.evaluation.benchmark import EvalModel, ReferringEvaluation, make_evaluator
from flowseg_jax.evaluation.examples import GallerySample
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.reports import overlay, pictures

SCORES = ("ciou", "giou", "oracle_ciou", "oracle_giou", "selection_gap")  # of a `<split>.json`
PICTURES = 4  # samples that are drawn at every validation


class Validation:
    """Scores and pictures of a model's answers to the first images of a split. Nothing compiles twice.

    Args:
        cfg: the model.
        mesh: the devices that the parameters lie on, as `sharding.param_shardings` says.
        datasets: prepared data sets; the first of expressions with the split is taken.
        split: which split.
        images: at most so many; 0: all.
        tokenizer, prompts: of the run.

    Raises:
        UserError: the model has no language or makes no masks, or no data set has the split; the config's keys are named.
    """

    def __init__(
        self,
        cfg: FlowSegConfig,
        mesh: Mesh,
        datasets: Sequence[PreparedDataset],
        split: str,
        images: int,
        tokenizer: Tokenizer | None,
        prompts: PromptTemplates,
    ):
        if not (cfg.has_language_model and cfg.has_mask_decoder):
            raise UserError(f"eval_every: a model of the components {cfg.components!r} answers no expressions: set it to 0")
        known = [data for data in datasets if data.task in ("referring", "reasoning") and split in data.splits]
        if not known:
            places = ", ".join(str(data.directory) for data in datasets)
            raise UserError(
                f"eval_split: no expressions in a split {split!r} of {places}: name another split, a data set that has it by "
                "eval_data, or turn validation off by eval_every=0"
            )
        if mesh.shape["tensor"] > 1:  # an evaluation computes an image on one device
            sizes = {"data": mesh.shape["data"], "fsdp": mesh.shape["fsdp"] * mesh.shape["tensor"]}
            mesh = sharding.make_mesh(sizes, list(mesh.devices.flat))
        model = EvalModel(cfg, make_evaluator(cfg, mesh), {}, {}, tokenizer, prompts)
        self._evaluation = ReferringEvaluation(model, known[0])
        self._split, self._images = split, images or None

    def __call__(self, params: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Every process calls it alike.

        Args:
            params: the model's.

        Returns:
            `eval/ciou`, `eval/giou`, `eval/oracle_ciou`, `eval/oracle_giou` and `eval/selection_gap` in percent; and the strips
            of a few samples that are always the same, uint8 [H, W, 3].
        """
        model = dataclasses.replace(self._evaluation.model, params=params)
        evaluation = dataclasses.replace(self._evaluation, model=model)
        found = evaluation.evaluate(self._split, None, images=self._images, fixed=PICTURES, say=lambda _: None)
        strips = {
            f"eval/{i}_{overlay.slug(sample.record['text'])}": strip(sample)
            for i, sample in enumerate(found.examples["fixed"], 1)
        }
        return {f"eval/{name}": found.result[name] for name in SCORES}, strips


def strip(sample: GallerySample) -> np.ndarray:
    """The image, the true mask, the selected mask and the best candidate side by side, uint8 [H, W, 3]."""
    masks = (None, sample.truth, sample.selected, sample.best)
    colors = (pictures.TRUTH, pictures.TRUTH, pictures.SELECTED, pictures.BEST)
    panels = [pictures.panel(sample.image, mask, color) for mask, color in zip(masks, colors, strict=True)]
    return np.concatenate([np.asarray(panel) for panel in panels], axis=1)
