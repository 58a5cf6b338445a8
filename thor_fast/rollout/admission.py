"""Who may be live, and how far each may grow, so that the KV cache never has to evict one.

A live trajectory holds a *grant*: the blocks of KV it may fill. It is asked for before each engine
call, and what is granted caps that call. The sum of all grants never exceeds the pool, so nobody is
evicted because too many are live, whatever their lengths turn out to be.

How much to grant. The only bound on what a trajectory will need is ``max_response_tokens``, and
most end far below it: with grants of that size the pool would stand mostly empty. So a trajectory
starts with what half of those that ended have needed (a quarter of the bound while fewer than eight
have), and asks for more where that is not enough. If there is no more it waits, keeping its KV,
until another one ends. A wrong guess costs time and never an eviction: too high admits few, too low
has many wait for each other with the pool full of half-finished ones. Steps of the tiny policy over
128 episodes, in a pool of a third of what they would hold: 784 with nine in ten in the place of
half, 560 with half, 550 with a quarter, which takes 6 % more engine calls than half does.

More than half's need is granted where the pool has room for it: with twice as many live as the
engine decodes at a time, some may pause and its batch is full all the same, so that nobody gains by
a smaller first grant, and each raise saved is an engine call saved.

Why nobody waits for ever. One of them, the longest live, is always granted what it asks for: as
many blocks as it may still need stay free of other grants. When it ends they go to the next one in
line, which is enough, since that one needs at most ``max_response_tokens`` beyond what it holds
already. (This is the banker's algorithm with one kind of resource, where serving in the order of
admission is always safe.)
"""

from __future__ import annotations

import asyncio
import statistics
from collections import deque
from collections.abc import MutableSequence
from dataclasses import dataclass, field

from thor_fast.engines.base import KVBudget

__all__ = ["Admission", "Allowance"]

_FEWEST_LENGTHS = 8
_FIRST_SHARE = 4  # of the bound, before that
_LIVE_PER_RUNNING = 2
# Each time a grant is raised costs an engine call with one token of prefill.
_SMALLEST_RAISE_TOKENS = 64


@dataclass(slots=True, eq=False)
class Allowance:
    """What one trajectory may use, in blocks: ``granted`` now, ``most`` ever.

    ``n_start``: tokens it began with. ``wanted``: tokens, while it waits for a higher grant.
    ``decided``: set with the next grant.
    """

    n_start: int
    most: int
    granted: int = 0
    wanted: int = 0
    decided: asyncio.Event = field(default_factory=asyncio.Event)


class Admission:
    """Shares a KV pool out among at most ``max_live`` trajectories.

    ``growth``: most tokens a trajectory adds to its prompt; ``max_context``: most it may have in
    all; ``lengths``: what ended ones have added, the last of them, which this one appends to. If
    the pool cannot hold one such, one at a time is live, and the engine says what it lacks. What
    others do on the same engine is not known here.
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
        running = budget.max_sequences if budget.max_running is None else budget.max_running
        self._ample = self._pool // (_LIVE_PER_RUNNING * running)  # blocks for each
        self._lengths = lengths
        self._live: list[Allowance] = []  # in the order of admission
        self._entering: deque[Allowance] = deque()

    async def enter(self, n_start: int, n_response: int = 0) -> Allowance:
        """Wait, first come, first served, until one more trajectory may be live.

        It begins with ``n_start`` tokens, ``n_response`` of which count as growth already.
        """
        most = max(min(n_start + self._growth - n_response, self._max_context), n_start + 1)
        allowance = Allowance(n_start, self._blocks(most))
        self._entering.append(allowance)
        self._share_out()
        try:
            await allowance.decided.wait()
        except asyncio.CancelledError:
            self.leave(allowance)
            raise
        return allowance

    async def room(self, allowance: Allowance, n_tokens: int) -> int:
        """How many tokens may follow its first ``n_tokens``; waits until it is at least one."""
        if allowance.granted * self._block <= n_tokens:
            allowance.wanted = n_tokens + 1
            allowance.decided.clear()
            self._share_out()
            await allowance.decided.wait()
        return allowance.granted * self._block - n_tokens

    def leave(self, allowance: Allowance, n_tokens: int | None = None) -> None:
        """It is over. ``n_tokens``: its length, if others are likely to be of the kind."""
        if allowance in self._live:
            self._live.remove(allowance)
        else:
            self._entering.remove(allowance)
        if n_tokens is not None:
            self._lengths.append(n_tokens - allowance.n_start)
        self._share_out()

    @property
    def expected_growth(self) -> int:
        """Tokens after its prompt that a trajectory is thought to need."""
        if len(self._lengths) < _FEWEST_LENGTHS:
            return max(self._growth // _FIRST_SHARE, 1)
        return statistics.median_high(self._lengths)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block)

    def _share_out(self) -> None:
        """Raise grants, then admit, as far as the pool goes."""
        for allowance in self._live:
            if allowance.wanted:
                self._raise(allowance)
        # Newcomers would take what those who wait are waiting for.
        waiting = any(allowance.wanted for allowance in self._live)
        while self._entering and not waiting and len(self._live) < self._max_live:
            newcomer = self._entering[0]
            blocks = newcomer.most
            if self._max_live * blocks > self._pool:
                usual = self._blocks(newcomer.n_start + self.expected_growth + 1)
                blocks = min(blocks, max(usual, self._ample))
            if not self._fits(newcomer, blocks):
                break
            self._live.append(self._entering.popleft())
            _grant(newcomer, blocks)

    def _raise(self, allowance: Allowance) -> None:
        step = self._blocks(max(_SMALLEST_RAISE_TOKENS, self.expected_growth // 4))
        blocks = max(self._blocks(allowance.wanted), allowance.granted + step)
        more = min(blocks, allowance.most) - allowance.granted
        if self._fits(allowance, more):
            _grant(allowance, more)

    def _fits(self, allowance: Allowance, blocks: int) -> bool:
        """Whether ``blocks`` more leave enough for the longest live one. That one always fits."""
        if not self._live or self._live[0] is allowance:
            return True
        oldest = self._live[0]
        granted = sum(other.granted for other in self._live)
        return granted + blocks + oldest.most - oldest.granted <= self._pool


def _grant(allowance: Allowance, blocks: int) -> None:
    allowance.granted += blocks
    allowance.wanted = 0
    allowance.decided.set()
