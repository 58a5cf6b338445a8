"""Equality of answers by algebra, in worker processes with deadlines.

What the exact comparison can decide costs no process. The rest is text that a model wrote, on its
way into a computer algebra system that it can crash or keep busy for ever; so it is done by
``verify_worker.py``, one question at a time, and a worker that is late or broken is killed and
replaced. The thread that asks waits, for a free worker and then for the answer; there are no
threads of ours, and nothing is queued but the askers.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
import weakref
from collections import Counter

from thor_fast.errors import ConfigError, RewardError
from thor_fast.rewards.exact import decide
from thor_fast.rewards.grader_process import GraderError, GraderProcess
from thor_fast.sandbox.base import ClosedOnExit

__all__ = ["MathVerifier"]

_CLOSED = "the verifier is closed, expected an open one until everything is scored"


class MathVerifier(ClosedOnExit):
    """``workers`` processes at most, started when needed; ``timeout_s``: wall time of one question.

    Any thread may ask. A forked child gets workers of its own. Processes end with :meth:`close`,
    with this object, or with the interpreter, however that ends. Raises ``ConfigError`` where
    math-verify is not installed.

    ``unscored`` counts questions without an answer by reason: ``timeout``, ``crash`` (the process
    died), ``garbage`` (its reply was none), ``start`` (it did not come up), ``reference`` (the
    grammar does not know it), or the name of the exception the algebra ended with.
    """

    def __init__(self, *, workers: int = 2, timeout_s: float = 5.0) -> None:
        if workers < 1:
            raise ConfigError(f"workers is {workers}, expected >= 1")
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s is {timeout_s}, expected > 0")
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError("math-verify is not installed, expected thor_fast[math]")
        self.unscored: Counter[str] = Counter()
        self._workers, self._timeout_s = workers, timeout_s
        self._closed = self._came_up = False
        self._live: set[GraderProcess] = set()
        self._open()
        self._finalizer = weakref.finalize(self, _kill_all, self._live)
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _after_fork(this()))

    def match(self, answer: str, reference: str) -> bool | None:
        r"""Whether ``answer`` means ``reference``; ``None`` where the grader could not tell.

        Neither symmetric (``2x+1=5`` answers ``5``, not the other way round) nor transitive (two
        decimals may stand for one root). Raises ``RewardError`` once closed, and where no worker
        has ever come up.

        >>> with MathVerifier() as verifier:
        ...     verifier.match("x + x", "2x"), verifier.match("[1,2)", "(1,2)")
        (True, False)
        """
        if self._closed:
            raise RewardError(_CLOSED)
        decided = decide(answer, reference)
        return self._by_algebra(answer, reference) if decided is None else decided

    def close(self) -> None:
        """End all workers and wait for them; questions that are open raise ``RewardError``."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for worker in self._live:
                worker.stop()
        for _ in range(self._workers):
            self._discard(self._idle.get())
        for _ in range(self._workers):
            self._idle.put(None)  # wakes who came too late

    def _open(self) -> None:
        self._lock = threading.Lock()
        # Last in, first out: a second worker starts only when the first is busy.
        self._idle: queue.LifoQueue[GraderProcess | None] = queue.LifoQueue()
        for _ in range(self._workers):
            self._idle.put(None)

    def _by_algebra(self, answer: str, reference: str) -> bool | None:
        worker = self._idle.get()
        try:
            worker = worker or self._start()
            equal, reason = worker.ask(reference, answer)
            self._came_up = True
        except GraderError as failure:
            self._discard(worker)
            worker = None
            if self._closed:
                raise RewardError(_CLOSED) from None
            if failure.reason != "start":
                self._came_up = True
            elif not self._came_up:
                raise RewardError(f"no grader process comes up: {failure}") from failure
            equal, reason = None, failure.reason
        except BaseException:  # an interrupt: its reply would be taken for the next one's
            self._discard(worker)
            worker = None
            raise
        finally:
            self._idle.put(worker)
        if equal is None:
            with self._lock:
                self.unscored[reason] += 1
        return equal

    def _start(self) -> GraderProcess:
        with self._lock:
            if self._closed:
                raise RewardError(_CLOSED)
            worker = GraderProcess(self._timeout_s)
            self._live.add(worker)
            return worker

    def _discard(self, worker: GraderProcess | None) -> None:
        if worker is not None:
            worker.kill()
            with self._lock:
                self._live.discard(worker)

    def _forget(self) -> None:
        for worker in self._live:
            worker.forget()
        self._live.clear()
        self._open()


def _kill_all(live: set[GraderProcess]) -> None:
    while live:
        live.pop().kill()


def _after_fork(verifier: MathVerifier | None) -> None:
    """The parent's workers are not ours, and a lock may be held by a thread we have not got."""
    if verifier is not None:
        verifier._forget()  # noqa: SLF001 - the other half of the class
