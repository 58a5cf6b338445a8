"""Problems and the float64 truth shared by the kernel tests, on every path a kernel has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch


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
