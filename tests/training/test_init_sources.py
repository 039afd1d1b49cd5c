"""What an entry of `init_from` brings and where it goes, by stand-ins for what is read; nothing is compiled."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowseg_jax import sharding
from flowseg_jax.checkpoints.manifest import flatten_params, manifest, unflatten_params
from flowseg_jax.errors import UserError
from flowseg_jax.training import initialization
from flowseg_jax.training.initialization import InitSource, initial_params

SHAPES = {"sam/a": (2,), "sam/b": (3, 1), "llm/c": (3,), "boundary/x": (1,), "background_embed": (4,)}


@pytest.fixture
def stored(monkeypatch):
    """{directory: {name: shape}} and {directory: family} that can be read, and the manifests of what was loaded."""
    shapes, families, loaded = {}, {}, {}

    def read_model_config(path, *, allow_component):
        assert allow_component
        path = path.removeprefix("models/")
        component = {"component": {"family": families[path], "config": {}}} if path in families else {}
        return {"manifest": {name: [list(shape), "float16"] for name, shape in shapes[path].items()}, **component}

    def load_pretrained(directory, abstract, *, allow_component):
        assert allow_component
        name = str(directory).removeprefix("models/")
        loaded[name] = manifest(abstract)
        place = 1 + list(shapes).index(name)
        return SimpleNamespace(params=jax.tree.map(lambda x: jnp.full(x.shape, place, x.dtype, device=x.sharding), abstract))

    def find_model(checkpoint, workdir):
        assert workdir is None
        return f"models/{checkpoint}"

    monkeypatch.setattr(initialization, "find_model", find_model)
    monkeypatch.setattr(initialization, "read_model_config", read_model_config)
    monkeypatch.setattr(initialization, "load_pretrained", load_pretrained)
    return SimpleNamespace(shapes=shapes, families=families, loaded=loaded)


def test_a_whole_model_brings_everything_and_parts_that_may_be_missing_are_left(stored):
    optional = {
        "category_head/kernel": (9,),
        "mask_decoder/layers/semantic_refinement/w": (1,),
        "mask_decoder/layers/condition_refinement/w": (1,),
    }
    stored.shapes["whole"] = SHAPES | optional
    source = InitSource.open("whole", SHAPES)
    assert (source.text, str(source.directory), source.unused) == ("whole", "models/whole", tuple(optional))
    assert source.places == {name: name for name in SHAPES}
    assert source.stored["sam/b"] == [[3, 1], "float16"]


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("qwen3", "llm/"), ("phi3", "llm/"), ("llama", "llm/"), ("siglip2", "siglip/"), ("sam", "sam/"), ("mask2former", "")],
)
def test_a_component_takes_its_place(stored, family, prefix):
    stored.shapes["part"], stored.families["part"] = {"w/x": (2,)}, family
    shapes = {f"{prefix}w/x": (2,), "other/y": (1,)}
    assert InitSource.open("part", shapes).places == {f"{prefix}w/x": "w/x"}
    if prefix:
        assert InitSource.open(f"{prefix[:-1]}=part", shapes).places == {f"{prefix}w/x": "w/x"}
        with pytest.raises(
            UserError, match=f"init_from 'other=part': models/part is a {family} component and belongs to {prefix[:-1]}"
        ):
            InitSource.open("other=part", shapes)


def test_one_part_of_a_model_and_folders_with_an_equals_sign(stored):
    for name in ("dir", "runs/a=b", "=dir", "x.y=dir"):
        stored.shapes[name] = SHAPES
        assert InitSource.open(name, SHAPES).places.keys() == SHAPES.keys()
    assert InitSource.open("sam=dir", SHAPES).places == {"sam/a": "sam/a", "sam/b": "sam/b"}
    assert InitSource.open("background_embed=runs/a=b", SHAPES).places == {"background_embed": "background_embed"}


@pytest.mark.parametrize(
    ("entry", "there", "message"),
    [
        ("samm=d", SHAPES, r"init_from 'samm=d': the model has no part 'samm' \(did you mean 'sam'\?\)$"),
        ("sam=d", {"llm/c": (3,)}, "init_from 'sam=d': models/d holds no sam$"),
        ("d", {}, "init_from 'd': models/d holds no parameters$"),
        ("d", {"mask_decoder/layers/fc1": (2,)}, r"does not fit the model: no place for mask_decoder/layers/fc1 \(2,\)$"),
        ("d", {"sam/a": (2, 1)}, r"does not fit the model: sam/a is \(2, 1\), the model's is \(2,\)$"),
        ("d", {f"x/{i}": (1,) for i in range(25)}, r"no place for x/9 \(1,\).* and 15 more$"),
    ],
)
def test_what_does_not_fit_is_one_line(stored, entry, there, message):
    stored.shapes["d"] = there
    with pytest.raises(UserError, match=message):
        InitSource.open(entry, SHAPES)


def test_a_later_entry_replaces_an_earlier_one_and_the_rest_is_fresh(stored, monkeypatch, capsys):
    stored.shapes |= {
        "one": {"sam/a": (2,), "sam/b": (3, 1), "category_head/w": (5,), "category_head/v": (6,)},
        "two": {"sam/a": (2,)},
        "three": {"a": (2,)},
    }
    stored.families["three"] = "sam"
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    tree = unflatten_params({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()})
    drawn = lambda cfg, seed: (None, jax.tree.map(lambda x: jnp.full(x.shape, seed, x.dtype), tree))  # noqa: E731
    monkeypatch.setattr(initialization.flowseg, "abstract_model", lambda cfg: (None, tree))
    monkeypatch.setattr(initialization.flowseg, "params_dict", lambda tree: tree)
    monkeypatch.setattr(initialization.flowseg, "init_model", drawn)
    whole = sharding.replicated(mesh)
    monkeypatch.setattr(sharding, "param_shardings", lambda state, _: jax.tree.map(lambda _: whole, state))

    found = flatten_params(initial_params("cfg", 70, ("one", "two", "sam=three"), mesh)[0])
    assert list(found) == list(flatten_params(tree))
    values = {name: np.unique(x).tolist() for name, x in found.items()}
    assert values == {"sam/a": [3], "sam/b": [1], "llm/c": [70], "boundary/x": [70], "background_embed": [70]}
    assert all(x.dtype == jnp.float32 and x.sharding == whole for x in found.values())
    assert stored.loaded == {  # nothing of `two` is needed; what the model lacks comes as it is stored
        "one": {"sam/a": [[2], "float32"], "sam/b": [[3, 1], "float32"]}
        | {"category_head/w": [[5], "float16"], "category_head/v": [[6], "float16"]},
        "three": {"a": [[2], "float32"]},
    }
    assert capsys.readouterr().out.splitlines() == [
        "init_from one: 1 parameters; not used: category_head/{w,v}",
        "init_from two: 0 parameters",
        "init_from sam=three: 1 parameters",
        "not found, initialised afresh: background_embed, boundary/x, llm/c",
    ]
    assert flatten_params(initial_params("cfg", 70, (), mesh)[0])["sam/a"].tolist() == [70, 70]
    assert capsys.readouterr().out == ""
    stored.shapes["one"] = SHAPES
    monkeypatch.setattr(initialization.flowseg, "init_model", None)  # nothing is left to draw
    initial_params("cfg", 70, ("one",), mesh)
    assert capsys.readouterr().out == "init_from one: 5 parameters\n"
