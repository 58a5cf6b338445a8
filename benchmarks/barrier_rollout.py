"""Rollout with a barrier after each round: the way THOR's official code works.

Rebuilt after ``_tir_generate`` of its ``vllm_rollout_spmd.py``, on any engine and sandbox::

    round:  tokenise the whole text of every live sequence      nothing is kept between rounds
            generate all, each until "```" or the end           wait for the slowest
            run the blocks that are now complete, 8 at a time   wait for the slowest
            append the outputs as text

An opening fence stops generation like a closing one, so a block costs two rounds. Left out are its
bugs that would make it compute something else (swallowed errors, observations trained on, prose run
as code): limits, prompts, seeds and the observation's wording are those of the other mode.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import cast

from thor_fast.engines.base import (
    Engine,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TokenChunk,
)
from thor_fast.errors import SandboxError
from thor_fast.rollout.limits import RolloutLimits
from thor_fast.sandbox.base import Sandbox
from thor_fast.tools.dialect import THOR_DIALECT
from thor_fast.tools.token_text import TokenBytes
from thor_fast.types import ExecutionResult, Status

__all__ = ["TextEpisode", "barrier_rollout", "changed_tokens"]

_FENCE = b"```"
_TOOL_THREADS = 8
_BLOCK = re.compile(r"```(?:python|py)[ \t]*\n(.*)```\Z", re.DOTALL)


@dataclass(slots=True)
class TextEpisode:
    """One sequence as text. ``n_prompt``: tokens of the prompt.

    ``said``: the words outside its blocks. ``open_text``: what the model wrote since its last block
    ran. ``sampled``: each token with its byte position in the whole text, as sampled.
    """

    prompt: str
    n_prompt: int
    seed: int
    response: str = ""
    said: str = ""
    open_text: str = ""
    tool_calls: int = 0
    done: bool = False
    sampled: list[tuple[int, int]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.prompt + self.response


@dataclass(frozen=True, slots=True)
class _Setting:
    engine: Engine
    sandbox: Sandbox
    encode: Callable[[str], Sequence[int]]
    tokens: TokenBytes
    limits: RolloutLimits
    sampling: SamplingParams
    eos_token_ids: frozenset[int]
    slots: asyncio.Semaphore


async def barrier_rollout(
    engine: Engine,
    sandbox: Sandbox,
    prompts: Sequence[tuple[str, int]],
    limits: RolloutLimits,
    *,
    encode: Callable[[str], Sequence[int]],
    tokens: TokenBytes,
    sampling: SamplingParams,
    eos_token_ids: frozenset[int],
    progress: Callable[[int, int], None],
) -> list[TextEpisode]:
    """Roll out one episode per (prompt text, seed); ``progress(done, total)`` after each round.

    ``encode``: whole text -> ids. ``tokens``: id -> bytes.
    """
    setting = _Setting(
        engine,
        sandbox,
        encode,
        tokens,
        limits,
        sampling,
        eos_token_ids,
        # As vLLM does inside one generate(): more sequences than fit wait, and slots are refilled.
        asyncio.Semaphore(engine.kv_budget.max_sequences),
    )
    episodes = [TextEpisode(prompt, len(encode(prompt)), seed) for prompt, seed in prompts]
    with ThreadPoolExecutor(_TOOL_THREADS) as pool:
        live = episodes
        while live:
            await asyncio.gather(*[_generate(setting, e, f"barrier/{e.seed}") for e in live])
            await asyncio.to_thread(_run_blocks, setting, pool, live)
            live = [e for e in live if not e.done]
            progress(len(episodes) - len(live), len(episodes))
    return episodes


class _FenceWatch:
    """True from the token on that completes a fence."""

    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens
        self._text = b""
        self.found = False

    def __call__(self, token_id: int) -> bool:
        self._text = self._text[1 - len(_FENCE) :] + self._tokens[token_id]
        self.found = _FENCE in self._text
        return self.found


async def _generate(setting: _Setting, episode: TextEpisode, session: str) -> None:
    """Continue one sequence, from text to text, until a fence or its end."""
    ids = tuple(setting.encode(episode.text))
    room = min(
        setting.limits.max_response_tokens - (len(ids) - episode.n_prompt),
        setting.engine.capabilities.max_context - len(ids),
    )
    if room < 1:
        episode.done = True
        return
    request = GenerateRequest(
        ids,
        session,
        room,
        setting.eos_token_ids,
        replace(setting.sampling, seed=episode.seed),
        watch=_FenceWatch(setting.tokens),
    )
    # Not every engine can ask ``watch``, so the stream is read with a second pair of eyes.
    fence = _FenceWatch(setting.tokens)
    sampled: list[int] = []
    finish = None
    stream = cast(AsyncGenerator[TokenChunk], setting.engine.generate(request))
    async with setting.slots, aclosing(stream):
        async for chunk in stream:
            for token_id in chunk.token_ids:
                sampled.append(token_id)
                if fence(token_id):
                    break
            finish = chunk.finish
            if fence.found:
                break
    # A request of its own per round: nothing of it is kept for the next.
    await setting.engine.release(session)
    if finish is FinishReason.STOP and not fence.found:
        sampled.pop()
    _append(setting, episode, ids, sampled)
    episode.done = not fence.found


def _append(
    setting: _Setting, episode: TextEpisode, context: Sequence[int], sampled: Sequence[int]
) -> None:
    """Take the sampled tokens as text, cut right behind a fence as a stop string cuts it."""
    position = sum(len(setting.tokens[t]) for t in context)
    text = b""
    for token_id in sampled:
        episode.sampled.append((position + len(text), token_id))
        text += setting.tokens[token_id]
    end = text.find(_FENCE)
    piece = (text if end < 0 else text[: end + len(_FENCE)]).decode(errors="replace")
    episode.response += piece
    episode.open_text += piece


def _run_blocks(
    setting: _Setting, pool: ThreadPoolExecutor, episodes: Sequence[TextEpisode]
) -> None:
    """Run every block that is complete now and append its output; returns when all are through."""
    pending: list[TextEpisode] = []
    codes: list[str] = []
    for episode in episodes:
        block = _BLOCK.search(episode.open_text)
        if block is None:
            if episode.done:
                episode.said += episode.open_text
            continue
        episode.said += episode.open_text[: block.start()]
        episode.open_text = ""
        episode.tool_calls += 1
        if episode.tool_calls > setting.limits.max_tool_calls:
            episode.done = True
            continue
        pending.append(episode)
        codes.append(block[1])
    results: list[ExecutionResult] = list(pool.map(setting.sandbox.execute, codes))
    for episode, result in zip(pending, results, strict=True):
        if result.status is Status.INFRA:
            raise SandboxError(f"a snippet could not be run: {result.error}")
        episode.response += THOR_DIALECT.render(result, trailing="")


def changed_tokens(
    encode: Callable[[str], Sequence[int]], tokens: TokenBytes, episode: TextEpisode
) -> int:
    """How many sampled tokens are others among the tokens of the final text.

    A token is unchanged if the same token stands at the same byte of the text.
    """
    final: set[tuple[int, int]] = set()
    position = 0
    for token_id in encode(episode.text):
        final.add((position, token_id))
        position += len(tokens[token_id])
    return sum(pair not in final for pair in episode.sampled)
