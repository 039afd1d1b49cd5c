"""Evaluation on eight host devices. A file of its own: the two longest of them then run beside each other."""

from __future__ import annotations

import pytest

from tests.helpers import eight_devices


@pytest.mark.parametrize("name", eight_devices.EVALUATION)
def test_on_eight_devices(name, request):
    eight_devices.run(name, request)
