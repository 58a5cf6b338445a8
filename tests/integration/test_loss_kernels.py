"""The loss benchmark as a user runs it, on a CPU. Nothing here compares times."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "loss_kernels.py"
BACKENDS = {
    *("thor_fast", "thor_fast-frozen", "naive", "compiled", "torch-ce", "trl", "verl"),
    *("liger-scaled", "liger-grpo", "quack", "cce"),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(SCRIPT), *arguments]
    # A machine with a GPU is to be tested like one without.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_quick_run(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "r.jsonl"
    chosen = ("thor_fast-frozen", "naive", "torch-ce", "cce")
    done = run(
        *("--quick", "--device", "cpu", "--output", str(output)),
        *(word for name in chosen for word in ("--backend", name)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    (line,) = output.read_text().splitlines()
    found = json.loads(line)
    assert (found["schema_version"], found["benchmark"]) == (1, "loss_kernels")
    assert {"time", "commit", "dirty", "host", "versions", "params"} < set(found)
    assert {"gpu_before", "gpu_after", "cuda", "absent"} < set(found["params"])
    assert list(found["metrics"]) == [
        f"{scenario} T=64 H=32 V=509" for scenario in ("dense", "episodes", "steps")
    ]
    for key, one in found["metrics"].items():
        check_problem(key, one)
    # Who takes no part is named with the reason, in the record and in the table.
    assert set(found["params"]["absent"]) | set(one["backends"]) == {"thor_fast", *chosen}
    for name, why in found["params"]["absent"].items():
        assert f"{name}  {why}" in re.sub(r" {2,}", "  ", done.stdout)
    assert done.stdout.splitlines()[-1].startswith("steps T=64")


def check_problem(key: str, one: dict[str, Any]) -> None:
    assert set(one["floors"]) == {"2", "3"}
    shares = {"dense": (1.0, 1.0), "episodes": (0.3, 0.7), "steps": (0.05, 0.15)}
    low, high = shares[key.split()[0]]
    assert low <= one["data"]["active_share"] <= high
    assert one["active_rows"] == round(64 * one["data"]["active_share"])
    # Like a model's: mostly certain, neither one-hot nor flat (log 509 = 6.2).
    assert 0.4 < one["data"]["share_above_0.9"] < 0.95
    assert 0.05 < one["data"]["mean_entropy_nats"] < 1.5
    for name, summary in one["backends"].items():
        assert summary["problem"] == "", f"{key}, {name}"
        frozen = name == "thor_fast-frozen"
        named = {"loss", "by_hidden"} if frozen else {"loss", "by_hidden", "by_weight"}
        assert set(summary["errors"]) == named
        assert max(summary["errors"].values()) < 1e-4
        assert summary["seconds"] > 0
        assert summary["share_of_floor"] > 0
        assert len(summary["seconds_by_round"]) == 1
    assert one["backends"]["thor_fast"]["times_ours"] == 1.0


def test_logits_that_the_caller_holds(tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    done = run("--logits", "--quick", "--device", "cpu", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    found = json.loads(output.read_text())
    assert list(found["metrics"]) == [
        f"logits {scenario} T=64 H=32 V=509" for scenario in ("dense", "episodes", "steps")
    ]
    for one in found["metrics"].values():
        assert one["floors"]["copy"]["bytes_per_s"] > 0
        assert {"thor_fast", "naive"} <= set(one["backends"])
        assert set(one["backends"]) | set(one["absent"]) == {
            "thor_fast",
            "naive",
            "trl",
            "liger-grpo",
        }
        for summary in one["backends"].values():
            assert summary["problem"] == ""
            assert max(summary["errors"].values()) < 1e-4
            assert summary["share_of_floor"] > 0
    assert "of a copy" in done.stdout


def test_the_plot_lies_next_to_the_record(tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    done = run("--quick", "--scenario", "steps", "--backend", "naive", "--output", str(output))
    assert done.returncode == 0, done.stderr
    picture = output.with_suffix(".png")
    if importlib.util.find_spec("matplotlib") is None:
        assert "no plot: matplotlib is not installed" in done.stdout
    else:
        assert f"plot: {picture}" in done.stdout.splitlines()
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_options_are_these_and_no_more() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE)) == {
        *("--backend", "--device", "--hidden", "--logits", "--output", "--quick"),
        *("--rounds", "--scenario", "--tokens", "--vocab"),
    }
    for name in BACKENDS:
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "argument --rounds: '0', expected a whole number of at least 1"),
        (["--tokens", "x"], "argument --tokens: 'x', expected a whole number of at least 1"),
        (["--tokens", "31"], "argument --tokens: '31', expected a multiple of 32"),
        (["--vocab", "1"], "argument --vocab: '1', expected at least 2"),
        (["--scenario", "flat"], "argument --scenario: invalid choice: 'flat'"),
        (["--backend", "unsloth"], "argument --backend: invalid choice: 'unsloth'"),
        (["--device", "cuda"], "argument --device: 'cuda', but torch sees no GPU"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("loss_kernels: error: ")
    assert message in done.stderr


# --- pieces ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmark's modules."""
    names = ("loss_problem", "loss_truth", "loss_measure", "loss_results")
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name[5:]: importlib.import_module(name) for name in names})
    for name in set(sys.modules) - before:
        if name.startswith("loss_"):
            sys.modules.pop(name)


@pytest.fixture
def problem(bench: SimpleNamespace) -> Any:
    shape = bench.problem.Shape(128, 16, 97, "episodes")
    return bench.problem.make_problem(shape, torch.device("cpu"))


def test_a_problem_is_the_same_every_time(bench: SimpleNamespace, problem: Any) -> None:
    again = bench.problem.make_problem(problem.shape, torch.device("cpu"))
    for name in ("hidden", "weight", "targets", "old_logp", "rows"):
        assert torch.equal(getattr(again, name), getattr(problem, name)), name


def test_rows_that_are_not_read_are_ignored_targets(problem: Any) -> None:
    read = torch.zeros(128, dtype=torch.bool)
    read[problem.rows] = True
    assert torch.equal(problem.targets >= 0, read)
    assert torch.equal(problem.plan.trainable.rows, problem.rows)


@pytest.mark.parametrize("kind", ["GRPO", "CLIPPED", "CROSS_ENTROPY"])
def test_the_truth_is_what_autograd_finds(
    bench: SimpleNamespace, problem: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = bench.truth.Kind[kind]
    monkeypatch.setattr(bench.truth, "_CHUNK_BYTES", 8 * 97 * 7)  # seven rows, so not all at once
    truth = bench.truth.truth_of(kind, problem)
    hidden, weight = (
        t.detach().double().requires_grad_() for t in (problem.hidden, problem.weight)
    )
    scores = (hidden @ weight.t())[problem.rows].log_softmax(1)
    logp = scores.gather(1, problem.targets[problem.rows].unsqueeze(1)).squeeze(1)
    loss = bench.truth.loss_of(kind, logp, problem)
    loss.backward()
    assert truth.loss == pytest.approx(loss.item())
    torch.testing.assert_close(truth.by_hidden, hidden.grad.float())
    torch.testing.assert_close(truth.by_weight, weight.grad.float())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda loss: loss * 1.01, "wrong: by_"),
        (lambda loss: loss + 0.01, "wrong: loss is off by 1.0e-02, expected at most 0.0001"),
        (lambda loss: loss * float("nan"), "wrong: "),
        (lambda loss: 1 / 0, "failed: ZeroDivisionError: "),
    ],
)
def test_a_backend_that_is_wrong_is_found(
    bench: SimpleNamespace, problem: Any, break_it: Any, message: str
) -> None:
    kind = bench.truth.Kind.GRPO

    def loss() -> torch.Tensor:
        logits = problem.hidden @ problem.weight.t()
        scores = logits[problem.rows].log_softmax(1)
        logp = scores.gather(1, problem.targets[problem.rows].unsqueeze(1)).squeeze(1)
        return bench.truth.loss_of(kind, logp, problem)

    backend = SimpleNamespace(name="x", kind=kind, run=loss)
    truth = bench.truth.truth_of(kind, problem)
    assert bench.measure.check(backend, problem, truth)[1] == ""
    backend.run = lambda: break_it(loss())
    _, wrong = bench.measure.check(backend, problem, truth)
    assert wrong.startswith(message)
    assert problem.hidden.grad is None


def test_ratios_are_taken_within_a_round(bench: SimpleNamespace) -> None:
    """A machine that slows down by ten between rounds changes no ratio."""
    kind = bench.truth.Kind.GRPO

    def timed(*seconds: float) -> list[Any]:
        return [bench.measure.Measurement(s, 10) for s in seconds]

    outcomes = {
        name: bench.results.Outcome(kind, {}, "", rounds)
        for name, rounds in (
            ("thor_fast", timed(2.0, 20.0, 200.0)),
            ("naive", timed(6.0, 60.0, 600.0)),
        )
    }
    outcomes["trl"] = bench.results.Outcome(kind, {}, "out of memory")
    floors = {2: timed(1.0, 10.0, 100.0), 3: timed(1.0, 10.0, 100.0)}
    data = {"active_share": 0.5}
    run = bench.results.Run(data, 4, 2, 8, floors, outcomes, {"cce": "needs CUDA"})
    metrics = bench.results.record({"dense": run})
    backends = metrics["dense"]["backends"]
    assert backends["naive"]["times_ours"] == 3.0
    assert backends["thor_fast"]["share_of_floor"] == 0.5
    assert backends["naive"]["extra_bytes"] == 10
    assert "seconds" not in backends["trl"]
    assert metrics["dense"]["floors"]["3"]["flop_per_s"] == 3 * 2 * 4 * 2 * 8 / 10.0
    header, (row,) = bench.results.summary_table(metrics)
    assert dict(zip(header, row, strict=True))["trl"] == "out of memory"
    _, rows = bench.results.details_table(metrics)
    assert ["dense", "cce", "needs CUDA"] in [row[:3] for row in rows]


def test_numerics_prints_its_tables() -> None:
    command = [sys.executable, "-W", "error", str(BENCHMARKS / "loss_numerics.py")]
    small = ("--tokens", "64", "--hidden", "32", "--vocab", "509")
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines()]
    assert ["the same call twice", *["bitwise equal"] * 3] in rows
    found = {(row[0], row[1]): row[2:] for row in rows if len(row) == 7}
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 1e-2), ("float16", 1e-3)):
        logp, _, above, by_hidden, by_weight = map(float, found[dtype, "ours"])
        assert logp < 1e-4
        assert above == 0
        assert max(by_hidden, by_weight) < bound


def test_numerics_mistakes_are_one_line() -> None:
    command = [sys.executable, str(BENCHMARKS / "loss_numerics.py"), "--vocab", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("loss_numerics: error: argument --vocab: '0', expected a whole")
