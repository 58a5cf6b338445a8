"""What the loss benchmark computes on: masks of tool-integrated rollouts, logits like a model's.

Random normal logits would flatter and mislead: a nearly uniform softmax hides the errors of
rounded logits, and GEMMs on it draw more power. So the head has Zipf's frequencies along one
direction, hidden states point at one token (four rows in five) or at two, over a noise of standard
deviation 2, and the targets are sampled from the resulting distribution. ``Problem.data`` measures
what came out.

Legend: T tokens, B sequences of L tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from thor_fast.kernels import IGNORED_TARGET, Plan, make_plan, selected_logprob

__all__ = ["SCENARIOS", "Problem", "Shape", "make_problem"]

SCENARIOS = {
    "dense": "every row is read: the kernels alone",
    "episodes": "30 to 70 % of a sequence is prompt and tool output",
    "steps": "continuations of failed calls: the last 10 % of a sequence is read",
}
_LONGEST = 4096  # THOR trains on 800 tokens of prompt and 3,200 of response
_CHUNK_LOGITS_BYTES = 2**30
_STALENESS = 0.05  # standard deviation of log-prob minus old log-prob


@dataclass(frozen=True, slots=True)
class Shape:
    """One problem's sizes."""

    tokens: int
    hidden: int
    vocab: int
    scenario: str

    @property
    def key(self) -> str:
        """As in the record and the tables."""
        return f"{self.scenario} T={self.tokens} H={self.hidden} V={self.vocab}"


@dataclass(frozen=True)
class Problem:
    """Tensors of one shape on the device; a target is -100 where the row is not read."""

    shape: Shape
    hidden: torch.Tensor  # [T, H], a leaf with gradient
    weight: torch.Tensor  # [V, H], a leaf with gradient
    targets: torch.Tensor  # [T] int64
    rows: torch.Tensor  # [N] int64: those that are read
    old_logp: torch.Tensor  # [T] float32
    advantages: torch.Tensor  # [B] float32
    by_row: torch.Tensor  # [N] float32: the advantages of the rows
    plan: Plan
    data: dict[str, float] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        """B; all have the same length, so that [T] may be seen as [B, L]."""
        return len(self.advantages)


def make_problem(shape: Shape, device: torch.device, seed: int = 0) -> Problem:
    """Deterministic on a device. Weights and states are bfloat16 on CUDA, float32 elsewhere."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    mask, bounds = _mask(shape, torch.Generator().manual_seed(seed))
    generator = torch.Generator(device).manual_seed(seed)
    hidden, weight = _states(shape, generator, dtype)
    targets, entropy, certain = _sample(hidden, weight, generator)
    logp = selected_logprob(hidden, weight, targets)
    old_logp = logp + _STALENESS * torch.randn(logp.shape, generator=generator, device=device)
    advantages = torch.randn(len(bounds) - 1, generator=torch.Generator().manual_seed(seed))
    plan = make_plan(mask, int(shape.scenario == "steps"), advantages=advantages, cu_seqlens=bounds)
    rows = mask.nonzero().squeeze(1).to(device)
    sequence = torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff())[mask]
    return Problem(
        shape=shape,
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        targets=targets.masked_fill(~mask.to(device), IGNORED_TARGET),
        rows=rows,
        old_logp=old_logp.clamp(max=0.0),
        advantages=advantages.to(device),
        by_row=advantages[sequence].to(device),
        plan=plan,
        data={
            "active_share": float(mask.float().mean()),
            "mean_entropy_nats": entropy,
            "share_above_0.9": certain,
            "mean_logp": float(logp.mean()),
        },
    )


def _mask(shape: Shape, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] bool on the CPU, and [B + 1]: where sequences begin and end."""
    length = _LONGEST
    while shape.tokens % length or shape.tokens // length < 2:
        length -= 1
    bounds = torch.arange(0, shape.tokens + 1, length)
    mask = torch.ones(shape.tokens, dtype=torch.bool)
    for start in bounds[:-1].tolist():
        if shape.scenario == "steps":
            mask[start : start + math.ceil(0.9 * length)] = False
        elif shape.scenario == "episodes":
            mask[start : start + length] = _episode(length, generator)
    return mask, bounds


def _episode(length: int, generator: torch.Generator) -> torch.Tensor:
    """[L] bool: a prompt, then the model's text with up to four tool outputs in it."""
    inactive = length * (0.3 + 0.4 * float(torch.rand((), generator=generator)))
    calls = int(torch.randint(1, 5, (), generator=generator))
    prompt = round(0.4 * inactive)
    output = round(0.6 * inactive / calls)
    written = (length - prompt - output * calls) // (calls + 1)
    mask = torch.ones(length, dtype=torch.bool)
    mask[:prompt] = False
    for call in range(calls):
        start = prompt + written * (call + 1) + output * call
        mask[start : start + output] = False
    return mask


def _states(
    shape: Shape, generator: torch.Generator, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, H] and head [V, H]."""

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    def uniform(low: float, high: float) -> torch.Tensor:
        drawn = torch.rand(shape.tokens, 1, generator=generator, device=generator.device)
        return low + (high - low) * drawn

    rank = torch.arange(shape.vocab, device=generator.device)
    frequency = torch.log_softmax(-torch.log(rank + 10.0), dim=0)
    tokens = normal(shape.vocab, shape.hidden) / shape.hidden**0.5
    common = normal(shape.hidden)
    common /= common.norm()
    # What all rows have in common changes no softmax: none of it, so that gradients are of size 1.
    weight = tokens + (frequency - frequency.mean()).unsqueeze(1) * common
    # The odds of the tokens that a state points at, against all others together (e^2 of them).
    first, second = (
        torch.multinomial(frequency.exp(), shape.tokens, replacement=True, generator=generator)
        for _ in range(2)
    )
    fork = uniform(0, 1) < 0.2
    odds = torch.where(fork, uniform(1, 4), uniform(4, 12))
    hidden = common + 2 * normal(shape.tokens, shape.hidden)
    hidden += (odds + 2 - frequency[first].unsqueeze(1)) * tokens[first]
    hidden += torch.where(fork, odds + 2 - frequency[second].unsqueeze(1), 0.0) * tokens[second]
    return hidden.to(dtype), weight.to(dtype)


def _sample(
    hidden: torch.Tensor, weight: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, float, float]:
    """Targets [T] from the model's own distribution; its mean entropy; how often p > 0.9."""
    tokens, vocab = hidden.shape[0], weight.shape[0]
    targets = torch.empty(tokens, dtype=torch.int64, device=hidden.device)
    entropy = certain = 0.0
    chunk = max(1, _CHUNK_LOGITS_BYTES // (4 * vocab))
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        scores = (hidden[part] @ weight.t()).float().log_softmax(1)
        chances = scores.exp()
        entropy += float(-(chances * scores).sum())
        certain += float((chances.amax(dim=1) > 0.9).sum())
        noise = torch.empty_like(scores).exponential_(generator=generator)
        targets[part] = (scores - noise.log()).argmax(dim=1)
    return targets, entropy / tokens, certain / tokens
