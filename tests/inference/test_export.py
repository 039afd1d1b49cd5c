"""An exported model answers where this package cannot be imported, and says what the package says."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
from PIL import Image

from flowseg_jax.checkpoints.pretrained import save_pretrained
from flowseg_jax.cli.main import main as flowseg
from flowseg_jax.data import collate
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.tokenizer import load_tokenizer, train_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.inference import export, loading
from flowseg_jax.ops.attention import attention
from flowseg_jax.ops.portable import without_kernels
from tests.helpers import small

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "run_export.py"
# A process of its own, in isolated mode, in which an import of the package or of what it needs besides fails.
ALONE = """
import runpy, sys
for name in ("flowseg_jax", "convert_weights", "flax", "transformers", "orbax", "jaxtyping", "torch", "cv2"):
    sys.modules[name] = None
try:
    import flowseg_jax.data
except ImportError:
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
TEXTS = ["The  red circle", "it", "that blue star left of the red circle"]
SHAPES = export.ExportShapes(batch=2, phrases=4, text=200)


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the red circle", "Segment in this picture."], directory, vocab=300)
    return directory


@pytest.fixture(scope="module")
def model_directory(tokenizer_directory, tmp_path_factory):
    """A small model of random numbers, stored in bfloat16, whose boundary refinement does something."""
    cfg = small.lean()
    cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, vocab_size=load_tokenizer(tokenizer_directory).vocab))
    params = small.params(cfg)
    params["boundary"]["alpha"] = np.full((1,), 2.0, np.float32)
    extra = {"prompts": {"question": 1}, "step": 7}
    return save_pretrained(tmp_path_factory.mktemp("model") / "small", params, cfg.to_dict(), tokenizer_directory, extra=extra)


@pytest.fixture(scope="module")
def exported(model_directory, tmp_path_factory):
    return export.export(model_directory, tmp_path_factory.mktemp("export") / "out", SHAPES)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """40 x 28 pixels on disk, which EXIF turns upright to 28 x 40."""
    path = tmp_path_factory.mktemp("image") / "x.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 28, 3), np.uint8)).save(path, exif=exif)
    return path


def alone(*arguments):
    command = [sys.executable, "-I", "-c", ALONE, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


def test_the_script_answers_as_the_segmentor_does_without_the_package(model_directory, exported, photo, tmp_path):
    done = alone(exported, photo, tmp_path / "mask", *TEXTS)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == TEXTS
    for k, (answer, prediction) in enumerate(zip(answers, loading.load(model_directory).segment(photo, TEXTS), strict=True)):
        best = prediction.candidates[0]
        mask = np.array(Image.open(tmp_path / f"mask_{k}.png"))
        assert answer["query"] == best.query
        np.testing.assert_allclose(answer["score"], best.score, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(mask, best.mask)
        assert answer["area"] == best.mask.sum() and 0 < best.mask.mean() < 1


def test_a_threshold_travels_with_the_export(exported, photo, tmp_path):
    shutil.copytree(exported, tmp_path / "strict")
    about = json.loads((exported / "export.json").read_text())
    assert about["no_target_threshold"] == 0.0
    (tmp_path / "strict" / "export.json").write_text(json.dumps(about | {"no_target_threshold": 1.0}))
    done = alone(tmp_path / "strict", photo, tmp_path / "mask", TEXTS[0])
    assert json.loads(done.stdout)["area"] == 0, done.stderr
    assert not np.array(Image.open(tmp_path / "mask_0.png")).any()


def test_an_export_of_the_first_format_is_refused_in_one_line(exported, photo, tmp_path):
    shutil.copytree(exported, tmp_path / "old")
    about = json.loads((exported / "export.json").read_text())
    (tmp_path / "old" / "export.json").write_text(json.dumps(about | {"format_version": 1}))
    done = alone(tmp_path / "old", photo, tmp_path / "mask", "it")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "format 1, this script reads format 2: export the checkpoint again" in done.stderr


def test_what_the_script_refuses(exported, photo, tmp_path):
    for texts, message in ((["a <SEG> b"], "contains a special token"), (TEXTS * 2, "has room for 4 of 200")):
        done = alone(exported, photo, tmp_path / "mask", *texts)
        assert done.returncode == 1 and message in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_directory_describes_itself(model_directory, exported):
    assert sorted(path.name for path in exported.iterdir()) == [
        "encode_image.jax_export", "export.json", "predict.jax_export", "tokenizer.json", "weights.safetensors"
    ]  # fmt: skip
    about = json.loads((exported / "export.json").read_text())
    assert about["platforms"] == ["cpu", "tpu", "cuda"] and about["checkpoint"]["step"] == 7
    inputs = about["programs"]["encode_image"]["inputs"]
    assert inputs["sam_images"] == [[2, 32, 32, 3], "uint8"] and inputs["siglip_images"] == [[2, 16, 16, 3], "uint8"]
    assert about["programs"]["predict"]["inputs"]["input_ids"] == [[2, 200], "int32"]
    assert about["programs"]["predict"]["outputs"]["query"] == [[2, 4], "int32"]
    stored = json.loads((model_directory / "config.json").read_text())["manifest"]
    weights = export.safetensors.numpy.load_file(exported / "weights.safetensors")
    assert export.manifest(weights) == stored and {str(x.dtype) for x in weights.values()} == {"bfloat16"}
    for name in ("encode_image", "predict"):
        program = export.jax_export.deserialize(bytearray((exported / f"{name}.jax_export").read_bytes()))
        assert program.platforms == ("cpu", "tpu", "cuda") and not program.disabled_safety_checks


def test_queries_are_found_in_token_ids(tokenizer_directory):
    """As the batching makes them on the host, but for the places of the ends."""
    tokenizer, prompts = load_tokenizer(tokenizer_directory), PromptTemplates(randomize=False)
    prompt = export.PromptTokens.of(prompts, tokenizer, 4)
    said = [collate.encode_conversation(c, prompts, tokenizer, "") for c in collate.make_conversations(prompts, TEXTS)]
    phrases = [tokenizer.encode(f"<p>{' '.join(text.lower().split())}</p>") for text in TEXTS]
    ids = [[*prompt.before, *phrase, *prompt.after] for phrase in phrases]
    assert ids == [one.input_ids for one in said]
    row = [token for one in ids for token in (*one, export.END)]
    tokens = np.full((2, len(row) + 3), export.END, np.int32)  # the second image is asked nothing
    tokens[0, : len(row)] = row
    found = export.queries_from_tokens(tokens, 4, prompt)
    shape = (2, 4, len(row) - len(ids))
    want = collate.collate_queries([said], shape, len(prompt.prefix), tokenizer.pad, [""])
    for name in ("input_ids", "position_ids", "segment_ids", "phrase_ids", "seg_ids"):
        np.testing.assert_array_equal(np.array(getattr(found, name))[0][tokens[0] != export.END], getattr(want, name)[0], name)
    for name in ("segment_ids", "phrase_ids", "seg_ids"):
        assert (np.array(getattr(found, name))[tokens == export.END] == -1).all()
    np.testing.assert_array_equal(found.query_valid, want.query_valid)


def test_mistakes(model_directory, tokenizer_directory, tmp_path):
    def fails(message, *flags, checkpoint=model_directory, out=tmp_path / "out"):
        with pytest.raises(UserError, match=message):
            flowseg(["export", f"--checkpoint={checkpoint}", f"--out={out}", *flags])
        assert not (tmp_path / "out").exists()

    fails("unknown platform 'gpu'", "--platforms=cpu,gpu")
    fails("did you mean 'cuda'", "--platforms=cuda12")
    fails("phrases is 0", "--phrases=0")
    fails("text is 9: even the shortest expression takes", "--text=9")
    fails("no model directory", checkpoint=tmp_path / "none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    fails("full exists", out=tmp_path / "full")
    cfg = small.lean(components="vlm")
    language = save_pretrained(tmp_path / "language", {"x": np.zeros(1)}, cfg.to_dict(), tokenizer_directory)
    fails("holds only the components 'vlm'", checkpoint=language)
    half = save_pretrained(tmp_path / "half", {"x": np.zeros(1)}, small.lean().to_dict(), tokenizer_directory)
    fails(r"half does not fit the model: missing .* more.*", checkpoint=half)


def test_programs_have_no_kernels_but_models_do():
    """At this size attention on a TPU is our kernel; a stored program is promised to load later only without one."""
    query = jax.ShapeDtypeStruct((1, 256, 2, 64), "bfloat16")
    text = lambda run: jax.export.export(jax.jit(run), platforms=["tpu"])(query, query, query).mlir_module()  # noqa: E731
    assert "tpu_custom_call" in text(lambda q, k, v: attention(q, k, v))

    def alone(q, k, v):
        return attention(q, k, v)

    with without_kernels():
        assert "custom_call" not in text(alone)
