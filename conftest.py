"""Tests run against the installed package; says so where they would not."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import HealthCheck, settings

import thor_fast

# No test may fail because the machine is slow or busy.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_configure() -> None:
    """Refuse to start where the compiled core cannot be found."""
    if importlib.util.find_spec("thor_fast._core") is None:
        raise pytest.UsageError(
            f"{thor_fast.__file__} has no compiled thor_fast._core, expected the installed "
            "package: install it, then run `pytest` (`python -m pytest` puts the source tree first)"
        )
