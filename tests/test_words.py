"""Names and words that were replaced by the field's own and do not come back."""

import ast
import re
import subprocess

import pytest

from flowseg_jax.system.paths import ROOT

# Where old names must stand: what reads old files, says what a name is called now, or tests these.
ABOUT_OLD_NAMES = (
    "upgrade",
    "renamed",
    "test_words",
    "test_experiment",
    "test_commands",
    "test_fields",
    "CHANGELOG",
    "measurements",
    "helpers/wild",  # expressions as people write them
)

# Classes, functions and constants of the first version.
NAMES = """
Beat Benchmark Cache Chosen ConvNorm Cycles EvalData Geometry IMAGE_TOKEN KERNEL_TOKENS Language LanguageLayer LengthBound
LevelLosses LoadedModel Look MAY_CHANGE Marks Member NO_LABEL Pairs PartReport Partial Passes Peers Pixels Planned Problems
Prompts Questions RARE RIDDLES Recipe Restored Riddle SIGNS Sam SamLayer Seen Segmentation Siglip SiglipLayer Speaker Subject
TOWER_MATRIX TrainData Views Vocabulary Wording _ask _riddle _see as_stored as_tree asked at_rest changed_keys check_complete
check_free columns_to_rows conclude converse covered_once decode_pixels direction_grid ensure_shapes from_tree grid_attention
group_of interleave is_training jittered keep_programs learn_tokenizer level_costs level_losses listen load_model look_up
manual_axes masks_on_grid name_candidates no_target_below normalise_images normalise_vision_images open_members pad_rows
pair_outputs place_rows ref_samples relative_positions replace_text round_shape rows_here sample_packed save_model scatter_sum
segmentation_terms sine_positions splice stream_model sum_of_taps torch_uniform training_terms training_text vision_images
with_background
""".split()
# Words in prose, each with the one that is used.
WORDS = {
    "scaffold": "X-SAM",
    "towers?": "encoder, or component",
    "at rest": "as stored",
    "wordings?": "prompt template",
    "gives up": "fails",
    "behind": "after",
    # The names of old commands stand in quotes, and in the text of two seeds, which decides what is drawn.
    '(?<!")companions?(?! {)': "multi-task data sets",
    '(?<!")lessons?': "toy data set",
    "riddles?": "reasoning question",
}


def files(*suffixes: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    if not any(listed):
        pytest.skip("the list of files comes from git")
    return [name for name in listed if name.endswith(suffixes) and not any(x in name for x in ABOUT_OLD_NAMES)]


def defined(tree: ast.AST) -> set[str]:
    """Names that a module gives to something: classes, functions, arguments, variables, attributes, keywords."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                found.add(name)
            case ast.Name(id=name) | ast.Attribute(attr=name):
                found.add(name)
    return found


def test_old_names_are_gone():
    found = {
        name: sorted(defined(ast.parse((ROOT / name).read_text())) & set(NAMES))
        for name in files(".py")
        if name.startswith(("flowseg_jax/", "convert_weights/", "configs/", "experiments/", "benchmarks/"))
    }
    assert {name: words for name, words in found.items() if words} == {}


def test_no_class_name_means_two_things():
    places: dict[str, list[str]] = {}
    for name in files(".py"):
        if name.startswith(("flowseg_jax/", "convert_weights/", "experiments/", "benchmarks/")):
            for node in ast.walk(ast.parse((ROOT / name).read_text())):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize("word", WORDS)
def test_private_words_are_gone(word):
    pattern = re.compile(rf"(?<![\w`/]){word}(?![\w`])", re.IGNORECASE)
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name in files(".py", ".md", ".toml", "Makefile")
        if not name.startswith("tests/golden")
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"say {WORDS[word]}:\n" + "\n".join(found)


def test_files_are_not_longer_than_one_sits_through():
    """A file over about 400 lines is two; tables and tests of one subject may be longer."""
    long = {
        name: lines
        for name in files(".py")
        if name.startswith(("flowseg_jax/", "convert_weights/", "experiments/", "benchmarks/", "configs/"))
        and (lines := (ROOT / name).read_text().count("\n")) > 420
    }
    assert long == {}
