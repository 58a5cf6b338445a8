"""A stand-in for the server that THOR runs its snippets on, by the same steps.

``POST /run_code`` of SandboxFusion in its default configuration, ``isolation: none``: the snippet
is written to a file in a folder of its own, ``bash`` starts a fresh interpreter on it, both outputs
are read, up to a MiB of each is kept, and the process group is killed at the end or the time limit
(``run_command_bare`` in sandbox/runners/base.py there). Left out, in its favour: FastAPI, psutil,
code between fork and exec, which makes it copy the whole server's page tables, and the start-up
files of ``bash``.

UNSAFE: a snippet has the rights of whoever starts this. Run as ``python fusion_server.py PYTHON``,
it prints its port and serves until its standard input ends; nothing it started is left then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_KEPT_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16
_TIMEOUT_S = 10.0


async def _drain(stream: asyncio.StreamReader | None, kept: bytearray) -> None:
    assert stream is not None
    while piece := await stream.read(_PIECE_BYTES):
        kept += piece[: _KEPT_BYTES - len(kept)]


async def _run(python: str, code: str, timeout_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "snippet.py"
        path.write_text(code, encoding="utf-8")
        started = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *("/bin/bash", "-c", f"{shlex.quote(python)} {shlex.quote(str(path))}"),
            cwd=folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        out, err = bytearray(), bytearray()
        over = asyncio.gather(
            _drain(process.stdout, out), _drain(process.stderr, err), process.wait()
        )
        status = "Finished"
        try:
            await asyncio.wait_for(over, timeout_s)
        except TimeoutError:
            status = "TimeLimitExceeded"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return {
        "status": status,
        "execution_time": time.perf_counter() - started,
        "return_code": process.returncode,
        "stdout": out.decode(errors="replace"),
        "stderr": err.decode(errors="replace"),
    }


async def _answer(python: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request per connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").lower().split("\r\n")
        length = next(int(x.partition(":")[2]) for x in lines if x.startswith("content-length:"))
        request = json.loads(await reader.readexactly(length))
        run = await _run(python, request["code"], float(request.get("run_timeout", _TIMEOUT_S)))
        status = "Success" if run.get("return_code") == 0 else "Failed"
        body = json.dumps({"status": status, "message": "", "run_result": run}).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):  # the client has gone
        pass
    finally:
        writer.close()


async def _serve(python: str) -> None:
    running: set[asyncio.Task[None]] = set()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        task.add_done_callback(running.discard)
        await _answer(python, reader, writer)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
