"""The loop over chunks of rows, whatever the logits come from and whoever takes their gradient.

Legend: N rows that are read, C of a chunk, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from .hierarchical_grpo_plan import LEVELS, Selection
from .hierarchical_grpo_rows import (
    IGNORED_TARGET,
    Rows,
    Shard,
    anchors_of,
    finish_rows,
    logit_gradients,
    row_sums,
)
from .hierarchical_grpo_spec import LossSpec
from .hierarchical_grpo_tokens import METRICS, token_terms

__all__ = [
    "Asked",
    "Batch",
    "Found",
    "Source",
    "gather",
    "inverse_temperatures",
    "log_probs",
    "run",
]


class Source(Protocol):
    """Where logits come from, and where their gradient goes."""

    bias: torch.Tensor | None
    """[V], not yet in the logits."""
    weights_dtype: torch.dtype
    """Of the gradient; no wider than the logits."""
    shard: Shard

    def logits(self, part: slice) -> torch.Tensor:
        """[C, V] of these rows, which the caller uses up."""
        ...

    def take(self, part: slice, weights: torch.Tensor, scale: torch.Tensor | None) -> None:
        """The gradient of these rows' logits: ``weights`` [C, V], by row times ``scale`` [C]."""
        ...


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


def log_probs(
    source: Source, asked: Asked, spec: LossSpec, *, chunk_rows: int, triton: bool
) -> torch.Tensor:
    """[N]: what :func:`run` finds for these rows, where nobody wants more of them."""
    logp = torch.zeros_like(asked.inverse_temperature)
    for part in _parts(len(logp), chunk_rows):
        mine = Asked(*(values[part] for values in asked))
        logp[part] = _rows(source, part, mine, spec, triton, keep_weights=False).logp
    return logp


def _parts(rows: int, chunk_rows: int) -> list[slice]:
    return [slice(at, min(at + chunk_rows, rows)) for at in range(0, rows, chunk_rows)]


def run(
    source: Source,
    batch: Batch,
    chosen: Selection,
    spec: LossSpec,
    *,
    chunk_rows: int,
    triton: bool,
    want_gradient: bool,
) -> Found:
    """Log-probs, entropies and metrics of all rows; the gradient goes to the source.

    A loss by sequence needs the log-probs of all rows before it knows any derivative: then logits
    are computed twice where a gradient is wanted.
    """
    chosen = chosen.only(batch.targets != IGNORED_TARGET)
    logp = torch.zeros_like(batch.old_logp)
    found = Found(logp, torch.zeros_like(logp), logp.new_zeros(LEVELS, len(METRICS)))
    parts = _parts(len(chosen.rows), chunk_rows)
    derivative = None
    if spec.by_sequence:
        for part in parts:
            mine = batch.part(part)
            here = _rows(source, part, mine, spec, triton, keep_weights=False)
            _note(found, part, here)
        terms = token_terms(found.logp, batch.old_logp, batch.ref_logp, found.entropy, chosen, spec)
        derivative, found = terms.derivative, found._replace(metrics=terms.metrics)
        if not want_gradient:
            return found
    for part in parts:
        # With a gradient through the entropy a row's weights are known after its derivatives only.
        keep = want_gradient and not spec.entropy_coef
        mine = batch.part(part)
        if derivative is None or keep:
            here = _rows(source, part, mine, spec, triton, keep_weights=keep)
        if derivative is None:
            _note(found, part, here)
            ours = chosen.part(part.start, part.stop)
            terms = token_terms(here.logp, mine.old_logp, mine.ref_logp, here.entropy, ours, spec)
            found = found._replace(metrics=found.metrics + terms.metrics)
            by_logp = terms.derivative
        else:
            by_logp = derivative[part]
        if keep:
            source.take(part, here.weights, -by_logp * here.factor * spec.logit_scale)
        elif want_gradient:
            by_entropy = -spec.entropy_coef * chosen.term_weight[part].to(by_logp.dtype)
            gradient = _through_entropy(source, batch, part, spec, triton, by_logp, by_entropy)
            source.take(part, gradient, None)
    return found


def _note(found: Found, part: slice, here: Rows) -> None:
    found.logp[part] = here.logp
    if here.entropy is not None:
        found.entropy[part] = here.entropy


def _finished(logits: torch.Tensor, source: Source, spec: LossSpec) -> torch.Tensor:
    """With bias and scale; the Triton kernels add them as they read."""
    if source.bias is not None:
        logits = logits + source.bias.to(logits.dtype)
    return logits if spec.logit_scale == 1 else logits * spec.logit_scale


def _rows(
    source: Source,
    part: slice,
    mine: Batch | Asked,
    spec: LossSpec,
    triton: bool,
    *,
    keep_weights: bool,
) -> Rows:
    logits = source.logits(part)
    anchors = anchors_of(
        logits, mine.targets, source.shard, source.bias, spec.logit_scale, spec.softcap
    )
    if triton:
        from .hierarchical_grpo_triton import in_place_of, row_sums_triton

        sums = row_sums_triton(
            logits,
            anchors,
            mine.inverse_temperature,
            bias=source.bias,
            logit_scale=spec.logit_scale,
            softcap=spec.softcap,
            entropy=spec.needs_entropy,
            weights=in_place_of(logits, source.weights_dtype) if keep_weights else None,
        )
    else:
        sums = row_sums(
            _finished(logits, source, spec),
            anchors,
            mine.inverse_temperature,
            softcap=spec.softcap,
            entropy=spec.needs_entropy,
        )
    return finish_rows(
        sums,
        anchors,
        mine.inverse_temperature,
        source.shard,
        softcap=spec.softcap,
        keep_weights=keep_weights,
    )


def _through_entropy(
    source: Source,
    batch: Batch,
    part: slice,
    spec: LossSpec,
    triton: bool,
    by_logp: torch.Tensor,
    by_entropy: torch.Tensor,
) -> torch.Tensor:
    """[C, V]: the gradient by the source's logits."""
    logits, mine = source.logits(part), batch.part(part)
    if not triton:
        gradient = logit_gradients(
            _finished(logits, source, spec),
            mine.targets,
            mine.inverse_temperature,
            by_logp,
            by_entropy,
            softcap=spec.softcap,
        )
        return gradient.mul_(spec.logit_scale)
    from .hierarchical_grpo_triton import in_place_of, logit_gradients_triton

    return logit_gradients_triton(
        logits,
        mine.targets,
        mine.inverse_temperature,
        by_logp,
        by_entropy,
        bias=source.bias,
        logit_scale=spec.logit_scale,
        softcap=spec.softcap,
        gradients=in_place_of(logits, source.weights_dtype),
    )
