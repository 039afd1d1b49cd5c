"""Lists of images: what a line, a folder and a digest are, at their limits."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from flowseg_jax.errors import UserError
from flowseg_jax.inference import image_list


def line(image: str, text: str = "it") -> str:
    return json.dumps({"image": image, "text": text})


def test_a_line_that_is_too_long_or_no_text_is_that_lines_fault(tmp_path, monkeypatch):
    good, long = line("a.png"), line("b" * 40)
    (tmp_path / "list.jsonl").write_bytes(b"\n".join([good.encode(), b"", long.encode(), b"\xff", line("c.png").encode()]))
    monkeypatch.setattr(image_list, "LONGEST_LINE", len(good) + 1)
    listed = image_list.open_list(tmp_path / "list.jsonl", ())
    assert len(listed) == 4 and listed.job(0).image == tmp_path / "a.png" and listed.job(3).where.endswith("list.jsonl:5")
    with pytest.raises(UserError, match=rf"list\.jsonl:3: the line has more than {len(good) + 1} bytes"):
        listed.job(1)
    with pytest.raises(UserError, match=r"list\.jsonl:4: not text in UTF-8 \(invalid start byte\)"):
        listed.job(2)


def test_what_is_no_list(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for path, texts, options, message in (
        ("empty.jsonl", (), {}, r"empty\.jsonl: has no line; write"),
        ("none.jsonl", (), {}, r"none\.jsonl: cannot read the JSONL \(No such file or directory\)"),
        ("empty.jsonl", ("x",), {}, "has its own texts: leave --text out"),
        ("empty.jsonl", (), {"recursive": True}, "names its images: --recursive is for folders, leave it out"),
        ("", (), {}, "--text is missing: say what to segment"),
        ("", ("x",), {}, "the folder holds no image file; --recursive enters the folders inside of it"),
        ("", ("x",), {"recursive": True}, "the folder holds no image file$"),
    ):
        with pytest.raises(UserError, match=message):
            image_list.open_list(tmp_path / path, texts, **options)


def test_a_digest_tells_names_places_and_texts_apart(tmp_path):
    digests = set()
    for folder, names in (("a", ("x.png", "y.png")), ("b", ("x.png", "y.png")), ("c", ("x.png",))):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("L", (2, 2)).save(tmp_path / folder / name)
        listed = [image_list.open_list(tmp_path / folder, texts) for texts in (("it",), ("it", "that"), ("it",))]
        assert listed[0].digest == listed[2].digest and len(listed[0]) == len(names)
        assert [listed[1].job(n).image.name for n in range(len(names))] == list(names)
        assert listed[1].job(0).texts == ("it", "that") and listed[1].job(0).where == "--text"
        digests |= {one.digest for one in listed}
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text(line("a.png"))
        digests.add(image_list.open_list(tmp_path / name, ()).digest)
    assert len(digests) == 8
