"""What a family makes: the vocabulary of :mod:`thor_fast.synthetic`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Problem", "Step", "Task"]


@dataclass(frozen=True, slots=True)
class Step:
    """One block of a solution: a line of reasoning, the program, and exactly what it prints."""

    thought: str
    code: str
    output: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its exact answer, and steps whose last output is that answer."""

    question: str
    answer: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A :class:`Problem` with the name it was generated under."""

    family: str
    seed: int
    index: int
    question: str
    answer: str
    steps: tuple[Step, ...]

    @property
    def task_id(self) -> str:
        """``family/seed/index``: enough to generate the task again."""
        return f"{self.family}/{self.seed}/{self.index}"

    @property
    def prompt(self) -> str:
        """Asks for a solution by writing Python."""
        return f"{self.question} Use Python.\n"

    @property
    def direct_prompt(self) -> str:
        """Asks for the answer at once; the policy is trained on this form too, see the docs."""
        return f"{self.question} No code.\n"
