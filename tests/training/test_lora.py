"""LoRA: adapters beside frozen encoders, their checkpoints, their base, and what they become when they are merged."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowseg_jax import sharding
from flowseg_jax.checkpoints.manager import CheckpointManager
from flowseg_jax.checkpoints.manifest import flatten_params, unflatten_params
from flowseg_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from flowseg_jax.errors import UserError
from flowseg_jax.models import flowseg
from flowseg_jax.models.layers import DropoutKeys, Linear, LowRankAdapter
from flowseg_jax.models.quantization import quantized
from flowseg_jax.training import loop, lora
from flowseg_jax.training.adapters import load_adapters, merge_directories, save_adapters
from flowseg_jax.training.initialization import initial_params
from flowseg_jax.training.lora import LoraConfig
from flowseg_jax.training.optimizer import OPTIMIZERS, merge_trainable
from flowseg_jax.training.program import TrainProgram, model_params
from tests.helpers import encoders, small

TARGETS = (r"llm/layers/.*_proj", r"sam/.*_layers/.*", r"siglip/layers/mlp/fc1")
LORA = LoraConfig(TARGETS, rank=3, alpha=6.0)


def config_of(**changes):
    config = encoders.config()
    config.lora.update(dataclasses.asdict(LORA) | changes)
    config.ema.decay = 0.5
    return config


@pytest.fixture(scope="module")
def run():
    """(program, the state before the first step, the state after two, their metrics), with dropout and an average."""
    with encoders.only_encoders():
        program = TrainProgram.build(config_of(dropout=0.25), jax.devices()[:1])
    state, seen = encoders.go_on(program, encoders.start(program), 2)
    return program, jax.device_get(encoders.start(program)), jax.device_get(state), seen


@functools.cache
def _forward(cfg: LoraConfig):
    with encoders.only_encoders():
        graphdef, _ = lora.abstract_model(encoders.CFG, cfg)
    return jax.jit(lambda params: flowseg.bind_params(graphdef, params)(small.batch(encoders.CFG)))


def output(params, cfg=None):
    """What the encoders put out, with the adapters that `cfg` describes among the parameters or without any."""
    with encoders.only_encoders():
        return _forward(cfg or LoraConfig())(params)


def test_only_adapters_of_the_towers_learn_and_the_rest_as_before(run):
    program, start, state, seen = run
    assert {name.split("/")[0] for name in flatten_params(state.frozen)} == {"sam", "siglip", "llm"}
    trainable = flatten_params(state.trainable)
    assert {name for name in trainable if not lora.is_adapter(name)} == {"head/kernel", "head/bias"}
    assert {name for name, rate in program.lr_multipliers.items() if rate is not None} == set(trainable)
    a, b = trainable["llm/layers/self_attn/q_proj/lora/a"], trainable["sam/global_layers/mlp/lin2/lora/b"]
    assert (a.shape, b.shape, a.dtype) == ((1, 28, 3), (1, 3, 24), np.float32)
    before = flatten_params(start.trainable)
    still = [name for name, x in trainable.items() if np.array_equal(x, before[name])]
    assert not still and seen[1]["loss"] < seen[0]["loss"]
    assert jax.tree.all(jax.tree.map(np.array_equal, state.frozen, start.frozen))
    assert np.abs(before["siglip/layers/mlp/fc1/lora/a"]).max() == pytest.approx(20**-0.5, rel=0.1)


def test_adapters_are_divided_where_the_weight_beside_them_is(monkeypatch):
    """However small they are themselves."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 28 * 28)
    with encoders.only_encoders():
        _, state = lora.abstract_model(encoders.CFG, LORA)
    places = sharding.param_shardings(state, sharding.abstract_mesh({"fsdp": 2, "tensor": 2}))
    spec = {name: tuple(place.spec) for name, place in flatten_params(places).items()}
    for layer, axes in (
        ("mlp/up_proj", ("fsdp", "tensor")),
        ("mlp/down_proj", ("tensor", "fsdp")),
        ("self_attn/k_proj", (None, None)),
    ):
        assert spec[f"llm/layers/{layer}/kernel"] == (None, *axes)
        assert spec[f"llm/layers/{layer}/lora/a"] == (None, axes[0], None)
        assert spec[f"llm/layers/{layer}/lora/b"] == (None, None, axes[1])


def test_fresh_adapters_change_nothing_to_the_bit(run):
    """One operation after the other: a compiler rounds where it likes."""
    whole = flatten_params(run[1].params)
    base = unflatten_params({name: x for name, x in whole.items() if not lora.is_adapter(name)})
    ids = jnp.arange(5)[None]
    found = []
    with encoders.only_encoders(), jax.disable_jit():
        for cfg, params in ((LORA, run[1].params), (LoraConfig(), base)):
            llm = flowseg.bind_params(lora.abstract_model(encoders.CFG, cfg)[0], params).llm
            found.append(llm(llm.embed(ids), ids, 0 * ids))
    assert np.array_equal(*found)


def test_merged_adapters_compute_what_they_did_beside_their_weights(run):
    """Of the average, as `ema.export` says."""
    program, _, state, _ = run
    averaged = merge_trainable(state.ema, state.frozen)
    plain = model_params(program.run_config, state)
    assert not [name for name in flatten_params(plain) if lora.is_adapter(name)]
    beside, merged = output(averaged, LORA), output(plain)
    np.testing.assert_allclose(merged, beside, rtol=1e-5, atol=1e-5)
    alone = {name: x for name, x in flatten_params(averaged).items() if not lora.is_adapter(name)}
    assert np.abs(output(unflatten_params(alone)) - merged).max() > 1e-3  # they do something
    config = dataclasses.replace(program.run_config, ema=dataclasses.replace(program.run_config.ema, export=False))
    assert not np.array_equal(output(model_params(config, state)), merged)


def test_the_scale_is_that_of_the_paper_or_of_rslora():
    assert LORA.scale == 2.0 and dataclasses.replace(LORA, rank=4, rslora=True).scale == 3.0
    assert dataclasses.replace(LORA, rank=1).scale == 6.0  # the smallest rank
    kernel, a, b = np.ones((2, 3, 4)), np.full((2, 3, 1), 2.0), np.arange(8.0).reshape(2, 1, 4)
    merged = lora.merge_adapters({"x": {"kernel": jnp.asarray(kernel, jnp.bfloat16), "lora": {"a": a, "b": b}}}, 0.5)
    assert merged["x"]["kernel"].dtype == jnp.bfloat16 and np.array_equal(merged["x"]["kernel"], 1 + b + 0 * kernel)
    # A TPU would round the factors of a product to bfloat16.
    adapted = {"x": {"kernel": jnp.asarray(kernel), "lora": {"a": a, "b": b}}}
    assert "HIGHEST" in str(jax.make_jaxpr(lambda params: lora.merge_adapters(params, 0.5))(adapted))


def test_dora_gives_columns_the_lengths_that_it_learns():
    """Against the sum multiplied out, as https://arxiv.org/abs/2402.09353 writes it: the length passes no gradient."""
    rng = np.random.default_rng(0)
    w, a, b, d, x = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 4), (6, 2), (2, 4), (4,), (3, 6)))

    def ours(a, b, d):
        linear = Linear(6, 4, rngs=nnx.Rngs(0), bias=False)
        linear.kernel = nnx.Param(jnp.asarray(w))
        linear.lora = LowRankAdapter(nnx.Param(a), nnx.Param(b), 0.5, 0.0, nnx.Param(d))
        return linear(x)

    def theirs(a, b, d):
        whole = w + 0.5 * a @ b
        return x @ whole * np.linalg.norm(w, axis=0) * (1 + d) / jax.lax.stop_gradient(jnp.linalg.norm(whole, axis=0))

    np.testing.assert_allclose(ours(a, b, d), theirs(a, b, d), rtol=1e-5, atol=1e-5)
    gradients = (jax.grad(lambda *p, f=f: (f(*p) ** 2).sum(), argnums=(0, 1, 2))(a, b, d) for f in (ours, theirs))
    for mine, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)
    stacked = {"kernel": w[None], "lora": {"a": a[None], "b": b[None], "magnitude": d[None]}}
    merged = lora.merge_adapters({"x": stacked}, 0.5)
    assert list(merged["x"]) == ["kernel"]
    np.testing.assert_allclose(x @ merged["x"]["kernel"][0], theirs(a, b, d), rtol=1e-5, atol=1e-5)
    assert np.array_equal(ours(a, 0 * b, 0 * d), x @ jnp.asarray(w))  # fresh: the base, to the bit


def test_dora_adds_one_parameter_to_each_adapter():
    cfg = dataclasses.replace(LORA, dora=True)
    with encoders.only_encoders():
        found, plain = (
            {name: x.shape for name, x in flatten_params(flowseg.params_dict(lora.abstract_model(encoders.CFG, c)[1])).items()}
            for c in (cfg, LORA)
        )
    more = found.keys() - plain.keys()
    assert more == {f"{path}/lora/magnitude" for path in lora.adapted(found)} and all(map(lora.is_adapter, more))
    assert all(found[name] == found[name.replace("magnitude", "b")][::2] for name in more)
    fresh = lora.initial_adapters({name: found[name] for name in more}, 0)
    assert fresh.keys() == more and not any(x.any() for x in fresh.values())
    assert all(name in lora.freeze_base(dict.fromkeys(found, 1.0)) for name in more)


def test_dropout_depends_on_step_row_and_layer_alone(run):
    keys = jax.random.split(jax.random.key(0), 2)
    found = lora.dropout_keys({"llm/x": 3, "llm/y": 3}, keys)["llm"]
    each = np.concatenate([jax.random.key_data(found[name]["lora"]["keys"]).reshape(-1, 2) for name in "xy"])
    assert found["x"]["lora"]["keys"].shape == (3, 2) and len({tuple(key) for key in each.tolist()}) == 12
    adapter = LowRankAdapter(nnx.Param(jnp.eye(64)), nnx.Param(jnp.eye(64)), 1.0, 0.25)
    adapter.keys = DropoutKeys(keys)
    x = jnp.ones((8, 50, 64))  # four windows of either image
    y = np.asarray(adapter(x)).reshape(2, -1)
    adapter.keys = DropoutKeys(keys[1:])
    assert np.array_equal(np.asarray(adapter(x[4:])).reshape(-1), y[1]) and not np.array_equal(y[0], y[1])
    assert set(np.unique(y)) == {0.0, np.float32(4 / 3)} and y.mean() == pytest.approx(1, abs=0.02)


def test_a_run_goes_on_to_the_bit_from_its_adapters(run, tmp_path):
    """What is frozen is not in the checkpoint: it is made anew, and known again."""
    program, start, two, _ = run
    one, _ = encoders.go_on(program, encoders.start(program), 1)
    tree = loop.state_to_tree(one)
    assert "frozen" not in tree and set(flatten_params(tree["ema"])) == set(flatten_params(tree["trainable"]))
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {"base": lora.base_digests(one.frozen)})
        restored = checkpoints.restore_latest(loop.state_to_tree(program.state))
    again = dataclasses.replace(
        loop.state_from_tree(program.state, restored.state),
        frozen=jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), start.frozen, program.state.frozen),
    )
    lora.check_base(restored.meta["base"], lora.base_digests(again.frozen), "the run")
    after, _ = encoders.go_on(program, again, 1)
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(after), two))


@pytest.fixture(scope="module")
def directories(run, tmp_path_factory):
    """A model directory of the base, and one of the adapters that were trained on it."""
    _, start, state, _ = run
    root = tmp_path_factory.mktemp("adapters")
    (root / "tokenizer").mkdir()
    base = {name: x for name, x in flatten_params(start.params).items() if not lora.is_adapter(name)}
    model = save_pretrained(root / "base", unflatten_params(base), {}, root / "tokenizer", dtype="bfloat16")
    digests = lora.base_digests(state.frozen)
    return model, save_adapters(root / "adapters", state.trainable, LORA, digests, {"step": 2})


def test_a_directory_of_adapters_is_read_as_it_was_written_and_merged_into_its_base(run, directories, tmp_path):
    state = run[2]
    learned, cfg, base = load_adapters(directories[1])
    assert cfg == LORA and set(base) == {"sam", "siglip", "llm"}
    assert jax.tree.all(jax.tree.map(np.array_equal, learned, state.trainable))
    merged = load_pretrained(merge_directories(*directories, tmp_path / "merged"), dtype=None).params
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.frozen)  # the digest is the same
    wanted = flatten_params(lora.merge_adapters(merge_trainable(state.trainable, rounded), LORA.scale))
    assert all(np.array_equal(x, wanted[name]) for name, x in flatten_params(merged).items() if "head" not in name)
    assert np.array_equal(merged["head"]["kernel"], state.trainable["head"]["kernel"])


def test_adapters_on_an_int8_base_have_the_gradients_of_the_same_base_in_float():
    """Where weights are divided over devices: `tests/multidevice/test_lora.py`."""
    config = config_of(targets=("llm/layers/self_attn/q_proj", "llm/layers/mlp/down_proj"), dora=True)
    config.optimizer.frozen_dtype = "int8"
    with encoders.only_encoders():
        program = TrainProgram.build(config, jax.devices()[:1])
        plain, _ = lora.abstract_model(encoders.CFG, program.run_config.lora)
    params = encoders.start(program).params
    flat, rng = flatten_params(params), np.random.default_rng(1)
    learned = {
        name: jnp.asarray(rng.normal(size=x.shape), jnp.float32) / 5 for name, x in flat.items() if lora.is_adapter(name)
    }
    whole = {n: x * flat[f"{n}_scale"][:, None] if f"{n}_scale" in flat else x for n, x in flat.items() if not lora.is_scale(n)}
    assert sum(x.dtype == jnp.int8 for x in flat.values()) == 7 and len(learned) == 6
    ids = jnp.arange(5)[None]

    def gradients(graphdef, base):
        def loss(learned):
            llm = flowseg.bind_params(graphdef, unflatten_params(base | learned)).llm
            return jnp.square(llm(llm.embed(ids), ids, 0 * ids) - 1).sum()

        return jax.jit(jax.grad(loss))(learned)

    with encoders.only_encoders():
        ours, theirs = gradients(program.graphdef, flat), gradients(plain, whole)
    for name, x in theirs.items():
        assert np.abs(x).max() > 0 and np.abs(ours[name] - x).max() <= 1e-5 * np.abs(x).max(), name
    merged = flatten_params(lora.merge_adapters(unflatten_params(flat | learned), program.run_config.lora.scale))
    expected = flatten_params(lora.merge_adapters(unflatten_params(whole | learned), program.run_config.lora.scale))
    assert merged.keys() == expected.keys()
    for name, x in expected.items():
        x = x.astype(jnp.bfloat16) if flat[name].dtype == jnp.int8 else x
        assert (
            merged[name].dtype == x.dtype and np.abs(np.float32(merged[name]) - np.float32(x)).max() <= 2**-8 * np.abs(x).max()
        )


def test_an_int8_base_is_made_while_it_is_read_and_known_by_the_weights_that_it_is_made_of(run, directories):
    config = config_of()
    config.optimizer.frozen_dtype = "int8"
    config.init_from = tuple(map(str, directories))
    with encoders.only_encoders():
        program = TrainProgram.build(config, jax.devices()[:1])
        state, base = program.initial_state(config)
    wanted, frozen = flatten_params(load_pretrained(directories[0], dtype=None).params), flatten_params(state.frozen)
    alike = lambda x, like: (x.shape, x.dtype, x.sharding) == (like.shape, like.dtype, like.sharding)  # noqa: E731
    assert jax.tree.all(jax.tree.map(alike, (state.trainable, state.frozen), (program.state.trainable, program.state.frozen)))
    rounded = {name for name, x in frozen.items() if x.dtype == jnp.int8}
    for name in rounded:
        made = quantized(name, wanted[name])
        assert all(np.array_equal(frozen[path], x) for path, x in made.items()) and len(made) == 2
    assert {name for name in frozen if name.startswith("llm/layers") and name.endswith("kernel")} <= rounded
    assert frozen["siglip/layers/mlp/fc1/kernel"].dtype == frozen["llm/embed_tokens"].dtype == jnp.bfloat16
    assert base == load_adapters(directories[1])[2] == lora.base_digests(run[2].frozen)  # of the base, in whatever it is stored
    assert "frozen" not in loop.state_to_tree(state)
    config.init_from = ()
    with (
        encoders.only_encoders(),
        pytest.raises(UserError, match="frozen_dtype is int8, and init_from brings no llm/layers/mlp"),
    ):
        TrainProgram.build(config, jax.devices()[:1]).initial_state(config)


def test_a_run_and_a_merge_take_adapters_of_their_base_alone(run, directories, tmp_path):
    state, mesh = run[2], sharding.make_mesh({"data": 1}, jax.devices()[:1])
    other = load_pretrained(directories[0], dtype=None)
    other.params["llm"]["norm"]["scale"] *= 2
    elsewhere = save_pretrained(tmp_path / "other", other.params, {}, other.tokenizer_dir)
    with encoders.only_encoders():
        config = config_of()
        config.init_from = tuple(map(str, directories))
        found, base = TrainProgram.build(config, jax.devices()[:1]).initial_state(config)
        assert base == lora.base_digests(found.frozen)
        assert jax.tree.all(jax.tree.map(np.array_equal, (found.trainable, found.ema), (state.trainable, state.trainable)))
        for cfg, model, message in (
            (LORA, elsewhere, "was trained on another base, its llm is not this one: name the model that it was trained from"),
            (dataclasses.replace(LORA, alpha=5.0), directories[0], "these adapters have lora.alpha=6.0, the run has 5.0"),
            (LoraConfig(), directories[0], "no place for llm/layers/mlp/down_proj/lora/a"),
            (dataclasses.replace(LORA, rank=2), directories[0], r"lora/a is \(1, 36, 3\), the model's is \(1, 36, 2\)"),
        ):
            with pytest.raises(UserError, match=message):
                initial_params(encoders.CFG, 5, (str(model), str(directories[1])), mesh, cfg)
    with pytest.raises(UserError, match="adapters was trained on another base, its llm is not this one: name the model"):
        merge_directories(elsewhere, directories[1], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(UserError, match="holds no adapters, but a model"):
        merge_directories(directories[0], directories[0], tmp_path / "merged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"lora\.rank is 0: it must be at least 1 \(lora\.targets=\(\) trains without adapters\)"),
        ({"alpha": 0.0}, r"lora\.alpha is 0\.0: it must be above 0"),
        ({"dropout": 1.0}, r"lora\.dropout is 1\.0: it must be at least 0 and below 1"),
        ({"targets": ("(",)}, r"lora\.targets: '\(' is no regular expression"),
        ({"targets": ("a" * 101,)}, r"is longer than 100 characters"),
        ({"targets": ("llm/.*_porj",)}, r"'llm/\.\*_porj' matches no linear layer; there are llm/layers/mlp/down_proj, "),
        ({"targets": ("head",)}, r"'head' matches no linear layer"),
    ],
)
def test_what_makes_no_adapters_is_one_line(changes, message):
    with encoders.only_encoders(), pytest.raises(UserError, match=message) as error:
        TrainProgram.build(config_of(**changes), jax.devices()[:1])
    assert "\n" not in str(error.value)


def test_adapters_that_the_table_freezes_are_refused():
    rates = {"sam/x/lora/a": None, "sam/x/lora/b": None, "sam/x/kernel": None}
    with pytest.raises(UserError, match=r"param_groups freezes the adapters .* sam/x/lora/a among them: begin the table with"):
        lora.freeze_base(rates)
    rates = dict.fromkeys(["sam/x/lora/a", "sam/x/kernel", "llm/x/kernel"], 0.5)
    assert lora.freeze_base(rates) == rates | {"sam/x/kernel": None}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_has_its_place(name):
    config = encoders.config()
    config.optimizer.update(name=name, layer_decay=0.5)
    with encoders.only_encoders():
        program = TrainProgram.build(config, jax.devices()[:1])
    wanted = jax.eval_shape(program.optimizer.init, program.state.trainable)
    alike = lambda x, like: (x.shape, x.dtype, x.sharding.mesh) == (like.shape, like.dtype, program.mesh)  # noqa: E731
    assert jax.tree.all(jax.tree.map(alike, program.state.opt_state, wanted))


def test_a_base_is_the_same_in_any_order_and_either_dtype():
    a, b = (np.arange(6, dtype=np.float32) + n for n in (0, 1))
    digests = lora.base_digests({"llm": {"a": a, "b": b}, "sam": {"n": np.arange(3)}})
    assert digests == lora.base_digests({"sam": {"n": np.arange(3)}, "llm": {"b": b.astype(jnp.bfloat16), "a": a}})
    other = lora.base_digests({"llm": {"a": b, "b": a}, "sam": {"n": np.arange(3)}})
    assert other["sam"] == digests["sam"] and other["llm"] != digests["llm"]
