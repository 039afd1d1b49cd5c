"""What a conversion decides before it writes: vocabulary, modes, names of components, what is stored beside the parameters."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace
from unittest.mock import Mock, call

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert_weights import configs, configs_from_hf, convert, job, run
from convert_weights.job import ConversionRequest, open_conversion
from convert_weights.plan import ParamTarget
from convert_weights.sources import ArraySource
from flowseg_jax.errors import UserError
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.siglip import SiglipConfig
from tests.helpers import tiny_checkpoints as tiny


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    """Directories of tiny encoders and of a language model with its tokenizer."""
    root = tmp_path_factory.mktemp("components")
    for family in ("qwen3", "siglip2", "sam"):
        tiny.huggingface(family).save_pretrained(root / family)
    tiny.save_tokenizer(root / "qwen3")
    return root


def request(components, **changes) -> ConversionRequest:
    return ConversionRequest("qwen3", str(components / "qwen3"), **changes)


def test_the_vocabulary_is_at_least_the_tokenizers(components):
    with open_conversion(request(components, settings=["vocab_size=262"])) as found:
        assert found.plan.cfg.vocab_size == 262
    with open_conversion(request(components, settings=["vocab_size=270"])) as found:
        assert found.plan.cfg.vocab_size == 270
    with (
        pytest.raises(
            UserError, match="^vocab_size=261 has no row for each of the tokenizer's 262 ids: leave --set vocab_size"
        ),
        open_conversion(request(components, settings=["vocab_size=261"])),
    ):
        pass


def test_what_is_stored_beside_the_parameters(components):
    with open_conversion(request(components, seed=7)) as found:
        assert found.extra == {"converted": {"family": "qwen3", "seed": 7, "layout": "hf", "fresh": []}}
        assert found.shards == {}
        assert found.tokenizer.name == "tokenizer" and found.tokenizer.is_dir()
    assert not found.tokenizer.exists()  # it lives as long as the context
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.extra = {}
    defaults = ConversionRequest("qwen3", "x")
    assert (defaults.overwrite, defaults.seed, defaults.settings, defaults.mesh, defaults.mode) == (False, 0, (), None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        defaults.out = "y"


def parts(components) -> dict[str, str]:
    names = {"llm": "qwen3", "siglip": "siglip2", "sam": "sam"}
    return {part: str(components / family) for part, family in names.items()}


@pytest.mark.parametrize(("mode", "wanted"), [(None, "sr_cr"), ("sr", "sr"), ("off", "off")])
def test_the_semantic_flow_of_a_joined_model(components, mode, wanted):
    _, cfg, tokenizer = job._joined(job.FAMILIES["flowseg"], ConversionRequest("flowseg", parts(components), mode=mode))
    assert cfg.semantic_flow.mode == wanted
    assert cfg.boundary.enabled == (wanted != "off")
    assert tokenizer == components / "qwen3"
    assert cfg.dtype == "float32"
    assert cfg.connector_hidden_layers == (2, 4, 5)
    assert cfg.connector.hidden_channels == cfg.sam.hidden_size // 2


def stage1(path, old: bool) -> str:
    tensors = {n: x for n, x in tiny.xsam_tensors().items() if n.startswith(("segmentor.", "seg_connector."))}
    tensors = {n: x for n, x in tensors.items() if "logit" not in n}
    head = "segmentor.class_predictor.predictor"
    tensors |= {f"{head}.weight": np.ones((8, 64), np.float32), f"{head}.bias": np.ones(8, np.float32)}
    safetensors.numpy.save_file(tiny.aaai_names(tensors) if old else tensors, path)
    return str(path)


@pytest.mark.parametrize(("old", "vision"), [(False, "vision_encoder."), (True, "visual_encoder.")])
def test_a_first_stage_says_how_siglip_is_named(components, tmp_path, old, vision):
    given = parts(components) | {"segmentor": stage1(tmp_path / "x.safetensors", old)}
    with pytest.raises(UserError, match="both sam= and segmentor= hold a mask encoder: leave sam= out"):
        job._joined(job.FAMILIES["flowseg"], ConversionRequest("flowseg", given))
    del given["sam"]
    source, cfg, _ = job._joined(job.FAMILIES["flowseg"], ConversionRequest("flowseg", given))
    assert {n.split(".")[0] for n in source.entries} == {"llm", vision[:-1], "segmentor", "seg_connector"}
    assert cfg.sam == tiny.XSAM.sam
    assert cfg.pixel_decoder.channels == tiny.XSAM.pixel_decoder.channels
    assert (cfg.mask_decoder.num_queries, cfg.mask_decoder.mlp_dim, cfg.num_classes) == (20, 128, 0)
    assert cfg.connector_hidden_layers == tiny.XSAM.connector_hidden_layers


def test_a_mask_encoder_that_is_not_the_segmentors():
    cfg = FlowSegConfig.tiny()
    stage = configs.XSamStage1Config(
        cfg.sam, cfg.connector, cfg.connector_hidden_layers, cfg.pixel_decoder, cfg.mask_decoder, 3
    )
    joined = configs.joined_config(cfg.llm, cfg.siglip, cfg.sam, stage, "sr", "bfloat16")
    assert (joined.connector, joined.mask_decoder, joined.pixel_decoder) == (cfg.connector, cfg.mask_decoder, cfg.pixel_decoder)
    assert (joined.dtype, joined.semantic_flow.mode, joined.boundary.enabled) == ("bfloat16", "sr", True)
    assert not configs.joined_config(cfg.llm, cfg.siglip, cfg.sam, stage, "off", "float32").boundary.enabled
    other = dataclasses.replace(cfg.sam, window_size=cfg.sam.window_size + 1)
    with pytest.raises(UserError, match="the segmentor's mask encoder is .*, the given one .*: leave sam= out"):
        configs.joined_config(cfg.llm, cfg.siglip, other, stage, "off", "float32")


def test_values_set_by_name():
    cfg = FlowSegConfig.tiny()
    changed = configs.override(cfg, ["mask_decoder.num_heads=4", "dtype=bfloat16", "connector_hidden_layers=[1, 2, 3]"])
    assert (changed.mask_decoder.num_heads, changed.dtype, changed.connector_hidden_layers) == (4, "bfloat16", (1, 2, 3))
    assert configs.override(cfg, []) == cfg
    sam = configs.override(SamConfig.tiny(), ["window_size=3"])
    assert sam == dataclasses.replace(SamConfig.tiny(), window_size=3)
    for wrong in ("mask_decoder.num_heads", "nothing=1", "mask_decoder.nothing=1", "dtype.x=1", "a.b.c=1"):
        with pytest.raises(UserError) as caught:
            configs.override(cfg, [wrong])
        assert str(caught.value) == f"--set {wrong}: expected KEY=VALUE with a key of the config (say mask_decoder.num_heads=4)"
    with pytest.raises(UserError, match="^SiglipConfig.image_size is 'x', expected a whole number"):
        configs.override(SiglipConfig.tiny(), ["image_size=x"])


def test_a_network_computes_in_what_most_weights_are():
    half, full = np.zeros(3, ml_dtypes.bfloat16), np.zeros((2, 1), np.float32)
    assert job._compute(ArraySource({"a": half, "b": full})) == "bfloat16"
    assert job._compute(ArraySource({"a": half, "b": full, "c": full})) == "float32"
    assert job._compute(ArraySource({})) == "float32"
    assert job._compute(ArraySource({"a": np.zeros(9, np.float16)})) == "float32"


def test_the_chat_template_of_a_language_model():
    assert job._chat(LanguageConfig.qwen3_1b7()) == "qwen3_wothinking"
    assert job._chat(LanguageConfig.qwen3_4b()) == "qwen3_instruct"
    assert job._chat(LanguageConfig.phi3_mini()) == "phi3_chat"
    assert job._chat(LanguageConfig.smollm2_135m()) == "qwen3_instruct"
    assert job._chat(LanguageConfig.llama3_8b()) == "llama3_chat"
    assert job._chat(LanguageConfig.qwen3_14b()) == "qwen3_wothinking"
    deeper = dataclasses.replace(LanguageConfig.qwen3_1b7(), num_hidden_layers=29)
    assert job._chat(deeper) == "qwen3_instruct"


@pytest.mark.parametrize(
    ("values", "family"),
    [
        ('{"model_type": "phi3"}', "phi3"),
        ('{"model_type": "llava", "text_config": {"model_type": "llama"}}', "llama"),
        ('{"component": {"family": "qwen3"}}', "qwen3"),
        ('{"model": {"llm": {"model_type": "phi3"}}}', "phi3"),
    ],
)
def test_which_language_model_a_directory_holds(tmp_path, values, family):
    safetensors.numpy.save_file({"w": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(values)
    assert job._llm_family(tmp_path) == family
    (tmp_path / "config.json").write_text('{"model_type": "bert", "component": 3}')
    with pytest.raises(UserError) as caught:
        job._llm_family(tmp_path)
    said = "no language model that is supported (config.json says 'bert'; qwen3, phi3 or llama)"
    assert str(caught.value) == f"llm={tmp_path}: {said}"
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="config.json says 'bert'"):  # a config.json beside it counts more
        job._llm_family(tmp_path)


def test_what_a_conversion_says(monkeypatch, capsys):
    """A line for each parameter with where it comes from, then what is fresh, resized or left over, and what it took."""
    source = lambda name: SimpleNamespace(source=name)  # noqa: E731
    stack = tuple(source(f"model.layers.{n}.w") for n in (0, 1, 3))
    targets = [
        ParamTarget("llm/layers/w", (3, 1024, 512), np.dtype("float32"), stack),
        *(ParamTarget(f"boundary/{name}/kernel", (2,), np.dtype("float16"), ()) for name in "abcdefghi"),
    ]
    plan = SimpleNamespace(
        targets=targets,
        resized={"llm/table": (300, 302)},
        fresh=["boundary/a/kernel", "boundary/b/deep/er/kernel", "boundary/b/deep/er/bias", "scale"],
        ignored=["x", "y"],
    )
    made = SimpleNamespace(source=SimpleNamespace(notes=("read as main",)), plan=plan)
    opened, done = [], []
    monkeypatch.setattr(run.jobs, "open_conversion", lambda request: opened.append(request) or contextlib.nullcontext(made))

    def go_through(how):
        def each(job, request, progress):
            done.append((how, job, request))
            for target in targets:
                progress(target.name)

        return each

    for how in ("check", "write"):
        monkeypatch.setattr(run.jobs, how, go_through(how))
    memory = iter([5 << 20, 9 << 20] * 2)
    monkeypatch.setattr(run.host, "peak_memory", lambda: next(memory))
    clock = [100.0]
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: clock.append(clock[-1] + 0.25) or clock[-1]))
    beats = []
    beat = lambda message: beats.append(SimpleNamespace(message=message)) or contextlib.nullcontext(beats[-1])  # noqa: E731
    monkeypatch.setattr(run, "heartbeat", beat)
    asked = ConversionRequest("flowseg", {"llm": "a", "sam": "b"}, "out")
    run.convert(asked)
    assert [one.message for one in beats] == ["opening a, b", "10 of 10 arrays, 2 s so far"]
    lines = capsys.readouterr().out.splitlines()
    assert opened == [asked] and done == [("write", made, asked)]
    assert lines[:3] == [
        "note: read as main",
        " 1/10 llm/layers/w (3, 1024, 512) float32 <- model.layers.{0-1,3}.w",
        " 2/10 boundary/a/kernel (2,) float16 <- fresh",
    ]
    assert lines[11:-1] == [
        "resized llm/table: 300 rows in the checkpoint, 302 here",
        "fresh, not in the checkpoint: 4 parameters of boundary/a, boundary/b/deep, scale",
        "not used: 2 tensors that are known to be of no use here",
    ]
    took = "10 arrays, 1,572,882 values in 3 s; peak memory 9 MiB (5 before, largest array 6)"
    assert lines[-1] == f"out: {took}"
    run.convert(asked, check=True)
    assert done[1][0] == "check" and capsys.readouterr().out.splitlines()[-1] == f"checked: {took}"
    assert run._sources(asked) == "a, b" and run._sources(ConversionRequest("sam", "c")) == "c"


def test_what_an_export_says(monkeypatch, capsys):
    exported = Mock(return_value="out")
    monkeypatch.setattr(run, "export_directory", exported)
    monkeypatch.setattr(run.host, "peak_memory", lambda: 9 << 20)
    run.export("family", "model", "out", layout="main", dtype="float16", overwrite=True)
    options = {"layout": "main", "dtype": "float16", "overwrite": True, "progress": run.log}
    assert exported.mock_calls == [call("family", "model", "out", **options)]
    assert capsys.readouterr().out == "out: peak memory 9 MiB\n"


def test_what_a_conversion_cannot_begin_with(tmp_path):
    safetensors.numpy.save_file({"w": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    (tmp_path / "other.json").write_text('{"model_type": "x"}')
    joined = lambda parts: job._joined(job.FAMILIES["flowseg"], ConversionRequest("flowseg", parts))  # noqa: E731
    for begin, message in (
        (lambda: joined("x"), r"flowseg is put together from components: flowseg llm=DIR siglip=DIR sam=DIR"),
        (lambda: joined({"llm": "x", "eyes": "y"}), r"flowseg has no part 'eyes' \(known: llm, siglip, sam, segmentor\)"),
        (lambda: joined({"llm": "x"}), "flowseg needs siglip=DIR, sam=DIR: nothing is made up for a missing component"),
        (lambda: joined({"segmentor": "x", "llm": "y"}), "flowseg needs siglip=DIR: nothing is made up"),
        (
            lambda: job._xsam(
                job.FAMILIES["xsam"],
                ConversionRequest("xsam", str(tmp_path / "x.safetensors"), config=str(tmp_path / "other.json")),
            ),
            r"other\.json holds no config of ours \(key flowseg\); set single values by --set KEY=VALUE",
        ),
        (
            lambda: configs_from_hf.preset("qwen3_4c", job.PRESETS, None, "--llm"),
            r"--llm: no preset and no directory 'qwen3_4c' \(did you mean 'qwen3_4b'\?\)",
        ),
        (
            lambda: convert.TorchView(job.FAMILIES["sam"], SamConfig.tiny(), ArraySource({}), "hff"),
            r"sam has no layout 'hff' \(did you mean 'hf'\?\)",
        ),
    ):
        with pytest.raises(UserError, match=message):
            begin()
