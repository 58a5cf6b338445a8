"""A scripted engine that "solves" the synthetic tasks: their worked solutions, token by token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from thor_fast.engines.scripted import Script, ScriptedEngine
from thor_fast.rollout.splice import ObservationEncoder
from thor_fast.synthetic.problem import Task
from thor_fast.synthetic.transcripts import Shares, Transcript, tool_transcript
from thor_fast.types import TokenSource

__all__ = ["scripted_engine"]

_FENCE = "```"
# A 7B model on one data-centre GPU decodes a token in 5 to 15 ms, almost whatever the batch.
_TOKEN_S = 0.005
_SHARES = Shares(direct=0.0, first_fault=0.19, later_fault=0.1, give_up=0.25)


def scripted_engine(
    tokenizer: Any,
    tasks: Sequence[Task],
    prompts: Sequence[str],
    encode_text: Callable[[str], Sequence[int]],
    *,
    seed: int,
    max_sequences: int,
    max_context: int,
) -> ScriptedEngine:
    """Knows what follows each task's prompt, and each text a barrier rollout comes back with.

    ``encode_text``: whole text -> ids, as the rollouts do it.
    """
    rng = random.Random(seed)
    encode = ObservationEncoder(tokenizer)
    scripts: dict[tuple[int, ...], list[Script]] = {}
    for task, prompt in zip(tasks, prompts, strict=True):
        transcript = tool_transcript(task, rng, _SHARES)
        for context, rest in _continuations(prompt, transcript):
            ids = [t for text in rest for t in encode(text)]
            scripts[tuple(encode_text(context))] = [Script((*ids, tokenizer.eos_token_id))]
    return ScriptedEngine(
        scripts, token_s=_TOKEN_S, max_sequences=max_sequences, max_context=max_context
    )


def _continuations(prompt: str, transcript: Transcript) -> list[tuple[str, list[str]]]:
    """Each text at which generation (re)starts, with the model's texts from there on."""
    model = [turn.text for turn in transcript.turns if turn.source is TokenSource.MODEL]
    found = []
    context, n_model = prompt, 0
    for turn in transcript.turns:
        if turn.source is TokenSource.MODEL:
            found.append((context, model[n_model:]))
            head, fence, tail = turn.text.partition(_FENCE)
            if fence:
                found.append((context + head + fence, [tail, *model[n_model + 1 :]]))
            n_model += 1
        context += turn.text
    return found
