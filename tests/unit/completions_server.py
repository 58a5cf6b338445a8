"""An HTTP server in the test's own loop that answers as vLLM 0.32's completions route does.

Status lines, headers and events are those of a recorded exchange; what it "samples" is given.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"vary: Origin\r\ntransfer-encoding: chunked\r\n\r\n"
)


class CompletionsServer:
    """``say(body, index)``: the token at that index of a completion.

    ``refuse``: statuses to answer with, first, before any completion. ``break_after``: for each
    further request the number of tokens after which the connection is cut, None for never.
    ``edit``: changes an event before it is sent.
    """

    def __init__(self, say, *, refuse=(), break_after=(), edit=lambda event: event) -> None:
        self.say, self.edit = say, edit
        self.refuse, self.break_after = list(refuse), list(break_after)
        self.bodies: list[dict] = []
        self.headers: list[str] = []
        self.in_flight = 0
        self.delay_s = 0.0

    @asynccontextmanager
    async def serving(self):
        """The base URL."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"

    async def _serve(self, reader, writer) -> None:
        self.in_flight += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.headers.append(head.decode().lower())
                length = int(self.headers[-1].split("content-length:")[1].split("\r\n")[0])
                await self._answer(json.loads(await reader.readexactly(length)), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            self.in_flight -= 1
            writer.close()

    async def _answer(self, body: dict, writer) -> None:
        if self.refuse:
            text = json.dumps({"error": {"message": "not now", "type": "X", "code": 1}}).encode()
            head = f"HTTP/1.1 {self.refuse.pop(0)} No\r\ncontent-type: application/json\r\n"
            writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(text) + text)
            await writer.drain()
            return
        self.bodies.append(body)
        limit = self.break_after.pop(0) if self.break_after else None
        writer.write(HEAD)
        for index in range(body["max_tokens"]):
            if index == limit:
                raise ConnectionError("cut")
            token = self.say(body, index)
            event = self._event(body, token, index)
            await self._send(writer, f"data: {json.dumps(self.edit(event))}\n\n")
            if event["choices"][0]["finish_reason"] is not None:
                break
        await self._send(writer, "data: [DONE]\n\n")
        await self._send(writer, "")

    def _event(self, body: dict, token: int, index: int) -> dict:
        stopped = token in body["stop_token_ids"]
        finish = "stop" if stopped else "length" if index + 1 == body["max_tokens"] else None
        logprobs = {
            "text_offset": [index],
            "token_logprobs": [-token / 1000],
            "tokens": ["x"],
            "top_logprobs": [{"x": -token / 1000}],
        }
        choice = {
            "index": 0,
            "text": "x",
            "logprobs": logprobs,
            "finish_reason": finish,
            "stop_reason": token if stopped else None,
            "prompt_token_ids": None if index else body["prompt"],
            "token_ids": [token],
        }
        return {
            "id": "cmpl-a81d55f06f02408f",
            "object": "text_completion",
            "created": 1795407316,
            "model": body["model"],
            "choices": [choice],
        }

    async def _send(self, writer, text: str) -> None:
        data = text.encode()
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await writer.drain()
        await asyncio.sleep(self.delay_s)
