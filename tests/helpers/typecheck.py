"""The run-time checker of jaxtyping's annotations: beartype, with an int accepted where a float is asked for.

Of a tuple's items beartype checks one, drawn at random: conftest.py seeds the draw for every test.
"""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
