"""Pickles that hold plain lists, dicts, texts and numbers, from whoever may have written them.

`pickle.Unpickler` runs what a file names. Without that it still takes any memory: ten bytes make it reserve a table for four
billion values. The one here knows the codes that plain values need and no others; it is the one of Python's library that is
written in Python (a refs file of the published data sets takes some seconds), whose table grows with its entries.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from flowseg_jax.errors import quoted

_PLAIN = (
    "PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING "
    "SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM "
    "SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE "
    "GLOBAL STACK_GLOBAL INST"  # those three only reach `find_class`, which says what the file wanted
).split()


def loads(data: bytes) -> Any:
    """The value of a pickle, texts of Python 2 in latin-1.

    Time and memory grow with the length of `data`: a value that occurs in several places, by which a few bytes can stand for
    any number of values, is refused where it makes more values than bytes.

    Raises:
        Exception: of nearly any type, for damaged data and for a pickle that wants more than plain values.
    """
    value = _Plain(io.BytesIO(data), encoding="latin1").load()
    _check_size(value, len(data))
    return value


def _check_size(value: Any, limit: int) -> None:
    """Raises an UnpicklingError if a value holds more than `limit` values, those that are in it twice counted twice."""
    count, todo = 0, [value]
    while todo:
        node = todo.pop()
        count += len(node)
        if count > limit:
            raise pickle.UnpicklingError("its lists are nested in one another over and over")
        children = node.values() if isinstance(node, dict) else node
        todo += [child for child in children if isinstance(child, (list, tuple, dict)) and child]


class _Plain(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        wanted = quoted(f"{module[:40]}.{name[:40]}", 81)[1:-1]  # as code would show it, whatever characters are in it
        raise pickle.UnpicklingError(f"it wants to import {wanted}; a refs file holds plain lists and dicts only")

    def _refuse(self, code: int) -> None:
        raise pickle.UnpicklingError(f"it holds the code {bytes([code])!r}, which no plain list or dict needs")

    def _keys_are_texts(self, keys: list[Any]) -> None:
        # Texts are hashed with a secret; other keys can be chosen so that all of them fall into one place of the table.
        if not all(isinstance(key, str) for key in keys):
            raise pickle.UnpicklingError("a dict of it has a key that is no text")

    def load_setitem(self) -> None:
        self._keys_are_texts(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._keys_are_texts(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._keys_are_texts(self.stack[::2])
        super().load_dict()


def _dispatch() -> dict[int, Any]:
    known = {code: lambda self, code=code: self._refuse(code) for code in range(256)}
    for name in _PLAIN:
        code = getattr(pickle, name)[0]
        known[code] = pickle._Unpickler.dispatch[code]
    for name in ("SETITEM", "SETITEMS", "DICT"):
        known[getattr(pickle, name)[0]] = getattr(_Plain, f"load_{name.lower()}")
    return known


_Plain.dispatch = _dispatch()
