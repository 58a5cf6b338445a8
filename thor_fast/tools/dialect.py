"""How a call looks and how its result reads to the model: text is data, in this one file.

A model that writes ::

    ```python
    print(6 * 7)
    ```

is answered, right after its closing fence, with (THOR's format) ::

    ```output
    42
    ```

What is shown follows :class:`~thor_fast.types.Status`, never the words in the output: a result that
merely contains "Error" is shown like any other, and code that prints nothing has succeeded and gets
an empty block.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from thor_fast.errors import ToolError
from thor_fast.types import ExecutionResult, Status

__all__ = ["THOR_DIALECT", "TOOL_CALL_DIALECT", "ErrorView", "ObservationDialect"]


class ErrorView(enum.Enum):
    """What the model sees of code that did not run to its end."""

    LAST_LINE = "last_line"
    """One line: the last of the traceback, or the status message (THOR)."""
    TRACEBACK = "traceback"
    """What was printed before, then the whole traceback or the status message."""


@dataclass(frozen=True, slots=True)
class ObservationDialect:
    r"""The texts of one calling convention.

    ``languages``: info strings (lower case) that make a fenced block a call. ``opening`` and
    ``closing`` enclose the observation. An observation of ``cut_from_chars`` characters or more is
    cut to ``head_chars`` + ``ellipsis`` + ``tail_chars``. ``silence`` stands for empty output of
    code that succeeded. The other texts are the one-line messages of the endings that leave no
    traceback; ``exit_code`` and ``signal`` may hold ``{}`` for the number.

    >>> THOR_DIALECT.render(ExecutionResult(Status.OK, stdout="42\n"))
    '```output\n42\n```\n'
    """

    name: str
    languages: frozenset[str]
    opening: str
    closing: str
    cut_from_chars: int = 256
    head_chars: int = 128
    tail_chars: int = 128
    ellipsis: str = "..."
    error_view: ErrorView = ErrorView.LAST_LINE
    silence: str = ""
    timeout: str = "TimeoutError: time limit exceeded"
    memory: str = "MemoryError: memory limit exceeded"
    output: str = "OutputError: output limit exceeded"
    killed: str = "PermissionError: operation not permitted in the sandbox"
    exit_code: str = "SystemExit: {}"
    signal: str = "Killed: signal {}"

    def __post_init__(self) -> None:
        if not self.languages or any(x != x.lower().strip() or not x for x in self.languages):
            raise ToolError(
                f"languages are {sorted(self.languages)}, expected one or more non-empty words in "
                "lower case"
            )
        if min(self.head_chars, self.tail_chars) < 0:
            raise ToolError(
                f"head_chars is {self.head_chars} and tail_chars is {self.tail_chars}, expected >=0"
            )
        if self.cut_from_chars < self.head_chars + self.tail_chars:
            raise ToolError(
                f"cut_from_chars is {self.cut_from_chars}, expected at least head_chars + "
                f"tail_chars = {self.head_chars + self.tail_chars}, or they would overlap"
            )

    def render(self, result: ExecutionResult, trailing: str = "\n") -> str:
        """The text to splice in after a closing fence that was followed by ``trailing``.

        The observation starts on a line of its own: the newline is added unless the token that
        closed the fence already carried it. Raises ``ToolError`` for ``Status.INFRA``, which says
        nothing the model should see.
        """
        newline = "" if trailing.endswith("\n") else "\n"
        return f"{newline}{self.opening}{self.body(result)}{self.closing}"

    def body(self, result: ExecutionResult) -> str:
        """The observation without its enclosure: what to show of ``result``, cut to size."""
        printed = result.stdout.rstrip()
        if result.status is Status.OK:
            return self._cut(printed) if printed else self.silence
        failure = self._failure(result)
        if self.error_view is ErrorView.LAST_LINE:
            return self._cut(failure.rsplit("\n", 1)[-1])
        return self._cut(f"{printed}\n{failure}" if printed else failure)

    def _failure(self, result: ExecutionResult) -> str:
        match result.status:
            case Status.TIMEOUT:
                return self.timeout
            case Status.MEMORY:
                return self.memory
            case Status.OUTPUT:
                return self.output
            case Status.KILLED:
                return self.killed
            case Status.ERROR:
                traceback = result.stderr.rstrip()
                if result.signal is not None:
                    return self.signal.format(result.signal)
                return traceback or self.exit_code.format(result.exit_code)
        raise ToolError(
            f"result has status {result.status.name}, expected one the code itself caused: an "
            "infrastructure failure is not an observation"
        )

    def _cut(self, text: str) -> str:
        if len(text) < self.cut_from_chars:
            return text
        # A slice by [-tail_chars:] would keep everything for 0.
        tail = text[len(text) - self.tail_chars :]
        return f"{text[: self.head_chars]}{self.ellipsis}{tail}"


# Limits of 256 and 128 characters, the enclosure and the last-line view are those of THOR's
# published rollout (vllm_rollout_spmd.py); the status messages are ours.
THOR_DIALECT = ObservationDialect(
    name="thor",
    languages=frozenset({"python", "py"}),
    opening="```output\n",
    closing="\n```\n",
)

# The enclosure of Qwen-style chat templates; the call itself is still a fenced block.
TOOL_CALL_DIALECT = ObservationDialect(
    name="tool_call",
    languages=frozenset({"python", "py"}),
    opening="<tool_response>\n",
    closing="\n</tool_response>\n",
    error_view=ErrorView.TRACEBACK,
)
