"""What the generator of scenes is asked for, at the limits of what it makes."""

from __future__ import annotations

import pytest

from flowseg_jax.errors import UserError
from flowseg_jax.synthetic import generator, scene
from flowseg_jax.synthetic.expressions import NO_TARGET_FAMILY


def config(**changes):
    asked = {
        "seed": 3,
        "mix": {"attribute": 1.0},
        "objects": (4, 7),
        "preset": "default",
        "size": 128,
        "quality": 92,
        "palette": "all",
    }
    return generator._config(**asked | changes)


def test_what_is_asked_for_arrives_in_an_order_of_its_own():
    made = config(mix={"relation": 1.0, "attribute": 3.0, NO_TARGET_FAMILY: 0.0}, size=64, quality=100, objects=(10, 10))
    assert (made.seed, made.size, made.quality, made.objects) == (3, 64, 100, (10, 10))
    assert made.mix == {"attribute": 0.75, "relation": 0.25} and list(made.mix) == ["attribute", "relation"]
    assert config(size=4096, quality=1, objects=(4, 4), palette="few").palette == "few" and made.palette == "all"
    for preset, (mix, objects) in generator.PRESETS.items():
        made = config(mix=None, objects=None, preset=preset)
        assert made.objects == tuple(objects) and set(made.mix) == {family for family, share in mix.items() if share}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "defalt"}, r"unknown shapes preset 'defalt' \(did you mean 'default'\?\)"),
        ({"mix": {"atribute": 1.0}}, r"unknown expression family 'atribute' \(did you mean 'attribute'\?\)"),
        ({"mix": {"attribute": -0.1}}, "share of family 'attribute' must be a number of at least 0, got -0.1"),
        ({"mix": {"attribute": float("nan")}}, "share of family 'attribute' must be a number"),
        ({"mix": {"attribute": 0.0}}, "the shares of the families that refer to an object are all 0"),
        ({"mix": {NO_TARGET_FAMILY: 1.0}}, "the shares of the families that refer to an object are all 0"),
        ({"objects": (3, 5)}, r"objects must be a range within 4\.\.10, got 3\.\.5"),
        ({"objects": (5, 11)}, r"objects must be a range within 4\.\.10, got 5\.\.11"),
        ({"objects": (6, 5)}, r"objects must be a range within 4\.\.10, got 6\.\.5"),
        ({"size": 63}, r"image size must be within 64\.\.4096 pixels, got 63"),
        ({"size": 4097}, r"image size must be within 64\.\.4096 pixels, got 4097"),
        ({"quality": 0}, r"JPEG quality must be within 1\.\.100, got 0"),
        ({"palette": "fwe"}, r"unknown palette 'fwe' \(did you mean 'few'\?\)"),
        ({"quality": 101}, r"JPEG quality must be within 1\.\.100, got 101"),
    ],
)
def test_what_is_not_made(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_splits_have_their_shares_and_small_sets_one_image_each():
    count = lambda images: {s: generator.assign_splits(images, 5).count(s) for s in ("val", "testA", "testB", "train")}  # noqa: E731
    assert count(16) == {"val": 1, "testA": 1, "testB": 1, "train": 13}
    assert count(399) == {"val": 24, "testA": 12, "testB": 12, "train": 351}
    assert count(400) == {"val": 50, "testA": 12, "testB": 12, "train": 326}
    assert count(2000) == {"val": 120, "testA": 60, "testB": 60, "train": 1760}
    assert generator.assign_splits(16, 5) == generator.assign_splits(16, 5) != generator.assign_splits(16, 6)
    with pytest.raises(UserError, match="shapes needs at least 16 images so that every split has some, got 15"):
        generator.assign_splits(15, 5)


def test_expressions_that_no_scene_has_end_the_search(monkeypatch, tmp_path):
    monkeypatch.setattr(generator, "_draw_scene", lambda *_: None)
    monkeypatch.setattr(generator, "ATTEMPTS", 3)
    with pytest.raises(UserError, match=r"no scene found for the expression families .*attribute.* \(image 7\); use a"):
        generator.make_record(7, "train", config=config(), folder=tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out: cannot create the directory: "):
        generator.generate(tmp_path / "file" / "out", 16, 0, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_shape_that_there_is_not():
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        scene._outline("blob")
