"""Who holds which slot: sessions, their tokens, and how much of them the cache still knows.

No torch here. The table is owned by the engine's thread; nothing in it locks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from thor_fast.engines.base import check_position
from thor_fast.errors import EngineError

__all__ = ["Session", "SessionTable"]


@dataclass(slots=True)
class Session:
    """A named sequence. ``ids[:cached]`` have their KV in ``slot``; ``slot`` None means cold."""

    name: str
    ids: list[int] = field(default_factory=list)
    cached: int = 0
    slot: int | None = None
    busy: bool = False
    last_used: int = 0

    def resume(self, ids: Sequence[int]) -> int:
        """Take ``ids`` as the tokens from now on; returns how many of them must be computed.

        At least one: the logits after the last token are not kept.
        """
        self.cached = min(self.cached, _common_prefix(self.ids, ids), len(ids) - 1)
        self.ids = list(ids)
        return len(ids) - self.cached


class SessionTable:
    """Sessions by name, and a fixed number of slots handed out to them.

    ``copy_slot(source, target, length)`` duplicates cached KV.
    """

    def __init__(self, slots: int, copy_slot: Callable[[int, int, int], None]) -> None:
        self._sessions: dict[str, Session] = {}
        self._free = list(range(slots))[::-1]
        self._copy_slot = copy_slot
        self._clock = itertools.count()
        self._forks = itertools.count()

    @property
    def live(self) -> tuple[int, int]:
        """Sessions that hold a slot, and tokens cached in all of them; callable from any thread."""
        held = [s for s in list(self._sessions.values()) if s.slot is not None]
        return len(held), sum(s.cached for s in held)

    def open(self, name: str) -> Session:
        """The session of that name, created cold if unknown."""
        if name not in self._sessions:
            self._sessions[name] = Session(name)
        return self._sessions[name]

    def take_slot(self, session: Session, *, evict: bool) -> bool:
        """Give a session a slot; False if there is none to give.

        With ``evict``, the session idle for longest turns cold to make room.
        """
        if session.slot is None:
            if not self._free and evict:
                self._evict()
            if not self._free:
                return False
            # The lowest slot: the denser the live ones, the fewer rows attention computes in vain.
            session.slot = self._free.pop()
        return True

    def touch(self, session: Session, *, busy: bool) -> None:
        """Note that a call starts on this session, or has ended."""
        session.busy = busy
        session.last_used = next(self._clock)

    def fork(self, name: str, n: int, at_token: int) -> list[str]:
        """``n`` new sessions over the first ``at_token`` tokens.

        Each gets a copy of the KV as far as slots are free; the rest start cold, which costs them a
        prefill and changes nothing else.
        """
        parent = self._known(name, at_token)
        if n < 1:
            raise EngineError(f"fork into {n} sessions, expected at least 1")
        names = []
        for _ in range(n):
            child = Session(f"{name}/{next(self._forks)}", parent.ids[:at_token])
            length = min(parent.cached, at_token)
            if length and parent.slot is not None and self.take_slot(child, evict=False):
                assert child.slot is not None
                self._copy_slot(parent.slot, child.slot, length)
                child.cached = length
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
        session.cached = min(session.cached, at_token)

    def release(self, name: str) -> None:
        """Forget a session and free its slot; unknown names are ignored."""
        session = self._sessions.pop(name, None)
        if session is not None:
            self._free_slot(session)

    def invalidate(self) -> None:
        """All cached KV is void (new weights); slots stay where they are."""
        for session in self._sessions.values():
            session.cached = 0

    def _known(self, name: str, at_token: int) -> Session:
        session = self._sessions.get(name)
        if session is None:
            raise EngineError(f"no session {name!r}, expected one that has generated or was forked")
        check_position(name, at_token, len(session.ids))
        return session

    def _evict(self) -> None:
        idle = [s for s in self._sessions.values() if s.slot is not None and not s.busy]
        if idle:
            self._free_slot(min(idle, key=lambda s: s.last_used))

    def _free_slot(self, session: Session) -> None:
        if session.slot is not None:
            self._free.append(session.slot)
            self._free.sort(reverse=True)
        session.slot, session.cached = None, 0


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    # A resumed session extends what it had: one comparison in C settles nearly every call.
    if tuple(a[:n]) == tuple(b[:n]):
        return n
    return next(i for i in range(n) if a[i] != b[i])
