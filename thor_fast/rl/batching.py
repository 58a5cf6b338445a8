"""What a training step reads: sequences packed one after the other, and what is known per token.

Where siblings share a prefix, it is laid out once::

    alone    p q a b | p q c d e | p q f        together   p q a b | q c d e | q f

Each but the first begins with the prefix's last token, whose row predicts its own first one, so the
rule of the loss (row t predicts token t + 1 of the same sequence) holds as it is. Before that token
it sees the prefix inside of the first sibling (:attr:`TrainingBatch.prefix`).

Legend: T tokens of the batch, B sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
import torch

from thor_fast.errors import ConfigError, DataError
from thor_fast.kernels import Counts, make_plan
from thor_fast.rl.advantages import TrainingSequence

__all__ = ["TrainingBatch", "pack"]


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Position i of every [T] field is about token i itself, as in ``Trajectory``: no shift yet.

    Masks, levels, advantages and bounds are on the CPU, so that choosing rows waits for no device;
    the other fields may be anywhere. A field of shape [B] holds one value per sequence.
    """

    token_ids: torch.Tensor
    """[T] int64 or int32."""
    cu_seqlens: torch.Tensor
    """[B + 1] integer, ascending from 0 to T: where sequences begin and end."""
    loss_mask: torch.Tensor
    """[T] bool or 0 and 1: tokens the policy sampled and is to learn from. Never a sequence's first
    token, which nothing predicts."""
    level: torch.Tensor | int
    """[T] or [B] integer, or one for all: 0 for tokens of whole episodes, 1 for those of re-sampled
    steps."""
    advantages: torch.Tensor
    """[T] or [B] float."""
    old_logprobs: torch.Tensor
    """[T] float: what the policy ratio is against; as sampled, or recomputed before the first
    update. Only read under the mask."""
    ref_logprobs: torch.Tensor | None = None
    """[T] float, for a KL penalty."""
    rollout_weight: torch.Tensor | None = None
    """[T] float >= 0: importance weights for the mismatch of engine and trainer."""
    temperature: torch.Tensor | None = None
    """[T] float > 0: what the logits were divided by when the token was sampled."""
    group: torch.Tensor | None = None
    """[B] integer: prompt groups, for the metrics."""
    counts: Counts | None = None
    """Of the whole optimizer step, where this is a part of it (``normalizer="global"``)."""
    step_sequences: int | None = None
    """Sequences of the whole optimizer step, likewise (``normalizer="thor"``)."""
    prefix: torch.Tensor | None = None
    """[B, 2] integer: the row where the prefix that a sequence shares begins, and how many of its
    tokens come before the sequence's own first one; length 0: none."""


def pack(
    sequences: Sequence[TrainingSequence],
    *,
    max_tokens: int,
    share_prefixes: bool = False,
    temperature: float = 1.0,
    normalizer: Literal["global", "thor"] = "global",
) -> list[TrainingBatch]:
    """The sequences of one optimizer step as batches of at most ``max_tokens`` tokens each.

    First fit, longest first; equals in their order, so the same sequences give the same batches. A
    sequence longer than ``max_tokens`` is a batch of its own: nothing is cut or left out.

    Args:
        sequences: of both levels. The mask, and log-probs as sampled, are those of the trajectory.
        max_tokens: tokens of a batch, as laid out.
        share_prefixes: lay out once what trajectories with equal ``prompt_ids`` begin with, within
            a batch.
        temperature: at which the log-probs were sampled.
        normalizer: of the loss. ``global``: each batch has the ``counts`` of all of them, so their
            losses add up to that of a single batch (over ranks: replace them by the ranks' sum).
            ``thor``: each has the number of sequences instead.

    Returns:
        Batches on the CPU; none for no sequence.

    Raises:
        ConfigError: a setting is out of range.
        DataError: a trajectory has no prompt: nothing predicts its first token.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}, expected >= 1")
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature}, expected a finite number > 0")
    if normalizer not in ("global", "thor"):
        raise ConfigError(f"normalizer is {normalizer!r}, expected 'global' or 'thor'")
    for sequence in sequences:
        if not sequence.trajectory.prompt_ids:
            raise DataError("a trajectory has an empty prompt, expected at least one token")
    families = _families(sequences, max_tokens) if share_prefixes else [[s] for s in sequences]
    batches = [_batch(bin_, temperature) for bin_ in _first_fit(families, max_tokens)]
    if normalizer == "thor":
        return [dataclasses.replace(b, step_sequences=len(sequences)) for b in batches]
    counts = reduce(Counts.__add__, map(_counts, batches), Counts(*([(0.0, 0.0)] * 3)))
    return [dataclasses.replace(batch, counts=counts) for batch in batches]


_Family = list[TrainingSequence]
"""Sequences that are laid out behind one another; all but the first without their prefix."""


def _families(sequences: Sequence[TrainingSequence], max_tokens: int) -> list[_Family]:
    """Those of equal prompts together, as many as a batch holds."""
    open_: dict[tuple[int, ...], _Family] = {}
    families = []
    for sequence in sequences:
        prompt = sequence.trajectory.prompt_ids
        family = open_.get(prompt)
        if family is None or _tokens([*family, sequence]) > max_tokens:
            family = open_[prompt] = []
            families.append(family)
        family.append(sequence)
    return families


def _tokens(family: _Family) -> int:
    """Laid out."""
    shared = len(family[0].trajectory.prompt_ids) - 1
    return sum(len(s.trajectory) for s in family) - (len(family) - 1) * shared


def _first_fit(families: Sequence[_Family], max_tokens: int) -> list[list[_Family]]:
    bins: list[list[_Family]] = []
    room: list[int] = []
    for family in sorted(families, key=_tokens, reverse=True):
        size = _tokens(family)
        fits = next((i for i, free in enumerate(room) if size <= free), None)
        if fits is None:
            fits = len(bins)
            bins.append([])
            room.append(max_tokens)
        bins[fits].append(family)
        room[fits] -= size
    return bins


def _batch(families: Sequence[_Family], temperature: float) -> TrainingBatch:
    sequences = [sequence for family in families for sequence in family]
    token_ids: list[int] = []
    mask, logprobs = [], []
    bounds, prefix = [0], []
    for family in families:
        begin, shared = bounds[-1], len(family[0].trajectory.prompt_ids) - 1
        for number, sequence in enumerate(family):
            cut = shared if number else 0
            token_ids += sequence.trajectory.token_ids[cut:]
            mask.append(sequence.trajectory.loss_mask[cut:])
            logprobs.append(sequence.trajectory.sampling_logprobs[cut:])
            prefix.append((begin, cut))
            bounds.append(len(token_ids))
    return TrainingBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int64),
        loss_mask=torch.from_numpy(np.concatenate(mask)).bool(),
        level=torch.tensor([s.level for s in sequences]),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float32),
        old_logprobs=torch.from_numpy(np.concatenate(logprobs)).float(),
        temperature=None if temperature == 1 else torch.full((len(token_ids),), temperature),
        group=torch.tensor([s.group for s in sequences]),
        prefix=torch.tensor(prefix) if any(length for _, length in prefix) else None,
    )


def _counts(batch: TrainingBatch) -> Counts:
    plan = make_plan(
        batch.loss_mask,
        batch.level,
        advantages=batch.advantages,
        cu_seqlens=batch.cu_seqlens,
    )
    return plan.counts
