"""A generic evaluation of candidates that a function proposes, in place of a model's."""

from __future__ import annotations

from collections.abc import Callable

from flowseg_jax.data.generic_dataset import CategoryPrompts, GenericDataset
from flowseg_jax.evaluation import runner
from flowseg_jax.evaluation.evaluator import Evaluator
from flowseg_jax.evaluation.tasks.generic import GenericTask


class Proposals(Evaluator):
    """Candidates are what `propose` makes of a batch: scores [B, N, C] and mask logits [B, N, h, w]."""

    def __init__(self, propose: Callable):
        super().__init__(None)
        self.propose = propose

    def score_categories(self, params, inputs, prompts):
        return self._put(self.propose(inputs))


def evaluate(
    propose: Callable, data: GenericDataset, categories: tuple[str, ...], things: tuple[bool, ...] | None, **options
) -> runner.EvalResult:
    task = GenericTask(Proposals(propose), CategoryPrompts.of(categories), things, **options)
    return runner.evaluate(task, {}, lambda skip: data, name="val", about={}, settings={})
