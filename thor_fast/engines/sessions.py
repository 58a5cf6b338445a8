"""Sessions: named token sequences, the blocks that hold their KV, and who has to give some up.

No torch here. The table is owned by the engine's thread; nothing in it locks.

A session that forks, or is truncated, changes block tables only. What that leaves behind, a last
block with other holders or with a key, is settled when somebody writes to it: the writer takes a
fresh block and notes a copy (:meth:`SessionTable.take_copies`), or drops the key if it is alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from thor_fast.engines.base import check_position
from thor_fast.engines.blocks import BlockPool, chain_key, root_key
from thor_fast.engines.tail_copies import TailCopy
from thor_fast.errors import EngineError

__all__ = ["Session", "SessionTable"]


@dataclass(slots=True, eq=False)
class Session:
    """A named sequence. ``ids[:cached]`` have their KV in ``blocks``; without blocks it is cold.

    ``keys``: those of the full blocks among them, as far as they are known. ``busy``: a call on it
    is in flight, waiting or ``running``; the blocks of a running one are not taken away.
    """

    name: str
    ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    cached: int = 0
    busy: bool = False
    running: bool = False
    last_used: int = 0


class SessionTable:
    """Sessions by name over a pool of blocks of ``block_size`` positions."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool, self._block_size = pool, block_size
        self._sessions: dict[str, Session] = {}
        self._root = root_key(0)
        self._copies: list[TailCopy] = []
        self._clock = itertools.count()
        self._forks = itertools.count()
        self.evictions = 0
        self.prefix_tokens = 0

    @property
    def live(self) -> tuple[int, int]:
        """Sessions that hold blocks, and the positions of all blocks held, each counted once.

        Callable from any thread.
        """
        warm = sum(1 for s in list(self._sessions.values()) if s.blocks)
        return warm, (self._pool.size - self._pool.available) * self._block_size

    @property
    def ample(self) -> bool:
        """At least half of the pool is held by nobody."""
        return 2 * self._pool.available >= self._pool.size

    def open(self, name: str) -> Session:
        """The session of that name, created cold if unknown."""
        if name not in self._sessions:
            self._sessions[name] = Session(name)
        return self._sessions[name]

    def touch(self, session: Session, *, busy: bool) -> None:
        """Note that a call starts on this session, or has ended."""
        session.busy, session.running = busy, False
        session.last_used = next(self._clock)
        self._cut(session, session.cached)  # a block set aside for the next token

    def admit(self, session: Session, ids: Sequence[int], *, evict: bool) -> int | None:
        """Set a session running over ``ids``, with blocks for one token more.

        Returns how many of them must be computed: at least one, since the logits after the last
        token are not kept. ``None`` if there is no room; a cold session then stays cold.
        """
        cold = not session.blocks
        found = self._resume(session, ids)
        if not self.reserve(session, len(ids) + 1, evict=evict):
            if cold:
                self._cut(session, 0)
            return None
        session.running = True
        self.prefix_tokens += found
        return len(ids) - session.cached

    def reserve(self, session: Session, tokens: int, *, evict: bool) -> bool:
        """Give a session blocks for ``tokens`` positions, those it writes next made writable.

        False, with nothing taken, if the pool has not enough of them. With ``evict``, sessions that
        are not running turn cold first, idle ones before waiting ones, the longest unused first.
        """
        while True:
            copy = self._tail_is_shared(session)
            needed = -(-tokens // self._block_size) - len(session.blocks) + copy
            if needed <= self._pool.available:
                break
            if not (evict and self._evict(session)):
                return False
        if copy:
            index = session.cached // self._block_size
            source, target = session.blocks[index], self._pool.take()
            # The source keeps this holder until the copy is made, lest somebody else takes it.
            self._copies.append(TailCopy(source, target, session.cached % self._block_size))
            session.blocks[index] = target
            needed -= 1
        elif session.cached % self._block_size:
            self._pool.forget_key(session.blocks[session.cached // self._block_size])
        session.blocks += [self._pool.take() for _ in range(needed)]
        return True

    def advance(self, session: Session, tokens: int) -> None:
        """The step now composed writes the next ``tokens`` positions: full blocks get their keys.

        Early enough for the sequences after it in the same step: KV is written before any is read.
        """
        session.cached += tokens
        for index in range(len(session.keys), session.cached // self._block_size):
            key = self._key_after(session, index)
            session.keys.append(key)
            self._pool.set_key(session.blocks[index], key)

    def take_copies(self) -> list[TailCopy]:
        """The copies noted since the last call; to be made before anything is written.

        They do not overlap: a target was taken while all sources were held.
        """
        copies, self._copies = self._copies, []
        for copy in copies:
            self._pool.give_back(copy.source)
        return copies

    def fork(self, name: str, n: int, at_token: int) -> list[str]:
        """``n`` new sessions over the first ``at_token`` tokens, and over their KV."""
        parent = self._known(name, at_token)
        if n < 1:
            raise EngineError(f"fork into {n} sessions, expected at least 1")
        cached = min(parent.cached, at_token)
        names = []
        for _ in range(n):
            child = Session(f"{name}/{next(self._forks)}", parent.ids[:at_token])
            child.cached = cached
            child.blocks = parent.blocks[: -(-cached // self._block_size)]
            child.keys = parent.keys[: cached // self._block_size]
            for block in child.blocks:
                self._pool.share(block)
            self.touch(child, busy=False)
            self._sessions[child.name] = child
            names.append(child.name)
        return names

    def truncate(self, name: str, at_token: int) -> None:
        """Forget the tokens of a session from ``at_token`` on."""
        session = self._known(name, at_token)
        if session.busy:
            raise EngineError(f"session {name!r} is generating, expected it idle to truncate it")
        del session.ids[at_token:]
        self._cut(session, min(session.cached, at_token))

    def release(self, name: str) -> None:
        """Forget a session and give its blocks back; unknown names are ignored."""
        session = self._sessions.pop(name, None)
        if session is not None:
            self._cut(session, 0)

    def cool(self, session: Session) -> None:
        """Give all blocks of a session back; it keeps its tokens."""
        self._cut(session, 0)

    def spoil(self, session: Session) -> list[int]:
        """Like :meth:`cool`, for KV that is not finite; returns the blocks nobody holds now."""
        blocks = session.blocks[:]
        for block in blocks:
            self._pool.forget_key(block)
        self._cut(session, 0)
        return [block for block in blocks if self._pool.holders(block) == 0]

    def invalidate(self, version: int) -> None:
        """All KV is void: the weights are those of ``version`` now."""
        self._root = root_key(version)
        for session in self._sessions.values():
            self._cut(session, 0)

    def _resume(self, session: Session, ids: Sequence[int]) -> int:
        """Take ``ids`` as the tokens from now on, keep the KV of what they share with the old ones.

        What the session does not hold itself it takes over from the prefix cache, whole blocks
        only; returns how many tokens that were.
        """
        known = _common_prefix(session.ids, ids)
        self._cut(session, min(session.cached, known, len(ids) - 1))
        session.ids = list(ids)
        size, own = self._block_size, session.cached
        for index in range(own // size, (len(ids) - 1) // size):
            key = self._key_after(session, index)
            block = self._pool.find(key)
            if block is None:
                break
            self._pool.share(block)
            for partial in session.blocks[index:]:
                self._pool.give_back(partial)
            session.blocks[index:] = [block]
            session.keys.append(key)
            session.cached = (index + 1) * size
        return session.cached - own

    def _key_after(self, session: Session, index: int) -> bytes:
        """The key of block ``index`` of a session whose ``keys`` reach up to there."""
        size = self._block_size
        previous = session.keys[index - 1] if index else self._root
        return chain_key(previous, session.ids[index * size : (index + 1) * size])

    def _tail_is_shared(self, session: Session) -> bool:
        """True if the next position lies in a block that others hold as well."""
        index, offset = divmod(session.cached, self._block_size)
        return offset > 0 and self._pool.holders(session.blocks[index]) > 1

    def _cut(self, session: Session, cached: int) -> None:
        """Keep the KV of the first ``cached`` tokens."""
        keep = -(-cached // self._block_size)
        # The last first: of a cached chain the end goes first, its beginning stays of use.
        for block in reversed(session.blocks[keep:]):
            self._pool.give_back(block)
        del session.blocks[keep:]
        del session.keys[cached // self._block_size :]
        session.cached = cached

    def _evict(self, other: Session) -> bool:
        """Turn a session cold that neither runs nor is ``other``; False if there is none."""
        idle = [s for s in self._sessions.values() if s.blocks and not s.running and s is not other]
        if idle:
            self._cut(min(idle, key=lambda s: (s.busy, s.last_used)), 0)
            self.evictions += 1
        return bool(idle)

    def _known(self, name: str, at_token: int) -> Session:
        session = self._sessions.get(name)
        if session is None:
            raise EngineError(f"no session {name!r}, expected one that has generated or was forked")
        check_position(name, at_token, len(session.ids))
        return session


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    # A resumed session extends what it had: one comparison in C settles nearly every call.
    if tuple(a[:n]) == tuple(b[:n]):
        return n
    return next(i for i in range(n) if a[i] != b[i])
