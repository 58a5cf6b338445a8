"""vLLM as the engine: its in-process ``AsyncLLM``, token ids in and token ids out.

Every ``generate`` call is one vLLM request over the whole context. vLLM's prefix cache makes that
cheap: what is computed again is the tail of the context that does not fill a cache block, and what
is new. So a session here is only a name and a length; there is nothing in vLLM to fork or truncate,
and both are bookkeeping that the next request makes true.

The loop sees tokens one step late and drops what ran past a closing fence; closing the stream
aborts the vLLM request, which frees its blocks. vLLM is imported when an engine is built.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import math
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thor_fast.engines.base import (
    Capabilities,
    FinishReason,
    GenerateRequest,
    KVBudget,
    SamplingParams,
    TokenChunk,
    check_context,
    check_model_folder,
    check_position,
)
from thor_fast.engines.vllm_start import import_vllm, saved_dtype, start
from thor_fast.errors import EngineError

if TYPE_CHECKING:
    import torch

__all__ = ["VLLMEngine"]

# vLLM raises anything hotter than 0 and colder than this to it (sampling_params.py, _MAX_TEMP).
_COLDEST = 0.01
# vLLM's own few seconds are too few on a busy machine; it then kills its processes.
_SHUTDOWN_S = 60


@dataclass(slots=True)
class _Session:
    """``length``: tokens of the context and samples so far. ``request_id``: the call in flight.

    ``ended``: why a call in flight was ended from outside.
    """

    length: int = 0
    request_id: str | None = None
    ended: str = ""


class VLLMEngine:
    """``Engine`` over vLLM (V1; tested: 0.32); see :mod:`thor_fast.engines.base` for the contract.

    - **Log-probs** are vLLM's ``processed_logprobs``: after temperature, as the contract says, and
      at temperature 1 for greedy calls. vLLM takes them *after* top-k and top-p, renormalised over
      the tokens that are left, so a call that samples with either on is refused. So is a
      temperature in (0, 0.01) or above 2, which vLLM does not sample at.
    - **Noise.** vLLM has one generator per request. It is seeded from ``(seed, position of the
      first new token)``: an episode whose calls start at the same positions meets the same noise,
      whatever is sampled next to it and however far past a fence a call ran. A context cut into
      calls elsewhere meets other noise, which the contract's "function of (seed, position)" would
      exclude. Equal noise gives equal tokens only where logits are equal, and vLLM's are not the
      same to the last bit in batches of other sizes (its ``VLLM_BATCH_INVARIANT`` helps on GPUs).
    - **Budget.** ``kv_budget.max_tokens`` is the KV pool vLLM has allocated; ``max_sequences`` is
      lowered to as many full contexts as fit in it. ``live_*`` counts sessions not yet released:
      vLLM may have evicted their blocks, which costs a prefill and changes nothing else.
    - **Weights.** ``update_weights`` has vLLM read its model folder again, so save there first.
      Calls in flight go on under the new weights, from a prefill of all they have. Cached prefixes
      carry the version as vLLM's ``cache_salt``: old ones can never be hit again.
    - **Event loop.** vLLM ties itself to the event loop of the first call; use no other afterwards.

    Build it with :meth:`from_pretrained`.
    """

    def __init__(self, llm: Any, *, max_sequences: int, max_context: int) -> None:
        cache = llm.vllm_config.cache_config
        # Block 0 is vLLM's placeholder and holds nobody's tokens.
        blocks = cache.num_gpu_blocks - 1
        fitting = blocks // math.ceil(max_context / cache.block_size)
        self._llm = llm
        self._vocab: int = llm.model_config.get_vocab_size()
        self._max_sequences, self._max_context = min(max_sequences, max(fitting, 1)), max_context
        self._max_tokens: int = blocks * cache.block_size
        self._sessions: dict[str, _Session] = {}
        self._numbers = itertools.count()
        self._weight_version = 0
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        max_sequences: int,
        max_context: int,
        dtype: torch.dtype | None = None,
        **engine_args: Any,
    ) -> VLLMEngine:
        """Start vLLM on a local folder; ``dtype`` None takes the one it was saved in.

        ``engine_args``: further fields of vLLM's ``AsyncEngineArgs``, such as
        ``tensor_parallel_size`` or ``enforce_eager``. On a CPU the KV pool gets room for
        ``max_sequences`` full contexts, unless ``kv_cache_memory_bytes`` or the environment's
        ``VLLM_CPU_KVCACHE_SPACE`` says otherwise; on a GPU it is what vLLM takes.

        Blocks for seconds to minutes and starts processes that import the caller's main module, so
        call it under ``if __name__ == "__main__"``. Raises ``EngineError`` where there is no model
        at ``path``, vLLM is not installed, or it does not start.
        """
        check_model_folder(path)
        if max_sequences < 1:
            raise EngineError(f"max_sequences is {max_sequences}, expected at least 1")
        if max_context < 2:
            raise EngineError(f"max_context is {max_context}, expected at least 2")
        ours = {
            "model": str(path),
            "dtype": saved_dtype(Path(path)) if dtype is None else dtype,
            "max_num_seqs": max_sequences,
            "max_model_len": max_context,
            "logprobs_mode": "processed_logprobs",
            "enable_prefix_caching": True,
            # Ids in and out; and nobody but the request says what stops a call.
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "disable_log_stats": True,
        }
        if taken := sorted(ours.keys() & engine_args.keys()):
            raise EngineError(f"engine_args sets {taken[0]}, expected none of {sorted(ours)}")
        # No local name for it: vLLM keeps frames of its start, and it would never be freed.
        return cls(
            start({**ours, **engine_args}), max_sequences=max_sequences, max_context=max_context
        )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            max_context=self._max_context, watch=False, native_fork=False, native_truncate=False
        )

    @property
    def kv_budget(self) -> KVBudget:
        return KVBudget(
            max_sequences=self._max_sequences,
            max_tokens=self._max_tokens,
            live_sequences=len(self._sessions),
            live_tokens=sum(session.length for session in self._sessions.values()),
        )

    @property
    def weight_version(self) -> int:
        return self._weight_version

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Stream tokens; see :meth:`Engine.generate`. ``watch`` is ignored.

        Raises ``EngineError`` for a context too long to start, a token id outside the vocabulary,
        sampling parameters that would break the contract of log-probs, a session that is generating
        already or is released meanwhile, a log-prob that is not finite, a closed or broken engine.
        """
        self._check(request)
        session = self._open(request)
        n_sampled = 0
        finish: FinishReason | None = None
        try:
            async with contextlib.aclosing(self._submit(request, session)) as outputs:
                while finish is None:
                    output = await _next_output(outputs, session)
                    completion = output.outputs[0]
                    ids = tuple(completion.token_ids)
                    logprobs = _logprobs(completion, request.session)
                    n_sampled += len(ids)
                    session.length += len(ids)
                    finish = _finish(completion, request, n_sampled)
                    cached = output.num_cached_tokens
                    first = n_sampled == len(ids) and cached is not None
                    prefill = len(request.token_ids) - cached if first else None
                    yield TokenChunk(ids, logprobs, finish, prefill)
        finally:
            session.request_id = None

    async def fork(self, session: str, n: int, at_token: int) -> list[str]:
        self._known(session, at_token)
        if n < 1:
            raise EngineError(f"fork into {n} sessions, expected at least 1")
        names = [f"{session}/{next(self._numbers)}" for _ in range(n)]
        self._sessions.update({name: _Session(at_token) for name in names})
        return names

    async def truncate(self, session: str, at_token: int) -> None:
        known = self._known(session, at_token)
        if known.request_id is not None:
            raise EngineError(f"session {session!r} is generating, expected it idle to truncate it")
        known.length = at_token

    async def release(self, session: str) -> None:
        """Forget a session; a call in flight on it raises ``EngineError``."""
        known = self._sessions.pop(session, None)
        if known is not None:
            reason = f"session {session!r} was released while it was generating"
            await self._end(known, reason=reason)

    async def update_weights(self, version: int) -> None:
        """See :meth:`Engine.update_weights`, and the class for what it does.

        Raises ``EngineError`` unless ``version`` has grown, or if vLLM cannot read the weights; the
        engine then holds a mixture, and must not be used before an update that succeeds.
        """
        if version <= self._weight_version:
            raise EngineError(
                f"weight version is {version}, expected more than {self._weight_version}, "
                "the present one"
            )
        if self._closed:
            raise EngineError("the engine is closed")
        try:
            await self._llm.pause_generation(mode="keep", clear_cache=True)
            try:
                await self._llm.collective_rpc("reload_weights")
            finally:
                await self._llm.resume_generation()
        except Exception as error:
            raise EngineError(f"vLLM cannot take new weights: {error}") from error
        self._weight_version = version

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        sessions, self._sessions = self._sessions, {}
        await self._end(*sessions.values(), reason="the engine is closed")
        if self._llm.output_handler is not None:
            # It would report the end of vLLM's processes as a failure.
            self._llm.output_handler.cancel()
        await asyncio.to_thread(self._llm.shutdown, timeout=_SHUTDOWN_S)
        # Calls that were on their way to vLLM when the first ones were ended.
        await self._end(*sessions.values(), reason="the engine is closed")
        # Held until the interpreter exits, its destructor would complain then.
        self._llm = None

    def _check(self, request: GenerateRequest) -> None:
        if self._closed:
            raise EngineError("the engine is closed")
        check_context(request.token_ids, self._max_context, self._vocab)
        sampling = request.sampling
        if sampling.temperature == 0:
            return
        if not _COLDEST <= sampling.temperature <= 2:
            raise EngineError(
                f"temperature is {sampling.temperature}, expected 0 or {_COLDEST} to 2 with vLLM"
            )
        if sampling.top_k > 0 or sampling.top_p < 1:
            raise EngineError(
                f"top_k is {sampling.top_k} and top_p {sampling.top_p}, expected 0 and 1: vLLM "
                "has no log-probs after temperature and before them"
            )

    def _open(self, request: GenerateRequest) -> _Session:
        """The session, created if unknown, with a call in flight."""
        session = self._sessions.setdefault(request.session, _Session())
        if session.request_id is not None:
            raise EngineError(f"session {request.session!r} is generating, expected it idle")
        session.request_id = f"{request.session}#{next(self._numbers)}"
        session.length = len(request.token_ids)
        return session

    def _submit(self, request: GenerateRequest, session: _Session) -> AsyncGenerator[Any]:
        vllm = import_vllm("vllm")
        length = len(request.token_ids)
        params = vllm.SamplingParams(
            temperature=request.sampling.temperature,
            seed=_call_seed(request.sampling, length),
            max_tokens=min(request.max_tokens, self._max_context - length),
            stop_token_ids=sorted(request.stop_token_ids),
            ignore_eos=True,
            logprobs=0,  # the sampled token's alone
            detokenize=False,
            output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
        )
        prompt = {
            "prompt_token_ids": list(request.token_ids),
            "cache_salt": f"w{self._weight_version}",
        }
        outputs: AsyncGenerator[Any] = self._llm.generate(prompt, params, session.request_id)
        return outputs

    def _known(self, name: str, at_token: int) -> _Session:
        session = self._sessions.get(name)
        if session is None:
            raise EngineError(f"no session {name!r}, expected one that has generated or was forked")
        check_position(name, at_token, session.length)
        return session

    async def _end(self, *sessions: _Session, reason: str) -> None:
        """End the calls in flight, if there are any: their streams raise ``reason``."""
        for session in sessions:
            session.ended = reason
            if session.request_id is not None:
                await self._llm.abort(session.request_id)


async def _next_output(outputs: AsyncGenerator[Any], session: _Session) -> Any:
    """The next output; whatever vLLM raises comes as ``EngineError``."""
    try:
        output = await anext(outputs)
    except Exception as error:
        # vLLM wraps what went wrong in errors that say only that something did.
        cause = error.__cause__ or error
        reason = session.ended or f"vLLM broke: {type(cause).__name__}: {cause}"
        raise EngineError(reason) from error
    if session.ended:
        raise EngineError(session.ended)
    return output


def _logprobs(completion: Any, name: str) -> tuple[float, ...]:
    """Log-probs of the sampled tokens: float32 values, all finite."""
    entries = zip(completion.token_ids, completion.logprobs or (), strict=True)
    logprobs = tuple(entry[token].logprob for token, entry in entries)
    if not all(map(math.isfinite, logprobs)):
        raise EngineError(f"log-probs of session {name!r} are not finite: {logprobs}")
    return logprobs


def _finish(completion: Any, request: GenerateRequest, n_sampled: int) -> FinishReason | None:
    """How vLLM says that a call ended, in our words."""
    reason = completion.finish_reason
    if reason is None:
        return None
    if reason == "stop":
        return FinishReason.STOP
    if reason == "length":
        return FinishReason.LENGTH if n_sampled == request.max_tokens else FinishReason.CONTEXT
    raise EngineError(
        f"vLLM ended a call of session {request.session!r} with {reason!r} after {n_sampled} "
        "tokens, expected 'stop' or 'length'"
    )


def _call_seed(sampling: SamplingParams, position: int) -> int:
    """A 63-bit seed for the call whose first new token stands at ``position``."""
    key = struct.pack("<QQ", sampling.seed & 0xFFFFFFFFFFFFFFFF, position)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
