"""Wrong values in Hugging Face's config.json: a clear error, no effect, or the numbers that transformers computes as well.

`python -m pytest -m slow -s tests/convert_weights/test_config_fuzz.py` tries every value at every key and prints the counts of
docs/reliability.md. The default suite tries a sample.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import io
import json
import math
import random
import signal

import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from convert_weights import job as jobs
from convert_weights.convert import get_family, import_params
from flowseg_jax.errors import UserError
from flowseg_jax.models import hf_keys
from tests.helpers import tiny_checkpoints as tiny

FAMILIES = ("qwen3", "phi3", "llama", "siglip2", "sam", "mask2former")
LONG = "x" * 100_000
VALUES = (0, 1, -1, 2, 3, 0.5, 1e9, 10**9, 10**400, 1e-30, -0.5, math.nan, math.inf, "", "abc", "1", LONG, None, True, False,
          [], [0], [-1], ["abc"], [[[]]], [10**9] * 3, {}, {"a": 1}, {"rope_type": "yarn", "factor": 4.0}, {"model_type": "x"},
          {"rope_theta": -1})  # fmt: skip
DOCUMENTS = (
    "",
    "[]",
    "0",
    "null",
    '"abc"',
    "{",
    "{}",
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"hidden_size": ' + "9" * 10_000 + "}",
)
SECONDS = 120  # a hang; any of these takes a fraction of a second
NO_EFFECT, HONOURED, ERROR = "no effect", "as transformers", "clear error"


class Hang(BaseException):
    """Not an `Exception`: nothing may catch it on its way."""


@contextlib.contextmanager
def no_longer_than(seconds: int):
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Checkpoint:
    """A tiny checkpoint of one family, and what it is without a wrong value."""

    def __init__(self, family: str, directory):
        self.family, self.directory = family, directory / family
        tiny.huggingface(family).save_pretrained(self.directory)
        self.text = (self.directory / "config.json").read_text()
        self.config = json.loads(self.text)
        self.cfg = None
        self.cfg = self.read(self.text)

    def read(self, text: str):
        """The config of a conversion, whose arrays have all been made (those of the right config once: they are the same)."""
        (self.directory / "config.json").write_text(text)
        request = jobs.ConversionRequest(self.family, str(self.directory))
        with contextlib.redirect_stdout(io.StringIO()) as said, jobs.open_conversion(request) as job:
            if (
                job.plan.cfg != self.cfg and not job.plan.fresh
            ):  # a parameter that the file lacks would be compiled for every input
                jobs.check(job, request)
        assert "Traceback" not in said.getvalue()
        return job.plan.cfg

    def keys(self) -> list[tuple[str, ...]]:
        """Every key that is in the file or in our list, those of nested groups too."""
        family = get_family(self.family).name
        known = hf_keys.LANGUAGE.get(family) or {"siglip2": hf_keys.SIGLIP, "sam": hf_keys.SAM}.get(family, hf_keys.MASK2FORMER)
        inside = {"rope_parameters": hf_keys.ROPE, "backbone_config": hf_keys.SWIN}
        more = [(group, key) for group, keys in inside.items() if group in known.read for key in sorted(keys.known)]
        rest = ["text_config", "vision_config", "is_causal", "component", "model", "flowseg", "mystery"]
        return [(key,) for key in sorted({*known.known, *self.config, *rest})] + more

    def changed(self, path: tuple[str, ...], value) -> str:
        config = copy.deepcopy(self.config)
        node = config
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
        return json.dumps(config)

    def judge(self, text: str) -> str:
        """What comes of a config.json; anything else than the three outcomes is the name of what went wrong."""
        try:
            with no_longer_than(SECONDS):
                cfg = self.read(text)
        except UserError as error:
            line = str(error)
            return ERROR if "\n" not in line and len(line) < 3000 and line.isprintable() else "unclear error"
        except Hang:
            return "hang"
        except Exception as error:  # what a user would see as a stack trace
            return f"trace: {type(error).__name__}: {str(error)[:200]}"
        if cfg == self.cfg:
            return NO_EFFECT
        try:
            same = self.as_transformers(text, cfg)
        except Exception as error:  # transformers refuses what we have accepted
            return f"silent change: {str(error)[-300:]}"
        return HONOURED if same else f"silent change: {cfg} for {self.cfg}"

    def as_transformers(self, text: str, cfg) -> bool:
        """Whether transformers computes the same from that config and these weights."""
        if self.family == "mask2former":  # the keys that its weights say nothing about
            changed = {
                k for k in ("common_stride", "feature_strides", "id2label") if json.loads(text).get(k) != self.config.get(k)
            }
            return bool(changed)
        # transformers wants 1.0 where 1 is meant.
        config = json.loads(text)
        config |= {k: float(config[k]) for k in ("rms_norm_eps", "layer_norm_eps", "mlp_ratio") if type(config.get(k)) is int}
        (self.directory / "config.json").write_text(json.dumps(config))
        model = tiny.huggingface(self.family)
        theirs = type(model).from_pretrained(self.directory, attn_implementation="eager", dtype=torch.float32).eval()
        tensors = {name: x.numpy() for name, x in model.state_dict().items()}
        params = import_params(self.family, {n: x for n, x in tensors.items() if n != "lm_head.weight" or not tied(cfg)}, cfg)
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: get_family(self.family).module(cfg, rngs=nnx.Rngs(0))))
        ours = nnx.merge(graphdef, nnx.restore_int_paths(params))
        rng = np.random.default_rng(0)
        if self.family in hf_keys.LANGUAGE:
            ids = rng.integers(0, 200, (2, 30)).astype(np.int32)
            positions = np.broadcast_to(np.arange(30, dtype=np.int32), ids.shape)
            mine = ours(ours.embed(ids), positions, np.zeros_like(ids))
            with torch.no_grad():
                wanted = theirs.model(torch.from_numpy(ids).long()).last_hidden_state.numpy()
        else:
            image = rng.normal(size=(1, cfg.image_size, cfg.image_size, 3)).astype(np.float32)
            with torch.no_grad():
                wanted = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()), output_hidden_states=True).hidden_states[
                    -2
                ]
            wanted = wanted.numpy()
            mine = (
                ours(image, layers=cfg.num_hidden_layers - 1)
                if self.family == "siglip2"
                else ours(image, (cfg.num_hidden_layers - 1,))[0]
            )
        return float(np.abs(np.asarray(mine).reshape(-1) - wanted.reshape(-1)).max()) < 1e-4 * max(
            1.0, float(abs(wanted).max())
        )


def tied(cfg) -> bool:
    return getattr(cfg, "tie_word_embeddings", False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    return functools.cache(lambda family: Checkpoint(family, root))


def run(checkpoint: Checkpoint, inputs: list[str]) -> collections.Counter:
    outcomes = [(checkpoint.judge(text), text) for text in inputs]
    wrong = [(outcome, text[:2000]) for outcome, text in outcomes if outcome not in (ERROR, NO_EFFECT, HONOURED)]
    assert not wrong, wrong[:5]
    return collections.Counter(outcome for outcome, _ in outcomes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_of_wrong_values(checkpoint, family):
    one, rng = checkpoint(family), random.Random(family)
    every = [(path, value) for path in one.keys() for value in VALUES]
    count = 40
    counts = run(one, [one.changed(*pair) for pair in rng.sample(every, count)] + rng.sample(DOCUMENTS, 2))
    assert counts[ERROR] and counts[NO_EFFECT]


@pytest.mark.slow
def test_every_wrong_value_at_every_key(checkpoint):
    total = collections.Counter()
    for family in FAMILIES:
        one = checkpoint(family)
        # What is not read is tried with a few values only.
        unused = {key for keys in (hf_keys.QWEN3, hf_keys.SIGLIP, hf_keys.MASK2FORMER, hf_keys.SWIN) for key in keys.unused}
        pairs = [(path, v) for path in one.keys() for v in (VALUES[:3] if path[-1] in unused else VALUES)]
        counts = run(one, [*(one.changed(*pair) for pair in pairs), *DOCUMENTS])
        print(f"{family}: {sum(counts.values())} inputs, {dict(counts)}")
        total += counts
    print(f"all: {sum(total.values())} inputs, {dict(total)}; traces, hangs, silent changes: 0")


@pytest.mark.parametrize("document", ["[]", "0", "null", '"abc"'])
def test_a_config_that_is_no_object(checkpoint, document):
    one = checkpoint("sam")
    with pytest.raises(UserError, match=r"config.json holds no JSON object$"):
        one.read(document)


def test_a_vocabulary_is_not_cut_by_a_wrong_number(checkpoint):
    one = checkpoint("phi3")
    with pytest.raises(UserError, match="the file has 280 rows for .*, vocab_size in its config is 270, and no tokenizer"):
        one.read(one.changed(("vocab_size",), 270))


def test_the_judge_sees_a_silent_change(checkpoint, monkeypatch):
    """A reader that drops a setting is found out, and one that fails too."""
    one = checkpoint("llama")
    wrong = one.changed(("rms_norm_eps",), 0.5)
    assert one.judge(wrong) == HONOURED
    read = hf_keys.Keys.values
    lies = lambda self, config: read(self, config) | ({"rms_norm_eps": 0.25} if self is hf_keys.LLAMA else {})  # noqa: E731
    monkeypatch.setattr(hf_keys.Keys, "values", lies)
    assert one.judge(wrong).startswith("silent change")
    monkeypatch.setattr(hf_keys.Keys, "values", lambda self, config: config["nothing"])
    assert one.judge(wrong).startswith("trace: KeyError")
    assert transformers.LlamaConfig().rms_norm_eps == 1e-6
