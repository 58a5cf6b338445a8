"""What a result reads like: by its status, never by its words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from thor_fast.errors import ToolError
from thor_fast.tools import THOR_DIALECT, TOOL_CALL_DIALECT, ErrorView
from thor_fast.types import ExecutionResult, Status

TRACEBACK = 'Traceback (most recent call last):\n  File "<code>", line 1\nValueError: bad\n'


def test_thor_format() -> None:
    result = ExecutionResult(Status.OK, stdout="1\n2\n")
    assert THOR_DIALECT.render(result) == "```output\n1\n2\n```\n"
    assert THOR_DIALECT.render(result, trailing="") == "\n```output\n1\n2\n```\n"


def test_tool_call_format_shows_what_was_printed_before_the_traceback() -> None:
    result = ExecutionResult(Status.ERROR, stdout="so far\n", stderr=TRACEBACK, exit_code=1)
    assert TOOL_CALL_DIALECT.render(result) == (
        f"<tool_response>\nso far\n{TRACEBACK}</tool_response>\n"
    )


def test_the_word_error_in_good_output_changes_nothing() -> None:
    text = "Mean Squared Error\n0.5\nTimeoutError"
    assert THOR_DIALECT.body(ExecutionResult(Status.OK, stdout=text)) == text


def test_silent_success_is_an_empty_block() -> None:
    silent = ExecutionResult(Status.OK, stdout="", stderr="a warning")
    assert silent.passed
    assert THOR_DIALECT.render(silent) == "```output\n\n```\n"
    assert replace(THOR_DIALECT, silence="(no output)").body(silent) == "(no output)"


def test_error_shows_the_last_line_of_the_traceback() -> None:
    result = ExecutionResult(Status.ERROR, stdout="12", stderr=TRACEBACK, exit_code=1)
    assert THOR_DIALECT.body(result) == "ValueError: bad"
    full = replace(THOR_DIALECT, error_view=ErrorView.TRACEBACK)
    assert full.body(result) == f"12\n{TRACEBACK.rstrip()}"


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (ExecutionResult(Status.ERROR, exit_code=3), "SystemExit: 3"),
        (ExecutionResult(Status.ERROR, signal=11, stderr="x"), "Killed: signal 11"),
        (ExecutionResult(Status.TIMEOUT, stdout="1"), "TimeoutError: time limit exceeded"),
        (ExecutionResult(Status.MEMORY, stderr=TRACEBACK), "MemoryError: memory limit exceeded"),
        (ExecutionResult(Status.OUTPUT, stdout="1" * 999), "OutputError: output limit exceeded"),
        (
            ExecutionResult(Status.KILLED, signal=31),
            "PermissionError: operation not permitted in the sandbox",
        ),
    ],
)
def test_one_line_for_endings_without_a_traceback(result: ExecutionResult, text: str) -> None:
    assert THOR_DIALECT.body(result) == text


@pytest.mark.parametrize("length", [0, 1, 127, 128, 255])
def test_short_output_is_whole(length: int) -> None:
    assert THOR_DIALECT.body(ExecutionResult(Status.OK, stdout="x" * length)) == "x" * length


@pytest.mark.parametrize("length", [256, 257, 100_000])
def test_long_output_keeps_head_and_tail(length: int) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(length))
    body = THOR_DIALECT.body(ExecutionResult(Status.OK, stdout=text))
    assert body == text[:128] + "..." + text[-128:]


def test_nothing_of_the_tail_can_be_kept() -> None:
    head_only = replace(THOR_DIALECT, cut_from_chars=3, head_chars=2, tail_chars=0)
    assert head_only.body(ExecutionResult(Status.OK, stdout="abcdef")) == "ab..."


def test_infrastructure_failure_is_not_an_observation() -> None:
    with pytest.raises(ToolError, match="status INFRA"):
        THOR_DIALECT.render(ExecutionResult(Status.INFRA, error="fork failed"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"languages": frozenset()}, r"languages are \[\], expected one or more"),
        ({"languages": frozenset({"Python"})}, r"languages are \['Python'\], expected .* lower"),
        ({"head_chars": -1}, "head_chars is -1 and tail_chars is 128, expected >=0"),
        ({"cut_from_chars": 255}, r"cut_from_chars is 255, expected at least .* = 256"),
    ],
)
def test_impossible_dialects(change: dict, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        replace(THOR_DIALECT, **change)
