"""Who may be live, and how far each may grow, so that a small KV cache is full and never overfull.

A live trajectory holds a *grant*: the blocks of KV it may fill. It is asked for before each engine
call, and what is granted caps that call. The sum of all grants never exceeds the pool, so the
engine has no reason to evict anybody, whatever their lengths turn out to be. Where the engine has a
prefix cache, full blocks of a prompt count once for all live samples of its group.

Whom to admit. The only bound on what a trajectory will need is ``max_response_tokens``, and most
end far below it. So one more is admitted if the pool is thought to hold all of them at every moment
to come: each grows to what half of those needed that came as far as it has, all at the same pace,
and gives its room back there (LightLLM's "past-future" scheduling does so with running requests).
While fewer than eight have ended, a sixteenth of the bound is assumed.

How much to grant. What is granted and not filled is lost to the others, so a grant reaches a
quarter of the usual length further, and is raised when it is used up; a raise costs one more engine
call, with one token of prefill, unless a call ends there anyway. Where the pool has room for it,
more is granted: with twice as many live as the engine decodes at a time, some may pause and its
batch is full all the same.

If there is no more to grant, a trajectory waits, keeping its KV, and nobody is admitted meanwhile.
Once more of them wait than go on, the youngest that waits has its KV forgotten by us and its grant
taken back, for those in line before it; it is prefilled when there is room for it again. So a wrong
guess costs some prefill. Nobody waits for ever: when all wait, this leaves in the end one alone,
the longest live of those that wait, which gets what it asks for; every grant is good for a token at
least; and newcomers come after all of them.

Why nothing is kept free for the worst case is in ``docs/decisions/0025-nothing-kept-free.md``.
"""

from __future__ import annotations

import asyncio
import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableSequence
from dataclasses import dataclass, field

from thor_fast.engines.base import KVBudget

__all__ = ["Admission", "Allowance"]

_FEWEST_LENGTHS = 8
_FIRST_SHARE = 16  # of the bound, before that
_LIVE_PER_RUNNING = 2
_RAISES = 4  # for a trajectory of the usual length
# Each time a grant is raised costs an engine call with one token of prefill.
_SMALLEST_RAISE_TOKENS = 32


async def _nothing_held() -> None:
    """Before the first engine call there is no KV to forget."""


@dataclass(slots=True, eq=False)
class Allowance:
    """What one trajectory may use, in blocks: ``granted`` now, ``most`` ever.

    ``n_start``: tokens it began with; ``n_tokens``: those it had when it last asked. ``shared``:
    blocks that the live ones of its ``group`` hold together. ``wanted``: tokens, while it waits for
    a higher grant. ``forget``: has the engine let go of its KV.
    ``revoked``: the grant is about to be taken back. ``decided``: set with the next grant, or then.
    """

    n_start: int
    most: int
    n_tokens: int
    group: int | None = None
    shared: int = 0
    granted: int = 0
    wanted: int = 0
    forget: Callable[[], Awaitable[None]] = _nothing_held
    revoked: bool = False
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

    async def enter(
        self, n_start: int, n_response: int = 0, *, group: int | None = None
    ) -> Allowance:
        """Wait, first come, first served, until one more trajectory may be live.

        It begins with ``n_start`` tokens, ``n_response`` of which count as growth already.
        ``group``: of those that begin with the same tokens, if the engine holds these once.
        """
        most = max(min(n_start + self._growth - n_response, self._max_context), n_start + 1)
        allowance = Allowance(n_start, self._blocks(most), n_start)
        if group is not None:
            # Full blocks only; the one with the last token, which is computed anew, is not.
            allowance.group, allowance.shared = group, (n_start - 1) // self._block
        self._entering.append(allowance)
        self._share_out()
        try:
            await allowance.decided.wait()
        except asyncio.CancelledError:
            self.leave(allowance)
            raise
        return allowance

    async def room(self, allowance: Allowance, n_tokens: int) -> int:
        """How many tokens may follow its first ``n_tokens``; waits until it is at least one.

        Its KV may be forgotten meanwhile.
        """
        allowance.n_tokens = n_tokens
        self._top_up(allowance)
        if allowance.granted * self._block <= n_tokens:
            await self._ask(allowance)
            while allowance.revoked:
                # Forgotten before anybody else may use the room.
                await allowance.forget()
                allowance.granted, allowance.revoked = 0, False
                await self._ask(allowance)
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

    def _top_up(self, allowance: Allowance) -> None:
        """Raise a grant of which little is left, if nobody waits: here a call has ended anyway."""
        little = self._step // 2
        left = allowance.granted * self._block - allowance.n_tokens
        more = min(self._blocks(allowance.n_tokens + little), allowance.most) - allowance.granted
        if left < 1 or more < 1 or any(other.wanted for other in self._live):
            return
        if self._fits(allowance, more):
            _grant(allowance, more)

    @property
    def _step(self) -> int:
        """Tokens by which a grant is raised."""
        return max(_SMALLEST_RAISE_TOKENS, self.expected_growth // _RAISES)

    async def _ask(self, allowance: Allowance) -> None:
        allowance.wanted = allowance.n_tokens + 1
        allowance.decided.clear()
        self._share_out()
        await allowance.decided.wait()

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block)

    def _share_out(self) -> None:
        """Raise grants, take one back if too many wait, then admit, as far as the pool goes."""
        step = self._step
        for allowance in self._live:
            if allowance.wanted and not allowance.revoked:
                self._raise(allowance, self._blocks(step))
        waiting = [allowance for allowance in self._live if allowance.wanted]
        if waiting:
            # Newcomers would take what those who wait are waiting for.
            self._revoke(waiting)
            return
        while self._entering and len(self._live) < self._max_live:
            newcomer = self._entering[0]
            blocks = newcomer.most
            if self._max_live * blocks > self._pool:
                if self._live and not self._will_fit(newcomer):
                    break
                blocks = min(blocks, max(self._blocks(newcomer.n_start + step), self._ample))
            if not self._fits(newcomer, blocks):
                break
            self._live.append(self._entering.popleft())
            _grant(newcomer, blocks)

    def _raise(self, allowance: Allowance, step: int) -> None:
        blocks = max(self._blocks(allowance.wanted), allowance.granted + step)
        least = self._blocks(allowance.wanted) - allowance.granted
        more = min(blocks, allowance.most) - allowance.granted
        for n_blocks in (more, least):
            if self._fits(allowance, n_blocks):
                _grant(allowance, n_blocks)
                return

    def _fits(self, allowance: Allowance, blocks: int) -> bool:
        """Whether there are so many more. For one that alone holds any there always are."""
        others = [other for other in self._live if other.granted and other is not allowance]
        held = allowance.granted + blocks + sum(other.granted for other in others)
        return not others or held - _saved([allowance, *others]) <= self._pool

    def _revoke(self, waiting: list[Allowance]) -> None:
        """Of those that wait, in the order of admission: the last that holds any, for the first."""
        if any(allowance.revoked for allowance in waiting):
            return
        holders = [allowance for allowance in waiting[1:] if allowance.granted]
        if holders and 2 * len(waiting) > len(self._live):
            holders[-1].revoked = True
            holders[-1].decided.set()

    def _will_fit(self, newcomer: Allowance) -> bool:
        """Whether the pool is thought to hold the live ones and this one until they end."""
        together = [*self._live, newcomer]
        known = sorted(self._lengths) if len(self._lengths) >= _FEWEST_LENGTHS else []
        # The usual case, a pool with room for all at their longest, takes no more than this.
        longest = max(a.n_start for a in together) + max(known, default=self.expected_growth)
        if len(together) * self._blocks(longest + self._block) <= self._pool:
            return True
        plans = sorted(((self._left(a, known), a.n_tokens) for a in together), reverse=True)
        tokens = -_saved(together) * self._block
        for n_live, (left, n_tokens) in enumerate(plans, 1):
            # When this one ends, those before it are still there, and half of each last block.
            tokens += n_tokens
            if tokens + n_live * (left + self._block / 2) > self._pool * self._block:
                return False
        return True

    def _left(self, allowance: Allowance, known: list[int]) -> int:
        """Tokens it is thought to add yet; ``known``: lengths of others, ascending, or none."""
        grown = allowance.n_tokens - allowance.n_start
        if not known:
            return max(self.expected_growth - grown, self._block)
        first_longer = bisect_right(known, grown)
        if first_longer == len(known):
            return self._block
        return known[(first_longer + len(known)) // 2] - grown


def _saved(allowances: Iterable[Allowance]) -> int:
    """Blocks that are counted more than once in what these hold."""
    seen: set[int | None] = set()
    saved = 0
    for allowance in allowances:
        if allowance.group in seen:
            saved += allowance.shared
        seen.add(allowance.group)
    return saved


def _grant(allowance: Allowance, blocks: int) -> None:
    allowance.granted += blocks
    allowance.wanted = 0
    allowance.decided.set()
