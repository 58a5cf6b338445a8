"""One request to vLLM: its sampling parameters, what comes out, and the KV it stands on."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from typing import Any

from thor_fast.engines.base import FinishReason, GenerateRequest, SamplingParams
from thor_fast.engines.vllm_start import import_vllm
from thor_fast.errors import EngineError

__all__ = ["PinNames", "call_seed", "finish_reason", "logprobs", "next_output", "parameters"]


class PinNames:
    """Who still needs which pin of :mod:`thor_fast.engines.vllm_connector`.

    A pin may be shared (forks start from their parent's). The connector lives in another process
    and hears only requests, so names nobody needs any more travel with the next one.
    """

    def __init__(self) -> None:
        self._users: Counter[str] = Counter()
        self._unused: list[str] = []

    def hold(self, name: str | None) -> str | None:
        """One more session stands on ``name``, which is returned."""
        if name is not None:
            self._users[name] += 1
        return name

    def release(self, name: str | None) -> None:
        """One session less; with the last one, the pin is to be dropped."""
        if name is None:
            return
        self._users[name] -= 1
        if self._users[name] <= 0:
            del self._users[name]
            self._unused.append(name)

    def only_one(self, name: str | None) -> bool:
        """Whether at most one session stands on ``name``."""
        return self._users[name or ""] <= 1

    def take_unused(self) -> list[str]:
        """The names to drop since the last call."""
        unused, self._unused = self._unused, []
        return unused

    def clear(self) -> None:
        """The connector has dropped everything."""
        self._users.clear()
        self._unused.clear()


def parameters(
    request: GenerateRequest,
    context_tokens: int,
    max_tokens: int,
    pause_token_ids: frozenset[int],
    kv_transfer: dict[str, Any] | None,
) -> Any:
    """What vLLM calls ``SamplingParams``; the first new token stands at ``context_tokens``."""
    vllm = import_vllm("vllm")
    return vllm.SamplingParams(
        temperature=request.sampling.temperature,
        seed=call_seed(request.sampling, context_tokens),
        max_tokens=max_tokens,
        stop_token_ids=sorted(request.stop_token_ids | pause_token_ids),
        ignore_eos=True,
        logprobs=0,  # the sampled token's alone
        detokenize=False,
        output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
        extra_args=None
        if kv_transfer is None
        else {"kv_transfer_params": {"thor_fast": kv_transfer}},
    )


async def next_output(outputs: AsyncGenerator[Any], ended: Callable[[], str]) -> Any:
    """The next output; whatever vLLM raises comes as ``EngineError``.

    ``ended()``: why the call was ended from outside, empty if it was not.
    """
    try:
        output = await anext(outputs)
    except Exception as error:
        # vLLM wraps what went wrong in errors that say only that something did.
        cause = error.__cause__ or error
        reason = ended() or f"vLLM broke: {type(cause).__name__}: {cause}"
        raise EngineError(reason) from error
    if reason := ended():
        raise EngineError(reason)
    return output


def logprobs(completion: Any, name: str) -> tuple[float, ...]:
    """Log-probs of the sampled tokens: float32 values, all finite."""
    entries = zip(completion.token_ids, completion.logprobs or (), strict=True)
    values = tuple(entry[token].logprob for token, entry in entries)
    if not all(map(math.isfinite, values)):
        raise EngineError(f"log-probs of session {name!r} are not finite: {values}")
    return values


def finish_reason(
    completion: Any, request: GenerateRequest, n_sampled: int, *, context_full: bool
) -> FinishReason | None:
    """How vLLM says that a call ended, in our words; None if it goes on or only pauses."""
    reason = completion.finish_reason
    if reason is None:
        return None
    if reason not in ("stop", "length"):
        raise EngineError(
            f"vLLM ended a call of session {request.session!r} with {reason!r} after {n_sampled} "
            "tokens, expected 'stop' or 'length'"
        )
    if completion.stop_reason in request.stop_token_ids:
        return FinishReason.STOP
    if n_sampled == request.max_tokens:
        return FinishReason.LENGTH
    return FinishReason.CONTEXT if context_full else None


def call_seed(sampling: SamplingParams, position: int) -> int:
    """A 63-bit seed for the call whose first new token stands at ``position``."""
    key = struct.pack("<QQ", sampling.seed & 0xFFFFFFFFFFFFFFFF, position)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
