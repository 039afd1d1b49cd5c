"""The page: upload an image or take a scene, write expressions, see the answers and how they came about (Gradio)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flowseg_jax.app import views
from flowseg_jax.errors import UserError
from flowseg_jax.inference.explanation import Explanation
from flowseg_jax.inference.segmentor import GeneratedAnswer, Segmentor
from flowseg_jax.inference.selection import Prediction

try:
    import gradio as gr
except ModuleNotFoundError:
    raise UserError("the page needs Gradio, the extra app: in a clone, `make app` or pip install -e '.[app]'") from None

TITLE = "FlowSeg: language-conditioned segmentation"
MAX_UPLOAD = "30mb"
KEEP = 3600  # seconds that an idle visitor's results are kept
CSS = """
#banner {border-left: 4px solid #e69f00; padding-left: 0.8em}
#answers img {image-rendering: pixelated}
@media (max-width: 700px) {#page {flex-direction: column} .gradio-container {padding: 0.4em !important}}
"""


def build(segmentor: Segmentor, scenes: Sequence[tuple[str, str]], checkpoint: str | None, about: Sequence[str]) -> gr.Blocks:
    """The page of a model.

    Args:
        segmentor: answers.
        scenes: (image file, expressions, one per line) to try; shown as examples.
        checkpoint: the model's directory, for "copy as Python"; None for the shipped one.
        about: what the model knows, a few lines that are shown on top (`ModelCard.lines`).
    """
    count = segmentor.num_layers
    with gr.Blocks(title=TITLE) as page:
        results = gr.State(None, time_to_live=KEEP)
        gr.Markdown(f"# {TITLE}")
        gr.HTML("".join(f"<p>{escape(line)}</p>" for line in about), elem_id="banner")
        with gr.Row(elem_id="page"):
            with gr.Column(scale=2, min_width=320):
                image = gr.Image(type="filepath", label="image", sources=["upload", "clipboard"], elem_id="image")
                texts = gr.Textbox(lines=4, max_lines=12, label="what to segment, one expression per line", elem_id="texts")
                go = gr.Button("Segment", variant="primary", elem_id="go")
                with gr.Accordion("options", open=False):
                    threshold = gr.Slider(
                        0, 1, segmentor.no_target_threshold, step=0.01, label="no target: best scores below mean “not found”"
                    )
                    top_k = gr.Slider(1, 15, 5, step=1, label="candidates per expression")
                    generate = gr.Checkbox(False, label="the model writes its answer itself")
                gr.Examples([list(scene) for scene in scenes], [image, texts], label="scenes to try", examples_per_page=4)
            with gr.Column(scale=3, min_width=320):
                with gr.Tabs():
                    with gr.Tab("Answers"):
                        answers = gr.Image(label="click on an object", interactive=False, elem_id="answers", format="png")
                        table = gr.HTML(elem_id="table")
                        here = gr.Dataframe(
                            headers=["expression", "query", "mask probability", "score"],
                            label="at the pixel that was clicked: the query that owns it in each expression's pass",
                            interactive=False,
                            elem_id="here",
                        )
                        owner = gr.Image(label="that query's mask", interactive=False, format="png", elem_id="owner")
                    with gr.Tab("Candidates"):
                        gallery = gr.Gallery(label="highest score first", columns=5, elem_id="candidates", format="png")
                    with gr.Tab("Layers"):
                        which = gr.Dropdown([], label="expression", elem_id="which")
                        number = gr.Slider(0, count, count, step=1, label="after this many decoder layers", elem_id="layer")
                        at_layer = gr.Image(
                            label="the selected query's mask", interactive=False, format="png", elem_id="at-layer"
                        )
                        figures = gr.Dataframe(headers=["", "value"], interactive=False, elem_id="figures")
                    with gr.Tab("Boundary"):
                        refined = gr.Gallery(label="boundary-aware refinement", columns=3, elem_id="boundary", format="png")
                    with gr.Tab("Save"):
                        files = gr.Files(label="JSON with COCO RLE masks, PNG", elem_id="files")
                        code = gr.Code(language="python", label="the same in Python", elem_id="code")

        shown = [results, answers, table, gallery, which, at_layer, figures, refined, files, code, here, owner]

        def segment(path: str | None, text: str, threshold: float, top_k: int, generate: bool) -> list[Any]:
            options = {"no_target_threshold": round(float(threshold), 4), "top_k": int(top_k)}
            predictions, explanations = _answer(segmentor, path, text, options, generate)
            named = _names([p.text for p in predictions])
            first = views.layer(explanations[0], count, views.color_of(0)) if explanations else (None, [])
            bounds = [shot for n, e in enumerate(explanations) for shot in views.boundary(e, views.color_of(n))]
            python = views.as_python(checkpoint, os.path.basename(path or "image"), views.read_texts(text), options)
            return [
                explanations,
                views.combined(predictions),
                _table(views.answer_rows(predictions), predictions),
                views.candidates(predictions),
                gr.Dropdown(named[: len(explanations)], value=named[0] if explanations else None),
                *first,
                bounds,
                _files(predictions),
                python,
                [],
                None,
            ]

        def clicked(explanations: list[Explanation] | None, at: gr.SelectData) -> tuple[Any, list[list[Any]]]:
            if not explanations:
                raise gr.Error("segment something first", print_exception=False)
            picture = explanations[0].prediction.image
            scale = views.on_page(picture).shape[1] / picture.shape[1]
            x, y = (min(int(v / scale), side - 1) for v, side in zip(at.index, picture.shape[1::-1], strict=True))
            return views.at_point(explanations, x, y)

        def moved(explanations: list[Explanation] | None, name: str | None, number: int) -> tuple[Any, list[list[Any]]]:
            if not explanations:
                return None, []
            names = _names([e.prediction.text for e in explanations])
            chosen = names.index(name) if name in names else 0
            return views.layer(explanations[chosen], int(number), views.color_of(chosen))

        inputs = [image, texts, threshold, top_k, generate]
        gr.on([go.click, texts.submit], _errors_on_page(segment), inputs, shown, api_name="segment")
        answers.select(_errors_on_page(clicked), [results], [owner, here])
        gr.on([number.change, which.change], _errors_on_page(moved), [results, which, number], [at_layer, figures])
    return page


def _errors_on_page(function: Callable) -> Callable:
    """`function`, whose UserErrors become messages on the page and nothing else."""
    import functools

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return call


def _answer(
    segmentor: Segmentor, path: str | None, text: str, options: dict[str, Any], generate: bool
) -> tuple[list[Prediction], list[Explanation]]:
    """The predictions about the image, and how they came about where the expressions were given."""
    if path is None:
        raise UserError("choose an image: upload one, paste one, or take a scene below")
    expressions = views.read_texts(text)
    try:
        encoded = segmentor.encode_image(path, name=Path(path).name)
    except UserError as error:
        raise UserError(str(error).replace(os.fspath(path), Path(path).name)) from None
    if not generate:
        explanations = segmentor.explain(encoded, expressions, **options)
        return [e.prediction for e in explanations], explanations
    answers: list[GeneratedAnswer] = segmentor.generate(encoded, expressions, **options)
    return [prediction for answer in answers for prediction in answer.or_empty(encoded)], []


def _names(texts: Sequence[str]) -> list[str]:
    """Numbered, so that equal expressions can be told apart."""
    return [f"{number}. {text}" for number, text in enumerate(texts, 1)]


def _table(rows: Sequence[Sequence[Any]], predictions: Sequence[Prediction]) -> str:
    line = (
        '<tr><td><span style="display:inline-block;width:1em;height:1em;background:{}"></span></td>'
        "<td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>"
    )
    head = "<tr><th></th><th>expression</th><th></th><th>score</th><th>pixels</th></tr>"
    cells = [line.format(*(escape("-" if x is None else str(x)) for x in row)) for row in rows]
    written = "".join(f"<p>{escape(p.answer)}</p>" for p in predictions if p.answer)
    return f"<table>{head}{''.join(cells)}</table>{written}"


def _files(predictions: Sequence[Prediction]) -> list[str]:
    from PIL import Image

    folder = Path(tempfile.mkdtemp(prefix="flowseg_", dir=_folder()))
    (folder / "predictions.json").write_text(views.as_json(predictions), encoding="utf-8")
    Image.fromarray(views.combined(predictions)).save(folder / "answers.png")
    return [os.fspath(folder / name) for name in ("predictions.json", "answers.png")]


def _folder() -> Path:
    """Where Gradio may serve from: its own cache, which it empties."""
    folder = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def scenes(directory: Path) -> list[tuple[str, str]]:
    """The shipped scenes with their first expressions; none where they are not installed."""
    listed = directory / "scenes.jsonl"
    if not listed.is_file():
        return []
    texts: dict[str, list[str]] = {}
    for line in listed.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.setdefault(row["image"], []).append(row["expressions"][0])
    return [(os.fspath(directory / name), "\n".join(each)) for name, each in texts.items()]


def serve(page: gr.Blocks, host: str, port: int, *, block: bool = True) -> str:
    """Starts the page and returns its address. Nothing but what it made or was given is served.

    Raises:
        UserError: the port is taken.
    """
    try:
        page.queue(default_concurrency_limit=1).launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            show_error=False,
            prevent_thread_lock=not block,
            max_file_size=MAX_UPLOAD,
            css=CSS,
            footer_links=[],
        )
    except OSError as error:
        raise UserError(f"the page cannot start on {host}:{port}: {error}; choose another --port") from None
    return page.local_url
