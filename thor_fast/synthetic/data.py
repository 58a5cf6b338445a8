"""Training batches: endless fresh transcripts, encoded the way the runtime assembles them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from thor_fast.rollout.splice import ObservationEncoder
from thor_fast.synthetic.tasks import TRAIN_SEED, TRAINED_FAMILIES, generate
from thor_fast.synthetic.transcripts import Shares, Transcript, direct_transcript, tool_transcript
from thor_fast.types import TokenSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Batch", "batches", "encode", "transcripts"]

# Transcripts sorted by length together: enough that batches hardly need padding, few enough that
# the mix of families in a batch stays random.
_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Batch:
    """``token_ids`` [B, L] int64, padded on the right; ``mask`` [B, L] bool: model tokens."""

    token_ids: torch.Tensor
    mask: torch.Tensor


def transcripts(seed: int, shares: Shares) -> Iterator[Transcript]:
    """One transcript per task of the training split, without end and without repetition."""
    rng = random.Random(f"transcripts/{seed}")  # noqa: S311 - not for secrets
    index = 0
    while True:
        for family in TRAINED_FAMILIES:
            task = generate(family, TRAIN_SEED, index)
            if rng.random() < shares.direct:
                yield direct_transcript(task)
            else:
                yield tool_transcript(task, rng, shares)
        index += 1


def encode(
    tokenizer: PreTrainedTokenizerFast, encode_turn: ObservationEncoder, transcript: Transcript
) -> tuple[list[int], list[bool]]:
    """Token ids and loss mask of one transcript; ``encode_turn`` is the tokenizer's.

    Each turn is encoded by itself, as in a rollout, so no token spans a border between sources. The
    model's last turn is followed by EOS.
    """
    ids: list[int] = tokenizer.encode(transcript.prompt)
    mask = [False] * len(ids)
    for turn in transcript.turns:
        new = encode_turn(turn.text)
        ids += new
        mask += [turn.source is TokenSource.MODEL] * len(new)
    ids.append(tokenizer.eos_token_id)
    mask.append(True)
    return ids, mask


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, shares: Shares, batch_tokens: int
) -> Iterator[Batch]:
    """Batches of about ``batch_tokens`` tokens each, of sequences of like length, without end."""
    rng = random.Random(f"batches/{seed}")  # noqa: S311 - not for secrets
    source = transcripts(seed, shares)
    encode_turn = ObservationEncoder(tokenizer)
    while True:
        chunk = [encode(tokenizer, encode_turn, next(source)) for _ in range(_CHUNK)]
        chunk.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for row in chunk:
            if (len(groups[-1]) + 1) * len(row[0]) > batch_tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            yield _pad(group, tokenizer.pad_token_id)


def _pad(rows: list[tuple[list[int], list[bool]]], pad_id: int) -> Batch:
    # On the right: with causal attention padding is then invisible to real tokens, and attention
    # needs no mask of its own.
    length = max(len(ids) for ids, _ in rows)
    token_ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, (ids, model) in enumerate(rows):
        token_ids[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = torch.tensor(model)
    return Batch(token_ids, mask)
