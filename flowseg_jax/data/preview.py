"""`index.html` with its pictures: samples of an on-disk layout as a person should check them before training."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from flowseg_jax.data import images, masks
from flowseg_jax.data.records import DatasetReader, Example, RecordErrors, Sample
from flowseg_jax.data.records import make_samples as samples_of
from flowseg_jax.errors import UserError
from flowseg_jax.reports import html as page
from flowseg_jax.reports import overlay
from flowseg_jax.reports.html import Html, html, join

COLORS = (
    (214, 64, 159),
    (47, 111, 235),
    (46, 160, 67),
    (217, 119, 6),
    (130, 80, 223),
    (14, 148, 136),
    (207, 34, 46),
    (161, 98, 7),
)
IGNORE = (120, 120, 120)
_SIDE = 360  # longest side of a picture, pixels
_STRIPE = 6  # of the hatching, pixels


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is shown of one example: the drawn objects in the order of their colours, and the sentence if there is one."""

    example: Example
    drawn: tuple[int, ...]
    sample: Sample | None = None


def color(place: int) -> tuple[int, int, int]:
    """The colour of a drawn object; colours recur."""
    return COLORS[place % len(COLORS)]


def choose(example: Example, rng: np.random.Generator) -> Picture:
    """One of the example's samples; all of its objects where nothing is said about them."""
    samples = samples_of(example)
    if samples:
        sample = samples[rng.integers(len(samples))]
        return Picture(example, sample.annotations, sample)
    return Picture(example, tuple(i for i, a in enumerate(example.annotations) if not a.ignore))


def draw(picture: Picture) -> tuple[Image.Image, Image.Image]:
    """The image, and the same with the drawn objects outlined, its other parts faded and its ignored parts hatched in grey.

    Raises:
        UserError: the image is damaged.
    """
    example = picture.example
    image = images.decode(example.image, name=example.file_name)
    scale = _SIDE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
    image = image.convert("RGB")
    out = np.array(image)
    targets = [_small(example, i, image.size) for i in picture.drawn]
    if targets:
        out = overlay.fade(out, np.any(targets, axis=0))
        for place, mask in enumerate(targets):
            overlay.draw_outline(out, mask, color(place))
    rows, columns = np.indices(out.shape[:2])
    stripes = (rows + columns) // _STRIPE % 2 == 0
    for i, annotation in enumerate(example.annotations):
        if annotation.ignore:
            out[_small(example, i, image.size) & stripes] = IGNORE
    return image, Image.fromarray(out)


def _small(example: Example, index: int, size: tuple[int, int]) -> Bool[np.ndarray, "y x"]:
    """An object's mask at the picture's (width, height); even the smallest one keeps a pixel."""
    mask: UInt8[np.ndarray, "h w"] = masks.decode([example.annotations[index].rle], example.height, example.width)[0]
    share = np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX))
    return share >= min(0.5, share.max()) if share.any() else np.zeros(share.shape, bool)


def preview(
    layout: DatasetReader, out: str | Path, splits: Sequence[str], problems: RecordErrors, *, samples: int = 12, seed: int = 0
) -> Path:
    """Writes the page.

    Args:
        layout: an opened layout.
        out: the folder to create.
        splits: which splits are shown.
        problems: keeps its problems: those found at opening are listed, and a damaged sample is shown as its error.
        samples: how many examples are drawn of each split.
        seed: which ones.

    Returns:
        The HTML file.

    Raises:
        UserError: an unknown split, `samples` below 1, `seed` below 0, or a folder that is not empty or cannot be written to.
    """
    out = Path(out)
    if samples < 1:
        raise UserError(f"--samples must be at least 1, got {samples}")
    if seed < 0:
        raise UserError(f"--seed must be at least 0, got {seed}")
    sizes = {split: layout.size(split) for split in splits}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"{out} is not empty; choose a new folder for the preview")
        title = f"Preview: {layout.source}"
        body = [html('<h1>{}</h1><p class="about">{}</p>', title, _about(layout, seed))]
        body += [html('<p class="error">{}</p>', problem) for problem in problems.found]
        for number, (split, size) in enumerate(sizes.items()):
            rng = np.random.default_rng([seed, number])
            chosen = sorted(rng.permutation(size)[:samples].tolist())
            body.append(html('<h2>{}</h2><p class="about">{} of {:,}</p>', split, len(chosen), size))
            files = [out / f"{number}_{overlay.slug(split)}_{i}.jpg" for i in chosen]
            cards = [_card(layout, split, i, rng, file, problems) for i, file in zip(chosen, files, strict=True)]
            body.append(html('<div class="gallery">{}</div>', join(cards, "\n")))
    except OSError as error:
        raise UserError(f"cannot write the preview to {out}: {error.strerror}; choose a folder you can write to") from error
    page.write(out / "index.html", "page.html", title=title, body=body)
    return out / "index.html"


def _about(layout: DatasetReader, seed: int) -> str:
    count = len(layout.categories)
    categories = f", {count} {'category' if count == 1 else 'categories'}" if count else ""
    colors = "Beside each image its targets, outlined; grey stripes: ignored."
    return f"Task {layout.task}{categories}. Drawn at random (seed {seed}). {colors}"


def _card(layout: DatasetReader, split: str, index: int, rng: np.random.Generator, path: Path, problems: RecordErrors) -> Html:
    """A sample's figure, its pictures written to `path` and beside it; its error if it is damaged."""
    before = len(problems.found)
    with problems.record():
        notes: Counter[str] = Counter()
        example = layout.example(split, index, notes)
        if example is None:
            left_out = '<figure><figcaption class="note">example {}: left out ({})</figcaption></figure>'
            return html(left_out, index, ", ".join(notes))
        picture = choose(example, rng)
        files = path.with_stem(f"{path.stem}_image"), path
        for drawn, file in zip(draw(picture), files, strict=True):
            drawn.save(file, quality=88)
        return _figure(layout, picture, [file.name for file in files], index, notes)
    return html('<figure><figcaption class="error">example {}: {}</figcaption></figure>', index, problems.found[before])


def _figure(layout: DatasetReader, picture: Picture, sources: Sequence[str], index: int, notes: Iterable[str]) -> Html:
    example, sample = picture.example, picture.sample
    said: Html | str = ""
    if sample:
        family = html('<span class="tag">{}</span>', sample.family) if sample.family else ""
        said = html('<figcaption class="said">“{}”{}</figcaption>', sample.sentence, family)
    under = [_legend(layout, picture)] if picture.drawn else ["refers to nothing"] if sample else []
    under += [f"answer: “{sample.answer}”"] if sample and sample.answer else []
    under += [html("<b>Q</b> {}<br><b>A</b> {}", turn.question, turn.answer) for turn in example.turns]
    where = f"example {index}: {example.file_name}, {example.width}x{example.height}"
    under += [html('<span class="note">{}</span>', "; ".join([where, *notes]))]
    alt = sample.sentence if sample else example.file_name
    panels = page.pieces().panels([("", source) for source in sources], alt)
    return html("<figure>{}{}<figcaption>{}</figcaption></figure>", said, panels, join(under, "<br>"))


def _legend(layout: DatasetReader, picture: Picture) -> Html:
    """Colour and category of each drawn object."""
    entries = []
    for place, i in enumerate(picture.drawn):
        annotation = picture.example.annotations[i]
        name = layout.categories[annotation.category] if annotation.category >= 0 else f"target {place + 1}"
        crowd = " (crowd)" if annotation.crowd else ""
        swatch = '<span class="swatch" style="background: rgb({}, {}, {})"></span>{}'
        entries.append(html(swatch, *color(place), f"{name}{crowd}"))
    return join(entries)
