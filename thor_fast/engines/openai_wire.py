"""The OpenAI completions protocol, with vLLM's token ids: one request body, one event of a stream.

Spoken by vLLM's server and whoever follows it in ``return_token_ids`` (vLLM's
``entrypoints/openai/completion/protocol.py``).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from thor_fast.engines.base import GenerateRequest
from thor_fast.engines.vllm_calls import call_seed
from thor_fast.errors import EngineError

__all__ = ["Event", "body", "parse_event"]


@dataclass(frozen=True, slots=True)
class Event:
    """``prompt``: the prompt as the server read it, on the first event. ``finish``: its words."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str | None
    prompt: tuple[int, ...] | None


def body(
    request: GenerateRequest,
    context: list[int],
    *,
    model: str,
    max_tokens: int,
    stop_token_ids: frozenset[int],
    cache_salt: str,
) -> dict[str, Any]:
    """The JSON of one completion that continues ``context``."""
    return {
        "model": model,
        "prompt": context,
        "max_tokens": max_tokens,
        "temperature": request.sampling.temperature,
        "top_p": request.sampling.top_p,
        "seed": call_seed(request.sampling, len(context)),
        "logprobs": 1,
        "stream": True,
        # Beyond OpenAI's own protocol. What is 0 or 1 here could be something else in the model's
        # generation_config.json, whose values a server takes as defaults.
        "top_k": request.sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "return_token_ids": True,
        "stop_token_ids": sorted(stop_token_ids),
        "ignore_eos": True,
        "cache_salt": cache_salt,
    }


def parse_event(line: str, name: str) -> Event | None:
    """One line of the stream, or None for one that says nothing of tokens.

    Raises ``EngineError`` for what the server says went wrong, and for what it should not say.
    """
    if not line.startswith("data:"):
        return None
    data = line.removeprefix("data:").strip()
    if data == "[DONE]":
        return None
    try:
        message = json.loads(data)
        if "error" in message:
            raise EngineError(f"the server broke off session {name!r}: {_reason(message)}")
        if not message["choices"]:
            return None
        return _event(message["choices"][0], name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            f"the server sent {data[:200]!r} for session {name!r}, expected a completion chunk"
        ) from error


def _event(choice: dict[str, Any], name: str) -> Event:
    token_ids = choice.get("token_ids")
    if token_ids is None:
        raise EngineError(
            f"the server sent no token_ids for session {name!r}, expected them as "
            "return_token_ids asks: it must be vLLM's server or one that follows it"
        )
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
    if len(logprobs) != len(token_ids):
        raise EngineError(
            f"the server sent {len(token_ids)} token_ids and {len(logprobs)} token_logprobs for "
            f"session {name!r}, expected as many"
        )
    if not all(p is not None and math.isfinite(p) for p in logprobs):
        raise EngineError(f"log-probs of session {name!r} are not finite: {logprobs}")
    prompt = choice.get("prompt_token_ids")
    return Event(
        tuple(token_ids),
        tuple(logprobs),
        choice.get("finish_reason"),
        None if prompt is None else tuple(prompt),
    )


def _reason(message: dict[str, Any]) -> str:
    error = message["error"]
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
