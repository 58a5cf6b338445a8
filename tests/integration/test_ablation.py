"""The ablation as a user runs it, on its smallest preset, and the sums behind its table."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ARMS = [
    "T1 no tool",
    "T2 + episode RL",
    "T3 tool, cold start",
    "T4 + episode RL",
    "T5 + step RL",
    "T6 + self-correction",
    "T3 corrected",
    "T4 corrected",
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(BENCHMARKS / "ablation.py"), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("ablation_table")


@pytest.mark.slow
def test_smoke_trains_examines_and_tells(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "r.jsonl"
    done = run("--preset", "smoke", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    (line,) = output.read_text().splitlines()
    found = json.loads(line)
    assert (found["schema_version"], found["benchmark"]) == (1, "ablation")
    metrics = found["metrics"]
    assert list(metrics["arms"]) == ARMS
    for name in ("tool, episodes", "tool, both levels", "direct, episodes"):
        (result,) = metrics["policies"][name]
        curve = result["curve"]
        assert [point["step"] for point in curve] == [0, 1]
        assert 0 == curve[0]["rollout_tokens"] < curve[1]["rollout_tokens"]
    # Both begin as the same policy, with the same noise: the first episodes are the same.
    episodes, both = (
        metrics["policies"][n][0]["curve"] for n in ("tool, episodes", "tool, both levels")
    )
    assert episodes[0]["accuracy"] == both[0]["accuracy"]
    assert both[0]["step_groups"] >= 1
    assert both[1]["rollout_tokens"] > episodes[1]["rollout_tokens"]
    # 2 tasks x 2 samples of each of the 7 families.
    scores = metrics["policies"]["tool"][0]["scores"]
    assert scores["plain, trained"]["episodes"] == 28
    assert scores["corrected, trained"]["attempts"] > 0 == scores["plain, trained"]["attempts"]
    assert metrics["policies"]["direct"][0]["scores"]["plain, trained"]["calls"] == 0
    if importlib.util.find_spec("matplotlib") is None:
        assert "no plot: matplotlib is not installed" in done.stdout
    else:
        assert (tmp_path / "deep" / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "T5 - T4" in done.stdout


def test_a_wrong_number_is_one_line() -> None:
    done = run("--seeds", "0")
    assert done.returncode == 2
    assert done.stderr == (
        "ablation: error: argument --seeds: '0', expected a whole number of at least 1\n"
    )


def test_intervals_are_students(table: ModuleType) -> None:
    mean, half = table.interval([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert table.interval([0.5]) == (0.5, math.inf)


def test_where_a_curve_first_reaches_the_end_of_another(table: ModuleType) -> None:
    def curve(values: list[float]) -> dict[str, object]:
        points = [
            {"step": i, "rollout_tokens": 10 * i, "accuracy": v, "call_success": v}
            for i, v in enumerate(values)
        ]
        return {"curve": points}

    slow, fast = curve([0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]), curve([0.1, 0.3, 0.5, 0.5, 0.5])
    told = table._reached([slow], [fast])
    assert "seed 0, accuracy 30.0%: T4 4 updates, 40 tokens; T5 2 updates, 20 tokens" in told
    # The end of this one is lower than it has been, and higher than the other ever is.
    falling = curve([0.9, 0.6, 0.6, 0.6, 0.6, 0.6])
    assert "accuracy 60.0%: T4 0 updates, 0 tokens; T5 not at all" in table._reached(
        [falling], [slow]
    )
