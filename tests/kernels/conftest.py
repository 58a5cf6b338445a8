"""Problems and the float64 truth shared by the kernel tests, on every path a kernel has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from thor_fast.kernels import Plan, make_plan
from thor_fast.kernels.hierarchical_grpo_rows import (
    Rows,
    Shard,
    anchors_of,
    finish_rows,
    row_sums,
)


@dataclass(frozen=True)
class Problem:
    """hidden [T, H], weight [V, H], targets [T], bias [V] or None; T tokens, V vocab, H hidden."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None
    temperature: float

    def truth(self) -> torch.Tensor:
        """[T] float64, from the operands as they are stored."""
        return self._plain(torch.float64)

    def torch_error(self) -> float:
        """Largest error of plain torch with float32 logits: what any float32 kernel may cost."""
        return float((self._plain(torch.float32).double() - self.truth()).abs().max())

    def _plain(self, dtype: torch.dtype) -> torch.Tensor:
        logits = self.hidden.to(dtype) @ self.weight.to(dtype).t()
        if self.bias is not None:
            logits = logits + self.bias.to(dtype)
        scores = torch.log_softmax(logits / self.temperature, dim=1)
        return scores.gather(1, self.targets[:, None]).squeeze(1)


def _make_problem(
    tokens: int,
    vocab: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> Problem:
    gen = torch.Generator().manual_seed(seed)
    # Logits of standard deviation 4: sharp, like a trained language model's, not near-uniform.
    weight = torch.randn(vocab, hidden, generator=gen) * (4.0 / hidden**0.5)
    return Problem(
        torch.randn(tokens, hidden, generator=gen).to(dtype).to(device),
        weight.to(dtype).to(device),
        torch.randint(0, vocab, (tokens,), generator=gen).to(device),
        torch.randn(vocab, generator=gen).to(device) if bias else None,
        temperature,
    )


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    return _make_problem


@dataclass(frozen=True)
class GrpoBatch:
    """Six sequences of both levels, one of them empty; all [T] but the head and what is [B]."""

    hidden: torch.Tensor  # [T, H], a leaf, as are the next two
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor  # [V]
    targets: torch.Tensor
    old_logp: torch.Tensor  # float64, as the next two
    ref_logp: torch.Tensor
    temperature: torch.Tensor
    mask: torch.Tensor
    rollout_weight: torch.Tensor
    level: torch.Tensor  # [B]
    advantages: torch.Tensor  # [B]
    cu_seqlens: torch.Tensor  # [B + 1]

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.weight, self.bias

    @property
    def rows(self) -> tuple[torch.Tensor, ...]:
        """What the ops take after the plan's place: old and reference log-probs."""
        return self.old_logp, self.ref_logp

    def plan(self, **settings: Any) -> Plan:
        given = {"advantages": self.advantages, "cu_seqlens": self.cu_seqlens} | settings
        return make_plan(given.pop("mask", self.mask), given.pop("level", self.level), **given)

    def to(self, dtype: torch.dtype) -> GrpoBatch:
        """The same numbers, rounded, as leaves of their own."""
        leaves = (leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves)
        return replace(self, **dict(zip(("hidden", "weight", "bias"), leaves, strict=True)))


def _make_grpo_batch(
    vocab: int = 53, hidden: int = 16, longest: int = 13, seed: int = 0, drift: float = 0.4
) -> GrpoBatch:
    """In float64; ``drift`` is how far the policy is from the one that sampled, in nats."""
    gen = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (6,), generator=gen)
    lengths[2] = 0
    tokens = int(lengths.sum())
    real = {"generator": gen, "dtype": torch.float64}
    states = torch.randn(tokens, hidden, **real)
    weight = torch.randn(vocab, hidden, **real) * (4.0 / hidden**0.5)
    bias = torch.randn(vocab, **real)
    targets = torch.randint(0, vocab, (tokens,), generator=gen)
    scores = torch.log_softmax(states @ weight.t() + bias, dim=1)
    logp = scores.gather(1, targets[:, None]).squeeze(1)
    return GrpoBatch(
        hidden=states.requires_grad_(),
        weight=weight.requires_grad_(),
        bias=bias.requires_grad_(),
        targets=targets,
        old_logp=logp + drift * torch.randn(tokens, **real),
        ref_logp=logp + drift * torch.randn(tokens, **real),
        temperature=0.6 + torch.rand(tokens, **real),
        mask=torch.rand(tokens, generator=gen) < 0.7,
        rollout_weight=torch.rand(tokens, generator=gen)
        * (torch.rand(tokens, generator=gen) < 0.7),
        level=torch.tensor([0, 0, 1, 1, 0, 1]),
        advantages=torch.tensor([1.0, -0.5, 3.0, 0.0, 0.0, 2.0])[torch.randperm(6, generator=gen)],
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
    )


@pytest.fixture(scope="session")
def make_grpo_batch() -> Callable[..., GrpoBatch]:
    return _make_grpo_batch


def _row_stage(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    *,
    triton: bool = False,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    weights: torch.Tensor | None = None,
) -> Rows:
    """The vocabulary's stage over whole rows of logits [C, V], as the loss runs it.

    Triton's leaves the logits alone unless ``weights`` lies over them; the twin keeps the weights
    that it makes.
    """
    inverse = (1 / torch.as_tensor(temperature)).expand(len(logits))
    inverse = inverse.to(torch.promote_types(logits.dtype, torch.float32))
    shard = Shard(0, logits.shape[1], None)
    anchors = anchors_of(logits, targets, shard, bias, logit_scale, softcap)
    if triton:
        from thor_fast.kernels.hierarchical_grpo_triton import row_sums_triton

        sums = row_sums_triton(
            logits,
            anchors,
            inverse,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            entropy=entropy,
            weights=weights,
        )
    else:
        finished = logits.to(inverse.dtype, copy=True)
        finished = (finished if bias is None else finished + bias) * logit_scale
        sums = row_sums(
            finished,
            anchors,
            inverse,
            softcap=softcap,
            entropy=entropy,
            weights_dtype=finished.dtype,
        )
    return finish_rows(sums, anchors, inverse, shard, softcap=softcap)


@pytest.fixture(scope="session")
def row_stage() -> Callable[..., Rows]:
    return _row_stage


@pytest.fixture
def ieee() -> Iterator[None]:
    """Triton's interpreter computes in numpy, which warns of infinities that a GPU works with."""
    with np.errstate(all="ignore"):
        yield
