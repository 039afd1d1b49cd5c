"""Meshes and adapters on eight host devices; beside them, files that are quick."""

from __future__ import annotations

import pytest

from tests.helpers import eight_devices


@pytest.mark.parametrize("name", eight_devices.OTHERS)
def test_on_eight_devices(name, request):
    eight_devices.run(name, request)
