"""Who may be live, so that a small KV cache is full and hardly ever overfull.

The only bound on what a trajectory will need is ``max_response_tokens``, and most end far below it.
So one more is admitted if the pool is thought to hold all of them at every moment to come: each
grows to what half of those needed that came as far as it has, all at the same pace, and gives its
room back there (LightLLM's "past-future" scheduling does so with running requests). While fewer
than eight have ended, a sixteenth of the bound is assumed. Where the engine has a prefix cache,
full blocks of a prompt count once for all live samples of its group.

What each then takes is the engine's affair: block by block, as it decodes. Where the guess was
wrong and the pool runs full, the engine makes room, at the price of some prefill; so a good guess
is worth something and a wrong one is no failure. Why no room is promised to anybody is in
``docs/decisions/0028-engines-make-room.md``.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass, field

from thor_fast.engines.base import KVBudget

__all__ = ["Admission", "Seat"]

_FEWEST_LENGTHS = 8
_FIRST_SHARE = 16  # of the bound, before that


@dataclass(slots=True, eq=False)
class Seat:
    """One trajectory, live or in line: it began with ``n_start`` tokens and has ``n_tokens`` now.

    ``shared``: blocks that the live ones of its ``group`` hold together.
    """

    n_start: int
    n_tokens: int
    group: int | None = None
    shared: int = 0
    taken: asyncio.Event = field(default_factory=asyncio.Event)

    def grown(self, n_tokens: int) -> None:
        """It has so many tokens now, fewer than before if it was rolled back."""
        self.n_tokens = n_tokens


class Admission:
    """Lets at most ``max_live`` trajectories into a KV pool, as many as are thought to fit.

    ``growth``: most tokens a trajectory adds to its prompt; ``max_context``: most it may have in
    all; ``lengths``: what ended ones have added, the last of them, which this one appends to. One
    is let in however small the pool; the engine says what it lacks. What others do on the same
    engine is not known here.
    """

    def __init__(
        self,
        budget: KVBudget,
        lengths: MutableSequence[int],
        *,
        max_live: int,
        growth: int,
        max_context: int,
    ) -> None:
        self._block = budget.block_tokens
        self._pool = budget.max_tokens // self._block
        self._max_live, self._growth, self._max_context = max_live, growth, max_context
        self._first_guess = max(growth // _FIRST_SHARE, 1)
        self._lengths = lengths
        self._live: list[Seat] = []
        self._entering: deque[Seat] = deque()

    async def enter(self, n_start: int, *, group: int | None = None) -> Seat:
        """Wait, first come, first served, until one more trajectory may be live.

        It begins with ``n_start`` tokens. ``group``: of those that begin with the same tokens, if
        the engine holds these once.
        """
        seat = Seat(n_start, n_start)
        if group is not None:
            # Full blocks only; the one with the last token, which is computed anew, is not.
            seat.group, seat.shared = group, (n_start - 1) // self._block
        self._entering.append(seat)
        self._let_in()
        try:
            await seat.taken.wait()
        except asyncio.CancelledError:
            self.leave(seat)
            raise
        return seat

    def leave(self, seat: Seat, n_tokens: int | None = None) -> None:
        """It is over. ``n_tokens``: its length, if others are likely to be of the kind."""
        if seat in self._live:
            self._live.remove(seat)
        else:
            self._entering.remove(seat)
        if n_tokens is not None:
            self._lengths.append(n_tokens - seat.n_start)
        self._let_in()

    def _let_in(self) -> None:
        while self._entering and len(self._live) < self._max_live:
            if self._live and not self._will_fit(self._entering[0]):
                break
            seat = self._entering.popleft()
            self._live.append(seat)
            seat.taken.set()

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block)

    def _will_fit(self, newcomer: Seat) -> bool:
        """Whether the pool is thought to hold the live ones and this one until they end."""
        together = [*self._live, newcomer]
        start = max(seat.n_start for seat in together)
        longest = min(start + self._growth, self._max_context)
        if self._max_live * self._blocks(longest) <= self._pool:
            return True  # whatever their lengths
        lengths = self._lengths if len(self._lengths) >= _FEWEST_LENGTHS else []
        longest = start + max(lengths, default=self._first_guess)
        longest = max(longest, max(seat.n_tokens for seat in together)) + self._block
        if len(together) * self._blocks(longest) <= self._pool:
            return True  # as below, with less work: the usual case
        known = sorted(lengths)
        plans = sorted(((self._left(s, known), s.n_tokens) for s in together), reverse=True)
        tokens = -_saved(together) * self._block
        for n_live, (left, n_tokens) in enumerate(plans, 1):
            # When this one ends, those before it are still there, and half of each last block.
            tokens += n_tokens
            if tokens + n_live * (left + self._block / 2) > self._pool * self._block:
                return False
        return True

    def _left(self, seat: Seat, known: list[int]) -> int:
        """Tokens it is thought to add yet; ``known``: lengths of others, ascending, or none."""
        grown = seat.n_tokens - seat.n_start
        if not known:
            return max(self._first_guess - grown, self._block)
        first_longer = bisect_right(known, grown)
        if first_longer == len(known):
            return self._block
        return known[(first_longer + len(known)) // 2] - grown


def _saved(seats: Iterable[Seat]) -> int:
    """Blocks that are counted more than once in what these hold."""
    seen: set[int | None] = set()
    saved = 0
    for seat in seats:
        if seat.group in seen:
            saved += seat.shared
        seen.add(seat.group)
    return saved
