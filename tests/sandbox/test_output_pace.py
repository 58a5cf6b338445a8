"""Standard output leaves a snippet line by line, or in blocks while lines pour out."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import ExecutionRequest, NativeSandbox, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

# Ends by itself once lines are written in blocks; a busy machine takes more than one attempt.
POUR = """
import os, sys, time
lines = 0
while sys.stdout.line_buffering and lines < 800_000:
    for n in range(lines, lines + 20_000): print(n)
    lines += 20_000
print(lines, sys.stdout.line_buffering, file=sys.stderr)
"""
ROOMY = 8 << 20


@pytest.fixture(scope="module")
def sandbox() -> Iterator[NativeSandbox]:
    with NativeSandbox(slots=2) as box:
        yield box


def poured(stderr: str) -> str:
    """What the loop of ``POUR`` printed, by what it says of itself."""
    lines, by_line, *_ = stderr.split()
    assert by_line == "False"
    return "".join(f"{n}\n" for n in range(int(lines)))


def test_a_flood_goes_by_blocks_and_arrives_whole(sandbox: NativeSandbox) -> None:
    result = sandbox.execute(ExecutionRequest(POUR, max_output_bytes=ROOMY))
    assert result.status is Status.OK
    assert result.stdout == poured(result.stderr)


@pytest.mark.parametrize(
    "back",
    [
        "sys.stdout.flush()",
        "print('seen', flush=True)",
        "time.sleep(0.1)\nfor n in range(1000): print('later')",
    ],
)
def test_afterwards_a_kill_leaves_every_line(sandbox: NativeSandbox, back: str) -> None:
    ask = "print(sys.stdout.line_buffering, file=sys.stderr)"
    code = f"{POUR}{back}\n{ask}\nprint('last words')\nos.kill(os.getpid(), 9)"
    result = sandbox.execute(ExecutionRequest(code, max_output_bytes=ROOMY))
    assert (result.status, result.signal) == (Status.ERROR, 9)
    assert result.stderr.endswith("True\n")
    assert result.stdout.startswith(poured(result.stderr))
    assert result.stdout.endswith("\nlast words\n")


def test_a_kill_in_a_flood_takes_no_more_than_a_block(sandbox: NativeSandbox) -> None:
    code = f"{POUR}os.kill(os.getpid(), 9)"
    result = sandbox.execute(ExecutionRequest(code, max_output_bytes=ROOMY))
    assert (result.status, result.signal) == (Status.ERROR, 9)
    whole = poured(result.stderr)
    assert whole.startswith(result.stdout)
    assert len(whole) - len(result.stdout) <= 2048


def test_a_sessions_next_block_goes_by_lines_again(sandbox: NativeSandbox) -> None:
    with sandbox.session(ExecutionRequest("", max_output_bytes=ROOMY)) as session:
        first = session.execute(POUR)
        assert first.stdout == poured(first.stderr)
        assert session.execute("print(sys.stdout.line_buffering)").stdout == "True\n"


def test_a_stream_that_was_closed_fails_as_plain_python_does(sandbox: NativeSandbox) -> None:
    for close in ("sys.stdout.close()", "import os\nos.close(1)\nprint('z' * 9000)"):
        code = f"import sys\nprint('before')\n{close}\nprint('after', flush=True)\n"
        plain = subprocess.run(
            [sys.executable, "-I", "-u", "-c", code], capture_output=True, text=True, check=False
        )
        result = sandbox.execute(code)
        assert (result.status, result.stdout) == (Status.ERROR, "before\n")
        assert result.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]
        assert result.stderr.count('File "') == 1, "none of our frames"


def test_the_streams_look_as_plain_ones(sandbox: NativeSandbox) -> None:
    code = """
import io, sys
out = sys.stdout
print(repr(out), repr(out.buffer), repr(out.buffer.raw), out.mode, out.name, out.fileno())
print(type(out.buffer).__module__, type(out.buffer).__name__, out is sys.__stdout__, out.newlines)
print(isinstance(out.buffer, io.BufferedWriter), out.writable(), out.isatty(), flush=True)
out.buffer.write(b"bytes\\n"); out.buffer.flush()
print(out.buffer.raw.closefd, out.errors in ("strict", "surrogateescape"), file=sys.stderr)
"""
    plain = subprocess.run(
        [sys.executable, "-I", "-X", "utf8", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    result = sandbox.execute(code)
    assert (result.stdout, result.stderr) == (plain.stdout, plain.stderr)
