"""Draws `docs/figures/architecture.svg`: the parts of FlowSeg, and the semantic flow within one layer of the mask decoder.

python docs/figures/make_architecture.py [OUT.svg]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from xml.etree import ElementTree as xml

WIDTH, HEIGHT = 1200, 560
INK, PAPER, GREY = "#1f2430", "#ffffff", "#6b7280"
VISION, LANGUAGE, FLOW, HEAD = "#dbeafe", "#fde9c8", "#e6f4e6", "#f3e3f5"
VISION_LINE, LANGUAGE_LINE = "#2563a8", "#b45f06"
CONDITIONS, QUERIES = 645, 825  # x of the two streams through a decoder layer


class Drawing:
    """An SVG image, on which later shapes cover earlier ones. Lengths are in SVG's user units (pixels)."""

    def __init__(self) -> None:
        size = {"width": str(WIDTH), "height": str(HEIGHT), "viewBox": f"0 0 {WIDTH} {HEIGHT}"}
        font = {"font-family": "DejaVu Sans, Helvetica, Arial, sans-serif"}
        self.root = xml.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, **font})
        self.add("title").text = "The architecture of FlowSeg"
        definitions = self.add("defs")
        for name, color in (("ink", INK), ("vision", VISION_LINE), ("language", LANGUAGE_LINE)):
            geometry = {"viewBox": "0 0 10 10", "refX": "9", "refY": "5", "markerWidth": "7", "markerHeight": "7"}
            tip = xml.SubElement(definitions, "marker", {"id": f"tip-{name}", "orient": "auto", **geometry})
            xml.SubElement(tip, "path", {"d": "M0,0 L10,5 L0,10 z", "fill": color})
        self.add("rect", width=WIDTH, height=HEIGHT, fill=PAPER)

    def add(self, tag: str, **attributes: object) -> xml.Element:
        names = {key.replace("_", "-"): str(value) for key, value in attributes.items()}
        return xml.SubElement(self.root, tag, names)

    def text(self, x: float, y: float, line: str, *, size: int = 13, color: str = INK, bold: bool = False, anchor="middle"):
        weight = "bold" if bold else "normal"
        self.add("text", x=x, y=y, font_size=size, fill=color, font_weight=weight, text_anchor=anchor).text = line

    def box(self, x: float, y: float, width: float, height: float, fill: str, title: str, *lines: str) -> None:
        """A rounded box with a bold first line and smaller ones below it, centred."""
        self.add("rect", x=x, y=y, width=width, height=height, rx=8, fill=fill, stroke=INK, stroke_width=1.2)
        top = y + height / 2 - 8 * len(lines) + 5
        self.text(x + width / 2, top, title, bold=True)
        for row, line in enumerate(lines, 1):
            self.text(x + width / 2, top + 16 * row, line, size=11)

    def arrow(self, *points: tuple[float, float], kind: str = "ink", width: float = 1.6) -> None:
        """A line through the points with its tip at the last one."""
        color = {"ink": INK, "vision": VISION_LINE, "language": LANGUAGE_LINE}[kind]
        path = " ".join(f"{x},{y}" for x, y in points)
        self.add("polyline", points=path, fill="none", stroke=color, stroke_width=width, marker_end=f"url(#tip-{kind})")


def inputs_and_encoders(drawing: Drawing) -> None:
    drawing.box(12, 110, 112, 56, PAPER, "image")
    drawing.box(12, 380, 112, 80, PAPER, "expression", "“the square that", "is not yellow”")
    drawing.box(160, 60, 150, 60, VISION, "SAM ViT-L", "image encoder, 1,024 px")
    drawing.box(160, 176, 150, 60, VISION, "SigLIP2", "vision encoder, 384 px")
    drawing.arrow((124, 130), (142, 130), (142, 90), (160, 90), kind="vision")
    drawing.arrow((124, 146), (142, 146), (142, 206), (160, 206), kind="vision")
    drawing.box(350, 60, 170, 60, VISION, "pixel decoder", "deformable attention")
    drawing.arrow((310, 90), (350, 90), kind="vision")
    drawing.box(160, 284, 150, 48, LANGUAGE, "projectors", "visual tokens")
    drawing.arrow((235, 236), (235, 284), kind="vision")
    drawing.arrow((330, 90), (330, 260), (270, 260), (270, 284), kind="vision")
    prompt = "“Please segment <p>the square that is not", "yellow</p> in this image.” “It is <SEG>.”"
    drawing.box(160, 372, 360, 96, LANGUAGE, "language model", "visual tokens, then for each expression:", *prompt)
    drawing.arrow((124, 420), (160, 420), kind="language")
    drawing.arrow((235, 332), (235, 372), kind="vision")
    drawing.arrow((520, 394), (544, 394), (544, 28), (QUERIES, 28), (QUERIES, 70), kind="language")
    drawing.arrow((520, 440), (556, 440), (556, 80), (CONDITIONS - 58, 80), kind="language")
    drawing.text(534, 345, "S, the hidden state of <SEG>", size=11, color=LANGUAGE_LINE, anchor="end")
    drawing.text(534, 361, "C, the mean over <p>...</p>", size=11, color=LANGUAGE_LINE, anchor="end")
    drawing.text(532, 388, "S", color=LANGUAGE_LINE, bold=True)
    drawing.text(532, 434, "C", color=LANGUAGE_LINE, bold=True)


def decoder(drawing: Drawing) -> None:
    left, right, c, q = 572, 928, CONDITIONS, QUERIES
    drawing.add("rect", x=left, y=40, width=right - left, height=462, rx=12, fill=FLOW, stroke=INK, stroke_width=1.2)
    drawing.text(left + 14, 60, "mask decoder, each layer:", bold=True, anchor="start")
    drawing.text(c, 85, "conditions C", color=LANGUAGE_LINE, bold=True)
    drawing.text(q, 85, "queries Q + S", color=VISION_LINE, bold=True)
    drawing.arrow((q, 92), (q, 112), kind="vision", width=2.4)
    drawing.arrow((c, 92), (c, 352), kind="language", width=2.4)
    drawing.box(q - 80, 112, 160, 50, VISION, "cross-attention", "to the pixels")
    drawing.arrow((520, 76), (532, 76), (532, 14), (950, 14), (950, 137), (q + 80, 137), kind="vision")
    drawing.arrow((950, 137), (950, 308), (976, 308), kind="vision")
    drawing.arrow((q, 162), (q, 190), kind="vision", width=2.4)
    drawing.box(q - 80, 190, 160, 74, PAPER, "SR", "cross-attention to C,", "mixed in by a gate g:", "g·Q_vis + (1 − g)·Q_sem")
    drawing.arrow((c, 227), (q - 80, 227), kind="language", width=2.4)
    drawing.text((q - 80 + c) / 2, 216, "language", size=11, color=LANGUAGE_LINE)
    drawing.text((q - 80 + c) / 2, 244, "to queries", size=11, color=LANGUAGE_LINE)
    drawing.arrow((q, 264), (q, 292), kind="vision", width=2.4)
    drawing.box(q - 80, 292, 160, 40, VISION, "self-attention")
    drawing.arrow((q, 332), (q, 436), kind="vision", width=2.4)
    drawing.box(c - 55, 352, 110, 60, PAPER, "CR", "C + attention", "from C to Q")
    drawing.arrow((q, 382), (c + 55, 382), kind="vision", width=2.4)
    drawing.text((q + c + 55) / 2, 372, "queries", size=11, color=VISION_LINE)
    drawing.text((q + c + 55) / 2, 398, "to language", size=11, color=VISION_LINE)
    drawing.arrow((c, 412), (c, 436), kind="language", width=2.4)
    drawing.box(q - 80, 436, 160, 36, VISION, "feed-forward")
    drawing.box(c - 55, 436, 110, 36, LANGUAGE, "refined C")
    drawing.text(right - 14, 492, "The next layer starts from both.", size=11, color=GREY, anchor="end")


def heads(drawing: Drawing) -> None:
    x, width = 976, 208
    middle = x + width / 2
    drawing.box(
        x, 396, width, 76, HEAD, "which query?", "cosine of each query", "with the refined C:", "the highest score wins"
    )
    drawing.arrow((QUERIES + 80, 454), (x, 454), kind="vision")
    drawing.arrow((CONDITIONS, 472), (CONDITIONS, 520), (middle, 520), (middle, 472), kind="language")
    drawing.box(x, 270, width, 76, HEAD, "its mask", "mask embedding of the query", "times the pixel features")
    drawing.arrow((middle, 396), (middle, 346))
    drawing.box(x, 144, width, 76, HEAD, "BAR", "corrects the logits in a", "band along the outline")
    drawing.arrow((middle, 270), (middle, 220))
    drawing.box(middle - 50, 60, 100, 44, PAPER, "mask")
    drawing.arrow((middle, 144), (middle, 104))


def legend(drawing: Drawing) -> None:
    notes = (
        "SR: semantic refinement.  CR: condition refinement.  BAR: boundary-aware refinement.  Blue: vision.  Orange: language."
    )
    drawing.text(WIDTH / 2, HEIGHT - 12, notes, size=12, color=GREY)


def draw(out: Path) -> None:
    """Writes the figure to `out`."""
    drawing = Drawing()
    for part in (decoder, inputs_and_encoders, heads, legend):
        part(drawing)
    xml.indent(drawing.root)
    out.write_text(xml.tostring(drawing.root, encoding="unicode") + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "out", nargs="?", type=Path, default=Path(__file__).with_name("architecture.svg"), help="file that is written"
    )
    draw(parser.parse_args().out)
