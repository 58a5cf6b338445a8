"""Whether it pays to begin blocks early, told from how long their results are waited for.

What a stream costs depends on the machine (0.4 ms where a core is idle, many times that where none
is), and what it hides on the snippets and on how fast the model writes. So it is not computed but
tried: at first every other block that could begin early does, then all of them or none, whichever
has been waited for less, but for one in sixteen that goes the other way to keep the answer fresh.
"""

from __future__ import annotations

import itertools
from collections import deque

__all__ = ["EarlyGain"]

_KEPT = 64
_FEWEST = 8  # of each kind, to compare
_OTHER_WAY = 16
# Twenty times what a stream costs on an idle core, and less than a large model takes for a token:
# a gain below it is noise, or not worth the cores.
_LEAST_GAIN_S = 0.01
# So that one snippet that runs into its limit does not speak for all others.
_MOST_WAITED_S = 1.0


class EarlyGain:
    """For all episodes of a scheduler. :meth:`add` on the event loop, the rest from any thread."""

    def __init__(self) -> None:
        self._asked = itertools.count()
        self._early: deque[float] = deque(maxlen=_KEPT)
        self._whole: deque[float] = deque(maxlen=_KEPT)
        self._pays: bool | None = None

    def begin(self) -> bool:
        """Whether the next block that can begin early is to."""
        n = next(self._asked)
        if self._pays is None:
            return n % 2 == 0
        return self._pays != (n % _OTHER_WAY == 0)

    def add(self, waited_s: float, *, early: bool) -> None:
        """From the closing fence to the result of a block that could begin early, or did."""
        (self._early if early else self._whole).append(min(waited_s, _MOST_WAITED_S))
        if min(len(self._early), len(self._whole)) >= _FEWEST:
            self._pays = _mean(self._whole) - _mean(self._early) >= _LEAST_GAIN_S


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values)
