"""The `shapes` benchmark is made once, complete or not at all."""

import threading

import pytest

from flowseg_jax.data.records import make_samples
from flowseg_jax.errors import UserError
from flowseg_jax.synthetic import generator, shapes
from tests.helpers import minirefcoco as mini


def quiet(_):
    pass


def break_image(root):
    path = root / "images" / "COCO_train2014_000000000005.jpg"
    path.write_bytes(path.read_bytes()[:300])


@pytest.fixture
def generated(monkeypatch):
    """Replaces the generator by the miniature layout; counts its calls."""
    calls = []

    def generate(out, images, seed, *, workers=None, report=print, **options):
        calls.append((images, seed, options))
        mini.write(out)

    monkeypatch.setattr(generator, "generate", generate)
    return calls


def test_makes_it_once(generated, tmp_path):
    first = shapes.load_or_build_shapes(tmp_path / "s", 20, 3, tokenizer_vocab=300, log=quiet, objects=(4, 6))
    again = shapes.load_or_build_shapes(tmp_path / "s", 20, 3, tokenizer_vocab=300, log=quiet, objects=(4, 6))
    assert generated == [(20, 3, {"objects": (4, 6)})] and first.digest == again.digest
    assert first.tokenizer_directory.is_dir()
    with pytest.raises(UserError, match=r"holds a shapes set made otherwise \(seed 3 -> 4\); remove it or name another"):
        shapes.load_or_build_shapes(tmp_path / "s", 20, 4, tokenizer_vocab=300, log=quiet, objects=(4, 6))


def test_with_expressions_that_refer_to_nothing_it_is_read_as_grefcoco(tmp_path):
    mix = {"attribute": 0.6, "no-target": 0.4}
    prepared = shapes.load_or_build_shapes(tmp_path / "s", 20, 3, tokenizer_vocab=300, log=quiet, workers=1, mix=mix)
    sources = map(prepared.source, prepared.splits)
    samples = [sample for source in sources for i in range(len(source)) for sample in make_samples(source[i])]
    assert {bool(sample.annotations) for sample in samples if sample.family == "attribute"} == {True}
    assert {bool(sample.annotations) for sample in samples if sample.family == "no-target"} == {False}


def test_several_at_once_make_it_once(generated, tmp_path):
    results, errors = [], []

    def ask():
        try:
            results.append(shapes.load_or_build_shapes(tmp_path / "s", 20, 3, tokenizer_vocab=300, log=quiet).digest)
        except Exception as error:  # reported below: a thread would swallow it
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(results) == 3 and len(set(results)) == 1 and len(generated) == 1


def test_failure_leaves_nothing(monkeypatch, tmp_path):
    def generate(out, images, seed, **options):
        break_image(mini.write(out))

    monkeypatch.setattr(generator, "generate", generate)
    with pytest.raises(UserError, match="truncated"):
        shapes.load_or_build_shapes(tmp_path / "s", 20, 3, log=quiet)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_leavings_of_a_killed_process_are_removed(generated, tmp_path):
    (tmp_path / ".s.12345.partial" / "refcoco-like").mkdir(parents=True)
    shapes.load_or_build_shapes(tmp_path / "s", 20, 3, tokenizer_vocab=300, log=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".s.lock", "s"]


def test_foreign_directory(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="exists but is not a shapes set made by this command"):
        shapes.load_or_build_shapes(tmp_path / "s", 20, 3, log=quiet)


def test_the_real_generator(tmp_path):
    prepared = shapes.load_or_build_shapes(tmp_path / "s", 16, 1, log=quiet, workers=1)
    assert set(prepared.splits) == {"train", "val", "testA", "testB"} and prepared.families("train")
    source, index = prepared.source("train"), prepared.index("train")
    assert [source[i].image_id for i in range(len(source))] == [entry.image_id for entry in index]  # stored in order


def test_who_waits_says_so_and_a_place_that_was_taken_meanwhile_is_left_alone(tmp_path):
    said = []
    with shapes._locked(tmp_path / "set.lock", said.append):
        release = threading.Event()

        def second():
            with shapes._locked(tmp_path / "set.lock", said.append):
                release.set()

        thread = threading.Thread(target=second)
        thread.start()
        assert not release.wait(0.3)
    thread.join(10)
    assert release.is_set() and said == [f"waiting for another process to make {tmp_path / 'set'}"]
    with pytest.raises(UserError, match=r"out: cannot be put in place \(.*\); did another process write it meanwhile\?"):
        with shapes._atomic_directory(tmp_path / "out") as made:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("")
            assert made.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set.lock"]
