"""The native sandbox: snippets run in forks of warm interpreters, jailed.

The C++ orchestrator (``csrc/core``) starts the interpreters, feeds them, watches clocks and pipes
and kills; this file translates requests and results, and joins the orchestrator to threads and
event loops. No thread waits per call and the GIL is free while anything waits.

What isolates a snippet, and what does not, is in ``docs/sandbox-security.md``.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, ParamSpec

from thor_fast import _core
from thor_fast.errors import SandboxError
from thor_fast.sandbox.base import ClosedOnExit
from thor_fast.sandbox.completions import LoopSink, ThreadSink
from thor_fast.sandbox.dialogue import Step, Stream
from thor_fast.sandbox.launch import template_command, template_environment
from thor_fast.sandbox.layers import REQUIRED_LAYERS, check_layers
from thor_fast.sandbox.session import Session, open_session
from thor_fast.sandbox.tiers import choose_tier, default_tiers
from thor_fast.sandbox.wire import (
    Determinism,
    Mode,
    SandboxLimits,
    check_limits,
    decode_result,
    encode_limits,
    encode_request,
)
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from thor_fast._core import Completion
    from thor_fast.sandbox.tiers import Tier

__all__ = ["NativeSandbox"]

_Args = ParamSpec("_Args")


class NativeSandbox(ClosedOnExit):
    r"""Runs Python snippets; implements :class:`thor_fast.sandbox.base.Sandbox`.

    Args:
        slots: snippets that run at a time, besides as many that have run for longer than 0.1 s and
            no longer keep others waiting, and one more for each of these that has used up a
            quarter of its time; default: as many as ``cpus``. With more, limits mean less: snippets
            time out waiting for each other.
        cpus: the CPUs on which snippets run (``sched_setaffinity``); default: all that this process
            may use. Leave out that of an engine's thread on the same machine.
        limits: what a request that names none gets.
        tiers: which warm interpreters there are; a snippet's imports choose. The first starts at
            once, each other when it is first asked for (see :meth:`warm_up`).
        required: layers of isolation whose absence is an error, by name; by default all but
            ``landlock`` and ``memory_cgroup``, which are used where the host has them.
        deterministic: the same code gives the same output.
        max_dialogues: streams and sessions open at a time; one more raises ``SandboxError``.
        queue_capacity: requests that may wait; one more raises ``SandboxError`` at once.
        startup_timeout_s: for an interpreter to warm up, or a jail to be made.

    Raises ``SandboxError`` if the host does not grant a layer; the message names the step and the
    system's error. May be used from several threads and event loops; a fork of the process must
    make its own.

    >>> with NativeSandbox(slots=1) as sandbox:
    ...     result = sandbox.execute("print(6 * 7)")
    >>> result.stdout, result.passed
    ('42\n', True)
    """

    def __init__(
        self,
        *,
        slots: int | None = None,
        cpus: Collection[int] | None = None,
        limits: SandboxLimits | None = None,
        tiers: Sequence[Tier] | None = None,
        required: Collection[str] = REQUIRED_LAYERS,
        deterministic: Determinism | None = None,
        max_dialogues: int = 64,
        queue_capacity: int = 65_536,
        startup_timeout_s: float = 60.0,
    ) -> None:
        self._limits = limits or SandboxLimits()
        self._tiers = default_tiers() if tiers is None else tuple(tiers)
        self._deterministic = deterministic
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopSink] = (
            weakref.WeakKeyDictionary()
        )
        usable = os.sched_getaffinity(0)
        kept = usable if cpus is None else set(cpus)
        if not kept or not kept <= usable:
            raise ValueError(f"cpus is {sorted(kept)}, expected some of {sorted(usable)}")
        slots = len(kept) if slots is None else slots
        if slots < 1:
            raise ValueError(f"slots is {slots}, expected >= 1")
        check_limits(startup_timeout_s=startup_timeout_s)
        cgroups = _core.CgroupPool()
        inside = check_layers(required, cgroups)
        self._memory_cgroup = cgroups.granted
        pool = cgroups if cgroups.granted else None
        try:
            self._orchestrator = _core.Orchestrator(
                tiers=[
                    (tier.name, template_command(tier, inside, deterministic, pool))
                    for tier in self._tiers
                ],
                env=template_environment(deterministic),
                cpus=[] if cpus is None else sorted(kept),
                slots=slots,
                max_dialogues=max_dialogues,
                queue_capacity=queue_capacity,
                startup_timeout_s=startup_timeout_s,
                cgroups=pool,
            )
        except _core.StartError as error:
            raise SandboxError(str(error)) from None
        self._closed = False
        # Also at interpreter exit, before threads and modules are torn down.
        self._finalizer = weakref.finalize(self, _close, self._orchestrator, self._owner_pid)

    def execute(self, request: ExecutionRequest | str) -> ExecutionResult:
        """Run one snippet; blocks the calling thread with the GIL released."""
        return self.execute_batch([request])[0]

    def execute_batch(self, requests: Sequence[ExecutionRequest | str]) -> list[ExecutionResult]:
        """Run many; results in the order of the requests."""
        results = dict(self.as_completed(requests))
        return [results[index] for index in range(len(requests))]

    def as_completed(
        self, requests: Iterable[ExecutionRequest | str]
    ) -> Iterator[tuple[int, ExecutionResult]]:
        """Run many; each result, with the index of its request, as soon as there is one.

        Leaving early kills what still runs.
        """
        sink = ThreadSink()
        waiting: dict[int, int] = {}
        try:
            for index, request in enumerate(requests):
                waiting[self._submit(request, sink.queue)] = index
            while waiting:
                for done in sink.wait():
                    yield waiting.pop(done[0]), decode_result(done)
        finally:
            for ticket in waiting:
                self._orchestrator.cancel(ticket)
            while waiting:  # the slots are free again when the caller goes on
                for done in sink.wait():
                    waiting.pop(done[0])

    async def submit(self, request: ExecutionRequest | str) -> ExecutionResult:
        """Run one snippet without blocking the event loop; cancelling kills the snippet."""
        done = await self._submit_async(lambda queue: self._submit(request, queue))
        return decode_result(done)

    def open(self, request: ExecutionRequest | None = None) -> Stream:
        """A block that runs while its text arrives; ``request`` gives all but its code.

        Raises ``SandboxError`` when ``max_dialogues`` are open.
        """
        request = ExecutionRequest("") if request is None else request
        opening = self._encode(request, mode="stream", life_s=_STREAM_LIFE_S)
        return Stream(self, self._ask(self._orchestrator.open_dialogue, opening), request)

    def session(
        self,
        request: ExecutionRequest | None = None,
        *,
        rewindable: bool = False,
        life_s: float = 3600.0,
    ) -> Session:
        """A namespace that several blocks share; ``request`` gives all but their code.

        The first block's imports choose the tier. ``rewindable``: keep the state before each block,
        to go back to or to fork the session at; costs a fork a block. ``life_s``: after that time
        since its first block it is over, whatever it does; it is also the limit of its CPU time,
        unless the request names one.
        Raises ``SandboxError`` when ``max_dialogues`` are open, ``ValueError`` for too low a
        ``max_processes``.
        """
        request = ExecutionRequest("") if request is None else request
        processes = request.max_processes or self._limits.max_processes
        if rewindable and processes < _FEWEST_PROCESSES:
            raise ValueError(
                f"max_processes is {processes}, expected at least {_FEWEST_PROCESSES} for a "
                "rewindable session: for its router, its first state and a block"
            )
        mode: Mode = "rewindable session" if rewindable else "session"
        whole = request if request.cpu_s is not None else replace(request, cpu_s=life_s)
        opening = self._encode(whole, mode=mode, life_s=life_s)
        return open_session(
            self,
            self._ask(self._orchestrator.open_dialogue, opening),
            request,
            rewindable=rewindable,
        )

    def warm_up(self, *tiers: str) -> None:
        """Have these tiers ready, all by default; blocks until they are.

        Raises ``ValueError`` for an unknown name and ``SandboxError`` for one that cannot start.
        """
        names = [tier.name for tier in self._tiers]
        for name in tiers:
            if name not in names:
                raise ValueError(f"tier is {name!r}, expected one of {', '.join(names)}")
        for index, name in enumerate(names):
            if tiers and name not in tiers:
                continue
            # Snippets of a tier that cannot start are served by a lighter one: ask who answers.
            modules = self._tiers[index].modules
            lacking = f"import sys; print(*sorted({{*{modules}}} - {{*sys.modules}}))"
            sink = ThreadSink()
            request = encode_request(
                ExecutionRequest(lacking),
                self._limits,
                tier=index,
                determinism=self._deterministic,
            )
            ticket = self._ask(self._orchestrator.submit, request, sink.queue)
            result = decode_result(sink.take(ticket))
            if result.status is not Status.OK or result.stdout != "\n":
                why = result.error or result.stderr or f"it cannot import {result.stdout.strip()}"
                raise SandboxError(f"tier {name!r} did not start: {why}")

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The warm interpreters, from light to heavy."""
        return self._tiers

    @property
    def layers(self) -> frozenset[str]:
        """The layers of isolation in force, of those that a host may lack."""
        inside = frozenset(self._orchestrator.layers())
        return inside | {"memory_cgroup"} if self._memory_cgroup else inside

    def stats(self) -> dict[str, int]:
        """Counts since the start, and of what there is now.

        Since the start: submitted, completed, jails_made, jails_discarded (a snippet left traces),
        template_starts. Now: queued, running, dialogues, jails.
        """
        return self._orchestrator.stats()

    def close(self) -> None:
        """Kill what runs (its requests end as INFRA) and free everything. Safe to call twice."""
        self._closed = True
        self._finalizer()

    # --- for streams and sessions too -----------------------------------------------------------

    def _step(self, dialogue: int, step: Step, queue: _core.CompletionQueue) -> int:
        limits = encode_limits(step.limits, self._limits)
        tier = choose_tier(step.code, self._tiers)
        return self._ask(self._orchestrator.step, dialogue, step.data, limits, tier, queue)

    def _timeout_of(self, request: ExecutionRequest) -> float:
        return self._limits.timeout_s if request.timeout_s is None else request.timeout_s

    async def _submit_async(self, submit: Callable[[_core.CompletionQueue], int]) -> Completion:
        """Await the completion of what ``submit`` queues; cancelling cancels it."""
        sink = self._loop_sink(asyncio.get_running_loop())
        ticket = submit(sink.queue)
        future = sink.expect(ticket)
        try:
            return await future
        except asyncio.CancelledError:
            self._orchestrator.cancel(ticket)
            raise

    def _close_dialogue(self, dialogue: int) -> None:
        if os.getpid() == self._owner_pid:
            self._orchestrator.close_dialogue(dialogue)

    # --- our own --------------------------------------------------------------------------------

    def _submit(self, request: ExecutionRequest | str, queue: _core.CompletionQueue) -> int:
        if isinstance(request, str):
            request = ExecutionRequest(request)
        return self._ask(self._orchestrator.submit, self._encode(request), queue)

    def _encode(
        self, request: ExecutionRequest, *, mode: Mode = "block", life_s: float = 1.0
    ) -> _core.Request:
        tier = choose_tier(request.code, self._tiers) if isinstance(request.code, str) else 0
        return encode_request(
            request,
            self._limits,
            tier=tier,
            mode=mode,
            determinism=self._deterministic,
            life_s=life_s,
        )

    def _ask(self, method: Callable[_Args, int], *args: _Args.args, **kwargs: _Args.kwargs) -> int:
        """Call one of the orchestrator's methods that give a number."""
        self._check_usable()
        try:
            return method(*args, **kwargs)
        except (_core.QueueFullError, _core.StartError) as error:
            raise SandboxError(str(error)) from None

    def _check_usable(self) -> None:
        if self._closed:
            raise SandboxError("the sandbox is closed")
        if os.getpid() != self._owner_pid:
            raise SandboxError(
                f"this sandbox belongs to process {self._owner_pid}, got a call from its fork "
                f"{os.getpid()}: create one there"
            )

    def _loop_sink(self, loop: asyncio.AbstractEventLoop) -> LoopSink:
        with self._lock:
            sink = self._loops.get(loop)
            if sink is None:
                sink = self._loops[loop] = LoopSink(loop)
            return sink


# A stream lives while its text is written; a model that needs longer has gone.
_STREAM_LIFE_S = 3600.0
_FEWEST_PROCESSES = 3


def _close(orchestrator: _core.Orchestrator, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a fork has neither the thread nor the zygote to stop
        orchestrator.close()
