"""PEFT's adapters, read and written: against what PEFT computed (tests/golden/peft/make.py)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert_weights import peft
from convert_weights.convert import import_params
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.checkpoints.pretrained import save_pretrained
from flowseg_jax.errors import UserError
from flowseg_jax.models.language import LanguageConfig, LanguageModel
from flowseg_jax.training import lora
from flowseg_jax.training.adapters import load_adapters, save_adapters

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"


@dataclasses.dataclass(frozen=True)
class Recording:
    """A family's base as a component directory, its adapter in our form, and what PEFT computed."""

    family: str
    source: Path
    base: Path
    adapters: Path
    cfg: LanguageConfig
    params: dict
    arrays: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=["qwen3", "phi3", "dora"])
def recording(request, tmp_path_factory):
    family, root, source = request.param, tmp_path_factory.mktemp("peft"), GOLDEN / request.param
    family = "phi3" if family == "dora" else family
    cfg = LanguageConfig.from_hf(json.loads((source / "base/config.json").read_text()))
    params = import_params(family, load_file(source / "base/model.safetensors"), cfg)
    component = {"family": family, "config": dataclasses.asdict(cfg)}
    base = Path(save_pretrained(root / "base", params, None, None, dtype=None, component=component))
    adapters = peft.import_adapters(source / "adapter", base, root / "adapters")
    return Recording(family, source, base, adapters, cfg, params, dict(np.load(source / "recorded.npz")))


def model_of(recording, cfg):
    """The graph definition of {"llm": the language model with its adapters}."""
    network = nnx.eval_shape(lambda: nnx.Dict(llm=LanguageModel(recording.cfg, rngs=nnx.Rngs(0))))
    lora.add_adapters(network, cfg)
    return nnx.split(network)[0]


def test_outputs_and_gradients_are_those_of_peft(recording):
    learned, cfg, _ = load_adapters(recording.adapters)
    graphdef, flat = model_of(recording, cfg), flatten_params(learned)
    tokens = jnp.asarray(recording.arrays["tokens"])
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def run(flat):
        llm = nnx.merge(
            graphdef, unflatten_params({f"llm/{n}": x for n, x in flatten_params(recording.params).items()} | flat)
        ).llm
        hidden = llm(llm.embed(tokens), position, jnp.zeros_like(position))
        return (hidden * recording.arrays["weight"]).sum(), hidden

    (_, hidden), gradient = jax.value_and_grad(run, has_aux=True)(flat)
    assert np.abs(hidden - recording.arrays["hidden"]).max() <= 1e-5 * np.abs(hidden).max()
    base = peft.Base.open(recording.base, "llm")
    assert cfg.scale == pytest.approx(5 / 3**0.5 if cfg.rslora else 5 / 3)
    seen = set()
    for module, parts in base.modules.items():
        if (name := f"base_model.model.{module}.lora_A.weight") not in recording.arrays:
            assert f"{base.layer(parts[0])}/lora/a" not in flat
            continue
        a = sum(np.asarray(gradient[f"{base.layer(part)}/lora/a"][part.layer]).T for part in parts)  # PEFT has one for all
        b = np.concatenate([np.asarray(gradient[f"{base.layer(part)}/lora/b"][part.layer]).T for part in parts])
        for ours, theirs in ((a, recording.arrays[name]), (b, recording.arrays[name.replace("lora_A", "lora_B")])):
            assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max(), module
        if cfg.dora:  # ours is relative to the base's lengths
            found = [np.asarray(gradient[f"{base.layer(part)}/lora/magnitude"][part.layer]) for part in parts]
            ours = np.concatenate([x / base.column_lengths(part) for x, part in zip(found, parts, strict=True)])
            theirs = recording.arrays[name.replace("lora_A.weight", "lora_magnitude_vector.weight")]
            assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max(), module
        seen.update(base.layer(part) for part in parts)
    assert seen == set(lora.adapted(flat))


def test_what_peft_wrote_comes_back_to_the_bit(recording, tmp_path):
    out, rest = peft.export_adapters(recording.adapters, recording.base, tmp_path / "out")
    ours, theirs = (load_file(folder / peft.WEIGHTS) for folder in (out, recording.source / "adapter"))
    assert not rest and ours.keys() == theirs.keys()
    for name in theirs:  # of a length, its relation to the base's is kept
        assert np.allclose(ours[name], theirs[name], rtol=3e-7 if name.endswith(peft.MAGNITUDE) else 0, atol=0), name
    wrote, had = (json.loads((folder / peft.CONFIG).read_text()) for folder in (out, recording.source / "adapter"))
    same = ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias")
    assert {key: wrote[key] for key in same} == {key: had[key] for key in same}


def test_parts_of_a_fused_matrix_that_went_apart_come_back_as_they_are(recording, tmp_path):
    """What training makes of them: PEFT then has one adapter of a higher rank, and the same product."""
    learned, cfg, base = load_adapters(recording.adapters)
    rng = np.random.default_rng(0)
    learned = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(x.dtype), learned)
    trained = save_adapters(tmp_path / "trained", learned | {"llm_projector": {"bias": np.ones(2, np.float32)}}, cfg, base)
    out, rest = peft.export_adapters(trained, recording.base, tmp_path / "out")
    assert rest == ["llm_projector/bias"]
    again, cfg_again, _ = load_adapters(peft.import_adapters(out, recording.base, tmp_path / "again"))
    assert (cfg_again.rank, cfg_again.alpha, cfg_again.rslora) == (cfg.rank, cfg.alpha, cfg.rslora)
    for (name, x), y in zip(flatten_params(again).items(), flatten_params(learned).values(), strict=True):
        more = 1 if name.endswith("/magnitude") else 0  # PEFT has the length itself
        np.testing.assert_allclose(more + x, more + y, rtol=1e-6, err_msg=name)
    if recording.family == "phi3" and not cfg.dora:
        tensors, config = load_file(out / peft.WEIGHTS), json.loads((out / peft.CONFIG).read_text())
        a, b = (tensors[f"base_model.model.model.layers.1.self_attn.qkv_proj.lora_{half}.weight"] for half in "AB")
        assert config["rank_pattern"] == {"qkv_proj": 9, "gate_up_proj": 6} and a.shape == (9, 16)
        product = config["alpha_pattern"]["qkv_proj"] / 3 * b @ a
        flat = flatten_params(learned)
        parts = [
            cfg.scale * flat[f"llm/layers/self_attn/{n}/lora/a"][1] @ flat[f"llm/layers/self_attn/{n}/lora/b"][1]
            for n in ("q_proj", "k_proj", "v_proj")
        ]
        np.testing.assert_allclose(product, np.concatenate([part.T for part in parts]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', only LORA is read"),
        ({"use_bdlora": True}, "use_bdlora=True is not computed here; merge such an adapter into its base by PEFT"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not computed here"),
        ({"something_new": 1}, "something_new=1 is not computed here"),
        ({"bias": "all"}, "bias='all' is not computed here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not computed here"),
        ({"r": 0}, "r is 0, expected a rank from 1"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', expected a positive number"),
        ({"alpha_pattern": {".*q_proj": 3}}, "alpha_pattern is .*, expected a positive number for each module's name"),
        ({"r": 2}, r"has rank 3, the others 2: give all modules the same rank"),
    ],
)
def test_what_is_not_computed_here_is_refused(changes, message, tmp_path):
    shutil.copytree(GOLDEN / "qwen3/adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    (tmp_path / "adapter" / peft.CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message) as error:
        settings = peft.read_config(tmp_path / "adapter" / peft.CONFIG)
        a, b = np.zeros((3, 4)), np.zeros((5, 3))
        list(peft._split(a, b, [], settings["r"], "file", "q_proj"))
    assert "\n" not in str(error.value)


def test_tensors_that_fit_no_layer_or_not_all_are_refused(recording, tmp_path):
    shutil.copytree(recording.source / "adapter", tmp_path / "adapter")
    tensors = load_file(recording.source / "adapter" / peft.WEIGHTS)

    def refused(changed):
        save_file(changed, tmp_path / "adapter" / peft.WEIGHTS)
        with pytest.raises(UserError) as error:
            peft.import_adapters(tmp_path / "adapter", recording.base, tmp_path / "out")
        assert not (tmp_path / "out").exists() and "\n" not in str(error.value)
        return str(error.value)

    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
    one = {key: x for key, x in tensors.items() if key != name}
    rest = sorted(key for key in one if key.startswith(name.removesuffix("lora_A.weight")))
    assert f"has no place for {', '.join(rest)}: the base has " in refused(one)
    one = {key: x for key, x in one.items() if key not in rest}
    assert "only 1 of the 2 layers of llm/layers/self_attn/o_proj have adapters; a stack has all" in refused(one)
    assert "has no place for base_model.model.elsewhere.lora_A.weight" in refused(
        tensors | {"base_model.model.elsewhere.lora_A.weight": np.zeros((3, 3), np.float32)}
    )
    assert "o_proj has A (3, 7) and B (16, 3), its base needs" in refused(tensors | {name: np.zeros((3, 7), np.float32)})
    file = tmp_path / "adapter" / peft.CONFIG
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps(config | {"use_dora": not config["use_dora"]})
    )  # lengths are missing, or there are some too many
    assert f"has no place for {min(tensors)}, " in refused(tensors)
    with pytest.raises(UserError, match="has no adapter_config.json"):
        peft.import_adapters(tmp_path, recording.base, tmp_path / "out")


def test_a_config_of_peft_has_its_defaults(tmp_path):
    (tmp_path / peft.CONFIG).write_text('{"peft_type": "LORA"}')
    found = peft.read_config(tmp_path / peft.CONFIG)
    assert (found["r"], found["lora_alpha"], found["lora_dropout"]) == (8, 8, 0.0)
    assert (found["use_rslora"], found["use_dora"], found["bias"], found["init_lora_weights"]) == (False, False, "none", True)
    assert found["rank_pattern"] == found["alpha_pattern"] == {}


def test_a_component_without_adapters_has_none_to_export(monkeypatch, tmp_path):
    learned = {"llm": {"x": {"lora": {"a": np.zeros((2, 3)), "b": np.zeros((3, 2))}}}}
    monkeypatch.setattr(peft.Base, "open", lambda model, component: None)
    monkeypatch.setattr(peft, "load_adapters", lambda directory: (learned, None, {"llm": "digest"}))
    with pytest.raises(UserError, match="^a has no adapters of sam, but of llm$"):
        peft.export_adapters("a", "m", tmp_path / "out", "sam")
    assert list(tmp_path.iterdir()) == []
