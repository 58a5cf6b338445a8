"""One measurement: forward and backward of a backend, or the GEMMs that no exact one can spare."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from loss_peers.registry import Backend
from loss_problem import Problem
from loss_truth import Truth, errors_of
from report import first_line

__all__ = ["TOLERANCE", "Measurement", "check", "floors", "measure", "timed"]

_LEAST_S = 0.05
_MOST_CALLS = 20
_CHUNK = 8192  # rows of one GEMM: at this size cuBLAS is at its rate
# A gradient further away than bfloat16 logits and accumulation explain is wrong.
TOLERANCE = {torch.bfloat16: 0.06, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of one call. ``extra_bytes``: most allocated above what was there before; CUDA only."""

    seconds: float
    extra_bytes: int | None


def check(backend: Backend, problem: Problem, truth: Truth) -> tuple[dict[str, float], str]:
    """Loss and gradients against the truth, and what is wrong with them, or nothing.

    This is the warm-up too: what compiles or tunes itself does it here.
    """
    try:
        loss = backend.run()
        loss.backward()
        errors = errors_of(loss, problem, truth)
    except torch.OutOfMemoryError:
        return {}, "out of memory"
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
        return {}, f"failed: {type(error).__name__}: {first_line(error)[:200]}"
    finally:
        _forget(problem)
    bound = TOLERANCE[problem.hidden.dtype]
    worst = max(errors, key=lambda name: errors[name])
    # A comparison that NaN passes would be none.
    if not errors[worst] <= bound or any(e != e for e in errors.values()):
        return errors, f"wrong: {worst} is off by {errors[worst]:.1e}, expected at most {bound:g}"
    return errors, ""


def _forget(problem: Problem) -> None:
    problem.hidden.grad = problem.weight.grad = None


def measure(backend: Backend, problem: Problem) -> Measurement:
    """Forward and backward."""

    def step() -> None:
        backend.run().backward()
        _forget(problem)

    return timed(step, problem.hidden.device)


def floors(problem: Problem) -> dict[int, Callable[[], Measurement]]:
    """By number of GEMMs: those of the rows that are read, on the softmax of the data itself.

    The logits, and back to the states (2); to the head as well (3).
    """
    device, hidden = problem.hidden.device, problem.hidden.detach()[problem.rows]
    weight = problem.weight.detach()
    size = min(_CHUNK, len(hidden))
    logits = hidden[:size] @ weight.t()
    chances = logits.float().softmax(1).to(hidden.dtype)
    by_hidden, by_weight = torch.empty_like(hidden[:size]), torch.empty_like(weight)

    def products(count: int) -> None:
        for start in range(0, len(hidden), size):
            rows = hidden[start : start + size]
            n = len(rows)
            torch.mm(rows, weight.t(), out=logits[:n])
            torch.mm(chances[:n], weight, out=by_hidden[:n])
            if count == 3:
                torch.mm(chances[:n].t(), rows, out=by_weight)

    return {count: lambda c=count: timed(lambda: products(c), device) for count in (2, 3)}


def timed(step: Callable[[], object], device: torch.device) -> Measurement:
    """The mean of as many calls as fill a twentieth of a second, and one call's memory."""
    if device.type != "cuda":
        seconds = _seconds_on_cpu(step, 1)
        return Measurement(_seconds_on_cpu(step, _calls(seconds)), None)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    seconds = _seconds_on_cuda(step, 1)
    extra = torch.cuda.max_memory_allocated(device) - before
    return Measurement(_seconds_on_cuda(step, _calls(seconds)), extra)


def _calls(seconds: float) -> int:
    return max(1, min(_MOST_CALLS, round(_LEAST_S / max(seconds, 1e-9))))


def _seconds_on_cpu(step: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - started) / calls


def _seconds_on_cuda(step: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls
