"""Identical pure snippets of a group run once.

The samples of one prompt often write the same block, most of all the short first ones. A snippet
whose result can only ever be the same (:mod:`thor_fast.rollout.purity`) need not run again, and not
a second time at once: who comes while it runs waits for that run.

Not shared are a timeout and a failure of ours, which another run may not have, nor an end by a
signal or for lack of memory, which depend on the machine, nor an output in which an address shows.
Whoever waited for one of these runs the snippet after all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from thor_fast.rollout.purity import is_pure
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

__all__ = ["SnippetMemo"]

_LASTING = (Status.OK, Status.ERROR, Status.OUTPUT)
_ADDRESS = " at 0x"


class SnippetMemo:
    """The results of one group; for one event loop."""

    def __init__(self) -> None:
        self._runs: dict[str, asyncio.Future[ExecutionResult | None]] = {}
        self._pure: dict[str, bool] = {}

    async def run(
        self, request: ExecutionRequest, execute: Callable[[], Awaitable[ExecutionResult]]
    ) -> tuple[ExecutionResult, bool]:
        """The result of ``request``, by ``execute()`` unless it is known; and whether it was.

        Raises what ``execute`` raises; then the next one to come runs the snippet.
        """
        key = repr(request)
        known = self._runs.get(key)
        if known is None:
            return await self._first(key, execute), False
        # Judged only now, since many snippets come once.
        if key not in self._pure:
            self._pure[key] = is_pure(request.code)
        if self._pure[key]:
            await asyncio.wait([known])
            result = known.result()
            if result is not None:
                return result, True
        return await execute(), False

    async def _first(
        self, key: str, execute: Callable[[], Awaitable[ExecutionResult]]
    ) -> ExecutionResult:
        run = self._runs[key] = asyncio.get_running_loop().create_future()
        result = None
        try:
            result = await execute()
        finally:
            if result is not None and _lasts(result):
                run.set_result(result)
            else:
                del self._runs[key]
                run.set_result(None)
        return result


def _lasts(result: ExecutionResult) -> bool:
    shown = _ADDRESS in result.stdout or _ADDRESS in result.stderr
    return result.status in _LASTING and result.signal is None and not shown
