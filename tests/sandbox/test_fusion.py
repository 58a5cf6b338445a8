"""The client of SandboxFusion's protocol, against small servers that speak it well or badly."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from thor_fast.errors import SandboxError
from thor_fast.sandbox import ExecutionRequest, Sandbox, Status
from thor_fast.sandbox import fusion as fusion_module
from thor_fast.sandbox.fusion import FusionSandbox

from .fusion_server import (
    Answer,
    FusionServer,
    finished,
    hanging,
    raw_server,
    read_request,
    run_in_python,
    serving,
)

Until = Callable[[Callable[[], object]], Awaitable[None]]


@pytest.fixture(scope="module")
def server() -> Iterator[FusionServer]:
    with serving(run_in_python) as found:
        yield found


@pytest.fixture
def sandbox(server: FusionServer) -> Iterator[FusionSandbox]:
    server.documents.clear()
    with FusionSandbox(server.url, concurrency=4) as box:
        yield box


def ask(answer: Answer, request: ExecutionRequest | str = "code", **options: Any) -> Any:
    with serving(answer) as server, FusionSandbox(server.url, **options) as box:
        return box.execute(request)


# --- what a snippet does --------------------------------------------------------------------------


def test_is_a_sandbox(sandbox: FusionSandbox) -> None:
    assert isinstance(sandbox, Sandbox)


@pytest.mark.parametrize(
    ("code", "status", "exit_code", "signal"),
    [
        ("print(6 * 7)", Status.OK, 0, None),
        ("", Status.OK, 0, None),
        ("import sys; sys.exit(3)", Status.ERROR, 3, None),
        ("1 / 0", Status.ERROR, 1, None),
        ("x =", Status.ERROR, 1, None),
        ("import os; os.kill(os.getpid(), 9)", Status.ERROR, None, 9),
    ],
)
def test_endings(
    sandbox: FusionSandbox, code: str, status: Status, exit_code: int | None, signal: int | None
) -> None:
    result = sandbox.execute(code)
    assert (result.status, result.exit_code, result.signal) == (status, exit_code, signal)
    assert result.passed is (status is Status.OK)
    assert result.error == ""
    assert result.wall_s > 0


def test_text_comes_back(sandbox: FusionSandbox) -> None:
    result = sandbox.execute("import sys\nprint('Grüße 🎉')\nprint('e', file=sys.stderr)\n1 / 0")
    assert result.stdout == "Grüße 🎉\n"
    assert result.stderr.startswith("e\n")
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_time_limit(sandbox: FusionSandbox) -> None:
    result = sandbox.execute(ExecutionRequest("while True: pass", timeout_s=0.3))
    assert (result.status, result.exit_code, result.passed) == (Status.TIMEOUT, None, False)


def test_stdin_and_files(sandbox: FusionSandbox) -> None:
    request = ExecutionRequest(
        "print(input(), open('a.bin', 'rb').read())", stdin=b"\xc3\xa9", files={"a.bin": b"\xff\0"}
    )
    assert sandbox.execute(request).stdout == "é b'\\xff\\x00'\n"


def test_what_is_sent(server: FusionServer, sandbox: FusionSandbox) -> None:
    sandbox.execute(ExecutionRequest("print(1)", timeout_s=2.5, memory_bytes=(300 << 20) + 1))
    sandbox.execute("print(2)")
    assert server.paths[-1] == "/run_code"
    assert server.documents == [
        {
            "code": "print(1)",
            "language": "python",
            "run_timeout": 2.5,
            "stdin": "",
            "files": {},
            "memory_limit_MB": 301,
        },
        {"code": "print(2)", "language": "python", "run_timeout": 10.0, "stdin": "", "files": {}},
    ]


@pytest.mark.parametrize(
    ("suffix", "path"),
    [
        ("", "/run_code"),
        ("/", "/run_code"),
        ("/run_code", "/run_code"),
        ("/faas/sandbox/", "/faas/sandbox/run_code"),
    ],
)
def test_url_with_and_without_the_path(suffix: str, path: str) -> None:
    with serving(finished()) as server, FusionSandbox(server.url + suffix) as box:
        assert box.execute("x").status is Status.OK
        assert server.paths == [path]


# --- output ---------------------------------------------------------------------------------------


def test_long_output_keeps_head_and_tail() -> None:
    result = ask(
        finished(stdout="head" + "x" * 1000 + "tail"), ExecutionRequest("c", max_output_bytes=20)
    )
    assert (result.status, result.truncated, result.exit_code) == (Status.OUTPUT, True, 0)
    assert result.stdout == "headxxxxxx\n... [988 bytes omitted] ...\nxxxxxxtail"


def test_output_that_just_fits_is_whole() -> None:
    result = ask(finished(stdout="x" * 20), ExecutionRequest("c", max_output_bytes=20))
    assert (result.status, result.truncated, result.stdout) == (Status.OK, False, "x" * 20)


def test_a_stream_as_long_as_the_servers_own_limit_counts_as_cut() -> None:
    result = ask(finished(stderr="x" * (1 << 20)))
    assert (result.status, result.truncated, len(result.stderr)) == (Status.OUTPUT, True, 1 << 20)


def test_a_timeout_with_much_output_stays_a_timeout() -> None:
    answer = finished(status="TimeLimitExceeded", return_code=None, stdout="x" * 100)
    result = ask(answer, max_output_bytes=10)
    assert (result.status, result.truncated) == (Status.TIMEOUT, True)


def test_null_streams_are_empty() -> None:
    result = ask(finished(stdout=None, stderr=None))
    assert (result.status, result.stdout, result.stderr, result.wall_s) == (Status.OK, "", "", 0.25)


# --- what is not the snippet's fault --------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda _: (500, b"oh no"), "HTTP status 500, expected 200: oh no"),
        (lambda _: (422, b"bad field"), "HTTP status 422, expected 200: bad field"),
        (lambda _: (504, b""), "HTTP status 504, expected 200"),
        (lambda _: (302, b""), "HTTP status 302, expected 200"),
        (lambda _: (200, b"<html>"), "unexpected answer: Expecting value"),
        (lambda _: (200, b"\xff\xfe"), "unexpected answer"),
        (lambda _: (200, b"[" * 100_000), "unexpected answer"),
        (lambda _: (200, []), "run_result is NoneType, expected an object"),
        (lambda _: (200, {"status": "SandboxError", "message": "no pod"}), "server failed: no pod"),
        (lambda _: (200, {"status": "Success", "run_result": None}), "run_result is NoneType"),
        (finished(status="Error", stderr="fork: EAGAIN"), "could not run it: fork: EAGAIN"),
        (finished(status="Paused"), "run status 'Paused', expected Finished, Error or"),
        (finished(return_code=None), "return_code is None, expected a whole number"),
        (finished(return_code=True), "return_code is True, expected a whole number"),
        (finished(stdout=7), "stdout is int, expected a string or null"),
    ],
)
def test_a_failing_server_is_infra(answer: Answer, problem: str) -> None:
    result = ask(answer)
    assert (result.status, result.passed) == (Status.INFRA, None)
    assert problem in result.error


def test_nobody_listens_is_infra_and_says_it_was_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion_module, "_RETRY_DELAYS_S", (0.0, 0.0))
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # or somebody else might take the port, and listen
        with FusionSandbox(f"http://127.0.0.1:{deaf.getsockname()[1]}") as box:
            result = box.execute("print(1)")
    assert result.status is Status.INFRA
    assert "Connection refused" in result.error
    assert "the snippet was not run" in result.error


def test_a_server_that_comes_up_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion_module, "_RETRY_DELAYS_S", (0.05,) * 1200)
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        with FusionSandbox(f"http://127.0.0.1:{late.getsockname()[1]}") as box:
            result: list[Any] = []
            thread = threading.Thread(target=lambda: result.append(box.execute("x")))
            thread.start()
            time.sleep(0.2)  # the first attempt has failed by now, or is about to
            late.listen()
            connection, _ = late.accept()
            with connection:
                read_request(connection)
                body = json.dumps(finished()({})[1]).encode()
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
            thread.join()
    assert result[0].status is Status.OK


def test_a_refusal_is_tried_again_and_a_failure_never_is() -> None:
    answers = iter([(429, b"later"), (429, b"later"), finished()({})])
    with serving(lambda _: next(answers)) as server, FusionSandbox(server.url) as box:
        assert box.execute("x").status is Status.OK
        assert len(server.documents) == 3
    with serving(lambda _: (503, b"")) as server, FusionSandbox(server.url) as box:
        assert box.execute("x").status is Status.INFRA
        assert len(server.documents) == 1


def test_endless_refusal_is_infra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion_module, "_RETRY_DELAYS_S", (0.0, 0.0))
    with serving(lambda _: (429, b"")) as server, FusionSandbox(server.url) as box:
        result = box.execute("x")
        assert len(server.documents) == 3
    assert result.status is Status.INFRA
    assert "429: it refused to run the snippet" in result.error


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (b"", "RemoteDisconnected"),
        (b"SSH-2.0-OpenSSH\r\n", "BadStatusLine"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", "unexpected answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{", "unexpected answer"),
    ],
)
def test_a_broken_conversation_is_infra(sent: bytes, problem: str) -> None:
    with raw_server(lambda c: c.sendall(sent)) as url, FusionSandbox(url) as box:
        result = box.execute("x")
    assert result.status is Status.INFRA
    assert problem in result.error


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"])
def test_an_answer_that_drips_ends_at_the_deadline(first: bytes) -> None:
    done = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(first)
        while not done.wait(0.02):
            connection.sendall(b"H")

    with raw_server(drip) as url, FusionSandbox(url, timeout_s=0.5, grace_s=1) as box:
        result = box.execute("x")
        done.set()
    assert result.status is Status.INFRA
    assert "no answer within 1.5 s" in result.error


def test_an_answer_too_large_is_infra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion_module, "_MOST_ANSWER_BYTES", 1000)
    result = ask(finished(stdout="x" * 1000))
    assert result.status is Status.INFRA
    assert "answer of more than 1000 bytes" in result.error


# --- calling it -----------------------------------------------------------------------------------


def test_batch_keeps_the_order_and_the_concurrency() -> None:
    three = threading.Barrier(3, timeout=60)

    def answer(document: dict[str, Any]) -> tuple[int, Any]:
        three.wait()  # for three at a time
        time.sleep(0.02 * (int(document["code"]) % 3))
        return finished(stdout=document["code"])(document)

    with serving(answer) as server, FusionSandbox(server.url, concurrency=3) as box:
        codes = [str(i) for i in range(9)]
        assert [r.stdout for r in box.execute_batch(codes)] == codes
        assert box.execute_batch([]) == []
        assert server.most_running == 3


async def test_submit_does_not_block_the_loop() -> None:
    with hanging() as server, FusionSandbox(server.url) as box:
        tasks = [asyncio.create_task(box.submit("x")) for _ in range(4)]
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in tasks), "the loop went round while they ran"
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_results_are_their_submitters_own(sandbox: FusionSandbox) -> None:
    results = await asyncio.gather(*(sandbox.submit(f"print({i})") for i in range(8)))
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(8)]


async def test_cancelling_frees_the_place_at_once(until: Until) -> None:
    with hanging() as server, FusionSandbox(server.url, concurrency=1) as box:
        task = asyncio.create_task(box.submit("x"))
        await until(lambda: server.running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.answer = finished()
        async with asyncio.timeout(60):
            assert (await box.submit("y")).status is Status.OK


async def test_closing_answers_who_waits(until: Until) -> None:
    with hanging() as server:
        box = FusionSandbox(server.url, concurrency=1)
        tasks = [asyncio.create_task(box.submit("x")) for _ in range(3)]
        await until(lambda: server.running)
        await asyncio.to_thread(box.close)
        for result in await asyncio.gather(*tasks):
            assert (result.status, result.error) == (Status.INFRA, "the sandbox was closed")


def test_closed_is_an_error(server: FusionServer) -> None:
    with FusionSandbox(server.url) as box:
        assert box.execute("print(1)").stdout == "1\n"
    box.close()
    with pytest.raises(SandboxError, match="the sandbox is closed"):
        box.execute("print(1)")


def test_closing_leaves_no_thread(server: FusionServer) -> None:
    others = threading.enumerate()
    with FusionSandbox(server.url) as box:
        box.execute_batch(["pass"] * 4)
    mine = [thread for thread in threading.enumerate() if thread not in others]
    assert not [thread for thread in mine if thread.name.startswith("fusion-sandbox")]


def test_a_fork_is_told_so(sandbox: FusionSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(SandboxError, match="got a call from its fork -1: create one there"):
        sandbox.execute("print(1)")


# --- what the caller gets wrong -------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "localhost:8080", "ftp://host/", "http://", "http://:8080"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected http://host:port or https://host:port"):
        FusionSandbox(url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "concurrency is 0, expected >= 1"),
        ({"grace_s": 0}, "grace_s is 0, expected > 0"),
        ({"grace_s": float("inf")}, "grace_s is inf, expected > 0 and finite"),
        ({"timeout_s": 0}, "timeout_s is 0, expected > 0 and at most"),
        ({"memory_bytes": -1}, "memory_bytes is -1, expected > 0 and at most"),
        ({"max_output_bytes": 0}, "max_output_bytes is 0, expected > 0 and at most"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusionSandbox("http://localhost:1", **options)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ExecutionRequest("", language="cobol"), "'cobol', expected 'python'"),
        (ExecutionRequest("", timeout_s=float("nan")), "expected > 0 and at most"),
        (ExecutionRequest("", cpu_s=1), "cpu_s is 1, expected none"),
        (ExecutionRequest("", max_processes=4), "max_processes is 4, expected none"),
        (ExecutionRequest("", env={"K": "v"}), r"env is \{'K': 'v'\}, expected none"),
        (ExecutionRequest("", stdin=b"\xff"), "can't decode byte 0xff"),
        (ExecutionRequest("", files={"/etc/passwd": b""}), "expected a relative path without"),
        (ExecutionRequest("", files={"a/../../b": b""}), "expected a relative path without"),
    ],
)
def test_senseless_requests_are_refused(
    server: FusionServer, sandbox: FusionSandbox, request_: ExecutionRequest, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sandbox.execute_batch(["print(1)", request_])
    assert all(document["code"] == "print(1)" for document in server.documents)


@pytest.mark.parametrize("limits", [{"memory_bytes": 1e9}, {"timeout_s": "1"}, {"timeout_s": True}])
def test_limits_of_the_wrong_type_are_refused(
    sandbox: FusionSandbox, limits: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match=r"expected a (whole )?number"):
        sandbox.execute(ExecutionRequest("", **limits))
    with pytest.raises(TypeError, match="code is bytes, expected str"):
        sandbox.execute(ExecutionRequest(b"print(1)"))  # type: ignore[arg-type]
