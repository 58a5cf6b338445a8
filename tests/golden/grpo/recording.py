"""What the three peers share: hidden states to log-probs, gradients, and the files written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import batches
import numpy as np
import torch

HERE = Path(__file__).resolve().parent

Cases = Iterable[tuple[dict[str, object], tuple[str, ...]]]
"""Settings, and the batches they are run on."""

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of a micro-batch, by its hidden states [b, L, H] and the head's weight [V, H]."""

LossOf = Callable[[dict[str, object], dict[str, np.ndarray], slice], tuple[Loss, torch.dtype]]
"""The peer's loss with these settings of the sequences in the slice, and what it computes in."""


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


def parts_of(settings: dict[str, object]) -> tuple[int, ...]:
    """How many sequences each micro-batch has."""
    split = {settings.get(name) for name in ("gradient_accumulation_steps", "micro_batches")}
    return (2, batches.B - 2) if 2 in split else (batches.B,)


def record(peer: str, package: str, cases: Cases, loss_of: LossOf) -> None:
    """Write ``<peer>.json``, every case's settings, and ``<peer>.npz``, losses and gradients."""
    everything = batches.make()
    found: list[dict[str, object]] = []
    arrays: dict[str, np.ndarray] = {}
    for settings, names in cases:
        for batch in names:
            key, parts = f"{len(found):02}", parts_of(settings)
            inputs = batches.choose(everything, batch)
            for name, values in _differentiate(settings, inputs, parts, loss_of).items():
                # Nothing divides by 0 here: that would be this recording's fault.
                assert np.isfinite(values).all(), f"{peer}: {name} of {settings} is not finite"
                arrays[f"{key}.{name}"] = values
            case = {"key": key, "settings": text_of(settings), "batch": batch}
            found.append(case | {"parts": list(parts)})
    head = json.dumps({"peer": package, "version": version(package), "torch": torch.__version__})
    lines = ",\n".join(f"  {json.dumps(case)}" for case in found)
    text = f'{head[:-1]}, "cases": [\n{lines}\n]}}\n'
    (HERE / f"{peer}.json").write_text(text, encoding="utf-8")
    np.savez_compressed(HERE / f"{peer}.npz", **arrays)
    print(f"{peer}: {len(found)} cases of {package} {version(package)}")


def _differentiate(
    settings: dict[str, object],
    inputs: dict[str, np.ndarray],
    parts: tuple[int, ...],
    loss_of: LossOf,
) -> dict[str, np.ndarray]:
    bounds = np.cumsum((0, *parts)).tolist()
    rows = [slice(*pair) for pair in pairwise(bounds)]
    made = [loss_of(settings, inputs, part) for part in rows]
    dtype = made[0][1]
    hidden = torch.tensor(inputs["hidden"], dtype=dtype, requires_grad=True)
    weight = torch.tensor(inputs["weight"], dtype=dtype, requires_grad=True)
    loss = sum(one(hidden[part], weight) for part, (one, _) in zip(rows, made, strict=True))
    loss.backward()
    named = {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}
    return {name: values.numpy() for name, values in named.items()}
