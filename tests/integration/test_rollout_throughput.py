"""The main job as a user runs it: from the command line, in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "rollout_throughput.py"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(SCRIPT), *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=850)


def record(path: Path) -> dict[str, Any]:
    lines = path.read_text().splitlines()
    assert len(lines) == 1
    found: dict[str, Any] = json.loads(lines[0])
    return found


@pytest.mark.slow
def test_default_engine_and_sandbox_in_all_modes(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "results.jsonl"
    done = run(
        *("--episodes", "12", "--group-size", "2", "--repeats", "2", "--output", str(output))
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    for progress in ("barrier      1/2: 12 episodes in", "ours         2/2: 12 episodes in"):
        assert any(line.startswith(progress) for line in lines)
    modes = ["barrier", "barrier-loop", "resubmit", "ours", "free"]
    header = next(i for i, line in enumerate(lines) if line.split() == modes)
    names = [line.split("  ")[0] for line in lines[header + 2 :] if not line.startswith(" ")]
    # The table is the last thing printed, and its last rows the ratios.
    assert names == [
        "wall time, s",
        "tokens/s, sampled",
        "episodes/s",
        "accuracy",
        "tool calls that ran",
        "tool time, s, added up",
        "engine calls per episode",
        "prefill tokens per call",
        "calls whose KV was gone",
        "evictions and preemptions",
        "most KV tokens held at once",
        "tokens changed by re-tokenising",
        *(f"tokens/s, of {mode}" for mode in modes),
    ]
    found = record(output)
    assert found["schema_version"] == 1
    assert found["benchmark"] == "rollout_throughput"
    assert {"time", "commit", "dirty", "host", "versions"} < set(found)
    assert {"python", "torch", "transformers", "thor_fast"} <= set(found["versions"])
    assert found["params"]["episodes"] == 12
    assert "12 episodes of 6 tasks" in lines[0]
    metrics = found["metrics"]
    for barrier, ours in zip(metrics["barrier"], metrics["ours"], strict=True):
        assert ours["changed_tokens"] == 0
        # The observation and one token more, and nothing of it twice.
        assert ours["prefill_tokens"] <= ours["least_prefill_tokens"]
        assert ours["calls_evicted"] == ours["evictions"] == 0
        assert barrier["tools_hidden_s"] == 0
        # An opening fence ends a call there, so a block costs two.
        assert barrier["engine_calls"] == 12 + 2 * barrier["tool_calls"]
        assert ours["prefill_tokens"] < barrier["prefill_tokens"]
        # Seeds, prompts and noise are the same, and this tokenizer's samples survive as text.
        assert ours["correct"] == barrier["correct"] > 0
    # The sandbox is all they differ in.
    for barrier, loop in zip(metrics["barrier"], metrics["barrier-loop"], strict=True):
        for name in ("engine_calls", "tool_calls", "sampled_tokens", "correct"):
            assert barrier[name] == loop[name]
    # Nothing is shared between its samples, and what they run is what the others run.
    for resubmit, ours in zip(metrics["resubmit"], metrics["ours"], strict=True):
        assert resubmit["engine_calls"] == ours["engine_calls"] == 12 + resubmit["tool_calls"]
        assert ours["tool_calls"] < resubmit["tool_calls"]
    for resubmit, free in zip(metrics["resubmit"], metrics["free"], strict=True):
        assert resubmit["prefill_tokens"] > resubmit["least_prefill_tokens"]
        assert resubmit["correct"] == free["correct"] > 0
        assert free["tool_calls"] == 0


@pytest.mark.parametrize("group_size", ["1", "8"])
def test_in_a_small_pool_few_of_ours_lose_their_kv(tmp_path: Path, group_size: str) -> None:
    output = tmp_path / "results.jsonl"
    done = run(
        *("--mode", "resubmit", "--mode", "ours", "--episodes", "64", "--group-size", group_size),
        *("--kv-tokens", "640", "--max-context", "256", "--repeats", "1", "--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    (resubmit,), (ours,) = record(output)["metrics"].values()
    assert ours["sampled_tokens"] == resubmit["sampled_tokens"]
    assert 320 < ours["most_live_tokens"] <= 640
    assert ours["evictions"] <= ours["engine_calls"] // 4
    assert ours["calls_evicted"] <= ours["engine_calls"] // 4
    assert 1.5 * ours["prefill_tokens"] < resubmit["prefill_tokens"]


def test_scripted_engine_is_exact_and_asked_less_often_without_the_barrier(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    done = run(
        *("--engine", "scripted", "--episodes", "40", "--group-size", "1", "--repeats", "1"),
        *("--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    metrics = record(output)["metrics"]
    assert list(metrics) == ["barrier", "barrier-loop", "ours", "free"]
    barrier, ours = metrics["barrier"][0], metrics["ours"][0]
    assert barrier["tool_calls"] == ours["tool_calls"]
    assert barrier["correct"] == ours["correct"]
    assert barrier["sampled_tokens"] == ours["sampled_tokens"]
    assert ours["engine_calls"] < barrier["engine_calls"]


def test_one_mode_and_fresh_interpreters(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    done = run(
        *("--engine", "scripted", "--mode", "ours", "--sandbox", "fresh"),
        *("--episodes", "6", "--group-size", "2", "--repeats", "1", "--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    assert "barrier" not in done.stdout.replace("0 barrier", "")
    assert "tokens/s, of" not in done.stdout
    assert list(record(output)["metrics"]) == ["ours"]


def test_snippets_that_wait_change_nothing_that_the_model_sees(tmp_path: Path) -> None:
    found = {}
    for tools in ("plain", "slow"):
        output = tmp_path / f"{tools}.jsonl"
        done = run(
            *("--mode", "ours", "--tools", tools, "--episodes", "8", "--group-size", "1"),
            *("--repeats", "1", "--output", str(output)),
        )
        assert done.returncode == 0, done.stderr
        (found[tools],) = record(output)["metrics"]["ours"]
    plain, slow = found["plain"], found["slow"]
    for name in ("sampled_tokens", "tool_calls", "engine_calls", "correct"):
        assert plain[name] == slow[name]
    assert slow["tool_s"] > 0.05 * slow["tool_calls"]


def test_another_model_runs_without_a_sandbox_only_if_that_is_asked_for(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-W", "error", str(BENCHMARKS / "heavier_policy.py"), str(tmp_path / "m")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    options = ("--model", str(tmp_path / "m"), "--repeats", "1")
    options = (*options, "--episodes", "2", "--group-size", "1")
    output = tmp_path / "results.jsonl"
    assert run(*options, "--output", str(output)).returncode == 0
    assert list(record(output)["metrics"]) == ["barrier-loop", "resubmit", "ours", "free"]
    named = tmp_path / "named.jsonl"
    modes = ("--mode", "ours", "--mode", "barrier")
    assert run(*options, *modes, "--output", str(named)).returncode == 0
    assert list(record(named)["metrics"]) == ["barrier", "ours"]


def test_the_options_are_these_and_no_more() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE)) == {
        "--engine",
        "--episodes",
        "--family",
        "--group-size",
        "--kv-tokens",
        "--max-context",
        "--max-sequences",
        "--mode",
        "--model",
        "--output",
        "--repeats",
        "--sandbox",
        "--seed",
        "--tools",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "0"], "argument --episodes: '0', expected a whole number of at least 1"),
        (["--episodes", "12"], "--episodes is 12, expected a multiple of --group-size 8"),
        (["--repeats", "x"], "argument --repeats: 'x', expected a whole number of at least 1"),
        (["--engine", "tgi"], "argument --engine: invalid choice: 'tgi'"),
        (["--tools", "fast"], "argument --tools: invalid choice: 'fast'"),
        (["--sandbox", "docker"], "argument --sandbox: invalid choice: 'docker'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--model", "/no/such/place"], "no model at '/no/such/place', expected a folder with"),
        (["--max-context", "100000"], "max_context is 100000, expected 2 to 512"),
        (["--engine", "scripted", "--kv-tokens", "9"], "--kv-tokens: the scripted engine has no"),
        (["--engine", "scripted", "--mode", "resubmit"], "--mode resubmit: the scripted engine"),
        (["--max-context", "4"], "--max-context is 4, expected more than the longest prompt"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("rollout_throughput: error: ")
    assert message in done.stderr


def test_an_engine_whose_package_is_missing_says_what_to_install() -> None:
    # A None in sys.modules makes the import fail, whether or not vLLM is installed here.
    code = (
        "import sys; sys.modules['vllm'] = None; sys.path.insert(0, sys.argv.pop(1)); "
        "import rollout_throughput; sys.exit(rollout_throughput.main(['--engine', 'vllm']))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(BENCHMARKS)],
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'thor_fast[vllm]'" in done.stderr


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_interrupt_ends_it_quietly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("--episodes", "5000", "--output", str(tmp_path / "results.jsonl")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(5)  # start-up or rollout, by the speed of the machine: both must end quietly
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert not (tmp_path / "results.jsonl").exists()


def test_terminal_gets_a_bar(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = ("--engine", "scripted", "--mode", "ours", "--repeats", "1")
    arguments = (*arguments, "--episodes", "6", "--group-size", "1")
    process = subprocess.Popen(
        command(*arguments, "--output", str(tmp_path / "r.jsonl")),
        stdout=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = b""
    while chunk := _read(ours):
        shown += chunk
    assert process.wait(timeout=300) == 0
    os.close(ours)
    assert "━".encode() in shown
    assert b"6/6" in shown
    assert shown.rstrip().splitlines()[-1].startswith(b"tokens changed by re-tokenising")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux reports the closed other end this way
        return b""


def test_barrier_counts_tokens_that_text_does_not_give_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from thor_fast.tools.token_text import TokenBytes

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from barrier_rollout import TextEpisode, changed_tokens

    vocabulary = {"a": 0, "b": 1, "ab": 2, "c": 3}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = TokenBytes(tokenizer)
    # Sampled "a" "b" "c" behind the prompt "c"; the text comes back as "ab" "c".
    episode = TextEpisode("c", n_prompt=1, seed=0, response="abc", sampled=[(1, 0), (2, 1), (3, 3)])
    assert changed_tokens(tokenizer.encode, tokens, episode) == 2
    same = TextEpisode("c", n_prompt=1, seed=0, response="abc", sampled=[(1, 2), (3, 3)])
    assert changed_tokens(tokenizer.encode, tokens, same) == 0


async def test_fresh_interpreters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import asyncio

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from fresh_interpreters import FreshInterpreters

    from thor_fast.errors import SandboxError
    from thor_fast.sandbox.base import Sandbox
    from thor_fast.types import ExecutionRequest, Status

    with FreshInterpreters() as sandbox:
        assert isinstance(sandbox, Sandbox)
        good, silent, wrong, coded, late, loud = sandbox.execute_batch(
            [
                "import numpy; print(numpy.arange(3).sum())",
                "x = 1",
                "1 / 0",
                "raise SystemExit(3)",
                ExecutionRequest("print(1, flush=True)\nwhile True: pass", timeout_s=1.0),
                ExecutionRequest("print('x' * 3_000_000)", max_output_bytes=1000),
            ]
        )
        assert (good.status, good.stdout) == (Status.OK, "3\n")
        assert silent.passed
        assert wrong.status is Status.ERROR
        assert wrong.stderr.endswith("ZeroDivisionError: division by zero\n")
        assert (coded.status, coded.exit_code) == (Status.ERROR, 3)
        assert (late.status, late.stdout) == (Status.TIMEOUT, "1\n")
        assert (loud.status, loud.truncated) == (Status.OUTPUT, True)
        note = tmp_path / "pids"
        code = f"import os; open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}}')"
        endless = asyncio.create_task(sandbox.submit(f"{code}\nwhile True: pass"))
        await asyncio.to_thread(_wait_for_text, note)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
    with pytest.raises(SandboxError, match="closed"):
        sandbox.execute("1")
    # Neither the server nor the snippet that nobody waited for is left.
    for pid in note.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def _wait_for_text(path: Path) -> None:
    while not (path.is_file() and path.read_text()):
        time.sleep(0.05)
