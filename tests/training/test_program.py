"""Every value of a config arrives where it counts: values that all differ, read and passed on; nothing is compiled."""

from __future__ import annotations

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from flowseg_jax import experiment as configs
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.train_examples import TrainOptions
from flowseg_jax.errors import UserError
from flowseg_jax.losses import LossConfig
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from flowseg_jax.training import program as module
from flowseg_jax.training.ema import EmaConfig
from flowseg_jax.training.lora import LoraConfig
from flowseg_jax.training.optimizer import OptimizerConfig
from flowseg_jax.training.program import RunConfig, TrainProgram
from flowseg_jax.types import BatchShape
from tests.helpers import small

CFG = small.lean()
SEGMENTOR = dataclasses.replace(
    small.config(), components="segmentor", generic_pass="off", semantic_flow=SemanticFlowConfig(mode="off")
)


def experiment(cfg=CFG, **data) -> ConfigDict:
    config = configs.read("configs/shapes_tiny.py")
    config.model = ConfigDict(cfg.to_dict())
    config.update(batch_size=6, num_steps=50, seed=11)
    config.data.update(text_length=120, max_phrases=2, max_masks=4, max_names=3)
    config.data.update(data)
    config.mesh.data = 1
    return config


@pytest.mark.parametrize(
    ("classes", "named", "asked", "objects", "generic"),
    [
        (0, "off", "all", "referred", False),
        (3, "off", "all", "all", False),
        (0, "with_flow", "all", "all", True),
        (3, "without_flow", "all", "all", True),
        (3, "off", "referred", "referred", False),
        (0, "with_flow", "referred", "referred", False),
        (3, "with_flow", "referred", "referred", False),
    ],
)
def test_all_objects_are_targets_where_a_pass_needs_them(classes, named, asked, objects, generic):
    options = RunConfig.from_config(
        experiment(dataclasses.replace(CFG, num_classes=classes, generic_pass=named), objects=asked)
    ).options
    assert (options.objects, options.include_generic) == (objects, generic)


@pytest.mark.parametrize(
    ("named", "asked", "names"), [("off", 3, 0), ("with_flow", 3, 3), ("with_flow", 0, 4), ("without_flow", 3, 3)]
)
def test_room_for_names_and_the_other_sizes_of_a_batch(named, asked, names):
    run_config = RunConfig.from_config(experiment(dataclasses.replace(CFG, num_classes=2, generic_pass=named), max_names=asked))
    assert run_config.shape == BatchShape(
        batch=6, text_length=120, max_phrases=2, max_masks=4, sam_size=32, siglip_size=16, max_names=names
    )
    assert run_config.options.negatives == (asked > 0)


def test_options_losses_optimizer_and_prompts_are_those_of_the_config():
    config = experiment(
        curriculum=((5, {"color": 1.0}),), explanation_prob=0.25, lsj_scale_range=(0.5, 1.5), num_threads=3, num_workers=2
    )
    config.data.update(chat_template="phi3_chat", random_prompts=True)
    config.optimizer = ConfigDict(
        {
            "learning_rate": 0.1, "warmup_fraction": 0.2, "weight_decay": 0.3, "max_grad_norm": 0.4,
            "b1": 0.5, "b2": 0.6, "eps": 0.7, "param_groups": (("sam/.*", None), (".*", 0.8)),
            "grad_accum_steps": 3, "max_skipped_updates": 4, "frozen_dtype": "bfloat16",
            "name": "lion", "schedule": "wsd", "decay_fraction": 0.3, "layer_decay": 0.9,
            "losses": {field.name: 10.0 + n for n, field in enumerate(dataclasses.fields(LossConfig))},
        }
    )  # fmt: skip
    config.optimizer.losses.update(num_points=8, logits_chunk_size=32)
    config.lora.update(targets=("llm/.*_proj",), rank=5, alpha=7.0, dropout=0.5, rslora=True, dora=True)
    config.ema.update(decay=0.99, warmup=False, export=False)
    config.optimizer.losses.importance_sample_ratio = 0.5
    run_config = RunConfig.from_config(config)
    assert run_config.options == TrainOptions(
        objects="referred", include_generic=False, negatives=True, curriculum=((5, {"color": 1.0}),), explanation_prob=0.25,
        lsj_scale_range=(0.5, 1.5), pad_to_square=False, num_threads=3, num_workers=2,
    )  # fmt: skip
    wanted = {f.name: 10.0 + n for n, f in enumerate(dataclasses.fields(LossConfig))}
    assert run_config.losses == LossConfig(
        **wanted | {"num_points": 8, "logits_chunk_size": 32, "importance_sample_ratio": 0.5}
    )
    assert run_config.optimizer == OptimizerConfig(
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, (("sam/.*", None), (".*", 0.8)), 3, 4, "bfloat16", "lion", "wsd", 0.3, 0.9
    )
    assert run_config.prompts == PromptTemplates(chat_template="phi3_chat", randomize=True)
    assert run_config.model == CFG
    assert run_config.lora == LoraConfig(("llm/.*_proj",), 5, 7.0, 0.5, True, True)
    assert run_config.ema == EmaConfig(0.99, False, False)
    assert "losses" in config.optimizer  # the config itself, which is stored with the run, stays whole


def test_square_is_for_models_without_a_mask_decoder():
    with pytest.raises(UserError, match=r"data\.pad_to_square is for models without a mask decoder"):
        RunConfig.from_config(experiment(pad_to_square=True))
    stage2 = dataclasses.replace(CFG, components="vlm", semantic_flow=SemanticFlowConfig(mode="off"), num_classes=0)
    assert RunConfig.from_config(experiment(stage2, pad_to_square=True)).options.pad_to_square is True
    assert (
        RunConfig.from_config(experiment(stage2, max_masks=CFG.mask_decoder.num_queries + 1)).shape.max_masks == 6
    )  # it has no queries to run out of


def test_the_smallest_and_largest_values_that_fit():
    queries, visual = CFG.mask_decoder.num_queries, CFG.num_visual_tokens
    assert RunConfig.from_config(experiment(max_masks=queries, text_length=visual + 1)).shape.max_masks == queries
    with pytest.raises(
        UserError, match=rf"data\.max_masks is {queries + 1}, .*model\.mask_decoder\.num_queries={queries}: lower the one"
    ):
        RunConfig.from_config(experiment(max_masks=queries + 1))
    with pytest.raises(UserError, match=rf"data\.text_length is {visual}, and an image alone takes {visual} tokens: raise it"):
        RunConfig.from_config(experiment(text_length=visual))
    assert RunConfig.from_config(experiment(SEGMENTOR, text_length=1)).shape.text_length == 1  # it reads no text


@pytest.fixture(scope="module")
def built():
    """A run whose values all differ: its config, its program, and what the step and the optimizer were made from."""
    seen = {}
    real, optimizer = module.make_train_step, module.make_optimizer

    def make_train_step(*args):
        seen["step"] = inspect.signature(real).bind(*args).arguments
        return lambda state, batch: (state, {})

    def make_optimizer(*args):
        seen["optimizer"] = args
        return optimizer(*args)

    config = experiment()
    config.optimizer.update(grad_accum_steps=3, frozen_dtype="bfloat16", learning_rate=0.5, warmup_fraction=0.1)
    config.optimizer.param_groups = (("sam/.*|llm/.*", None), ("mask_decoder/.*", 0.5), (".*", 1.0))
    config.init_from = ("sam=somewhere",)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_train_step", make_train_step)
        patch.setattr(module, "make_optimizer", make_optimizer)
        return config, TrainProgram.build(config, jax.devices()[:1]), seen


def test_the_step_is_made_from_what_the_config_says(built):
    _, program, seen = built
    run_config, step = program.run_config, seen["step"]
    assert seen["optimizer"] == (run_config.optimizer, 50, program.lr_multipliers)
    assert (step["cfg"], step["losses"], step["seed"]) == (run_config.model, run_config.losses, 11)
    assert step["optimizer"] is program.optimizer and step["mesh"] is program.mesh and step["graphdef"] is program.graphdef
    assert step["partition"] is program.partition
    assert (program.partition.images, program.partition.devices, program.partition.micro_batches) == (6, 1, 3)
    assert float(step["schedule"](5)) == pytest.approx(0.5) and float(step["schedule"](50)) == pytest.approx(0, abs=1e-6)
    trainable, frozen = step["specs"]
    assert flatten_params(trainable).keys() == flatten_params(program.state.trainable).keys()
    assert flatten_params(frozen).keys() == flatten_params(program.state.frozen).keys()


def test_state_and_batch_are_described_as_they_will_be(built):
    _, program, _ = built
    frozen, trainable = flatten_params(program.state.frozen), flatten_params(program.state.trainable)
    assert {name.split("/")[0] for name in frozen} == {"sam", "llm"}
    assert program.lr_multipliers["mask_decoder/layernorm/scale"] == 0.5 and program.lr_multipliers["background_embed"] == 1.0
    assert {str(x.dtype) for name, x in frozen.items() if name.endswith("kernel")} == {"bfloat16"}
    assert {str(x.dtype) for x in trainable.values()} == {"float32"}
    assert (program.state.skipped.shape, program.state.step.shape) == ((2,), ())
    assert program.batch.example_id.dtype == np.int32 and program.batch.input_ids.shape == (6, 120)
    assert program.batch.sam_images.shape == (6, 32, 32, 3) and program.batch.siglip_images.shape == (6, 16, 16, 3)
    assert program.local_rows() == [0, 1, 2, 3, 4, 5]


def test_a_new_run_starts_from_its_seed_and_init_from(built, monkeypatch):
    config, program, _ = built
    asked = {}

    def initial_params(cfg, seed, init_from, mesh, lora, frozen):
        asked.update(cfg=cfg, seed=seed, init_from=tuple(init_from), mesh=mesh, lora=lora)
        assert frozen == flatten_params(program.state.frozen)
        return jax.device_put(small.params(cfg), jax.devices()[0]), {}

    monkeypatch.setattr(module, "initial_params", initial_params)
    state, base = program.initial_state(config)
    assert base == {}  # no adapters
    assert asked == {"cfg": CFG, "seed": 11, "init_from": ("sam=somewhere",), "mesh": program.mesh, "lora": LoraConfig()}
    whole = flatten_params(small.params(CFG))
    for name, x in flatten_params(state.trainable).items():
        assert np.array_equal(x, whole[name]), name
    for name, x in flatten_params(state.frozen).items():
        assert np.array_equal(x, jnp.asarray(whole[name]).astype(x.dtype)), name
    alike = lambda x, like: (x.shape, x.dtype) == (like.shape, like.dtype)  # noqa: E731
    assert jax.tree.all(jax.tree.map(alike, state, program.state))
    made = [(x.frozen, x.opt_state, x.step, x.skipped) for x in (state, program.state)]
    assert jax.tree.all(jax.tree.map(lambda x, like: x.sharding == like.sharding, *made))
    assert int(state.step) == 0 and state.skipped.tolist() == [0, 0]


def test_a_batch_is_placed_as_it_is_but_for_its_long_ids(built):
    _, program, _ = built
    rng = np.random.default_rng(0)
    draw = lambda x: rng.integers(0, 2, x.shape).astype(x.dtype)  # noqa: E731
    batch = jax.tree.map(draw, program.batch)
    placed = program.to_device(dataclasses.replace(batch, example_id=batch.example_id.astype(np.int64)))
    assert jax.tree.all(jax.tree.map(np.array_equal, placed, batch))
    assert jax.tree.all(jax.tree.map(lambda x, like: x.dtype == like.dtype, placed, program.batch))


def test_parts_that_share_no_group_of_negatives_are_refused():
    config = experiment()
    config.optimizer.grad_accum_steps = 6
    with pytest.raises(UserError, match=r"1 images at a time, .* groups of model\.negatives_group_size=2"):
        TrainProgram.build(config, jax.devices()[:1])


def test_the_step_takes_the_state_for_itself_and_leaves_the_batch(built):
    _, program, _ = built
    (state, batch), _ = program.step.lower(program.state, program.batch).args_info
    assert {x.donated for x in jax.tree.leaves(state)} == {True} and {x.donated for x in jax.tree.leaves(batch)} == {False}
