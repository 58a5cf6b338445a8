"""Small servers that speak SandboxFusion's protocol, well or badly. They isolate nothing."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


def run_in_python(document: dict[str, Any]) -> tuple[int, Any]:
    """What the real server does: a fresh interpreter, three endings."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in document["files"].items():
            Path(folder, name).write_bytes(base64.b64decode(content))
        Path(folder, "main.py").write_text(document["code"])
        started = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "main.py"],
                cwd=folder,
                input=document["stdin"].encode(),
                capture_output=True,
                timeout=document["run_timeout"],
            )
            run = {"status": "Finished", "return_code": done.returncode}
            streams = (done.stdout, done.stderr)
        except subprocess.TimeoutExpired as late:
            run = {"status": "TimeLimitExceeded", "return_code": None}
            streams = (late.stdout or b"", late.stderr or b"")
    run["execution_time"] = time.monotonic() - started
    run["stdout"], run["stderr"] = (s.decode("utf-8", "replace") for s in streams)
    status = "Success" if run["return_code"] == 0 else "Failed"
    return 200, {"status": status, "message": "", "run_result": run, "files": {}}


class FusionServer(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.documents: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.running = 0
        self.most_running = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FusionServer

    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.documents.append(document)
            self.server.paths.append(self.path)
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
        try:
            status, body = self.server.answer(document)
        finally:
            with self.server.lock:
                self.server.running -= 1
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.suppress(OSError):  # the client hung up
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving(answer: Answer) -> Iterator[FusionServer]:
    with FusionServer(answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def read_request(connection: socket.socket) -> None:
    """All of it: a socket closed over unread bytes resets the connection, answer and all."""
    with connection.makefile("rb") as stream:
        length = 0
        while line := stream.readline().strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        stream.read(length)


@contextmanager
def raw_server(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Answers one connection with whatever ``talk`` sends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                read_request(connection)
                with contextlib.suppress(OSError):  # the client hung up
                    talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@contextmanager
def hanging() -> Iterator[FusionServer]:
    """A server that answers nobody until the test is over."""
    over = threading.Event()

    def answer(_: dict[str, Any]) -> tuple[int, Any]:
        over.wait(300)
        return finished()({})

    with serving(answer) as server:
        try:
            yield server
        finally:
            over.set()


def finished(**fields: Any) -> Answer:
    run = {"status": "Finished", "return_code": 0, "execution_time": 0.25, "stdout": "x"} | fields
    return lambda _: (200, {"status": "Success", "message": "", "run_result": run})
