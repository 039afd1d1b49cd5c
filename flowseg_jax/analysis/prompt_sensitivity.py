"""How much a result depends on the prompt template of the question and of the given answer.

The same samples are evaluated once with every pair of a question and an answer of `data.prompts`. Published numbers come from
one prompt template, or from templates drawn at random. The spread over all of them says how much a difference between two
models must exceed to be about the models. Choosing the best template here and reporting its number would fit the split.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowseg_jax.analysis import page
from flowseg_jax.analysis.runner import AnalysisRunner
from flowseg_jax.data.prompts import REFERRING_ANSWERS, REFERRING_QUESTIONS
from flowseg_jax.evaluation.tasks import referring
from flowseg_jax.reports import plots
from flowseg_jax.system.console import log


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"ciou", "giou": mean, sd (of the prompt templates, n - 1), lowest, highest} over templates; None for the sd of one."""
    result = {}
    for name in ("ciou", "giou"):
        values = np.array([row[name] for row in rows])
        sd = float(values.std(ddof=1)) if len(values) > 1 else None
        result[name] = {"mean": float(values.mean()), "sd": sd, "lowest": float(values.min()), "highest": float(values.max())}
    return result


def evaluate(source: AnalysisRunner, templates: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """One mapping a (question, answer): its indices, n, cIoU, gIoU and `same`, the share of samples with the first's query."""
    model, rows, first = source.evaluation.model, [], None
    for question, answer in templates:
        prompts = dataclasses.replace(model.prompts, question=question, answer=answer)
        log(f"question {question}: {REFERRING_QUESTIONS[question]}  answer {answer}: {REFERRING_ANSWERS[answer]}")
        data = functools.partial(source.evaluation.open, source.split, images=source.images, prompts=prompts)
        found = referring.evaluate(model.evaluator, model.params, data, split=source.split)
        queries = [record["query"] for record in found.records]
        first = first or queries
        row = {"question": question, "answer": answer, **{key: found.result[key] for key in ("n", "ciou", "giou")}}
        rows.append(row | {"same": 100 * float(np.mean([a == b for a, b in zip(queries, first, strict=True)]))})
    return rows


def run(source: AnalysisRunner, out: Path) -> Path:
    """Writes `prompt_sensitivity_<split>.json` and `.html`; returns the page."""
    fixed = source.evaluation.model.prompts
    every = [(q, a) for q in range(len(REFERRING_QUESTIONS)) for a in range(len(REFERRING_ANSWERS))]
    rows = evaluate(source, sorted(every, key=lambda pair: pair != (fixed.question, fixed.answer)))
    spread = {"all": summarise(rows)}
    spread["questions, model's answer"] = summarise([r for r in rows if r["answer"] == fixed.answer])
    spread["answers, model's question"] = summarise([r for r in rows if r["question"] == fixed.question])
    body = [
        page.heading("Spread", "Over prompt templates, percent; sd with n - 1."),
        page.table(
            [
                "prompt templates",
                *(f"{name} {key}" for name in ("cIoU", "gIoU") for key in ("mean", "sd", "lowest", "highest")),
            ],
            [
                [name, *(_two(each[figure][key]) for figure in ("ciou", "giou") for key in ("mean", "sd", "lowest", "highest"))]
                for name, each in spread.items()
            ],
        ),
    ]
    by_pair = {(r["question"], r["answer"]): r for r in rows}
    answers, questions = range(len(REFERRING_ANSWERS)), range(len(REFERRING_QUESTIONS))
    for key, title, about in (
        ("ciou", "cIoU", "Percent."),
        ("giou", "gIoU", "Percent."),
        (
            "same",
            "Same query",
            "Share of the samples in which the query of the model's own prompt template is selected, percent.",
        ),
    ):
        cells = [[by_pair[q, a][key] for a in answers] for q in questions]
        names = [str(q) for q in questions], [str(a) for a in answers]
        body += [page.heading(title, about), plots.heat(cells, *names, x="answer", y="question", digits=1)]
    body += [
        page.heading("Prompt templates"),
        page.table(["", "question"], [[str(i), REFERRING_QUESTIONS[i]] for i in questions]),
        page.table(["", "answer"], [[str(i), REFERRING_ANSWERS[i]] for i in answers]),
    ]
    about = [
        f"{rows[0]['n']} samples of {source.split}, {source.about['images'] or 'all'} images, {len(rows)} templates; the"
        f" model's own are question {fixed.question} and answer {fixed.answer}."
    ]
    result = {**source.about, "spread": spread, "templates": rows}
    found = {"conclusion": finding(spread["all"]["ciou"]), "origin": source.origin}
    return page.write(
        out, f"prompt_sensitivity_{source.split}", f"Prompt templates: {source.split}", about, result, body, **found
    )


def finding(ciou: dict[str, Any]) -> str:
    """What the choice of a template is worth, in a sentence."""
    return (
        f"The prompt template alone moves cIoU between {ciou['lowest']:.1f} and {ciou['highest']:.1f}: a difference between "
        f"two models below {ciou['highest'] - ciou['lowest']:.1f} points may be one of templates."
    )


def _two(value: float | None) -> str:
    return page.shown(None if value is None else f"{value:.2f}")
