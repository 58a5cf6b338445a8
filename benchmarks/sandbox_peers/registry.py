"""The backends by name, in the order of the table, and why one cannot take part."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Protocol

from sandbox_peers.commands import Bubblewrap, Nsjail, PlainSubprocess
from sandbox_peers.install import INSTALLABLE, find_bubblewrap, find_nsjail
from sandbox_peers.interpreter import Interpreter
from sandbox_peers.worker_pool import WorkerPool
from thor_fast.errors import SandboxError
from thor_fast.sandbox import NativeSandbox, Sandbox
from thor_fast.sandbox.fusion import FusionSandbox
from thor_fast.types import ExecutionRequest, ExecutionResult

__all__ = ["BASELINE", "NAMES", "OURS", "Backend", "Blocking", "open_backends"]

BASELINE = "subprocess"
OURS = "thor_fast"
_MOST_IN_FLIGHT = 64


class Blocking(Protocol):
    """Runs a snippet on the calling thread."""

    def execute(self, request: ExecutionRequest) -> ExecutionResult: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """An open backend. Exactly one of ``blocking`` and ``sandbox`` (awaited) is there.

    ``close`` ends it and its processes, if it keeps any.
    """

    name: str
    blocking: Blocking | None
    sandbox: Sandbox | None
    close: Callable[[], None]


NAMES = {
    BASELINE: "fresh interpreter, no isolation",
    "pool": "persistent workers, no isolation between snippets",
    "bubblewrap": "fresh interpreter, all namespaces, no memory limit",
    "nsjail": "fresh interpreter, all namespaces, rlimits",
    "fusion": "SandboxFusion's server at --fusion-url",
    OURS: "NativeSandbox with its defaults",
}


def open_backends(
    names: list[str], interpreter: Interpreter, fusion_url: str | None, stack: ExitStack
) -> tuple[list[Backend], dict[str, str]]:
    """What can run, ready to; and by name why the others cannot. ``stack`` closes them.

    Raises ``SandboxError`` where ours, or a server that was named, does not work.
    """
    opened: list[Backend] = []
    absent: dict[str, str] = {}
    for name in names:
        made = _make(name, interpreter, fusion_url)
        if isinstance(made, str):
            absent[name] = made
            continue
        closing = stack.enter_context(ExitStack())
        runner = closing.enter_context(made)
        sandbox = runner if isinstance(runner, Sandbox) else None
        backend = Backend(name, None if sandbox else runner, sandbox, closing.close)
        problem = _trial(runner)
        if not problem:
            opened.append(backend)
        elif name in (BASELINE, OURS, "fusion"):
            raise SandboxError(f"{name} does not work here: {problem}")
        else:
            absent[name] = f"does not work here: {problem}"
    return opened, absent


def _make(
    name: str, interpreter: Interpreter, fusion_url: str | None
) -> AbstractContextManager[Blocking] | str:
    if name == BASELINE:
        return nullcontext(PlainSubprocess(interpreter))
    if name == "pool":
        return WorkerPool(interpreter, len(os.sched_getaffinity(0)))
    if name == "fusion":
        if fusion_url is None:
            return "not given (--fusion-url http://host:port)"
        try:
            return FusionSandbox(fusion_url, concurrency=_MOST_IN_FLIGHT)
        except ValueError as error:
            raise SandboxError(f"fusion: {error}") from None
    if name == OURS:
        return NativeSandbox()
    peer = find_bubblewrap() if name == "bubblewrap" else find_nsjail()
    if peer is None:
        return f"not installed (--install-peers, or {INSTALLABLE[name].by_hand})"
    kind = Bubblewrap if name == "bubblewrap" else Nsjail
    return nullcontext(kind(peer, interpreter))


def _trial(runner: Blocking) -> str:
    """The first thing that goes wrong with one snippet, or nothing."""
    result = runner.execute(ExecutionRequest("print('ready')", timeout_s=30.0))
    if result.stdout == "ready\n":
        return ""
    said = result.error or result.stderr.strip() or f"it printed {result.stdout!r}"
    return f"{said.splitlines()[0]}; expected 'ready' printed"
