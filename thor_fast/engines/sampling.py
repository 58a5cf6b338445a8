"""Sampling: one uniform number per (seed, position), turned into a token by the inverse CDF.

Legend: B rows, V vocabulary. The noise is a pure function of the seed and of the absolute position
of the token it decides, so a trajectory is the same alone, in any batch, and after any rollback, as
long as its logits are.

>>> key = noise_key(7)
>>> float(uniforms(np.array([key, key], np.uint64), np.array([3, 4], np.uint64))[0]) == float(
...     uniforms(np.array([key], np.uint64), np.array([3], np.uint64))[0]
... )
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from thor_fast.engines.base import SamplingParams

__all__ = ["SamplingRow", "noise_key", "sample", "uniforms"]

_UInt64 = npt.NDArray[np.uint64]

# SplitMix64 (Steele, Lea, Flood 2014): the golden-ratio increment and the finaliser's multipliers
# (Stafford's variant 13).
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of a batch needs: its parameters, its noise key, the position it decides."""

    params: SamplingParams
    key: int
    position: int


def _mix(z: _UInt64) -> _UInt64:
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLIERS[0]
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLIERS[1]
    mixed: _UInt64 = z ^ (z >> np.uint64(31))
    return mixed


def noise_key(seed: int) -> int:
    """The 64-bit key of a seed; seeds that are equal modulo 2**64 share it."""
    return int(_mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64) + _INCREMENT)[0])


def uniforms(keys: _UInt64, positions: _UInt64) -> npt.NDArray[np.float64]:
    """[B] float64 in [0, 1), a multiple of 2**-53, from [B] keys and [B] positions.

    The key enters twice: were it only the starting point of the counter, two keys a few increments
    apart would see the same noise, shifted.
    """
    bits = _mix(_mix(keys + positions * _INCREMENT) ^ keys)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(
    logits: torch.Tensor, rows: Sequence[SamplingRow]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Draw one token per row and copy tokens and log-probs to the host, in one transfer.

    ``logits`` [B, V], any float dtype; arithmetic is float32, the CDF float64. Returns token ids
    [B] int64 and log-probs [B] float64: those of the distribution after temperature and before
    top-k and top-p. Greedy rows (temperature 0) report the log-prob at temperature 1: the
    distribution itself is a point mass, whose log-prob of 0 would carry nothing. Logits that hold a
    NaN give a NaN log-prob and a token that means nothing.
    """
    device = logits.device
    # One transfer to the device too: the columns of this table are what differs between rows.
    table = torch.from_numpy(_row_table(rows, logits.shape[1])).to(device)
    uniform, temperature, top_k, top_p = table
    greedy = temperature == 0
    any_greedy = any(row.params.temperature == 0 for row in rows)
    any_drawn = any(row.params.temperature > 0 for row in rows)
    scale = temperature.masked_fill(greedy, 1.0).float()
    scaled = logits.float() / scale[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    if any_greedy:
        # Not argmax: on a CPU it takes three times as long. Both give the first of equal maxima.
        tokens = highest = scaled.max(dim=-1).indices
    if any_drawn:
        weights = logprobs.double().exp_()
        if any(row.params.top_k > 0 or row.params.top_p < 1 for row in rows):
            weights = _restrict(weights, top_k, top_p)
        tokens = _invert(weights, uniform)
        if any_greedy:
            tokens = torch.where(greedy, highest, tokens)
    chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    # Token ids are exact in float64, so both results travel in one tensor.
    host = torch.stack((tokens.double(), chosen.double())).cpu().numpy()
    return host[0].astype(np.int64), host[1]


def _row_table(rows: Sequence[SamplingRow], vocab: int) -> npt.NDArray[np.float64]:
    """[4, B] float64: uniform, temperature, top-k (V where off), top-p (2 where off)."""
    keys = np.array([row.key for row in rows], np.uint64)
    positions = np.array([row.position for row in rows], np.uint64)
    columns = [
        (p.temperature, p.top_k or vocab, p.top_p if p.top_p < 1 else 2.0)
        for p in (row.params for row in rows)
    ]
    return np.concatenate((uniforms(keys, positions)[None], np.array(columns, np.float64).T))


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """[B] int64: the first token whose cumulative weight exceeds ``uniform`` of the total.

    ``right=True`` passes over tokens of weight 0, and staying below the total keeps a rounded-up
    product from running past the last token that has weight.
    """
    cdf = weights.cumsum(dim=-1)
    total = cdf[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    draw = torch.minimum(uniform[:, None] * total, below)
    tokens = torch.searchsorted(cdf, draw, right=True).squeeze(-1)
    return tokens.clamp_(max=weights.shape[1] - 1)  # NaN rows only: keep the index in range


def _restrict(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero all but the top-k tokens, then all but the smallest set that holds ``top_p`` of them.

    Ties fall to the lower token id. Weights [B, V] stay in vocabulary order, so a filter changes
    which tokens the same uniform number can reach, not the order it walks them in.
    """
    ranked, order = weights.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(weights.shape[1], device=weights.device, dtype=weights.dtype)
    ranked = ranked * (rank < top_k[:, None])
    before = ranked.cumsum(dim=-1) - ranked
    ranked = ranked * (before < top_p[:, None] * ranked.sum(dim=-1, keepdim=True))
    return torch.zeros_like(weights).scatter_(-1, order, ranked)
