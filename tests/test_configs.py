"""The experiments of `configs/`: their keys, the help on them, and what each changes of the published recipe."""

import json

import pytest

from flowseg_jax import experiment, fields
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.config_help import HELP, list_keys
from flowseg_jax.errors import UserError
from flowseg_jax.system.paths import ROOT
from flowseg_jax.training.program import RunConfig

VARIANTS = {
    "base": ("qwen3_1b7", "qwen3_8b", "qwen3_14b", "qwen3_32b", "llama3_8b", "phi3_mini"),
    "shapes_ablation": ("baseline", "sr", "sr_cr", "cr", "sr_residual", "sr_even"),
    "shapes_smollm2": ("lora", "full"),
    "stage1_segmentor": ("tiny",),
    "stage2_align": ("qwen3_1b7", "phi3_mini", "tiny"),
    "stage3_mixed": ("qwen3_1b7", "phi3_mini", "tiny"),
}
NAMES = [path.stem for path in sorted((ROOT / "configs").glob("*.py"))]
EVERY = [*NAMES, *(f"{name}:{variant}" for name, variants in VARIANTS.items() for variant in variants)]
STAGE1, STAGE2 = "runs/stage1_segmentor/model", "runs/stage2_align/model"
# What a full-size stage changes of the published recipe, and what the tiny experiment does, the model's keys aside.
CHANGES = {
    "stage1_segmentor": {
        "init_from": ("weights/sam_l",),
        "num_steps": 66536,
        "data.dir": "data/coco_panoptic",
        "data.held_out": ("data/refcoco", "data/refcoco+", "data/refcocog"),
        "data.text_length": 8,
        "data.max_phrases": 1,
        "data.max_masks": 128,
        "data.lsj_scale_range": (0.1, 2.0),
        "data.tokenizer": "",
        "optimizer.learning_rate": 1e-4,
        "optimizer.max_grad_norm": 0.01,
        "optimizer.param_groups": (("sam/.*", 0.1), (".*", 1.0)),
    },
    "stage2_align": {
        "init_from": (f"sam={STAGE1}", "weights/siglip2", "weights/qwen3_4b"),
        "num_steps": 2180,
        "batch_size": 256,
        "data.dir": "data/llava_558k",
        "data.text_length": 2048,
        "data.max_phrases": 1,
        "data.max_masks": 1,
        "data.pad_to_square": True,
        "optimizer.learning_rate": 1e-3,
        "optimizer.weight_decay": 0.0,
        "optimizer.param_groups": (("(visual|seg)_projector/.*", 1.0), (".*", None)),
        "optimizer.frozen_dtype": "bfloat16",
    },
    "stage3_mixed": {
        "init_from": (STAGE2, STAGE1),
        "num_steps": 26962,
        "data.mixture": tuple(
            (f"data/{name}", 0.0) for name in ("llava_mix665k", "coco_panoptic", "refcoco", "refcoco+", "refcocog", "reasonseg")
        ),
        "data.objects": "referred",
        "data.max_names": 128,
    },
    "shapes_tiny": {
        "num_steps": 2000,
        "batch_size": 8,
        "log_every": 20,
        "checkpoint_every": 200,
        "data.shapes_images": 6000,
        "data.text_length": 368,
        "data.max_masks": 12,
        "data.tokenizer": "",
        "data.random_prompts": False,
        "optimizer.learning_rate": 1e-3,
        "optimizer.b2": 0.98,
        "optimizer.param_groups": ((".*", 1.0),),
        "optimizer.losses.language_weight": 0.1,
        "optimizer.losses.class_loss_scale": 4.0,
        "optimizer.losses.num_points": 0,
        "optimizer.losses.logits_chunk_size": 4096,
        "mesh.data": -1,
        "mesh.fsdp": 1,
    },
}


def flat(name: str) -> dict:
    config = experiment.read(name)

    def value(key: str):
        node = config
        for part in key.split("."):
            node = node[part]
        return node

    return {key: value(key) for key in experiment.dotted_keys(config)}


@pytest.mark.parametrize("name", EVERY)
def test_every_key_of_every_config_has_help_and_every_line_of_help_a_key(name):
    config = experiment.read(name)
    assert set(experiment.dotted_keys(config)) == set(HELP)
    RunConfig.from_config(config)  # all its values fit together


def test_help_is_one_short_line_a_key():
    assert all(text and "\n" not in text and len(text) <= 105 and not text.endswith(".") for text in HELP.values())
    assert all(text == text.strip() for text in HELP.values())


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_config_changes_of_the_published_recipe(name):
    base, found = flat("base"), flat(name)
    changed = {key: value for key, value in found.items() if value != base[key] and not key.startswith("model.")}
    assert changed == CHANGES[name]


@pytest.mark.parametrize("llm", ["qwen3_1b7", "phi3_mini"])
def test_what_another_language_model_changes_of_stage_3(llm):
    base, found = flat("stage3_mixed"), flat(f"stage3_mixed:{llm}")
    changed = {key: value for key, value in found.items() if value != base[key] and not key.startswith("model.llm.")}
    chat = {"data.chat_template": "phi3_chat"} if llm == "phi3_mini" else {}
    assert changed == {"data.tokenizer": f"weights/{llm}/tokenizer", **chat}


def test_old_names_are_no_names_and_new_names_are():
    for section, names in fields.RENAMED_KEYS.items():
        if section == "extra.prompts":  # of a model directory
            continue
        prefix = section and f"{section}."
        for old, new in names.items():
            known = [key for key in HELP if key.startswith(f"{prefix}{new}")]
            assert known and f"{prefix}{old}" not in HELP, (section, old)


def test_the_printed_config_is_the_config(tmp_path, capsys):
    assert flowseg(["train", "--config=stage3_mixed:tiny", "--config.seed=5", "--print-config"]) == 0
    path = tmp_path / "printed.json"
    path.write_text(capsys.readouterr().out)
    again = experiment.read(str(path))
    assert (
        again.seed == 5 and again.to_dict() == experiment.load(["--config=stage3_mixed:tiny", "--config.seed=5"])[0].to_dict()
    )
    assert json.loads(path.read_text())["data"]["max_names"] == 10


def test_the_list_of_keys_has_type_value_and_help(capsys):
    assert flowseg(["train", "--config.data.max_masks=7", "--list-keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(HELP)
    found = {line.split()[0]: line.split(None, 1)[1].strip() for line in lines}
    assert found["data.max_masks"].split(None, 1) == ["int", f"7  # {HELP['data.max_masks']}"]
    assert found["model.llm.sliding_window"].startswith("int | None")
    assert found["model.sam.global_attn_indexes"].startswith("tuple[int, ...]")
    assert list_keys(experiment.load(["--config.data.max_masks=7"])[0]).splitlines() == lines


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=3", "config key 'steps' is called 'num_steps'"),
        ("data.text=3", "config key 'data.text' is called 'data.text_length'"),
        ("optimizer.losses.class_=3", "config key 'optimizer.losses.class_' is called 'optimizer.losses.class_weight'"),
        ("model.decoder.queries=3", "config key 'model.decoder.queries' is called 'model.mask_decoder.num_queries'"),
        ("model.mask_decoder.queries=3", "config key 'model.mask_decoder.queries' is called 'model.mask_decoder.num_queries'"),
        ("model.components=all", "config shapes_tiny: model.components=all is called model.components=full"),
        ("model.generic_pass=flow", "config shapes_tiny: model.generic_pass=flow is called model.generic_pass=with_flow"),
    ],
)
def test_an_old_name_on_the_command_line_gives_the_new_one(override, message):
    with pytest.raises(UserError) as error:
        experiment.load([f"--config.{override}"])
    assert str(error.value) == message


def test_old_names_in_a_file_give_the_new_ones(tmp_path):
    path, config = tmp_path / "old.json", experiment.load([])[0].to_dict()
    config["steps"] = config.pop("num_steps")
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        experiment.read(str(path))
    assert str(error.value) == f"config {path}: steps is called num_steps"
    config["data"]["text"] = config["data"].pop("text_length")
    config["model"]["decoder"] = config["model"].pop("mask_decoder")
    config["model"]["parts"] = "all"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        experiment.read(str(path))
    said = str(error.value)
    assert said.startswith(f"config {path}: data.text is called data.text_length; model.decoder.embed_dim is called ")
    assert "model.mask_decoder.embed_dim" in said and said.endswith(" more have other names too") and "\n" not in said


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"parts": "full"}, "RUN/config.json: model.parts is called components"),
        ("model", {"components": "all"}, "RUN/config.json: model.components: 'all' is called 'full'"),
        ("model.sam", {"width": 3}, "RUN/config.json: model.sam.width is called hidden_size"),
        ("extra.prompts", {"vary": True}, "RUN/config.json: extra.prompts.vary is called randomize"),
        ("extra.prompts", {"chat": "phi3_chat"}, "RUN/config.json: extra.prompts.chat is called chat_template"),
    ],
)
def test_old_names_in_a_model_directory_give_the_new_ones(section, values, message):
    from flowseg_jax.data.prompts import PromptTemplates
    from flowseg_jax.models.config import FlowSegConfig
    from flowseg_jax.models.sam import SamConfig

    cls = {"model": FlowSegConfig, "model.sam": SamConfig, "extra.prompts": PromptTemplates}[section]
    with pytest.raises(UserError) as error:
        fields.read(cls, values, f"RUN/config.json: {section}")
    assert str(error.value) == message


def test_a_config_has_exactly_the_known_keys():
    config = experiment.load([])[0]
    with config.unlocked():
        config.optimizer.learning_rat = 1.0
    with pytest.raises(UserError, match=r"^unknown config key 'optimizer.learning_rat' .did you mean 'optimizer.learning_rate"):
        RunConfig.from_config(config)
    with config.unlocked():
        del config.optimizer.learning_rat, config.data.max_masks, config.mesh.data
    with pytest.raises(UserError, match="^the config lacks data.max_masks, mesh.data$"):
        RunConfig.from_config(config)
