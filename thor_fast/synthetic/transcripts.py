"""Worked solutions as the policy is to write them, with tool output as the runtime shows it.

A transcript is text by provenance: what the model is to write, and what the tool answered. The loss
mask follows from that, here as in :class:`~thor_fast.types.Trajectory`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from random import Random

from thor_fast.errors import ConfigError
from thor_fast.synthetic.execution import run_trusted
from thor_fast.synthetic.faults import break_program
from thor_fast.synthetic.problem import Step, Task
from thor_fast.tools.dialect import THOR_DIALECT
from thor_fast.types import TokenSource

__all__ = ["Shares", "Transcript", "Turn", "direct_transcript", "tool_transcript"]


@dataclass(frozen=True, slots=True)
class Shares:
    """Probabilities of what happens in a training transcript, each in [0, 1].

    ``direct``: answered without code. ``first_fault``, ``later_fault``: the first block, any other
    block, is broken. ``give_up``: after a failure a wrong guess follows rather than another try.
    """

    direct: float
    first_fault: float
    later_fault: float
    give_up: float

    def __post_init__(self) -> None:
        for f in fields(self):
            share = getattr(self, f.name)
            if not 0 <= share <= 1:
                raise ConfigError(f"{f.name} is {share}, expected 0 to 1")


@dataclass(frozen=True, slots=True)
class Turn:
    """Text from one source."""

    source: TokenSource
    text: str


@dataclass(frozen=True, slots=True)
class Transcript:
    """A prompt and the turns that follow; the last is the model's and ends the sequence."""

    prompt: str
    turns: tuple[Turn, ...]


def direct_transcript(task: Task) -> Transcript:
    """The answer at once, for the prompt form that forbids code."""
    return Transcript(task.direct_prompt, (Turn(TokenSource.MODEL, _final(task.answer)),))


def tool_transcript(task: Task, rng: Random, shares: Shares) -> Transcript:
    """A solution by Python blocks, some of which fail, with every output really produced."""
    turns: list[Turn] = []
    for step in task.steps:
        thought = step.thought
        fault = shares.later_fault if turns else shares.first_fault
        while rng.random() < fault:
            fault = shares.later_fault
            error = _block(turns, thought, break_program(rng, step.code))
            if rng.random() < shares.give_up:
                guess = _wrong_guess(rng, task.answer)
                turns.append(Turn(TokenSource.MODEL, f"I must guess. {_final(guess)}"))
                return Transcript(task.prompt, tuple(turns))
            thought = f"{error.split(':')[0]}, fix it."
        _solve(turns, thought, step)
    turns.append(Turn(TokenSource.MODEL, _final(task.answer)))
    return Transcript(task.prompt, tuple(turns))


def _solve(turns: list[Turn], thought: str, step: Step) -> None:
    shown = _block(turns, thought, step.code)
    if shown != step.output:
        raise ValueError(f"program printed {shown!r}, expected {step.output!r}: {step.code!r}")


def _block(turns: list[Turn], thought: str, code: str) -> str:
    """Append a block and its observation; returns what the observation shows."""
    result = run_trusted(code)
    turns.append(Turn(TokenSource.MODEL, f"{thought}\n```python\n{code}\n```\n"))
    turns.append(Turn(TokenSource.TOOL, THOR_DIALECT.render(result)))
    return THOR_DIALECT.body(result)


def _final(answer: str) -> str:
    return f"The answer is \\boxed{{{answer}}}."


def _wrong_guess(rng: Random, answer: str) -> str:
    """A number as long as the answer, that is not the answer."""
    digits = len(answer.lstrip("-"))
    while True:
        guess = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if guess != answer:
            return guess
