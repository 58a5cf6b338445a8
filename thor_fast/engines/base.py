"""The contract every engine keeps: token ids in, token ids with log-probs out.

Text never crosses this line. An engine that holds KV for a session prefills only what is new.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from thor_fast.errors import EngineError

__all__ = [
    "Capabilities",
    "Engine",
    "FinishReason",
    "GenerateRequest",
    "KVBudget",
    "SamplingParams",
    "TokenChunk",
    "check_context",
    "check_model_folder",
    "check_position",
]


class FinishReason(enum.Enum):
    """Why one ``generate`` call ended (a trajectory's ending is a ``StopReason``)."""

    STOP = "stop"
    """A token of ``stop_token_ids`` was sampled; it is the last token of the chunk."""
    WATCH = "watch"
    """``GenerateRequest.watch`` returned True for the last token of the chunk."""
    LENGTH = "length"
    """``max_tokens`` were sampled."""
    CONTEXT = "context"
    """The model's context is full."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off.

    ``seed``: the noise for the token at absolute position ``p`` is a pure function of
    ``(seed, p)``: it does not depend on the batch, on what was discarded, or on the call count.
    Log-probs returned are those of the distribution the token was drawn from *before* top-k and
    top-p, after temperature (what a policy-gradient ratio needs).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}, expected >= 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected >= 0 (0 is off)")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Continue ``token_ids`` (the whole context so far, prompt first).

    ``session`` names the sequence: a KV-holding engine keeps its cache under that name between
    calls, compares it with ``token_ids`` and prefills only the suffix that differs. ``watch`` is
    called with each sampled token id, in order, on the engine's thread; returning True ends the
    call right after that token, so nothing is sampled past a closing fence. It must be quick and
    must not raise. Engines that cannot call it in step (``capabilities.watch`` is False) ignore it
    and the caller drops what it does not want.
    """

    token_ids: tuple[int, ...]
    session: str
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    watch: Callable[[int], bool] | None = None

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError("token_ids is empty, expected at least one token")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected >= 1")


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Newly sampled tokens, each with its log-prob; ``finish`` is set on the last chunk only.

    ``prefill_tokens``, on the first chunk of a call: how many tokens of the context the engine had
    to compute because its cache did not hold them; ``None`` if it cannot tell.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason | None = None
    prefill_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do. ``max_context``: prompt + response tokens of one sequence.

    ``prefix_cache``: full blocks of equal beginnings are held once, whoever has them.
    """

    max_context: int
    watch: bool
    native_fork: bool
    native_truncate: bool
    prefix_cache: bool = False


@dataclass(frozen=True, slots=True)
class KVBudget:
    """How many sequences and tokens of KV the engine can hold at once, and what it holds now.

    ``max_sequences`` counts those that pause between two calls, too: an engine may hold more than
    decode at a time. ``block_tokens``: a sequence takes up whole blocks of so many tokens. Where
    those it has outgrow ``max_tokens``, the engine makes room by itself and computes again what it
    let go of.
    """

    max_sequences: int
    max_tokens: int
    live_sequences: int
    live_tokens: int
    block_tokens: int = 1


def check_context(token_ids: Sequence[int], max_context: int, vocab_size: int) -> None:
    """Raise ``EngineError`` for a context with no room left, or with an id that is no token."""
    if len(token_ids) >= max_context:
        raise EngineError(
            f"the context has {len(token_ids)} tokens, expected at most {max_context - 1} "
            f"to start with max_context {max_context}"
        )
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise EngineError(f"token id {wrong} in the context, expected 0 to {vocab_size - 1}")


def check_position(session: str, at_token: int, length: int) -> None:
    """Raise ``EngineError`` unless ``at_token`` lies in the ``length`` tokens of ``session``."""
    if not 0 <= at_token <= length:
        raise EngineError(
            f"at_token is {at_token}, expected 0 to {length}, the tokens of session {session!r}"
        )


def check_model_folder(path: str | Path) -> None:
    """Raise ``EngineError`` unless there is a saved model at ``path``."""
    if not (Path(path) / "config.json").is_file():
        raise EngineError(f"no model at {str(path)!r}, expected a folder with a config.json")


@runtime_checkable
class Engine(Protocol):
    """A policy that samples tokens. All methods are called from one event loop."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def kv_budget(self) -> KVBudget: ...

    @property
    def weight_version(self) -> int:
        """Raised by each :meth:`update_weights`; recorded in every trajectory."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Stream tokens. Closing the iterator early stops the sequence and keeps its session.

        Raises ``EngineError`` if the engine broke or the context is too long to start.
        """
        ...

    async def fork(self, session: str, n: int, at_token: int) -> list[str]:
        """``n`` new sessions that share the first ``at_token`` tokens of ``session``."""
        ...

    async def truncate(self, session: str, at_token: int) -> None:
        """Forget the KV of ``session`` from position ``at_token`` on."""
        ...

    async def release(self, session: str) -> None:
        """Forget a session; unknown names are ignored."""
        ...

    async def update_weights(self, version: int) -> None:
        """Take the weights as they now are as ``version``; all cached KV becomes invalid."""
        ...

    async def aclose(self) -> None:
        """Stop. Streams in flight raise ``EngineError``. Safe to call twice."""
        ...
