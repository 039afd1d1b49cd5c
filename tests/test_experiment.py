from __future__ import annotations

import json
import re
import textwrap

import pytest
from ml_collections import ConfigDict

from flowseg_jax import experiment as config_lib
from flowseg_jax.errors import UserError
from flowseg_jax.fields import RENAMED_KEYS

CONFIG = """
from ml_collections import ConfigDict, config_dict


def get_config(arg=None):
    c = ConfigDict()
    c.seed, c.num_steps, c.batch_size, c.log_every, c.checkpoint_every = 0, 100, 8, 10, 50
    c.trackers, c.eval_every, c.eval_split, c.eval_images, c.eval_data = (), 0, "val", 64, ""
    c.init_from, c.checkpoint = (), ConfigDict({"keep": 2})
    c.model = ConfigDict({"preset": arg or "tiny", "semantic_flow": {"mode": "sr_cr", "norm": "residual"}, "remat": True})
    c.data = ConfigDict({"sizes": [1, 2, 3], "limit": config_dict.placeholder(int), "other": None})
    c.optimizer = ConfigDict({"learning_rate": 1e-3, "param_groups": [["llm/.*", None], [".*", 1.0]]})
    c.lora = ConfigDict({"targets": ()})
    c.ema = ConfigDict({"decay": 0.0})
    c.mesh = ConfigDict({"data": 1})
    c.data.batch = c.get_ref("batch_size")
    return c
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tests.helpers.small.py"
    path.write_text(CONFIG)
    return path


def load(file, *arguments):
    return config_lib.load([f"--config={file}", *arguments])


def test_overrides_are_parsed_by_the_type_of_the_default(file):
    config, rest = load(
        file,
        "--workdir=x",
        "--config.batch_size=2",
        "--config.model.remat=false",
        "--config.model.preset=7",
        "--config.optimizer.learning_rate=1",
        "--config.data.sizes=4,5",
        "--config.data.limit",
        "3",
        "--config.data.other=(1, [2])",
        "--config.init_from=sam=a,b",
        "--plan",
    )
    assert rest == ["--workdir=x", "--plan"]
    assert (config.batch_size, config.data.batch) == (2, 2)  # a reference follows
    assert config.model.remat is False
    assert config.model.preset == "7"
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.data.sizes == (4, 5)
    assert config.data.limit == 3
    assert config.data.other == (1, (2,))
    assert config.init_from == ("sam=a", "b")
    with pytest.raises(AttributeError):  # locked
        config.stepps = 1


def test_tuples_of_tuples(file):
    config, _ = load(file, "--config.optimizer.param_groups=(('llm', None), ('.*', 0.5))", "--config.data.sizes=")
    assert config.optimizer.param_groups == (("llm", None), (".*", 0.5))
    assert config.data.sizes == ()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optimizer.lerning_rate", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("mode", "model.semantic_flow.mode"),
        ("model.semantic_flow.nrom", "model.semantic_flow.norm"),
        ("semantic_flow.mode", "model.semantic_flow.mode"),
        ("seed.x", "seed"),
        ("lerning", "optimizer.learning_rate"),
    ],
)
def test_an_unknown_key_names_the_nearest(file, key, nearest):
    with pytest.raises(UserError, match=rf"^unknown config key '{re.escape(key)}' .did you mean '{nearest}'"):
        load(file, f"--config.{key}=1")


def test_an_unknown_key_without_a_near_one_lists_the_section(file):
    with pytest.raises(UserError, match=r"known: model.preset, model.remat, model.semantic_flow.mode"):
        load(file, "--config.model.zzzqq=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=x", "'seed' takes an integer .default 0., got 'x'"),
        ("num_steps=1.5", "'num_steps' takes an integer"),
        ("model.remat=maybe", "'model.remat' takes true or false"),
        ("optimizer.learning_rate=fast", "'optimizer.learning_rate' takes a number"),
        ("data.sizes=1,b", "'data.sizes' takes a tuple"),
        ("data.sizes=(1", "'data.sizes' takes a tuple"),
        ("data.limit=q", "'data.limit' takes an integer"),
        ("model=tiny", "'model' is a section; set one of model.preset"),
        ("batch_size=0", "batch_size must be an integer of at least 1, got 0"),
        ("seed=-1", "seed must be an integer of at least 0"),
    ],
)
def test_a_wrong_value_is_one_line(file, override, message):
    with pytest.raises(UserError, match=message) as error:
        load(file, f"--config.{override}")
    assert "\n" not in str(error.value)


def test_a_key_given_twice(file):
    with pytest.raises(UserError, match=r"--config.seed is given twice: 1 and 2"):
        load(file, "--config.seed=1", "--config.seed=2")
    with pytest.raises(UserError, match="--config is given twice"):
        load(file, f"--config={file}")
    with pytest.raises(UserError, match=r"--config.seed needs a value"):
        load(file, "--config.seed")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "does not define get_config"),
        ("def get_config(:", "line 1: SyntaxError"),
        ("def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError"),
        ("def get_config():\n    return {}", "returned dict, not a ConfigDict"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_lists_the_configs(tmp_path):
    with pytest.raises(UserError, match=r"no config .*nope.py \(known: .*shapes_tiny, .*stage3_mixed\)"):
        config_lib.load(["--config", str(tmp_path / "nope.py")])
    with pytest.raises(UserError, match=r"no config shapes_tyni \(did you mean 'shapes_tiny'\?\)"):
        config_lib.load(["--config=shapes_tyni"])


@pytest.mark.parametrize(
    ("name", "path"), [("shapes_tiny", "configs/shapes_tiny.py"), ("stage3_mixed:tiny", "configs/stage3_mixed.py:tiny")]
)
def test_a_config_is_chosen_by_name_and_by_path_from_anywhere(tmp_path, monkeypatch, name, path):
    monkeypatch.chdir(tmp_path)
    by_name, rest = config_lib.load([f"--config={name}", "--config.seed=3"])
    assert rest == [] and by_name.seed == 3
    assert config_lib.to_json(by_name) == config_lib.to_json(config_lib.load([f"--config={path}", "--config.seed=3"])[0])


def test_top_level_keys_are_fixed(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(textwrap.dedent(CONFIG).replace("c.mesh =", "c.mash ="))
    with pytest.raises(UserError, match="lacks mesh and has the unknown mash"):
        load(path)


def test_an_argument_reaches_get_config(file, tmp_path):
    assert config_lib.load([f"--config={file}:large"])[0].model.preset == "large"
    plain = tmp_path / "plain.py"
    plain.write_text(CONFIG.replace("arg=None", "").replace('arg or "tiny"', '"tiny"'))
    with pytest.raises(UserError, match="takes no argument, got 'large'"):
        load(f"{plain}:large")


def test_json_round_trip_and_file(file, tmp_path):
    config, _ = load(file, "--config.batch_size=3")
    text = config_lib.to_json(config)
    assert config_lib.from_json(text).to_dict() == config.to_dict()
    assert json.loads(text)["data"]["batch"] == 3
    saved = tmp_path / "config.json"
    saved.write_text(text)
    again, _ = load(saved, "--config.optimizer.learning_rate=2")
    assert again.data.sizes == (1, 2, 3)
    assert again.optimizer.learning_rate == 2.0
    saved.write_text(text[:-5])
    with pytest.raises(UserError, match="is not JSON"):
        load(saved)


def test_the_default_config_loads_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, rest = config_lib.load([])
    assert set(config) == set(config_lib.TOP_LEVEL)
    assert rest == []


def test_five_old_names_are_told_and_the_others_counted():
    names = list(RENAMED_KEYS["model.sam"])
    for many, more in ((5, ""), (6, "; 1 more have other names too"), (7, "; 2 more have other names too")):
        with pytest.raises(UserError) as error:
            config_lib.check_names({"model": {"sam": dict.fromkeys(names[:many], 1)}}, "it")
        told = [f"model.sam.{name} is called {config_lib.new_name(f'model.sam.{name}')}" for name in names[:5]]
        assert str(error.value) == f"it: {'; '.join(told)}{more}"


def test_a_config_holds_plain_values():
    with pytest.raises(ValueError, match="^a config holds plain values only: Object of type set is not JSON serializable"):
        config_lib.to_json(ConfigDict({"a": {1}}))
