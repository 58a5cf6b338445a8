"""Which rows of a batch the loss reads, and with which weights: every aggregation mode as data.

``L = sum_i w_i loss_i + t_i (beta KL_i - entropy_coef H_i) - nll_alpha n_i logp_i``, where the
weights ``w`` (policy), ``t`` (KL and entropy) and ``n`` (NLL) hold the mode's denominators, the
level's weight and, ``w`` alone, the rollout's importance weight. So an op sums, and knows no modes.

A plan is built on the CPU from what the collator knows; moving it to a device waits for nothing.

Legend: T tokens of the packed batch, B sequences, N rows that the loss reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from .hierarchical_grpo_spec import LossSpec

__all__ = ["AGGREGATIONS", "Aggregation", "Counts", "Plan", "Selection", "make_plan"]

LEVELS = 2
"""0: tokens of whole episodes; 1: of single re-sampled steps."""

Aggregation = Literal[
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "dr_grpo",
    "dapo",
    "bnpo",
    "luspo",
]
AGGREGATIONS: tuple[str, ...] = Aggregation.__args__  # type: ignore[attr-defined]
_BY_TOKENS = ("token-mean", "dapo", "bnpo")
_BY_LENGTH = ("seq-mean-token-sum-norm", "dr_grpo")

# Below it an advantage counts as not positive for the NLL term (THOR, dp_actor.py:323).
_POSITIVE = 1e-7


class Counts(NamedTuple):
    """What denominators are made of, per level (episode, step); add those of several batches."""

    tokens: tuple[float, float]
    sequences: tuple[float, float]  # with at least one such token
    positive_tokens: tuple[float, float]  # of positive advantage

    def __add__(self, other: object) -> Counts:
        """Element by element: over micro-batches, or over ranks."""
        if not isinstance(other, Counts):
            return NotImplemented
        return Counts(*((a[0] + b[0], a[1] + b[1]) for a, b in zip(self, other, strict=True)))


class Selection(NamedTuple):
    """The rows one call computes, all on one device."""

    rows: torch.Tensor  # [N] int64, ascending
    level: torch.Tensor  # [N] int64
    sequence: torch.Tensor  # [N] int64, ascending: 0 to B - 1
    bounds: torch.Tensor  # [B + 1] int64: where sequences begin and end among the rows
    policy_weight: torch.Tensor  # [N] float32
    term_weight: torch.Tensor  # [N] float32
    nll_weight: torch.Tensor  # [N] float32
    advantage: torch.Tensor  # [N] float32

    def to(self, device: torch.device) -> Selection:
        """A copy there; the host does not wait."""
        if device.type == "cuda":
            return Selection(*(part.pin_memory().to(device, non_blocking=True) for part in self))
        return Selection(*(part.to(device) for part in self))

    def only(self, asked: torch.Tensor) -> Selection:
        """The same rows, without weight where ``asked`` [N] is false."""
        return self._replace(
            policy_weight=self.policy_weight * asked,
            term_weight=self.term_weight * asked,
            nll_weight=self.nll_weight * asked,
        )

    def part(self, start: int, stop: int) -> Selection:
        """Rows ``start`` to ``stop``; for losses that do not look at sequences."""
        return self._replace(
            **{name: getattr(self, name)[start:stop] for name in self._fields if name != "bounds"}
        )


@dataclass(frozen=True)
class Plan:
    """Made by :func:`make_plan`; on the CPU, with copies where calls have needed its rows.

    So a second call with it copies nothing to the device: a CUDA graph may hold the call.
    """

    tokens: int
    """T."""
    counts: Counts
    """Of this batch, whatever the normalizer was."""
    groups: int
    """Prompt groups, where they were given, and how many have no advantage but zero."""
    groups_without_signal: int
    trainable: Selection
    """Every row under the mask."""
    drop_zero_adv: bool
    selections: dict[tuple[bool, bool], Selection] = field(default_factory=dict, repr=False)
    """Those that were asked for."""
    copies: dict[tuple[int, str], tuple[Selection, Selection]] = field(
        default_factory=dict, repr=False
    )
    """By identity of one of the above, which is kept beside its copy, and device."""

    def on(self, device: torch.device, selection: Selection) -> Selection:
        """One of this plan's selections there; the first call copies it, and waits for nothing."""
        if device.type == "cpu":
            return selection
        key = (id(selection), str(device))
        if key not in self.copies:
            self.copies[key] = (selection, selection.to(device))
        return self.copies[key][1]

    def select(self, spec: LossSpec, *, depends_on_advantage: bool = True) -> Selection:
        """The rows that a loss of this kind has to read, and no others.

        A token without advantage, or whose importance weight is 0, has neither value nor gradient,
        unless there is a KL or entropy term, or a loss that is not proportional to the advantage.
        With a ratio by sequence all rows of a sequence are read if one of them counts.
        """
        everything = self.trainable
        needed = spec.kl is not None or spec.needs_entropy or not depends_on_advantage
        if needed or not self.drop_zero_adv:
            return everything
        key = (spec.by_sequence, spec.nll_alpha > 0)
        if key not in self.selections:
            weighs, pulls = everything.policy_weight != 0, everything.advantage != 0
            if spec.by_sequence:
                # One row's advantage and another's weight may meet in the sequence's means.
                weighs, pulls = (_in_sequence(everything, any_of) for any_of in (weighs, pulls))
            counts = weighs & pulls
            if spec.nll_alpha > 0:
                counts |= everything.nll_weight != 0
            if spec.by_sequence:
                counts = _in_sequence(everything, counts)
            self.selections[key] = _subset(everything, counts)
        return self.selections[key]


def make_plan(
    mask: torch.Tensor,
    level: torch.Tensor | int,
    *,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    seq_ids: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    agg: Aggregation = "token-mean",
    norm_tokens: int | None = None,
    level_weight: tuple[float, float] = (1.0, 1.0),
    normalizer: Literal["global", "thor"] | Counts = "global",
    mini_batch_sequences: int | None = None,
    drop_zero_adv: bool = True,
    rollout_weight: torch.Tensor | None = None,
) -> Plan:
    """Turn masks, levels and advantages into rows and weights.

    Args:
        mask: [T] bool: tokens whose log-prob the loss reads.
        level: [T] or [B] integer, 0 (episode) or 1 (step), or one for all; by token where T is B.
        advantages: [T] or [B] float, likewise; finite.
        cu_seqlens: [B + 1] integer, ascending from 0 to T: where sequences begin and end. This or
            ``seq_ids``.
        seq_ids: [T] integer, not descending: each token's sequence.
        group: [B] integer: the prompt group of each sequence, for the plan's counts of groups.
        agg: ``token-mean`` (= ``dapo``, ``bnpo``): by tokens. ``token-sum``: not at all.
            ``seq-mean-token-sum`` (= ``luspo``, whose loss is by sequence): by sequences.
            ``seq-mean-token-mean``: by sequences and each one's tokens. ``seq-mean-token-sum-norm``
            (= ``dr_grpo``): by sequences and ``norm_tokens``. Each level has denominators of its
            own.
        norm_tokens: for the last mode: the constant, usually the longest completion allowed.
        level_weight: of the episode's and the step's mean in the sum.
        normalizer: where denominators come from. ``global``: this batch, which then is the whole
            optimizer step. :class:`Counts` of the whole step: so micro-batches (and ranks) add up
            to the single batch. ``thor``: one denominator for both levels, of this batch, times
            its share of the step's sequences, as in THOR's code.
        mini_batch_sequences: for ``thor``: sequences of the whole step; default: of this batch.
        drop_zero_adv: leave out tokens without advantage where nothing depends on it; they count in
            the denominators either way.
        rollout_weight: [T] float, finite, >= 0: importance weights for the mismatch of rollout and
            trainer (TIS truncates them, IcePop and MIS set them to 0), taken as constants.

    Raises:
        ValueError: a shape, dtype, device or value does not fit; the message says which.
    """
    sequence, batch = _sequences(mask, cu_seqlens, seq_ids)
    level = _per_token("level", torch.as_tensor(level), sequence, batch)
    advantages = _per_token("advantages", advantages, sequence, batch).float()
    weight = torch.ones(mask.shape[0]) if rollout_weight is None else rollout_weight.cpu().float()
    _check_values(mask, level, advantages, weight)
    token_level, token_sequence = level[mask].long(), sequence[mask]
    adv, weight = advantages[mask], weight[mask]
    lengths = torch.zeros(batch, LEVELS)
    lengths.index_put_((token_sequence, token_level), torch.ones(len(adv)), accumulate=True)
    counts = _count(lengths, token_level, adv)
    share = _shares(agg, norm_tokens, lengths, _denominators(normalizer, counts))
    positive = _positive_shares(_denominators(normalizer, counts))
    scale = torch.tensor(level_weight, dtype=torch.float32)
    if scale.shape != (LEVELS,) or not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise ValueError(f"level_weight is {level_weight}, expected two finite numbers >= 0")
    if normalizer == "thor":
        scale = scale * _fraction(batch, mini_batch_sequences)
    elif mini_batch_sequences is not None:
        raise ValueError(
            f"mini_batch_sequences is {mini_batch_sequences}, expected only with 'thor'"
        )
    term = share[token_sequence, token_level] * scale[token_level]
    nll = torch.where(adv > _POSITIVE, (positive * scale)[token_level], torch.zeros(()))
    everything = Selection(
        rows=mask.nonzero().squeeze(1),
        level=token_level,
        sequence=token_sequence,
        policy_weight=term * weight,
        term_weight=term,
        nll_weight=nll,
        advantage=adv,
        bounds=torch.empty(0),
    )
    groups, silent = _groups(group, batch, token_sequence, adv)
    return Plan(
        tokens=mask.shape[0],
        counts=counts,
        groups=groups,
        groups_without_signal=silent,
        trainable=_compact(everything),
        drop_zero_adv=drop_zero_adv,
    )


def _sequences(
    mask: torch.Tensor, cu_seqlens: torch.Tensor | None, seq_ids: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """Each token's sequence [T], counted from 0, and how many there are."""
    if mask.ndim != 1 or mask.dtype is not torch.bool or mask.is_cuda:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}, expected torch.bool (T,) "
            "on the CPU"
        )
    tokens = mask.shape[0]
    if (cu_seqlens is None) == (seq_ids is None):
        raise ValueError("expected either cu_seqlens or seq_ids")
    if cu_seqlens is not None:
        bounds = cu_seqlens.cpu().long()
        if bounds.ndim != 1 or len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != tokens:
            raise ValueError(f"cu_seqlens is {bounds.tolist()[:8]}, expected 0 to {tokens}")
        lengths = bounds.diff()
        if bool((lengths < 0).any()):
            raise ValueError(f"cu_seqlens is {bounds.tolist()[:8]}, expected ascending bounds")
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths), len(lengths)
    assert seq_ids is not None
    ids = seq_ids.cpu().long()
    if ids.shape != mask.shape or bool((ids.diff() < 0).any()):
        raise ValueError(
            f"seq_ids has shape {tuple(ids.shape)}, expected ({tokens},) without a descent"
        )
    _, index, _ = torch.unique_consecutive(ids, return_inverse=True, return_counts=True)
    return index, int(index[-1]) + 1 if tokens else 0


def _per_token(name: str, values: torch.Tensor, sequence: torch.Tensor, batch: int) -> torch.Tensor:
    values = values.cpu()
    tokens = sequence.shape[0]
    if values.ndim == 0:
        return values.expand(tokens)
    if values.shape == (tokens,):
        return values
    if values.shape == (batch,):
        return values[sequence]
    raise ValueError(f"{name} has shape {tuple(values.shape)}, expected ({tokens},) or ({batch},)")


def _check_values(
    mask: torch.Tensor, level: torch.Tensor, advantages: torch.Tensor, weight: torch.Tensor
) -> None:
    if level.is_floating_point():
        raise ValueError(f"level is {level.dtype}, expected integers")
    if weight.shape != mask.shape:
        raise ValueError(
            f"rollout_weight has shape {tuple(weight.shape)}, expected {tuple(mask.shape)}"
        )
    wrong = level[(level < 0) | (level >= LEVELS)]
    if len(wrong):
        raise ValueError(f"level has {int(wrong[0])}, expected 0 (episode) or 1 (step)")
    if not bool(torch.isfinite(advantages[mask]).all()):
        raise ValueError("advantages hold NaN or infinity under the mask, expected finite values")
    if not bool((torch.isfinite(weight) & (weight >= 0))[mask].all()):
        raise ValueError("rollout_weight holds values under the mask that are not finite and >= 0")


def _count(lengths: torch.Tensor, level: torch.Tensor, adv: torch.Tensor) -> Counts:
    def pair(values: torch.Tensor) -> tuple[float, float]:
        episode, step = values.tolist()
        return float(episode), float(step)

    positive = torch.bincount(level[adv > _POSITIVE], minlength=LEVELS)
    return Counts(pair(lengths.sum(dim=0)), pair((lengths > 0).sum(dim=0)), pair(positive))


def _denominators(normalizer: Literal["global", "thor"] | Counts, here: Counts) -> Counts:
    if isinstance(normalizer, Counts):
        return normalizer
    if normalizer == "global":
        return here
    if normalizer == "thor":
        return Counts(*((sum(pair), sum(pair)) for pair in here))
    raise ValueError(f"normalizer is {normalizer!r}, expected 'global', 'thor' or Counts")


def _shares(
    agg: str, norm_tokens: int | None, lengths: torch.Tensor, counts: Counts
) -> torch.Tensor:
    """[B, 2]: the weight of one token of a sequence at a level."""
    if agg not in AGGREGATIONS:
        raise ValueError(f"agg is {agg!r}, expected one of {', '.join(AGGREGATIONS)}")
    if (norm_tokens is not None) != (agg in _BY_LENGTH):
        raise ValueError(
            f"norm_tokens is {norm_tokens} with agg={agg!r}, expected a number with "
            f"{' and '.join(_BY_LENGTH)} only"
        )
    if norm_tokens is not None and norm_tokens < 1:
        raise ValueError(f"norm_tokens is {norm_tokens}, expected >= 1")
    one = torch.ones_like(lengths)
    if agg == "token-sum":
        return one
    if agg in _BY_TOKENS:
        return one / torch.tensor(counts.tokens).clamp(min=1)
    by_sequence = one / torch.tensor(counts.sequences).clamp(min=1)
    if agg == "seq-mean-token-mean":
        return by_sequence / lengths.clamp(min=1)
    return by_sequence / (norm_tokens or 1)


def _positive_shares(counts: Counts) -> torch.Tensor:
    return 1 / torch.tensor(counts.positive_tokens).clamp(min=1)


def _fraction(batch: int, mini_batch_sequences: int | None) -> float:
    if mini_batch_sequences is None:
        return 1.0
    if mini_batch_sequences < batch:
        raise ValueError(
            f"mini_batch_sequences is {mini_batch_sequences}, expected at least the {batch} here"
        )
    return batch / max(mini_batch_sequences, 1)


def _groups(
    group: torch.Tensor | None, batch: int, sequence: torch.Tensor, adv: torch.Tensor
) -> tuple[int, int]:
    if group is None:
        return 0, 0
    if group.shape != (batch,):
        raise ValueError(f"group has shape {tuple(group.shape)}, expected ({batch},)")
    _, index = torch.unique(group.cpu(), return_inverse=True)
    groups = int(index.max()) + 1 if batch else 0
    speaking = torch.unique(index[sequence[adv != 0]])
    return groups, groups - len(speaking)


def _in_sequence(selection: Selection, rows: torch.Tensor) -> torch.Tensor:
    """[N] bool: whether the row's sequence has one of ``rows`` [N]."""
    has = torch.zeros(len(selection.bounds) - 1, dtype=torch.bool)
    has[selection.sequence[rows]] = True
    return has[selection.sequence]


def _subset(selection: Selection, keep: torch.Tensor) -> Selection:
    parts = {n: getattr(selection, n)[keep] for n in selection._fields if n != "bounds"}
    return _compact(selection._replace(**parts))


def _compact(selection: Selection) -> Selection:
    """Number the sequences that have rows."""
    _, index, lengths = torch.unique_consecutive(
        selection.sequence, return_inverse=True, return_counts=True
    )
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return selection._replace(sequence=index, bounds=bounds)
