"""Tests on eight host devices. How many there are is fixed when JAX starts, so `tests/test_multidevice.py` runs them apart."""

from __future__ import annotations

import os

if "FLOWSEG_DEVICES" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
