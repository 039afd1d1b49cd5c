"""Fixtures of other sizes than the committed one: the model they describe and the batches they give."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from convert_weights.parity import training
from convert_weights.parity.compare import stage1_samples
from convert_weights.parity.fixture import STAGE1, Fixture
from convert_weights.parity.preprocessing import assemble, compare_inputs, read_conversation, read_samples
from convert_weights.parity.report import ParityReport
from flowseg_jax.checkpoints.manifest import flatten_params
from flowseg_jax.data import images
from flowseg_jax.data.prompts import CHAT_TEMPLATES
from flowseg_jax.errors import UserError
from flowseg_jax.models import flowseg
from flowseg_jax.types import IGNORE_INDEX, IMAGE_TOKEN_INDEX, PAD

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "xsam"


def test_the_committed_model():
    """Qwen3 with three levels: one FPN stage, masks of stride 8."""
    cfg = Fixture(GOLDEN).model(images=2, clamp=500.0)
    assert (cfg.llm.model_type, cfg.llm.qk_norm, cfg.llm.tie_word_embeddings, cfg.llm.sliding_window) == (
        "qwen3",
        True,
        True,
        None,
    )
    assert cfg.connector_hidden_layers == (2, 3, 4) and cfg.connector.scales == (2, 1, 0.5)
    assert cfg.pixel_decoder.channels == (96, 48, 24) and cfg.pixel_decoder.fpn_stages == 1
    assert (cfg.mask_decoder.num_layers, cfg.mask_decoder.logit_clamp, cfg.negatives_group_size) == (3, 500.0, 2)
    assert cfg.semantic_flow.mode == "off" and not cfg.boundary.enabled and cfg.dtype == "float32"


def test_another_model(phi3):
    """Every size arrives where it belongs."""
    cfg = phi3.model(images=2, classes=4)
    assert (cfg.llm.model_type, cfg.llm.sliding_window, cfg.llm.head_dim) == ("phi3", 90, 10)
    assert cfg.sam.grid_size == 13 and cfg.num_visual_tokens == 25 + 7 * 7
    assert cfg.pixel_decoder.strides == (32, 16, 8, 4) and cfg.pixel_decoder.fpn_stages == 0
    assert cfg.connector_hidden_layers == (5, 2, 3, 4)
    _, abstract = flowseg.abstract_model(cfg)
    shapes = {name: x.shape for name, x in flatten_params(flowseg.params_dict(abstract)).items()}
    assert shapes["sam/global_layers/attn/rel_pos_h"] == (2, 25, 8)
    assert shapes["sam/window_layers/attn/rel_pos_h"] == (3, 7, 8)
    assert shapes["llm/layers/self_attn/q_proj/kernel"] == (3, 72, 60)
    assert shapes["llm/layers/self_attn/k_proj/kernel"] == (3, 72, 30)
    assert shapes["llm/lm_head"] == (267, 72)
    assert shapes["mask_decoder/mask_embedder/2/kernel"] == (96, 32)
    assert shapes["pixel_decoder/mask_projection/kernel"][-1] == 32
    assert shapes["mask_decoder/layers/fc1/kernel"] == (6, 96, 52) and shapes["mask_decoder/queries_features"] == (17, 96)
    assert shapes["category_head/kernel"] == (96, 5)
    assert phi3.losses().num_points == 50


def test_defaults_of_the_language_config(phi3):
    """No `sliding_window` is full attention, no `head_dim` width / heads."""
    for key in ("sliding_window", "head_dim"):
        del phi3.config["llm_config"][key]
    llm = phi3.model().llm
    assert (llm.sliding_window, llm.head_dim) == (None, 12)


def test_a_projection_that_no_checkpoint_holds(phi3):
    phi3.config["m2f"]["feature_size"] = 64
    with pytest.raises(UserError, match="feature_size 64 differs from hidden_dim 96"):
        phi3.model()


def test_text_of_phi3(phi3):
    """bos once and first, the newline after the image, several turns in one conversation, the separator at the end."""
    cfg = phi3.model()
    samples = read_samples(phi3, cfg)
    ids = phi3.value("special_ids")
    text = samples[1].text.whole()
    newline = phi3.tokenizer().encode("\n")[0]
    assert text["input_ids"][:5] == [ids["<s>"], ids["<|user|>"], newline, IMAGE_TOKEN_INDEX, newline]
    assert text["input_ids"].count(ids["<s>"]) == 1 and text["input_ids"][-2:] == [ids["<|end|>"], newline]
    assert text["labels"][-2:] == [ids["<|end|>"], IGNORE_INDEX]
    assert [x for x in text["seg_ids"] if x != PAD] == [0, 1, 2]
    spans = [x for x in text["cond_ids"] if x != PAD]
    assert spans == [0] * 3 + [1] * 3 + [2] * 3  # <p>, one letter, </p>


def test_a_batch_of_unequal_samples(phi3):
    """One phrase beside three: padded slots exist nowhere; targets are those of an image side that is no multiple of 8."""
    cfg = phi3.model(images=2)
    samples = read_samples(phi3, cfg)
    batch = assemble([samples[1], samples[0]], cfg)
    assert batch.phrase_target.tolist() == [[0, 1, 2], [0, PAD, PAD]]
    assert batch.mask_valid.tolist() == [[True] * 3, [True, False, False]]
    assert (batch.input_ids == IMAGE_TOKEN_INDEX).sum(1).tolist() == [cfg.num_visual_tokens] * 2
    length = (batch.segment_ids != PAD).sum(1)
    assert length.max() == batch.input_ids.shape[1] > length.min()
    assert batch.packed_masks.shape == (2, 3, 182, 23)
    # The image lies in the upper left, scaled by its longest side; nearest neighbour in the middle of a large block is exact.
    height, width = batch.resized_hw[1]
    assert (height, width) == (123, 182)
    mask = images.unpack_masks(batch.packed_masks[1, 0])
    assert mask.shape == (182, 182) and not mask[height:].any() and mask[:height, -1].any()
    passes = training.referring_passes(batch)
    assert [(p.image, p.slot) for p in passes] == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_a_stage1_batch(phi3):
    """All masks are labelled objects, and there is no text: one phrase that does not exist."""
    cfg = phi3.model(images=2, classes=4)
    batch = assemble(read_samples(phi3, cfg), cfg, [np.array([3]), np.array([0, 2, 1])])
    assert batch.phrase_target.tolist() == [[PAD], [PAD]] and (batch.labels == IGNORE_INDEX).all()
    assert batch.object_category.tolist() == [[3, PAD, PAD], [0, 2, 1]]
    assert batch.input_ids.shape == (2, cfg.num_visual_tokens)
    assert [p.targets for p in training.category_passes(batch)] == [1, 3]


def test_stage1_samples(phi3, tmp_path):
    """config.json need not say which samples the stage-1 run has."""
    assert stage1_samples(phi3, 2) == [0, 1]
    np.savez(tmp_path / STAGE1, **{"class/pred0_logits": np.zeros((2, 17, 5))})
    assert stage1_samples(Fixture(tmp_path), 3) == [1, 0]
    phi3.config["batches"]["stage1"] = [1]
    assert stage1_samples(phi3, 2) == [1]


def test_another_template_is_refused(phi3):
    turns = json.loads((phi3.directory / "conversations.json").read_text())["sample0"]["conversations"]
    broken = copy.deepcopy(turns)
    broken[0]["input"] = broken[0]["input"].replace("<|user|>", "<|system|>")
    with pytest.raises(UserError, match="does not begin with"):
        read_conversation(broken, CHAT_TEMPLATES["phi3_chat"], "sample0")
    broken = copy.deepcopy(turns)
    broken[0]["input"] = broken[0]["input"].replace("<image>", "")
    with pytest.raises(UserError, match="does not begin with <image>"):
        read_conversation(broken, CHAT_TEMPLATES["phi3_chat"], "sample0")


def test_inputs_of_a_fixture_without_results(phi3):
    """Raw material alone gives no rows."""
    report = ParityReport({"inputs.npz": list(phi3.arrays("inputs.npz"))})
    compare_inputs(phi3, read_samples(phi3, phi3.model()), report)
    assert not report.rows
    assert {why for *_, why in report.not_compared()} == {"an input of the computation"}


def test_recorded_points(rng):
    """Points are put where our passes and targets are, whatever order X-SAM's pairs have; a missing array is no recording."""
    passes = [training.Pass(0, 0, 1), training.Pass(1, 0, 2)]
    recorded = {}
    for level in ("aux0", "final"):
        for p in range(2):
            recorded[f"match/{level}/pass{p}_points"] = rng.random((1, 6, 2)).astype(np.float32)
        recorded[f"match/{level}/pass0_target"] = np.array([0])
        recorded[f"match/{level}/pass1_target"] = np.array([1, 0])
        recorded[f"points/{level}/candidates"] = rng.random((3, 9, 2)).astype(np.float32)
        recorded[f"points/{level}/extra_random"] = rng.random((3, 2, 2)).astype(np.float32)
    found = training.read_points(recorded, passes, (2, 1, 2), 2)
    assert found.points.matcher.shape == (2, 2, 1, 6, 2) and found.points.candidates.shape == (2, 2, 2, 9, 2)
    np.testing.assert_array_equal(found.points.matcher[1, 1, 0], recorded["match/final/pass1_points"][0])
    np.testing.assert_array_equal(found.points.candidates[0, 1, 1], recorded["points/aux0/candidates"][1])
    np.testing.assert_array_equal(found.points.candidates[0, 1, 0], recorded["points/aux0/candidates"][2])
    np.testing.assert_array_equal(found.points.extra[1, 0, 0], recorded["points/final/extra_random"][0])
    for name in ("points/aux0/candidates", "match/final/pass1_target", "match/aux0/pass0_points"):
        assert training.read_points({k: v for k, v in recorded.items() if k != name}, passes, (2, 1, 2), 2) is None
    without = {k: v for k, v in recorded.items() if k != "match/final/pass0_target"}  # one target: its place is known
    assert training.read_points(without, passes, (2, 1, 2), 2) is not None
