"""The splice benchmark as a user runs it, on a CPU. Nothing here compares times."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASES = ["fork", "copy", "move", "slide", "turn"]
WAYS = ["thor_fast", "per-layer", "blocks", "re-prefill"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(BENCHMARKS / "kv_splice.py"), *arguments]
    # A machine with a GPU is to be tested like one without.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_quick_run(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "r.jsonl"
    done = run("--quick", "--device", "cpu", "--tokens", "40", "--output", str(output))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    (line,) = output.read_text().splitlines()
    found = json.loads(line)
    assert (found["schema_version"], found["benchmark"]) == (1, "kv_splice")
    assert list(found["metrics"]) == ["LBNHC T=40", "BLNHC T=40"]
    for one in found["metrics"].values():
        # 2 layers, keys and values, 2 heads of 16 numbers in float32.
        assert one["bytes_per_token"] == 512
        assert one["copy_bytes_per_s"] > 0
        assert list(one["cases"]) == CASES
        for case, ways in one["cases"].items():
            assert list(ways) == WAYS
            tokens = 16 * 8 if case == "fork" else 40
            expected = 2 * tokens * 512 * (0.5 if case == "turn" else 1.0)
            for way, outcome in ways.items():
                assert outcome["moved_bytes"] == expected
                if way == "blocks" and case in ("move", "slide", "turn"):
                    assert outcome["problem"] == "turns no keys"
                    continue
                assert outcome["problem"] == ""
                assert outcome["bytes_per_s"] == pytest.approx(expected / outcome["seconds"])
                share = outcome["bytes_per_s"] / one["copy_bytes_per_s"]
                assert outcome["share_of_copy"] == pytest.approx(share)
    assert done.stdout.splitlines()[-1].split()[:4] == ["BLNHC", "T=40", "turn", "re-prefill"]


def test_the_options_are_these_and_no_more() -> None:
    done = run("--help")
    assert done.returncode == 0
    options = {"--device", "--layout", "--output", "--quick", "--rounds", "--tokens"}
    assert set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE)) == options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "argument --tokens: '0', expected a whole number of at least 1"),
        (["--device", "cuda"], "argument --device: 'cuda', but torch sees no GPU"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("kv_splice: error: ")
    assert message in done.stderr


@pytest.fixture
def ways() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("kv_splice_ways")
    sys.modules.pop("kv_splice_ways")


def test_a_way_that_is_wrong_is_found(ways: SimpleNamespace) -> None:
    from thor_fast.kernels import Rope

    shape = ways.Shape(2, 4, 16, 32, 64, 16)
    cache = ways.Cache(shape, 80, "LBNHC", torch.device("cpu"))
    rope = Rope.from_config(shape.config(), interleaved=False)
    before = cache.storage.clone()
    for case in ways.make_cases(cache, 40, rope):
        assert ways.check(case, cache, lambda: None).startswith("wrong: off by ")
        assert torch.equal(cache.storage, before)
