"""Tests run against the installed package; says so where they would not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For several workers (pytest-xdist, as CI has them): who has to share one.

    What counts processes, descriptors or jails must not meet its like; what is built once for a
    folder or a file is not to be built again.
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_group_of(item.path)))


def _group_of(path: Path) -> str:
    folder = path.relative_to(Path(__file__).parent / "tests").parts[0]
    return {"sandbox": "sandboxes", "integration": "sandboxes", "packaging": folder}.get(
        folder, str(path)
    )
