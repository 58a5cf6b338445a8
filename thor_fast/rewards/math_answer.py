r"""Is the last ``\boxed{...}`` the right answer? 1.0 or 0.0, and ``None`` where nobody can tell."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from thor_fast.errors import RewardError
from thor_fast.rewards.exact import answers_match
from thor_fast.rewards.math_verifier import MathVerifier
from thor_fast.types import Trajectory

if TYPE_CHECKING:
    from thor_fast.rollout.renderer import Renderer

__all__ = ["MathAnswerReward", "answers_match", "last_boxed"]

_BOXED = re.compile(r"\\boxed\s*\{")


class MathAnswerReward:
    """Keeps :class:`~thor_fast.rewards.base.RewardFunction`.

    Looks only at what the model said itself, see
    :meth:`~thor_fast.rollout.renderer.Renderer.answer`. Compares by ``verifier``, or exactly
    (:func:`~thor_fast.rewards.exact.answers_match`) without one. The verifier stays the caller's,
    to share and to close.
    """

    def __init__(self, renderer: Renderer, verifier: MathVerifier | None = None) -> None:
        self._renderer = renderer
        self._match = answers_match if verifier is None else verifier.match

    def __call__(self, trajectory: Trajectory, reference: str) -> float | None:
        if not reference.strip():
            raise RewardError(f"reference is {reference!r}, expected the answer to compare with")
        stop = trajectory.stop_reason
        if stop is None or stop.is_infrastructure:
            return None
        answer = last_boxed(self._renderer.answer(trajectory))
        if answer is None:
            return 0.0
        equal = self._match(answer, reference)
        return None if equal is None else float(equal)


def last_boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` holds, braces balanced; ``None`` without one.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    for match in reversed(list(_BOXED.finditer(text))):
        end = _closing_brace(text, match.end())
        if end is not None:
            return text[match.end() : end]
    return None


def _closing_brace(text: str, start: int) -> int | None:
    r"""Where the brace opened just before ``start`` closes; ``\{`` and ``\}`` do not count."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None
