"""A client of SandboxFusion's HTTP protocol (``POST /run_code``), for who runs such a server.

What a server of that kind isolates is its own affair; bytedance/SandboxFusion as configured by
default isolates nothing. The protocol knows three endings. What it cannot tell apart, this client
does not guess: a memory limit is an ``ERROR`` like any other exception, and death by a signal is
the exit code the server's shell made of it. Whatever went wrong between us and the snippet is
``INFRA``. Field names: ``sandbox/server/sandbox_api.py`` and ``sandbox/runners/types.py`` there.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import math
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from thor_fast.errors import SandboxError
from thor_fast.sandbox.base import ClosedOnExit
from thor_fast.sandbox.fusion_wire import decode_result, encode_request, with_defaults
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

__all__ = ["FusionSandbox"]

_CONNECT_TIMEOUT_S = 5.0
# Three more attempts, and only where no byte of the snippet was sent or the server refused it.
_RETRY_DELAYS_S = (0.1, 0.4, 1.6)
_MOST_ANSWER_BYTES = 64 << 20


class FusionSandbox(ClosedOnExit):
    """Runs snippets on a SandboxFusion server; implements :class:`thor_fast.sandbox.base.Sandbox`.

    ``url``: the server, with or without ``/run_code``. ``concurrency``: requests under way at a
    time; the rest wait here, because the server itself admits everything at once. ``timeout_s``,
    ``memory_bytes`` (``None``: the server's), ``max_output_bytes``: what a request that names none
    gets; the memory limit counts address space, interpreter included. ``grace_s``: seconds an
    answer may take beyond the snippet's own time limit before the request ends as INFRA.

    A request with ``cpu_s``, ``max_processes`` or ``env`` is a ``ValueError``: the protocol has no
    field for them. Cancelling drops the connection; whether that stops the snippet is up to the
    server. A failed connection is tried again, a request that may have run never is.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int = 64,
        timeout_s: float = 10.0,
        memory_bytes: int | None = None,
        max_output_bytes: int = 1 << 20,
        grace_s: float = 30.0,
    ) -> None:
        self._server = _Server(url)
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}, expected >= 1")
        if not 0 < grace_s < math.inf:
            raise ValueError(f"grace_s is {grace_s}, expected > 0 and finite")
        self._defaults = (timeout_s, memory_bytes, max_output_bytes)
        with_defaults(ExecutionRequest(""), self._defaults)
        self._grace_s = grace_s
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._calls: set[_Call] = set()
        self._closed = False
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="fusion-sandbox")

    def execute(self, request: ExecutionRequest | str) -> ExecutionResult:
        """Run one snippet; blocks the calling thread with the GIL released."""
        return self.execute_batch([request])[0]

    def execute_batch(self, requests: Sequence[ExecutionRequest | str]) -> list[ExecutionResult]:
        """Run many; results in the order of the requests."""
        calls: list[_Call] = []
        try:
            for request in requests:
                calls.append(self._start(request))  # noqa: PERF401  (what started is kept)
            return [call.future.result() for call in calls]
        except BaseException:
            for call in calls:
                call.abort("another request of the batch could not be made, or it was interrupted")
            raise

    async def submit(self, request: ExecutionRequest | str) -> ExecutionResult:
        """Run one snippet without blocking the event loop."""
        call = self._start(request)
        try:
            return await asyncio.wrap_future(call.future)
        except asyncio.CancelledError:
            call.abort("cancelled")
            raise

    def close(self) -> None:
        """Drop every connection (its request ends as INFRA) and the threads. Safe to call twice."""
        with self._lock:
            self._closed = True
            calls = list(self._calls)
        for call in calls:
            call.abort("the sandbox was closed")
        if os.getpid() == self._owner_pid:  # a fork has none of the threads to wait for
            self._threads.shutdown()

    def _start(self, request: ExecutionRequest | str) -> _Call:
        if isinstance(request, str):
            request = ExecutionRequest(request)
        if os.getpid() != self._owner_pid:
            raise SandboxError(
                f"this sandbox belongs to process {self._owner_pid}, got a call from its fork "
                f"{os.getpid()}: create one there"
            )
        timeout_s, memory_bytes, max_output_bytes = with_defaults(request, self._defaults)
        body = encode_request(request, timeout_s, memory_bytes)
        call = _Call(self._server, body, timeout_s + self._grace_s, max_output_bytes)
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox is closed, expected an open one")
            self._calls.add(call)
            call.future = self._threads.submit(call)
        call.future.add_done_callback(lambda _: self._forget(call))
        return call

    def _forget(self, call: _Call) -> None:
        with self._lock:
            self._calls.discard(call)


class _Server:
    """Where the requests go."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {url!r}, expected http://host:port or https://host:port")
        self.name = parts.netloc.rpartition("@")[2]
        self.path = parts.path.rstrip("/").removesuffix("/run_code") + "/run_code"
        self._https = parts.scheme == "https"
        self._address = (parts.hostname, parts.port)

    def connection(self) -> http.client.HTTPConnection:
        """A new one, not yet connected. One per request: a kept one may die unnoticed, and what
        it carried would then have to count as possibly run.
        """
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        return kind(*self._address, timeout=_CONNECT_TIMEOUT_S)


class _Call:
    """One request, on a thread of the pool. The clock starts there, not in the queue."""

    future: Future[ExecutionResult]

    def __init__(self, server: _Server, body: bytes, allowed_s: float, most_output: int) -> None:
        self._server = server
        self._body = body
        self._allowed_s = allowed_s
        self._most_output = most_output
        self._lock = threading.Lock()
        self._aborted = threading.Event()
        self._why = ""
        self._socket: socket.socket | None = None

    def abort(self, why: str) -> None:
        """End it now as INFRA; callable from any thread, without effect once it is over."""
        with self._lock:
            self._why = self._why or why
            self._aborted.set()
            if self._socket is not None:
                _wake(self._socket)

    def __call__(self) -> ExecutionResult:
        problem = ""
        for delay_s in (*_RETRY_DELAYS_S, None):
            if self._aborted.is_set():
                return _infra(self._why)
            try:
                connection = self._connect()
            except OSError as error:
                problem = f"connecting to {self._server.name}: {error}; the snippet was not run"
            else:
                http_status, body = self._exchange(connection)
                if http_status != http.HTTPStatus.TOO_MANY_REQUESTS:
                    return self._result(http_status, body)
                problem = f"{self._server.name} answered 429: it refused to run the snippet"
            if delay_s is not None:
                self._aborted.wait(delay_s)
        return _infra(problem)

    def _connect(self) -> http.client.HTTPConnection:
        connection = self._server.connection()
        connection.connect()
        with self._lock:
            self._socket = connection.sock
            if self._aborted.is_set():
                _wake(connection.sock)
        return connection

    def _exchange(self, connection: http.client.HTTPConnection) -> tuple[int, bytes]:
        """Send the request, read the answer: its HTTP status, or 0 and what went wrong."""
        deadline = time.monotonic() + self._allowed_s
        headers = {"Content-Type": "application/json", "Connection": "close"}
        try:
            connection.sock.settimeout(self._allowed_s)
            connection.request("POST", self._server.path, self._body, headers)
            # Made here, because getresponse() knows only a timeout per read.
            with http.client.HTTPResponse(connection.sock, method="POST") as response:
                reader = _DeadlineReader(response.fp.detach(), connection.sock, deadline)
                response.fp = io.BufferedReader(reader)
                response.begin()
                return response.status, response.read(_MOST_ANSWER_BYTES + 1)
        except TimeoutError:
            return 0, f"no answer within {self._allowed_s:g} s".encode()
        except (OSError, ValueError, http.client.HTTPException) as error:
            return 0, f"{type(error).__name__}: {error}".encode()
        finally:
            with self._lock:
                self._socket = None
            connection.close()

    def _result(self, http_status: int, body: bytes) -> ExecutionResult:
        if self._aborted.is_set():
            return _infra(self._why)
        if len(body) > _MOST_ANSWER_BYTES:
            problem = f"answer of more than {_MOST_ANSWER_BYTES} bytes"
        elif http_status == http.HTTPStatus.OK:
            try:
                return decode_result(json.loads(body), self._most_output)
            except (ValueError, RecursionError) as error:
                problem = f"unexpected answer: {error}"
        else:
            text = body[:200].decode("utf-8", "replace")
            problem = f"HTTP status {http_status}, expected 200: {text}" if http_status else text
        return _infra(f"{self._server.name}: {problem}")


class _DeadlineReader(io.RawIOBase):
    """Reads a socket's file; all reads together end by ``deadline``, however slowly bytes drip."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: float) -> None:
        self._raw, self._socket, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._socket.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _wake(sock: socket.socket) -> None:
    """End what a thread waits for on ``sock``."""
    with contextlib.suppress(OSError):  # the server was faster
        # The plain class's method: an SSLSocket's would drop state the other thread uses.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _infra(problem: str) -> ExecutionResult:
    return ExecutionResult(Status.INFRA, error=problem)
