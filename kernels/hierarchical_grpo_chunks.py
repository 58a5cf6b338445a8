"""The loop over chunks of rows of a head's logits.

Legend: N rows that are read, C of a chunk, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from .hierarchical_grpo_head import Head
from .hierarchical_grpo_plan import LEVELS, Selection
from .hierarchical_grpo_rows import (
    IGNORED_TARGET,
    Rows,
    Weights,
    anchors_of,
    finish_rows,
    gradient_terms,
    logit_gradients,
    row_sums,
    split_target,
)
from .hierarchical_grpo_spec import LossSpec
from .hierarchical_grpo_tokens import METRICS, token_terms

__all__ = [
    "Asked",
    "Batch",
    "Found",
    "by_entropy",
    "gather",
    "inverse_temperatures",
    "log_probs",
    "parts_of",
    "run",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Asked(NamedTuple):
    """What a log-prob depends on besides the logits."""

    targets: torch.Tensor  # [N] int64
    inverse_temperature: torch.Tensor  # [N]


class Batch(NamedTuple):
    """What is known of each row before its logits are."""

    targets: torch.Tensor  # [N] int64
    old_logp: torch.Tensor  # [N]
    ref_logp: torch.Tensor | None  # [N]
    inverse_temperature: torch.Tensor  # [N]

    def part(self, rows: slice) -> Batch:
        """Those of a chunk."""
        return Batch(*(None if values is None else values[rows] for values in self))  # type: ignore[arg-type]


class Found(NamedTuple):
    """What the loop gives."""

    logp: torch.Tensor  # [N]
    entropy: torch.Tensor  # [N]; 0 where nobody asks
    metrics: torch.Tensor  # [2, len(METRICS)]


def gather(
    chosen: Selection,
    targets: torch.Tensor,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    temperature: torch.Tensor | None,
    spec: LossSpec,
    compute: torch.dtype,
) -> Batch:
    """The rows of a selection, from values per token of the batch.

    Of a row that nobody asks about the log-prob will be 0; so are those it is compared with.
    """
    rows = chosen.rows
    targets = targets[rows].long()
    ignored = targets == IGNORED_TARGET

    def compared(values: torch.Tensor) -> torch.Tensor:
        return torch.where(ignored, 0.0, values[rows].to(compute))

    return Batch(
        targets=targets,
        old_logp=compared(old_logp),
        ref_logp=None if ref_logp is None else compared(ref_logp),
        inverse_temperature=inverse_temperatures(rows, temperature, spec, compute),
    )


def inverse_temperatures(
    rows: torch.Tensor, temperature: torch.Tensor | None, spec: LossSpec, compute: torch.dtype
) -> torch.Tensor:
    """[N]: from one per token of the batch, or the spec's for all."""
    if temperature is None:
        return torch.full(rows.shape, 1 / spec.temperature, dtype=compute, device=rows.device)
    return 1 / temperature[rows].to(compute)


def _in_full_precision(loop: Callable[_P, _R]) -> Callable[_P, _R]:
    """Autocast would give bfloat16 GEMMs, whose logits are what this library is there to avoid."""

    @functools.wraps(loop)
    def run_it(*args: _P.args, **settings: _P.kwargs) -> _R:
        head = args[0]
        assert isinstance(head, Head)
        with torch.autocast(head.device_type, enabled=False):
            return loop(*args, **settings)

    return run_it


@_in_full_precision
def log_probs(
    head: Head, asked: Asked, spec: LossSpec, *, chunk_rows: int, triton: bool
) -> torch.Tensor:
    """[N]: what :func:`run` finds for these rows, where nobody wants more of them."""
    logp = torch.zeros_like(asked.inverse_temperature)
    for part in parts_of(len(logp), chunk_rows):
        mine = Asked(*(values[part] for values in asked))
        logits = head.logits(part)
        logp[part] = _rows(head, logits, mine, spec, triton, keep_weights=False).logp
    return logp


def parts_of(rows: int, chunk_rows: int) -> list[slice]:
    """The chunks, in order."""
    return [slice(at, min(at + chunk_rows, rows)) for at in range(0, rows, chunk_rows)]


@_in_full_precision
def run(
    head: Head,
    batch: Batch,
    chosen: Selection,
    spec: LossSpec,
    *,
    chunk_rows: int,
    triton: bool,
    want_gradient: bool,
) -> Found:
    """Log-probs, entropies and metrics of all rows; the gradient goes to the head."""
    chosen = chosen.only(batch.targets != IGNORED_TARGET)
    parts = parts_of(len(chosen.rows), chunk_rows)
    if spec.by_sequence:
        return _by_sequence(head, batch, chosen, spec, parts, triton, want_gradient)
    found = _nothing(batch)
    # With a gradient through the entropy a row's weights have no common factor.
    keep = want_gradient and not spec.entropy_coef
    for part in parts:
        mine, ours = batch.part(part), chosen.part(part.start, part.stop)
        logits = head.logits(part)
        here = _rows(head, logits, mine, spec, triton, keep_weights=keep)
        _note(found, part, here)
        terms = token_terms(here.logp, mine.old_logp, mine.ref_logp, here.entropy, ours, spec)
        found = found._replace(metrics=found.metrics + terms.metrics)
        if here.weights is not None:
            head.take(part, here.weights, -terms.derivative * here.factor * spec.logit_scale)
        elif want_gradient:
            gradient = _gradient(head, logits, mine, here, terms.derivative, ours, spec, triton)
            head.take(part, gradient, None)
    return found


def _by_sequence(
    head: Head,
    batch: Batch,
    chosen: Selection,
    spec: LossSpec,
    parts: list[slice],
    triton: bool,
    want_gradient: bool,
) -> Found:
    """Log-probs of all rows come before any derivative; logits are kept if one chunk has them."""
    found, rows = _nothing(batch), []
    logits = None
    for part in parts:
        logits = head.logits(part)
        rows.append(_rows(head, logits, batch.part(part), spec, triton, keep_weights=False))
        _note(found, part, rows[-1])
    terms = token_terms(found.logp, batch.old_logp, batch.ref_logp, found.entropy, chosen, spec)
    if want_gradient:
        for part, here in zip(parts, rows, strict=True):
            if logits is None or len(parts) > 1:
                logits = head.logits(part)
            mine, ours = batch.part(part), chosen.part(part.start, part.stop)
            by_logp = terms.derivative[part]
            gradient = _gradient(head, logits, mine, here, by_logp, ours, spec, triton)
            head.take(part, gradient, None)
    return found._replace(metrics=terms.metrics)


def _nothing(batch: Batch) -> Found:
    logp = torch.zeros_like(batch.old_logp)
    return Found(logp, torch.zeros_like(logp), logp.new_zeros(LEVELS, len(METRICS)))


def _note(found: Found, part: slice, here: Rows) -> None:
    found.logp[part] = here.logp
    if here.entropy is not None:
        found.entropy[part] = here.entropy


def _finished(logits: torch.Tensor, head: Head, spec: LossSpec) -> torch.Tensor:
    """With bias and scale; the Triton kernels add them as they read."""
    if head.bias is not None:
        logits = logits + head.bias.to(logits.dtype)
    return logits if spec.logit_scale == 1 else logits * spec.logit_scale


def _rows(
    head: Head,
    logits: torch.Tensor,
    mine: Batch | Asked,
    spec: LossSpec,
    triton: bool,
    *,
    keep_weights: bool,
) -> Rows:
    """Weights take the place of the logits."""
    anchors = anchors_of(
        logits, mine.targets, head.shard, head.bias, spec.logit_scale, spec.softcap
    )
    if triton:
        from .hierarchical_grpo_triton import in_place_of, row_sums_triton

        sums = row_sums_triton(
            logits,
            anchors,
            mine.inverse_temperature,
            bias=head.bias,
            logit_scale=spec.logit_scale,
            softcap=spec.softcap,
            entropy=spec.needs_entropy,
            weights=in_place_of(logits, head.weights_dtype) if keep_weights else None,
        )
    else:
        sums = row_sums(
            _finished(logits, head, spec),
            anchors,
            mine.inverse_temperature,
            softcap=spec.softcap,
            entropy=spec.needs_entropy,
            weights_dtype=head.weights_dtype if keep_weights else None,
        )
    return finish_rows(sums, anchors, mine.inverse_temperature, head.shard, softcap=spec.softcap)


def _gradient(
    head: Head,
    logits: torch.Tensor,
    mine: Batch,
    here: Rows,
    by_logp: torch.Tensor,
    ours: Selection,
    spec: LossSpec,
    triton: bool,
) -> Weights:
    """By the head's logits, which are used up."""
    terms = gradient_terms(
        here, mine.inverse_temperature, by_logp, by_entropy(ours, spec, by_logp.dtype)
    )
    if not triton:
        gradient = logit_gradients(_finished(logits, head, spec), terms, softcap=spec.softcap)
        gradient *= spec.logit_scale
        return split_target(gradient, terms.column, head.weights_dtype)
    from .hierarchical_grpo_triton import in_place_of, split_gradients_triton

    return split_gradients_triton(
        logits,
        terms,
        bias=head.bias,
        logit_scale=spec.logit_scale,
        softcap=spec.softcap,
        gradients=in_place_of(logits, head.weights_dtype),
    )


def by_entropy(chosen: Selection, spec: LossSpec, dtype: torch.dtype) -> torch.Tensor | None:
    """[N]: the loss's derivative by each row's entropy; ``None``: it does not depend on it."""
    if not spec.entropy_coef:
        return None
    return -spec.entropy_coef * chosen.term_weight.to(dtype)
