"""Tests on eight host devices. Their number is fixed when JAX starts, so `tests/test_eight_devices_*.py` run them apart."""

from __future__ import annotations

import os

if "FLOWSEG_DEVICES" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
