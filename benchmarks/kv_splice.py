"""KV splicing against index copies by layer, copies of whole blocks, and re-prefill.

Every way is checked before it is timed. Then all of them run in every round, in turns, beside a
plain copy of a large buffer: bytes are those that must be read and written, and the share is of
that copy's rate. A call's time has everything that it does, host included; the device's alone is
taken while the host is ahead. On a CPU everything is tiny: that checks this program and measures
nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from command_line import OneLineParser, count, exit_status
from gpu_state import gpu_state
from kv_splice_ways import CASES, LAYOUTS, WAYS, Cache, Shape, check, make_cases, ways_of
from report import append_record, print_table
from transformers import Qwen3ForCausalLM

from thor_fast.kernels import Rope

RESULTS = Path(__file__).parent / "results" / "kv_splice.jsonl"
# Qwen3-1.7B's, 112 KiB of cache per token in bfloat16; and a toy.
SHAPES = {"cuda": Shape(28, 16, 128, 2048, 6144, 16), "cpu": Shape(2, 4, 16, 32, 64, 16)}
TOKENS = {"cuda": (256, 2000, 8192), "cpu": (100,)}
COPIED_BYTES = {"cuda": 2**31, "cpu": 2**22}
_LEAST_S = 0.05
_MOST_CALLS = 50
_SLEEP_CYCLES = 50_000_000  # some 30 ms: time for the host to queue all calls


@dataclass(slots=True)
class Outcome:
    """Of one way in one case; ``problem`` is why it was not timed."""

    moved_bytes: int
    problem: str = ""
    seconds: list[float] = field(default_factory=list)
    device_seconds: list[float] = field(default_factory=list)

    def record(self, bandwidth: float) -> dict[str, Any]:
        """Medians over the rounds; the share is of the device's time where that was measured."""
        found: dict[str, Any] = {"moved_bytes": self.moved_bytes, "problem": self.problem}
        if self.seconds:
            seconds, device = median(self.seconds), None
            if self.device_seconds:
                device = median(self.device_seconds)
            rate = self.moved_bytes / (device or seconds)
            found |= {"seconds": seconds, "device_seconds": device, "bytes_per_s": rate}
            found["share_of_copy"] = rate / bandwidth
        return found


def run_layout(
    layout: str, tokens: int, model: Qwen3ForCausalLM, args: argparse.Namespace
) -> dict[str, Any]:
    """All cases and ways for one pool."""
    shape, device = SHAPES[args.device], torch.device(args.device)
    cache = Cache(shape, 2 * (-(-tokens // shape.block_size) + 32), layout, device)
    rope = Rope.from_config(model.config, interleaved=False)
    copied = torch.empty(COPIED_BYTES[args.device] // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(copied)
    ready: dict[tuple[str, str], Callable[[], object]] = {}
    outcomes: dict[tuple[str, str], Outcome] = {}
    for case in make_cases(cache, tokens, rope):
        for name, way in ways_of(case, cache, model).items():
            key = case.name, name
            outcomes[key] = Outcome(case.moved_bytes, way if isinstance(way, str) else "")
            if callable(way):
                way()  # compiles
                if name != "re-prefill":
                    outcomes[key].problem = check(case, cache, way)
                if not outcomes[key].problem:
                    ready[key] = way
    copies = []
    for number in range(args.rounds):
        copies.append(_timed(lambda: target.copy_(copied), device)[0])
        turn = number % len(ready)
        for key in [*ready][turn:] + [*ready][:turn]:
            seconds, device_seconds = _timed(ready[key], device)
            outcomes[key].seconds.append(seconds)
            if device_seconds is not None:
                outcomes[key].device_seconds.append(device_seconds)
    bandwidth = 2 * copied.numel() / median(copies)
    print(f"{layout}, {tokens} tokens: {args.rounds} rounds", flush=True)
    return {
        "copy_bytes_per_s": bandwidth,
        "bytes_per_token": cache.view.bytes_per_token,
        "cases": {
            name: {way: outcomes[name, way].record(bandwidth) for way in WAYS} for name in CASES
        },
    }


def _timed(step: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Seconds of a call, and those of the device alone (CUDA)."""
    once = _wall(step, 1, device)
    calls = max(1, min(_MOST_CALLS, round(_LEAST_S / max(once, 1e-9))))
    seconds = _wall(step, calls, device)
    if device.type != "cuda":
        return seconds, None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SLEEP_CYCLES)  # noqa: SLF001 - torch's own benchmarks do the same
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return seconds, start.elapsed_time(end) / 1e3 / calls


def _wall(step: Callable[[], object], calls: int, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        step()
    _wait(device)
    return (time.perf_counter() - started) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row per case and way."""
    header = ["layout, tokens, case", "way", "MB moved", "us", "us, device", "GB/s", "of copy"]
    rows = []
    for key, one in metrics.items():
        for case, ways in one["cases"].items():
            for way, found in ways.items():
                row = [f"{key} {case}", way, f"{found['moved_bytes'] / 1e6:.2f}"]
                if found["problem"]:
                    rows.append([*row, found["problem"], "", "", ""])
                    continue
                device = found["device_seconds"]
                row += [f"{found['seconds'] * 1e6:.1f}", f"{device * 1e6:.1f}" if device else "-"]
                rows.append(
                    [*row, f"{found['bytes_per_s'] / 1e9:.2f}", f"{found['share_of_copy']:.0%}"]
                )
    return header, rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; errors are one line on stderr and exit status 2."""
    assert __doc__ is not None
    parser = OneLineParser(
        prog="kv_splice",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=count, action="append", help="of a suffix, may be repeated")
    add("--layout", choices=LAYOUTS, action="append", help="may be repeated; default: both")
    add("--rounds", type=count, default=5, help="default: 5")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where torch sees a GPU")
    add("--quick", action="store_true", help="one round of the smallest problem: does it work")
    add("--output", type=Path, default=RESULTS, help="JSON lines")
    args = parser.parse_args(argv)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: 'cuda', but torch sees no GPU")
    args.tokens = args.tokens or TOKENS[args.device]
    if args.quick:
        args.tokens, args.rounds = args.tokens[:1], 1
    return args


def run(args: argparse.Namespace) -> int:
    """Everything the command line asks for; 1 if ours was wrong anywhere."""
    before = gpu_state()
    print(f"torch {torch.__version__} on {args.device}; GPU: {before}")
    if args.device == "cpu":
        print("on a CPU this checks the program; its times are no figures to quote")
    for kind in (CASES, WAYS):
        for name, what in kind.items():
            print(f"{name}: {what}")
    sys.stdout.flush()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with torch.device(args.device):
        model = Qwen3ForCausalLM(SHAPES[args.device].config()).to(dtype).eval()
    metrics = {
        f"{layout} T={tokens}": run_layout(layout, tokens, model, args)
        for layout in args.layout or LAYOUTS
        for tokens in args.tokens
    }
    params = {
        "device": args.device,
        "rounds": args.rounds,
        "quick": args.quick,
        "cuda": torch.version.cuda,
        "gpu_before": before,
        "gpu_after": gpu_state(),
    }
    append_record(args.output, "kv_splice", params, metrics)
    print_table(*table(metrics))
    ours = (case["thor_fast"] for one in metrics.values() for case in one["cases"].values())
    return int(any(found["problem"] for found in ours))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where ours is wrong, 2 on bad options, 130 if interrupted."""
    args = parse(argv)
    return exit_status("kv_splice", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
