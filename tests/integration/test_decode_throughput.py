"""The decode benchmark as a user runs it. Nothing here compares times."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decode_throughput.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(SCRIPT), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_quick_run_compares_tokens_and_names_who_is_absent(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "r.jsonl"
    done = run("--quick", "--vllm-python", str(tmp_path / "python"), "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    (line,) = output.read_text().splitlines()
    found = json.loads(line)
    assert (found["schema_version"], found["benchmark"]) == (1, "decode_throughput")
    assert {"time", "commit", "dirty", "host", "versions", "params"} < set(found)
    names = ["paged", "generate", "generate_batch"]
    assert list(found["params"]["contestants"]) == names
    assert found["params"]["contestants"]["paged"].startswith("thor_fast ")
    why = f"{tmp_path / 'python'}: No such file or directory"
    assert found["params"]["absent"] == {"vllm": why}
    (by_name,) = found["metrics"].values()
    assert list(found["metrics"]) == ["batch 2"]
    assert list(by_name) == names
    for summary in by_name.values():
        assert summary["sequences_equal"] == 1.0
        assert len(summary["seconds_by_round"]) == 1
        assert summary["tokens_per_s"] == 2 * 8 / summary["seconds_by_round"][0] > 0
    assert by_name["paged"]["ours_over_it"] == 1.0
    assert f"vllm takes no part: {why}" in done.stdout
    assert re.match(r"2 +\d+ +\d+ +\d+ +\d", done.stdout.splitlines()[-1])


def test_without_a_gpu_there_is_no_device_cuda(tmp_path: Path) -> None:
    done = run("--quick", "--device", "cuda", "--output", str(tmp_path / "r.jsonl"))
    assert done.returncode == 1
    assert done.stderr.startswith("paged does not start: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_wrong_number_is_one_line() -> None:
    done = run("--batch", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    what = "argument --batch: '0', expected a whole number of at least 1"
    assert done.stderr == f"decode_throughput.py: error: {what}\n"
