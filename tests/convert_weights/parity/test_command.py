"""`flowseg parity` on the committed recording of X-SAM, and on damaged copies of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from flowseg_jax.cli.parity import main
from flowseg_jax.errors import UserError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "xsam"
TEXT = ("config.json", "conversations.json", "tokenizer.json")
pytestmark = pytest.mark.timeout(900)  # the first run compiles the whole model with its gradients
NOISE = 1e-5  # float32 rounding, an order of magnitude below the tightest limit


def copy(to: Path, *files: str) -> Path:
    for file in files:
        shutil.copy(GOLDEN / file, to / file)
    return to


def rewrite(path: Path, **changes) -> None:
    """Changes arrays of an npz file: a function of the old one, or None to drop it. `__` stands for `/`."""
    with np.load(path) as archive:
        arrays = dict(archive)
    for key, change in changes.items():
        old = arrays.pop(key.replace("__", "/"))
        if change is not None:
            arrays[key.replace("__", "/")] = change(old)
    np.savez_compressed(path, **arrays)


def run(directory: Path, tmp_path: Path) -> tuple[int, dict]:
    code = main([str(directory), "--json", str(tmp_path / "report.json")])
    return code, json.loads((tmp_path / "report.json").read_text())


def over(report: dict) -> list[str]:
    return [row["name"] for row in report["arrays"] if not row["ok"]]


def reasons(report: dict) -> dict[str, str]:
    return {f"{row['file']}:{row['name']}": row["reason"] for row in report["not_compared"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The command on the whole recording."""
    return run(GOLDEN, tmp_path_factory.mktemp("whole"))


def test_everything_equals_pytorch(whole, capsys):
    """All arrays within their limits, and in fact equal up to float32 rounding: gradients and losses too."""
    code, report = whole
    assert code == 0 and report["ok"] and not over(report)
    assert report["compared"] == report["within"] == len(report["arrays"])
    worst = {row["name"]: row["error"] for row in report["arrays"] if row["error"] > NOISE}
    assert not worst


def test_everything_is_compared(whole):
    """Each part of the model has rows, and whatever is held without one has a reason."""
    _, report = whole
    rows = {(row["file"], row["name"]) for row in report["arrays"]}
    held = 0
    for path in GOLDEN.glob("*.npz"):
        with np.load(path) as archive:
            held += len(archive.files)
    prompts = {name for file, name in rows if file == "prompts.json"}
    assert prompts == {"phi3_chat", "qwen3_instruct", "qwen3_wothinking"}
    assert len(rows) + len(report["not_compared"]) == held + len(prompts)
    assert not [r for r in reasons(report).values() if r.startswith("nothing here is known")]
    for file, name in (
        ("inputs.npz", "sample1/input_ids"),
        ("eval_main.npz", "siglip/hidden_states_2"),
        ("eval_main.npz", "decoder/layer2_attn_mask"),
        ("eval_main.npz", "post/segmentation_0"),
        ("train_aaai.npz", "loss/loss"),
        ("train_aaai.npz", "match/aux1/pass2_query"),
        ("train_aaai.npz", "points/final/chosen"),
        ("train_aaai.npz", "grad/global_norm"),
        ("train_aaai.npz", "grad/segmentor.encoder.layers.0.attn.rel_pos_h"),
        ("train_stage1.npz", "loss/loss_cls_0"),
        ("units.npz", "msda/out"),
        ("text_cross_attn_layer.npz", "mid/after_text_norm"),
    ):
        assert (file, name) in rows
    kinds = {row["name"]: row["kind"] for row in report["arrays"] if row["name"].startswith("grad/")}
    assert kinds["grad/llm.model.norm.weight"] == "gradient"
    assert kinds["grad/segmentor.pixel_decoder.level_embed"] == "kinked gradient"


def test_a_changed_weight_is_found(tmp_path, capsys):
    """One bias of the second decoder layer: everything before it stays equal, everything after it does not; exit code 1."""
    copy(tmp_path, *TEXT, "inputs.npz", "eval_main.npz")
    tensors = safetensors.numpy.load_file(GOLDEN / "weights.safetensors")
    tensors["segmentor.decoder.decoder.layers.1.fc1.bias"] += 0.1
    safetensors.numpy.save_file(tensors, tmp_path / "weights.safetensors")
    code, report = run(tmp_path, tmp_path)
    assert code == 1
    found = over(report)
    assert {"decoder/layer1_out", "class/pred2_logits", "decoder/pred3_mask_logits", "out/scores"} <= set(found)
    assert not {"decoder/layer1_after_self", "decoder/layer0_out", "class/pred1_logits", "llm/loss"} & set(found)
    assert "OVER" in capsys.readouterr().out


def test_a_changed_conversation_is_found(tmp_path):
    """The token ids come from the text, not from the recorded ids. No weights are needed for that."""
    copy(tmp_path, *TEXT, "inputs.npz")
    text = (tmp_path / "conversations.json").read_text()
    (tmp_path / "conversations.json").write_text(text.replace("<p>green box</p>", "<p>green fox</p>"))
    code, report = run(tmp_path, tmp_path)
    assert code == 1 and over(report) == ["sample1/input_ids"]


@pytest.mark.parametrize(
    ("key", "change", "found"),
    [
        ("maybe_pad__out_nhwc", lambda x: x[:, :-1], "maybe_pad/out_nhwc"),
        ("sample_point__out", lambda x: np.where(np.arange(x.shape[1]) == 3, np.nan, x), "sample_point/out"),
        ("msda__out", lambda x: x * 1.001, "msda/out"),
        ("class_head__logits_main_masked", lambda x: np.where(x < -1e5, -1e9, x), "class_head/logits_main_masked"),
    ],
)
def test_changed_results_are_found(tmp_path, key, change, found):
    copy(tmp_path, "config.json", "units.npz")
    rewrite(tmp_path / "units.npz", **{key: change})
    code, report = run(tmp_path, tmp_path)
    assert code == 1 and over(report) == [found]


def test_without_a_tokenizer_or_weights(tmp_path):
    """What can be compared is; the rest says what is missing."""
    copy(tmp_path, "config.json", "inputs.npz", "eval_main.npz", "train_stage1.npz")
    rewrite(tmp_path / "inputs.npz", sample0__gt_masks=None, sample1__image_uint8=None)
    code, report = run(tmp_path, tmp_path)
    names = {row["name"] for row in report["arrays"]}
    assert code == 0
    assert names == {"sample0/sam_pixel_values", "sample0/siglip_pixel_values", "sample0/scaled_size"}
    why = reasons(report)
    assert why["inputs.npz:sample0/mask_labels"] == "what it is made from is not in the fixture"
    assert why["eval_main.npz:llm/loss"] == "the fixture has no weights.safetensors"
    assert why["train_stage1.npz:loss/loss"] == "the fixture has no weights.safetensors"


def test_recorded_ids_replace_conversations(tmp_path):
    """Without conversations the model runs on the recorded ids; with fewer arrays there are fewer rows."""
    copy(tmp_path, "config.json", "weights.safetensors", "inputs.npz", "eval_main.npz")
    keep = {"llm/loss", "out/top_query", "post/iou_0"}
    with np.load(GOLDEN / "eval_main.npz") as archive:
        np.savez(tmp_path / "eval_main.npz", unheard=np.zeros(2), **{name: archive[name] for name in keep})
    code, report = run(tmp_path, tmp_path)
    assert code == 0
    assert {row["name"] for row in report["arrays"] if row["file"] == "eval_main.npz"} == keep
    assert reasons(report)["eval_main.npz:unheard"] == "nothing here is known to have this name"


def test_mistakes_are_one_line(tmp_path):
    """No directory, no fixture, damaged files, sizes that do not fit, nothing to compare: one clear error each."""

    def fails(match: str, directory: Path = tmp_path) -> None:
        with pytest.raises(UserError, match=match) as caught:
            main([str(directory)])
        assert "\n" not in str(caught.value)

    fails("no such directory", tmp_path / "nothing")
    fails("not a parity fixture")
    (tmp_path / "config.json").write_text("{")
    fails("config.json: cannot be read as JSON")
    copy(tmp_path, "config.json")
    fails("nothing to compare")
    data = (GOLDEN / "units.npz").read_bytes()
    (tmp_path / "units.npz").write_bytes(data[: len(data) // 2])
    fails("units.npz: truncated or damaged npz file")
    np.savez(tmp_path / "units.npz", **{"msda/out": np.array([{}], dtype=object)})
    fails("units.npz: truncated or damaged npz file")
    (tmp_path / "units.npz").unlink()
    for file in ("conversations.json", "prompts.json"):
        (tmp_path / file).write_text('[{"template": 1}]')
        fails(f"{file}: ")
        (tmp_path / file).unlink()
    copy(tmp_path, "units.npz", "inputs.npz", "eval_main.npz", *TEXT)
    (tmp_path / "weights.safetensors").write_bytes((GOLDEN / "weights.safetensors").read_bytes()[:5000])
    fails("weights.safetensors: cannot be read")
    config = json.loads((GOLDEN / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"connector_scale_factor": [4, 2, 1, 1]}))
    fails("the connector puts out")
    (tmp_path / "config.json").write_text(json.dumps(config | {"connector_hidden_dim": "wide", "extra_select_layers": 3}))
    fails("config.json: ")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "sam"}))
    fails("config.json: sam is missing")
    (tmp_path / "config.json").write_text(json.dumps(config | {"special_ids": {"<SEG>": 7}}))
    fails("<SEG> has id 261, config.json says 7")


def test_exit_codes(tmp_path):
    """As a command: 2 and one line for a user's mistake."""
    done = subprocess.run(
        [sys.executable, "-m", "flowseg_jax", "parity", str(tmp_path)], capture_output=True, text=True, cwd=GOLDEN.parents[2]
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
