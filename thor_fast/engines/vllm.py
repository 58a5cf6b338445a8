"""vLLM as the engine: its in-process ``AsyncLLM``, token ids in and token ids out.

Every ``generate`` call is a vLLM request over the whole context. vLLM's prefix cache makes that
cheap: what is computed again is the tail of the context that does not fill a cache block, and what
is new. So a session here is only a name and a length; forking and truncating are bookkeeping that
the next request makes true. With ``splice_kv`` a session also names the KV it stands on, which
:mod:`thor_fast.engines.vllm_connector` holds inside vLLM: then nothing is computed twice.

At a token of ``pause_token_ids`` vLLM stops by itself and the stream waits: if the loop asks for
more, the call goes on in another vLLM request. A fence closed by other tokens is seen one step
late; the loop drops what ran past it, and closing the stream aborts the vLLM request, which frees
its blocks. vLLM is imported when an engine is built.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thor_fast.engines.base import (
    Capabilities,
    FinishReason,
    GenerateRequest,
    KVBudget,
    TokenChunk,
    check_context,
    check_model_folder,
    check_position,
)
from thor_fast.engines.vllm_calls import (
    PinNames,
    finish_reason,
    logprobs,
    next_output,
    parameters,
)
from thor_fast.engines.vllm_start import saved_dtype, splicing, start
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

    ``ended``: why a call in flight was ended from outside. ``pin``: where the connector has its KV.
    """

    length: int = 0
    request_id: str | None = None
    ended: str = ""
    pin: str | None = None


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
    - **Budget.** ``kv_budget.max_tokens`` is the KV pool vLLM has allocated. ``live_*`` counts
      sessions not yet released: vLLM may have evicted their blocks, which costs a prefill and
      changes nothing else.
    - **Weights.** ``update_weights`` has vLLM read its model folder again, so save there first.
      Calls in flight go on under the new weights, from a prefill of all they have. Cached prefixes
      carry the version as vLLM's ``cache_salt``: old ones can never be hit again.
    - **Fork, truncate.** Free either way. With ``splice_kv`` the next call computes only what is
      new, from any token on; without, also what lies behind the last full block.
    - **Event loop.** vLLM ties itself to the event loop of the first call; use no other afterwards.

    Build it with :meth:`from_pretrained`.
    """

    def __init__(
        self,
        llm: Any,
        *,
        max_sequences: int,
        max_context: int,
        pause_token_ids: frozenset[int] = frozenset(),
        splice_kv: bool = False,
    ) -> None:
        cache = llm.vllm_config.cache_config
        # Block 0 is vLLM's placeholder and holds nobody's tokens.
        blocks = max(cache.num_gpu_blocks - 1, math.ceil(max_context / cache.block_size))
        self._llm = llm
        self._vocab: int = llm.model_config.get_vocab_size()
        self._max_sequences, self._max_context = max_sequences, max_context
        self._block_tokens: int = cache.block_size
        self._max_tokens = blocks * self._block_tokens
        self._pause_token_ids, self._splice_kv = pause_token_ids, splice_kv
        self._pins = PinNames()
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
        pause_token_ids: frozenset[int] = frozenset(),
        splice_kv: bool = False,
        **engine_args: Any,
    ) -> VLLMEngine:
        """Start vLLM on a local folder; ``dtype`` None takes the one it was saved in.

        ``pause_token_ids``: where vLLM is to wait for the loop, usually
        :func:`~thor_fast.tools.closing_fence_tokens` of the tokenizer. ``splice_kv``: load the KV
        connector (vLLM 0.32 or 0.33). ``engine_args``: further fields of vLLM's
        ``AsyncEngineArgs``, such as ``tensor_parallel_size`` or ``enforce_eager``. On a CPU the
        KV pool gets room for ``max_sequences`` full contexts, unless ``kv_cache_memory_bytes`` or
        the environment's ``VLLM_CPU_KVCACHE_SPACE`` says otherwise; on a GPU it is what vLLM takes.

        Blocks for seconds to minutes and starts processes that import the caller's main module, so
        call it under ``if __name__ == "__main__"``. Raises ``EngineError`` where there is no model
        at ``path``, vLLM is not installed, or it does not start; with ``splice_kv`` also for other
        versions of vLLM, data parallelism and speculative decoding.
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
        if splice_kv:
            ours["kv_transfer_config"] = splicing(engine_args)
        if taken := sorted(ours.keys() & engine_args.keys()):
            raise EngineError(f"engine_args sets {taken[0]}, expected none of {sorted(ours)}")
        # No local name for it: vLLM keeps frames of its start, and it would never be freed.
        return cls(
            start({**ours, **engine_args}),
            max_sequences=max_sequences,
            max_context=max_context,
            pause_token_ids=pause_token_ids,
            splice_kv=splice_kv,
        )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            max_context=self._max_context,
            watch=False,
            native_fork=self._splice_kv,
            native_truncate=self._splice_kv,
            prefix_cache=True,
        )

    @property
    def kv_budget(self) -> KVBudget:
        return KVBudget(
            max_sequences=self._max_sequences,
            max_tokens=self._max_tokens,
            live_sequences=len(self._sessions),
            live_tokens=sum(session.length for session in self._sessions.values()),
            block_tokens=self._block_tokens,
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
        context = list(request.token_ids)
        finish: FinishReason | None = None
        try:
            while finish is None:
                async with contextlib.aclosing(self._submit(request, context, session)) as outputs:
                    ended = False
                    while not ended:
                        output = await next_output(outputs, lambda: session.ended)
                        chunk, ended = self._take(output, request, context, session)
                        finish = chunk.finish
                        yield chunk
        finally:
            self._settle(session)

    async def fork(self, session: str, n: int, at_token: int) -> list[str]:
        self._known(session, at_token)
        if n < 1:
            raise EngineError(f"fork into {n} sessions, expected at least 1")
        names = [f"{session}/{next(self._numbers)}" for _ in range(n)]
        pin = self._sessions[session].pin
        for name in names:
            self._sessions[name] = _Session(at_token, pin=self._pins.hold(pin))
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
            self._pins.release(known.pin)
            known.pin = None
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
            if self._splice_kv:
                await self._drop_pins()
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
        # Of no request yet, but taken.
        session.request_id = ""
        session.length = len(request.token_ids)
        return session

    def _submit(
        self, request: GenerateRequest, context: list[int], session: _Session
    ) -> AsyncGenerator[Any]:
        """Ask vLLM to continue ``context``, as far as ``request`` goes."""
        if session.ended:  # while it paused
            raise EngineError(session.ended)
        session.request_id = f"{request.session}#{next(self._numbers)}"
        n_sampled = len(context) - len(request.token_ids)
        kv = {
            "pin": session.request_id,
            "source": session.pin,
            "last": self._pins.only_one(session.pin),
            "drop": self._pins.take_unused(),
        }
        params = parameters(
            request,
            len(context),
            min(request.max_tokens - n_sampled, self._max_context - len(context)),
            self._pause_token_ids,
            kv if self._splice_kv else None,
        )
        # A copy: vLLM keeps the list it is given.
        prompt = {"prompt_token_ids": list(context), "cache_salt": f"w{self._weight_version}"}
        outputs: AsyncGenerator[Any] = self._llm.generate(prompt, params, session.request_id)
        return outputs

    def _take(
        self, output: Any, request: GenerateRequest, context: list[int], session: _Session
    ) -> tuple[TokenChunk, bool]:
        """What came out, appended to ``context``; and whether vLLM's request has ended."""
        completion = output.outputs[0]
        ids = tuple(completion.token_ids)
        values = logprobs(completion, request.session)
        prefill = None
        if len(context) == len(request.token_ids) and output.num_cached_tokens is not None:
            prefill = len(context) - output.num_cached_tokens
        context += ids
        session.length = len(context)
        finish = finish_reason(
            completion,
            request,
            len(context) - len(request.token_ids),
            context_full=len(context) == self._max_context,
        )
        ended = completion.finish_reason is not None
        if ended and self._splice_kv:
            # From now on the session stands on what this request has left behind.
            self._pins.release(session.pin)
            session.pin = self._pins.hold(session.request_id)
        return TokenChunk(ids, values, finish, prefill), ended

    def _settle(self, session: _Session) -> None:
        """The call is over, however it ended."""
        if session.request_id and session.request_id != session.pin:
            # It was cut short; if vLLM had finished meanwhile, its KV is nobody's.
            self._pins.release(self._pins.hold(session.request_id))
        session.request_id = None

    async def _drop_pins(self) -> None:
        """Have the connector let go of all KV, with nothing running that could pin more.

        vLLM can only reset a cache that nobody holds, and asks the connector last.
        """
        await self._llm.pause_generation(mode="keep", clear_cache=False)
        await self._llm.reset_prefix_cache(reset_connector=True)
        self._pins.clear()
        for session in self._sessions.values():
            session.pin = None

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
