"""The sandbox benchmark as a user runs it. Nothing here compares times."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ..sandbox.fusion_server import run_in_python, serving

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "sandbox_latency.py"
WORKLOADS = [
    "trivial c=1",
    "trivial c=8",
    "trivial c=64",
    "sympy c=1",
    "sympy c=8",
    "sympy-slow c=8",
    "sympy-unwarmed c=1",
    "sympy-unwarmed c=8",
    "mixed c=8",
]

needs_sympy = pytest.mark.skipif(
    importlib.util.find_spec("sympy") is None, reason="sympy is not installed"
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(SCRIPT), *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=850)


def record(path: Path) -> dict[str, Any]:
    (line,) = path.read_text().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


@needs_sympy
@pytest.mark.slow
def test_quick_run_of_everything(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "results.jsonl"
    done = run(
        *("--quick", "--backend", "pool", "--backend", "thor_fast", "--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "start-up hooks: none" in done.stdout
    assert "wrong, " not in done.stdout
    goals = done.stdout.split("within a round:")[1].strip().splitlines()
    assert goals[0].split() == ["goal", "subprocess", "pool", "thor_fast"]
    assert [re.split(r"  +", line)[0] for line in goals[2 : 2 + len(WORKLOADS)]] == WORKLOADS
    assert goals[-1].startswith("idle memory per slot, MB")

    found = record(output)
    assert found["schema_version"] == 1
    assert found["benchmark"] == "sandbox_latency"
    assert {"time", "commit", "dirty", "host", "versions"} < set(found)
    assert found["params"]["workloads"] == WORKLOADS
    assert found["params"]["quick"] is True
    assert found["params"]["interpreter"]["hooks"] == []
    assert set(found["params"]["interpreter"]) == {"python", "numpy", "sympy", "hooks"}
    runs = found["metrics"]["runs"]
    assert list(runs) == WORKLOADS
    for workload, backends in runs.items():
        assert list(backends) == ["subprocess", "pool", "thor_fast"]
        for name, summary in backends.items():
            check_summary(f"{workload}, {name}", summary)
        assert {s["executions"] for s in backends.values()} == {expected_executions(workload)}
        assert backends["thor_fast"]["unbounded"] == 0
        assert backends["subprocess"]["ratio"] == 1.0
    # Neither of them limits memory, so each lets the 2 GB allocation through.
    assert runs["mixed c=8"]["subprocess"]["unbounded"] == 1
    assert runs["mixed c=8"]["pool"]["unbounded"] == 1
    memory = found["metrics"]["idle_memory"]
    assert set(memory) == {"pool", "thor_fast"}
    for held in memory.values():
        assert held["processes"]
        assert held["pss_bytes"] is None or held["pss_bytes"] > 1 << 20


def expected_executions(workload: str) -> int:
    name, concurrency = workload.split(" c=")
    return 48 if name == "mixed" else max(2, int(concurrency))


def check_summary(where: str, summary: dict[str, Any]) -> None:
    assert set(summary) == {
        "ratio",
        "ratio_by_round",
        "executions_per_s",
        "executions",
        "p50_s",
        "p99_s",
        "p99_over_p50",
        "cpu_s_per_execution",
        "caller_cpu_s_per_execution",
        "right",
        "false_timeout",
        "unbounded",
        "wrong",
        "first_wrong",
    }, where
    # A false timeout is what an overloaded machine does to correct backends; a wrong one never is.
    assert (summary["wrong"], summary["first_wrong"]) == (0, ""), where
    counted = ("right", "false_timeout", "unbounded", "wrong")
    assert sum(summary[name] for name in counted) == summary["executions"], where
    assert 0 < summary["p50_s"] <= summary["p99_s"], where
    assert summary["caller_cpu_s_per_execution"] >= 0, where


@needs_sympy
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_quick_run_in_bubblewrap(tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    done = run(
        *("--quick", "--workload", "mixed", "--backend", "bubblewrap", "--output", str(output))
    )
    assert done.returncode == 0, done.stderr
    if "bubblewrap" in record(output)["params"]["absent"]:
        pytest.skip(f"bubblewrap {record(output)['params']['absent']['bubblewrap']}")
    summary = record(output)["metrics"]["runs"]["mixed c=8"]["bubblewrap"]
    check_summary("mixed, bubblewrap", summary)
    assert summary["unbounded"] == 1


@needs_sympy
def test_quick_run_on_a_fusion_server(tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    with serving(run_in_python) as server:
        done = run(
            *("--quick", "--workload", "trivial", "--backend", "fusion"),
            *("--fusion-url", server.url, "--output", str(output)),
        )
        # Every snippet once, after the one that shows the server works.
        assert len(server.documents) == 1 + 2 + 8 + 64
    assert done.returncode == 0, done.stderr
    for key, backends in record(output)["metrics"]["runs"].items():
        check_summary(f"{key}, fusion", backends["fusion"])


@needs_sympy
@pytest.mark.slow
def test_rounds_and_the_plot(tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    done = run(
        *("--workload", "trivial", "--backend", "thor_fast", "--rounds", "1"),
        *("--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for label in ("warm-up trivial c=64: ", "round 1/1 trivial c=64: "):
        assert any(line.startswith(label) for line in lines)
    runs = record(output)["metrics"]["runs"]
    assert list(runs) == ["trivial c=1", "trivial c=8", "trivial c=64"]
    assert len(runs["trivial c=8"]["thor_fast"]["ratio_by_round"]) == 1
    picture = tmp_path / "r.png"
    if importlib.util.find_spec("matplotlib") is None:
        assert "no plot: matplotlib is not installed (pip install matplotlib)" in lines
    else:
        assert f"plot: {picture}" in lines
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_options_are_these_and_no_more() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE)) == {
        "--backend",
        "--fusion-url",
        "--install-peers",
        "--output",
        "--quick",
        "--rounds",
        "--workload",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "argument --rounds: '0', expected a whole number of at least 1"),
        (["--workload", "huge"], "argument --workload: invalid choice: 'huge'"),
        (["--backend", "docker"], "argument --backend: invalid choice: 'docker'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--backend", "fusion"], "fusion: give its server with --fusion-url"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("sandbox_latency: error: ")
    assert message in done.stderr


@needs_sympy
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8080", "url is 'localhost:8080', expected http://host:port"),
        ("http://127.0.0.1:1", "fusion does not work here: connecting to 127.0.0.1:1"),
    ],
)
def test_a_server_that_cannot_be_reached_is_one_line(url: str, message: str) -> None:
    done = run("--backend", "fusion", "--fusion-url", url)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@needs_sympy
def test_a_peer_that_is_missing_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = run(
        *("--quick", "--workload", "trivial", "--backend", "nsjail", "--backend", "bubblewrap"),
        *("--output", str(tmp_path / "r.jsonl")),
    )
    assert done.returncode == 0, done.stderr
    absent = record(tmp_path / "r.jsonl")["params"]["absent"]
    assert absent == {
        "bubblewrap": "not installed (--install-peers, or apt-get install bubblewrap)",
        "nsjail": "not installed (--install-peers, or put nsjail on PATH)",
    }
    assert f"bubblewrap: {absent['bubblewrap']}" in done.stdout.splitlines()


@needs_sympy
@pytest.mark.usefixtures("heeds_ctrl_c")
def test_interrupt_ends_it_quietly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("--workload", "sympy", "--output", str(tmp_path / "r.jsonl")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert not (tmp_path / "r.jsonl").exists()


# --- workloads ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workloads() -> Any:
    """Module ``sandbox_workloads``, and ``sandbox_tool_calls`` behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("sandbox_workloads")
    for name in ("sandbox_workloads", "sandbox_tool_calls"):
        sys.modules.pop(name)


def test_mixed_is_forty_eight_of_twelve_kinds_four_times(workloads: Any) -> None:
    (mixed,) = (w for w in workloads.WORKLOADS if w.name == "mixed")
    batch = mixed.batch(3)
    assert len(batch) == 4 * workloads.MIXED_SET == 192
    for start in range(0, len(batch), 48):
        endings = [snippet.ending.value for snippet in batch[start : start + 48]]
        assert [endings.count(e) for e in ("timeout", "flood", "memory")] == [1, 1, 1]
        assert endings.count("error") == 5
    flood = next(s for s in batch if s.ending.value == "flood")
    assert len(flood.stdout) == pytest.approx(10e6, rel=0.01)


def test_inputs_are_drawn_anew_in_every_batch(workloads: Any) -> None:
    for workload in workloads.WORKLOADS:
        if workload.name == "trivial":
            continue
        one, same, other = (workload.batch(n) for n in (1, 1, 2))
        assert one == same
        fixed = 3 if workload.name == "mixed" else 0  # the bad ones know no inputs
        assert len({s.code for s in one} & {s.code for s in other}) == fixed


def test_the_warm_up_never_saw_what_is_run(workloads: Any) -> None:
    source = "".join(p.read_text() for p in (ROOT / "thor_fast" / "sandbox").glob("*.py"))
    assert workloads.UNWARMED_MODULE not in source
    lines = {
        line.strip()
        for workload in workloads.WORKLOADS
        for snippet in workload.batch(1)
        for line in snippet.code.splitlines()
        # Whoever writes Python writes the same imports; what holds numbers holds inputs.
        if re.search(r"\(.*\d", line)
    }
    assert lines
    assert [line for line in lines if line in source] == []


@pytest.mark.parametrize(
    ("ending", "status", "fields", "verdict"),
    [
        ("OK", "OK", {"stdout": "1\n"}, "RIGHT"),
        ("OK", "OK", {"stdout": "2\n"}, "WRONG"),
        ("OK", "ERROR", {"stdout": "1\n"}, "WRONG"),
        ("OK", "TIMEOUT", {}, "FALSE_TIMEOUT"),
        ("OK", "INFRA", {"error": "x"}, "WRONG"),
        ("ERROR", "ERROR", {"stdout": "1\n", "stderr": "Traceback\nKeyError: 3\n"}, "RIGHT"),
        ("ERROR", "ERROR", {"stdout": "1\n", "stderr": "KeyError: 4\n"}, "WRONG"),
        ("ERROR", "ERROR", {"stderr": "KeyError: 3\n"}, "WRONG"),
        ("ERROR", "TIMEOUT", {}, "FALSE_TIMEOUT"),
        ("TIMEOUT", "TIMEOUT", {}, "RIGHT"),
        ("TIMEOUT", "OK", {"stdout": "1\n"}, "WRONG"),
        ("FLOOD", "OK", {"stdout": "1\n"}, "RIGHT"),
        ("FLOOD", "OUTPUT", {"stdout": "1\n...", "truncated": True}, "RIGHT"),
        ("FLOOD", "OUTPUT", {"stdout": "", "truncated": True}, "WRONG"),
        ("FLOOD", "OK", {"stdout": "1\n..."}, "WRONG"),
        ("FLOOD", "TIMEOUT", {}, "FALSE_TIMEOUT"),
        ("MEMORY", "MEMORY", {}, "RIGHT"),
        ("MEMORY", "ERROR", {"stderr": "Traceback\nMemoryError\n"}, "RIGHT"),
        ("MEMORY", "ERROR", {"stderr": "NameError: table\n"}, "WRONG"),
        ("MEMORY", "OK", {"stdout": "2147483648\n"}, "UNBOUNDED"),
        ("MEMORY", "TIMEOUT", {}, "UNBOUNDED"),
    ],
)
def test_verdicts(
    workloads: Any, ending: str, status: str, fields: dict[str, Any], verdict: str
) -> None:
    from thor_fast.types import ExecutionResult, Status

    snippet = workloads.Snippet("code", "1\n", workloads.Ending[ending], "KeyError: 3")
    result = ExecutionResult(Status[status], **fields)
    assert workloads.judge(snippet, result) is workloads.Verdict[verdict]
