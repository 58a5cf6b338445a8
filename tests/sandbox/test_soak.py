"""The soak as a user runs it, a hundredth as long."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def accounting(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark's modules are imported as its script does it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("sandbox_footprint")


@pytest.mark.slow
def test_nothing_grows_and_nothing_is_left(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    script = str(BENCHMARKS / "sandbox_soak.py")
    limits = ("--requests", "2000", "--rounds", "10", "--seconds", "600", "--output", str(output))
    done = subprocess.run(
        [sys.executable, "-W", "error", script, *limits],
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = output.read_text().splitlines()
    metrics: dict[str, Any] = json.loads(line)["metrics"]
    assert metrics["problems"] == []
    assert metrics["wrong"] == 0
    assert metrics["answered"] == sum(metrics["kinds"].values()) >= 2000
    assert set(metrics["kinds"]) >= {"trivial", "files", "daemon", "stream", "session", "numpy"}
    assert metrics["stats"]["jails_discarded"] >= metrics["kinds"]["files"]
    assert "fitted growth" in done.stdout


def test_senseless_rounds_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "sandbox_soak.py"), "--rounds", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "got 2 rounds of 200000 requests, expected at least 5" in done.stderr


@pytest.mark.parametrize(
    ("field", "per_request"),
    [
        *(("descriptors", 0.001), ("processes", 0.001), ("cgroups", 0.001), ("rss_bytes", 100)),
        *(("zombies", 0.0001), ("mounts", 0.0001), ("files", 0.0001), ("threads", 0.0001)),
    ],
)
def test_a_leak_is_seen_and_a_jail_more_is_none(
    accounting: ModuleType, field: str, per_request: float
) -> None:
    """Of the full run: 23 samples of 8,000 requests each, eight jails."""
    requests = [8_000 * n for n in range(1, 24)]
    names = accounting.Footprint.__dataclass_fields__

    def grown(leak: float) -> list[str]:
        samples = [
            accounting.Footprint(**{n: int(leak * i) if n == field else 50 for n in names})
            for i in requests
        ]
        return [g.name for g in accounting.fit(requests, samples, idle_jails=8) if g.grows]

    assert grown(0.0) == []
    assert grown(per_request) == [field]
    assert grown(-per_request) == []


def test_too_few_samples_are_refused(accounting: ModuleType) -> None:
    with pytest.raises(ValueError, match="got 2 samples, expected at least 3"):
        accounting.fit([1, 2], [None, None], idle_jails=1)
