"""Pickles from anyone: no import, no memory or time beyond the file's length."""

import os
import pickle
import pickletools
import resource
import struct

import pytest

from flowseg_jax.data.formats import plain_pickle
from flowseg_jax.data.formats.refcoco import read_pickle
from flowseg_jax.errors import UserError
from tests.helpers import minirefcoco as mini

PLAIN = [{"a": [1, -(2**40), 2.5, True, None, "é", "x" * 70000], "b": (), "c": (1, (2, 3, 4, 5)), "": {}}] * 2


class Runs:
    def __reduce__(self):
        return os.system, ("false",)


def laughs() -> bytes:
    value = ["x"] * 10
    for _ in range(11):
        value = [value] * 10
    return pickle.dumps(value)


def shared_sentences() -> bytes:
    sentences = [{"sent_id": 1, "sent": "a dog"}] * 2000
    return pickle.dumps([{"ref_id": i, "sentences": sentences} for i in range(2000)])


def ring() -> bytes:
    value = []
    value.append(value)
    return pickle.dumps(value)


HOSTILE = {
    "a call": (pickle.dumps(Runs()), r"it wants to import posix\.system; a refs file holds plain lists and dicts only"),
    "a call, in text": (b"cos\nsystem\n(S'false'\ntR.", r"it wants to import os\.system"),
    "an instance": (b"(S'false'\nios\nsystem\n.", r"it wants to import os\.system"),
    "a long name": (b"c" + b"m" * 10**6 + b"\nn\n.", r"it wants to import m{40}\.n;"),
    "a set": (pickle.dumps([{1}], 4), "the code b'.x8f'"),
    "a persistent id": (b"Pabc\n.", "the code b'P'"),
    "an extension": (b"\x82\x01.", "the code b'.x82'"),
    "a bytearray of a TiB": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "the code b'.x96'"),
    "a text of a PiB": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"x.", "EOFError"),
    "keys that are numbers": (pickle.dumps([{1: 2}]), "a key that is no text"),
    "keys that are numbers, in text": (b"(I1\nI2\nd.", "a key that is no text"),
    "one key that is a number": (b"(dI1\nI2\ns.", "a key that is no text"),
    "a billion laughs": (laughs(), "nested in one another over and over"),
    "sentences of all refs": (shared_sentences(), "nested in one another over and over"),
    "a ring": (ring(), "nested in one another over and over"),
    "a number of megabytes": (b"I" + b"9" * 10**6 + b"\n.", "Exceeds the limit"),
    "a cut file": (pickle.dumps(PLAIN)[:-3], "."),
    "no pickle": (b"\xff\xfe" * 50, "the code"),
    "empty": (b"", "EOFError|Ran out"),
    "no list": (pickle.dumps({"a": 1}), "expected a list of refs, got dict"),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back(protocol):
    assert plain_pickle.loads(pickle.dumps(PLAIN, protocol)) == PLAIN
    assert plain_pickle.loads(pickletools.optimize(pickle.dumps(PLAIN, protocol))) == PLAIN


def test_python_2():
    _, refs = mini.tables()
    assert plain_pickle.loads(mini.py2_pickle(refs)) == refs
    assert plain_pickle.loads(b"(lp0\nVcaf\\u00e9\np1\naS'caf\\xe9'\np2\nag1\naL5L\na.") == ["café", "café", "café", 5]


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_one_line(case, tmp_path):
    data, message = HOSTILE[case]
    path = tmp_path / "refs(unc).p"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_pickle(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_table_for_four_billion_values_takes_no_memory(tmp_path):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"\x80\x02]r" + struct.pack("<I", 2**32 - 1) + b".")  # "remember this list as number 4294967295"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_pickle(path) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17  # KiB
