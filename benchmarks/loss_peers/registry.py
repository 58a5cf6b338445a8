"""The backends by name, in the order of the table, and why one cannot take part."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from loss_problem import Problem
from loss_truth import Kind

from loss_peers.unsupported import Unsupported

__all__ = ["FROZEN", "GIVEN", "NAMES", "OURS", "Backend", "open_backends"]

OURS = "thor_fast"
FROZEN = "thor_fast-frozen"
_MODULES = {
    OURS: "thor_fast_fused",
    FROZEN: "thor_fast_frozen",
    "naive": "naive",
    "compiled": "compiled_chunks",
    "torch-ce": "torch_cross_entropy",
    "trl": "trl_head",
    "verl": "verl_triton",
    "liger-scaled": "liger_scaled",
    "liger-grpo": "liger_grpo",
    "quack": "quack_scaled_exp",
    "cce": "cce",
}
NAMES = tuple(_MODULES)
GIVEN = {
    OURS: "given_thor_fast",
    "naive": "given_naive",
    "trl": "given_trl",
    "liger-grpo": "given_liger",
}
"""Files of those that take logits, by name; their ``make`` gets these."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute a loss of ``kind``; ``run`` gives it, differentiable."""

    name: str
    kind: Kind
    run: Callable[[], torch.Tensor]


def describe(name: str, *, logits: bool = False) -> str:
    """The first line of its file, and its loss; ``logits``: of the case where these are given."""
    module = importlib.import_module(f"loss_peers.{(GIVEN if logits else _MODULES)[name]}")
    summary = (module.__doc__ or "").splitlines()[0]
    return f"{summary} [{module.KIND.value}]"


def open_backends(names: Iterable[str], problem: Problem) -> tuple[list[Backend], dict[str, str]]:
    """What can run on this problem; and by name why the others cannot."""
    opened, absent = [], {}
    for name in names:
        module = importlib.import_module(f"loss_peers.{_MODULES[name]}")
        try:
            opened.append(Backend(name, module.KIND, module.make(problem)))
        except ImportError as error:
            absent[name] = f"not installed ({error.name or str(error).splitlines()[0]})"
        except Unsupported as error:
            absent[name] = str(error)
    return opened, absent
