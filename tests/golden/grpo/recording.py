"""What the three peers share: hidden states to log-probs, gradients, and the files written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent

LogProbs = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""``(hidden, weight, targets)`` to log-probs and entropies [B, L]."""


def plain_logp(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [B, L] by whole logits, in the inputs' dtype."""
    scores = torch.log_softmax(hidden @ weight.t(), dim=-1)
    logp = scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logp, -(scores.exp() * scores).sum(-1)


def text_of(settings: dict[str, object]) -> str:
    """As a user of the peer writes them."""
    quoted = {k: json.dumps(v) if isinstance(v, str) else repr(v) for k, v in settings.items()}
    return ", ".join(f"{name}={value}" for name, value in quoted.items())


@dataclass
class Recording:
    """Of one peer: every case's settings (JSON), loss and gradients (npz)."""

    peer: str
    package: str
    cases: list[dict[str, object]] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def add(
        self,
        settings: dict[str, object],
        batch: str,
        inputs: dict[str, np.ndarray],
        loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        dtype: torch.dtype = torch.float64,
        parts: tuple[int, ...] = (),
    ) -> None:
        """Differentiate ``loss_of(hidden [B, L, H], weight [V, H])``.

        ``parts``: the sequences of each micro-batch, where the loss is a sum over such.
        """
        hidden = torch.tensor(inputs["hidden"], dtype=dtype, requires_grad=True)
        weight = torch.tensor(inputs["weight"], dtype=dtype, requires_grad=True)
        loss = loss_of(hidden, weight)
        loss.backward()
        key = f"{len(self.cases):02}"
        for name, values in {"loss": loss, "hidden": hidden.grad, "weight": weight.grad}.items():
            found = values.detach().numpy()
            # A denominator of 0 is the only way to NaN here, and no case has one.
            assert np.isfinite(found).all(), f"{self.peer}: {name} of {settings} is not finite"
            self.arrays[f"{key}.{name}"] = found
        case = {"key": key, "settings": text_of(settings), "batch": batch, "parts": list(parts)}
        self.cases.append(case)

    def write(self) -> None:
        """``<peer>.json`` and ``<peer>.npz`` beside this file."""
        head = {"peer": self.package, "version": version(self.package)}
        head["torch"] = torch.__version__
        cases = ",\n".join(f"  {json.dumps(case)}" for case in self.cases)
        text = json.dumps(head)[:-1] + f', "cases": [\n{cases}\n]}}\n'
        (HERE / f"{self.peer}.json").write_text(text, encoding="utf-8")
        np.savez_compressed(HERE / f"{self.peer}.npz", **self.arrays)
        print(f"{self.peer}: {len(self.cases)} cases of {self.package} {head['version']}")
