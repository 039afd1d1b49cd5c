"""A run over several images, by stand-ins: what is asked, written, said and counted, and how latency is measured."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from flowseg_jax.inference import one_by_one


class Answer:
    """A prediction."""

    def __init__(self, name: str, text: str):
        self.name, self.text = name, text

    def summary(self) -> str:
        return f"{self.name}: {self.text}"


class Segmentor:
    def __init__(self):
        self.asked = []

    def validate_texts(self, texts, where):
        self.asked.append((tuple(texts), where))

    def preprocess(self, image):
        if image.startswith("bad"):
            raise ValueError(f"{image} is damaged")
        return SimpleNamespace(name=image, notes=("16 bits",) if image == "deep" else ())

    def encode_image(self, ready):
        return SimpleNamespace(name=ready.name, cache=ready.name)


class Writer:
    def __init__(self):
        self.failed = []

    def write(self, prediction):
        return [f"{prediction.name}.png", f"{prediction.name}.json"] if prediction.text != "nothing" else []

    def write_pictures(self, predictions):
        return [f"{predictions[0].name}.answers"]

    def fail(self, image, why):
        self.failed.append((image, why))


@pytest.fixture
def clock(monkeypatch):
    """Seconds pass only where a test says so."""
    now = [50.0]
    read = lambda: now[0]  # noqa: E731
    monkeypatch.setattr(one_by_one, "time", SimpleNamespace(monotonic=read, perf_counter=read))
    monkeypatch.setattr(one_by_one, "Prediction", Answer)
    return now


def job(image: str, *texts: str):
    return SimpleNamespace(image=image, texts=texts, where=f"texts of {image}")


def test_a_run_around_an_image_that_fails(clock, capsys):
    segmentor, writer = Segmentor(), Writer()
    jobs = [job("a", "x", "nothing"), job("bad", "x"), job("deep", "y")]

    def respond(encoded, texts):
        clock[0] += 2
        return [Answer(encoded.name, text) for text in texts]

    done = one_by_one.run(segmentor, jobs, respond, writer)
    assert segmentor.asked == [(one.texts, one.where) for one in jobs]
    assert (done.answered, done.failed, done.last[0].name, done.last[1]) == (2, 1, "deep", ("y",))
    assert done.paths == ["a.png", "a.json", "a.answers", "deep.png", "deep.json", "deep.answers"]
    ((image, why),) = writer.failed
    assert image == "bad" and "bad is damaged" in why
    assert capsys.readouterr().out.splitlines() == [
        "a: x  a.png",
        "a: nothing",
        "a.answers",
        f"failed: {why}",
        "note: deep: 16 bits",
        "deep: y  deep.png",
        "deep.answers",
        "predict: 2 of 3 images answered in 4 s, compilation included (0.8 images/s); 1 failed",
    ]
    with pytest.raises(ValueError, match="bad is damaged"):
        one_by_one.run(segmentor, [job("bad", "x")], respond, writer, strict=True)
    capsys.readouterr()
    one_by_one.run(segmentor, [job("a", "x")], respond, writer)
    assert "images answered" not in capsys.readouterr().out  # one image has no rate


def test_what_a_model_wrote_is_told_with_what_it_lacks(clock, capsys):
    def answer(complete, without):
        empty = lambda encoded: [Answer(encoded.name, "found")]  # noqa: E731
        written = {"question": "Where?", "text": "There.", "complete": complete, "without_phrase": without}
        return SimpleNamespace(**written, or_empty=empty)

    done = one_by_one.run(Segmentor(), [job("a", "x")], lambda *_: [answer(True, 0), answer(False, 2)], Writer())
    assert len(done.paths) == 5
    assert capsys.readouterr().out.splitlines()[:5] == [
        "a: Where?",
        "  There.",
        "a: Where?",
        "  There. ... (cut: --max-tokens)",
        "note: 2 <SEG> of this answer stands for no phrase <p>..</p>, so it has no mask",
    ]


@pytest.mark.parametrize(("seconds", "runs"), [(0.1, 5), (0.5, 4), (1.5, 2), (2.0, 1)])
def test_a_latency_is_the_median_of_some_runs(clock, monkeypatch, seconds, runs):
    took = []

    def call():
        took.append(seconds * (3 if len(took) == 1 and runs == 5 else 1))
        clock[0] += took[-1]

    assert one_by_one._median(call) == pytest.approx(1e3 * seconds) and len(took) == runs


def test_texts_of_an_image_share_its_latency(clock, monkeypatch):
    segmentor, plain = Segmentor(), Segmentor.encode_image

    def encode(self, ready):
        clock[0] += 0.25
        return plain(self, ready)

    def respond(encoded, texts):
        assert encoded.name == "a" and texts == ["x", "y"]
        clock[0] += 0.5

    monkeypatch.setattr(Segmentor, "encode_image", encode)
    monkeypatch.setattr(jax, "block_until_ready", lambda cache: cache)
    assert one_by_one.latency(segmentor, SimpleNamespace(name="a"), ["x", "y"], respond) == (
        "warm latency: first expression 500.0 ms, each further one 250.0 ms; encoding an image 250.0 ms (medians after "
        "compilation; 2 asked together)"
    )
