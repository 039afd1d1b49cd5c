"""Matching at its limits: how many faults are shown, how tied copies are compared, which family names look like."""

from __future__ import annotations

import dataclasses
import types

import ml_dtypes
import numpy as np
import pytest

from convert_weights import plan
from convert_weights.convert import get_family, import_params
from convert_weights.families import FAMILIES
from convert_weights.ops import OPS
from convert_weights.sources import ArraySource
from flowseg_jax.errors import UserError
from tests.helpers import tiny_checkpoints as tiny

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(f"float{bits}") for bits in (16, 32, 64))


@pytest.mark.parametrize(("count", "more"), [(10, ""), (11, "; and 1 more such lines, 11 tensors in all")])
def test_ten_lines_of_faults_are_shown(count, more):
    tensors, cfg = tiny.arrays("siglip2")
    strays = {f"stray_{'abcdefghijk'[i]}.weight": np.zeros(2, np.float32) for i in range(count)}
    lines = [f"unexpected {name} (2,)" for name in list(strays)[:10]]
    with pytest.raises(UserError) as caught:
        import_params("siglip2", tensors | strays, cfg)
    assert str(caught.value) == f"the given arrays does not fit siglip2: {'; '.join(lines)}{more}"


def compare(a: np.ndarray, b: np.ndarray, words: int | None = None) -> None:
    pairs = types.SimpleNamespace(tied_copies={"head": "table"})
    plan.check_tied_copies(pairs, ArraySource({"head": a, "table": b}), words)


def test_every_row_of_a_long_tied_copy_is_compared():
    rows = plan.COMPARED_ROWS
    table = np.arange(2 * (rows + 5), dtype=np.float32).reshape(-1, 2)
    compare(table.copy(), table)
    for changed, message in (
        ([rows + 4], "in 1 of 4,101 rows"),
        ([rows - 1, rows], "in 2 of 4,101 rows"),
        ([0, rows - 1, rows, rows + 4], "in 4 of 4,101 rows"),
    ):
        head = table.copy()
        head[changed, 1] += 1
        with pytest.raises(UserError, match=rf"head \(4101, 2\) differs from table \(4101, 2\) {message}, and the config"):
            compare(head, table)
    head = table.copy()
    head[rows + 3] = -1
    compare(head, table, words=rows + 3)  # the row after the last word in use
    with pytest.raises(UserError, match=r"in 1 of 4,100 rows"):
        compare(head, table, words=rows + 4)
    compare(table[:-1], table)  # one has fewer rows
    with pytest.raises(UserError, match=r"in 1 of 4,100 rows"):
        compare(head[:-1], table)


def test_rounding_is_that_of_the_coarser_dtype():
    table = np.array([[1.0], [3e-45], [0.0]], np.float32)
    eps, tiny_step = float(ml_dtypes.finfo(BF16).eps), float(ml_dtypes.finfo(BF16).smallest_subnormal)
    compare(table.astype(BF16), table)
    compare(np.array([[1.0], [0.0], [0.0]], BF16), np.array([[1 + eps / 2], [tiny_step], [0.0]], np.float32))
    with pytest.raises(UserError, match="in 1 of 3 rows"):
        compare(table.astype(BF16), table + np.array([[3 * eps], [0], [0]], np.float32))
    with pytest.raises(UserError, match="in 1 of 3 rows"):  # equal dtypes have nothing to round
        compare(table, table + np.array([[1.2e-7], [0], [0]], np.float32))


def test_a_family_is_recognised_above_a_fifth():
    """Likeness: the share of the file's names that are known times the share of known names that are there."""
    known = sorted(FAMILIES["siglip2"].names["encoder"])
    others = [f"other{'abcdefghijklmnopqrstuvwxyz'[i // 26]}{'abcdefghijklmnopqrstuvwxyz'[i % 26]}" for i in range(80)]
    assert plan.detect_family([*known, *others[: 4 * len(known) - 1]]) == "siglip2"
    assert plan.detect_family([*known, *others[: 4 * len(known)]]) is None  # exactly a fifth
    assert plan.detect_family([]) is None
    half = known[: len(known) // 2]
    assert plan.detect_family(half) == "siglip2"
    assert plan.detect_family([*half, *others[: 2 * len(half)]]) is None


def test_which_families_share_their_names():
    assert plan.same_family("sam", "sam") and plan.same_family("xsam", "flowseg") and plan.same_family("flowseg", "xsam")
    assert not plan.same_family("sam", "siglip2") and not plan.same_family("xsam", "qwen3")
    assert not plan.same_family("llama", "flowseg")


def test_the_dtype_of_a_stack():
    assert plan._common([]) == F32
    assert plan._common([BF16, BF16]) == BF16
    assert plan._common([F16, BF16]) == F32
    assert plan._common([BF16, F32]) == F32
    assert plan._common([F64]) == F32 and plan._common([F32, F64]) == F32
    assert plan._common([F16]) == F16


def test_names_that_differ_in_one_number_are_one_line():
    faults = [("missing", f"a.{i}.b.7.c", (2,)) for i in (3, 0, 1, 5, 1)]
    faults += [("missing", "a.2.b.7.c", (3,)), ("missing", "plain", (1,)), ("unexpected", "a.4.b.7.c", (2,))]
    assert plan.collapse_layer_names(faults) == [
        ("missing", "a.{0-1,3,5}.b.7.c", (2,)),
        ("missing", "a.2.b.7.c", (3,)),
        ("missing", "plain", (1,)),
        ("unexpected", "a.4.b.7.c", (2,)),
    ]


def test_what_a_plan_says():
    tensors, cfg = tiny.arrays("qwen3")
    head = tensors["model.embed_tokens.weight"].copy()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32), "lm_head.weight": head}
    found = plan.make_plan(get_family("qwen3"), cfg, ArraySource(tensors | extra))
    assert set(found.ignored) == set(extra)
    assert found.tied_copies == {"lm_head.weight": "model.embed_tokens.weight"}
    assert (found.layout, found.resized, found.fresh) == ("hf", {}, ())
    assert {target.dtype for target in found.targets} == {F32}
    assert {target.name: target.shape for target in found.targets} == get_family("qwen3").shapes(cfg)
    half = plan.make_plan(get_family("qwen3"), cfg, ArraySource(tensors), "bfloat16")
    assert {target.dtype for target in half.targets} == {BF16}
    with pytest.raises(AttributeError):
        found.layout = "other"
    with pytest.raises(AttributeError):
        found.targets[0].name = "other"


def test_a_vocabulary_without_rows_is_no_vocabulary():
    tensors, cfg = tiny.arrays("qwen3")
    for shape in ((0, 24), (280,), (280, 25)):
        with pytest.raises(UserError, match=r"expected \(280, 24\) for model.embed_tokens.weight"):
            import_params("qwen3", tensors | {"model.embed_tokens.weight": np.zeros(shape, np.float32)}, cfg)


def test_a_parameter_without_a_row_is_a_fault():
    tensors, cfg = tiny.arrays("qwen3")
    family = get_family("qwen3")

    def rows(cfg):
        sections = family.layouts["hf"](cfg)
        return tuple(dataclasses.replace(s, table=dataclasses.replace(s.table, rows=s.table.rows[:-1])) for s in sections)

    with pytest.raises(UserError, match=r"the tables do not cover layers/self_attn/k_norm/scale \(3, 8\)"):
        plan.make_plan(dataclasses.replace(family, layouts={"hf": rows}), cfg, ArraySource(tensors))


def test_only_a_table_of_words_may_have_another_length():
    """Of any other parameter, first rows that happen to be there would be taken for the whole."""
    want = (4, 3, 2, 1)
    longer = types.SimpleNamespace(shape=(5, 3, 2, 1), dtype=F32)
    free = [
        name for name, op in OPS.items() if plan._misfit(types.SimpleNamespace(op=op, source_shape=want), longer, True) is None
    ]
    assert free == ["vocabulary"]
