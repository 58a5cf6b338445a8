"""What the rollout benchmark puts in front of snippets, and the policy it makes heavier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from thor_fast.errors import ConfigError
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CODE = "import math\n# how many\n\nx = math.gcd(12, 18)\nprint(x)\n"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


class _Sandbox:
    """Gives back the code it was asked to run; a stream of it joins what it was fed."""

    def execute(self, request):
        return ExecutionResult(Status.OK, request.code)

    def execute_batch(self, requests):
        return [self.execute(request) for request in requests]

    async def submit(self, request):
        return self.execute(request)

    def open(self, request=None):
        return _Stream()

    def close(self) -> None:
        pass


class _Stream:
    def __init__(self) -> None:
        self.pieces: list[str] = []

    def feed(self, text: str) -> None:
        self.pieces.append(text)

    async def afinish(self, rest: str = "") -> ExecutionResult:
        return ExecutionResult(Status.OK, "".join(self.pieces) + rest)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("name", ["plain", "sympy", "slow"])
async def test_whole_and_in_any_two_pieces(name) -> None:
    from rollout_tools import TOOLS, PreparedStreams

    sandbox = PreparedStreams(_Sandbox(), TOOLS[name])
    whole = sandbox.execute(CODE).stdout
    assert whole.endswith(CODE)
    assert whole.count("\n") == CODE.count("\n") + (name != "plain")
    assert sandbox.execute_batch([ExecutionRequest(CODE)])[0].stdout == whole
    assert (await sandbox.submit(CODE)).stdout == whole
    for cut in range(len(CODE) + 1):
        stream = sandbox.open()
        stream.feed(CODE[:cut])
        assert (await stream.afinish(CODE[cut:])).stdout == whole
        stream = sandbox.open()
        stream.feed(CODE[:cut])
        stream.feed(CODE[cut:])
        assert (await stream.afinish()).stdout == whole


def test_the_wait_depends_on_the_first_statement_alone() -> None:
    from rollout_tools import TOOLS

    wait = TOOLS["slow"]
    assert wait(CODE) == wait("x = math.gcd(12, 18)\nx += 1\n") != wait("y = 1\n")
    seconds = sorted(float(wait(f"print({i})").split("(")[2][:-2]) for i in range(999))
    assert 0.22 < seconds[499] < 0.28  # lognormal: median 0.25, mean 0.41
    assert 0.35 < sum(seconds) / 999 < 0.48


def test_a_heavier_policy_says_the_same() -> None:
    from heavier_policy import heavier

    from thor_fast.synthetic import load_tiny_policy

    tiny, tokenizer = load_tiny_policy()
    heavy = heavier(tiny, layers=6, intermediate=512)
    ids = tokenizer("Find the value of 14286*4812-67238.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(heavy(ids).logits, tiny(ids).logits, rtol=0, atol=1e-5)
    assert heavy.num_parameters() > 1.5 * tiny.num_parameters()
    with pytest.raises(ConfigError, match="--layers is 3, expected at least the tiny policy's 4"):
        heavier(tiny, layers=3, intermediate=512)
