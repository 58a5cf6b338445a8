r"""Tokens per second of the embedded engine and of others, on one tiny model made on the spot.

Contestants: our ``PagedEngine``, transformers' ``generate`` (static batch) and ``generate_batch``
(continuous batching), and vLLM where ``--vllm-python`` names an interpreter that has it. Each runs
in a process of its own with the same number of threads; for each batch size they take turns, round
after round, on the same prompts, and no prompt is seen twice, so that no prefix cache helps.
Decoding is greedy, and the tokens of all contestants are compared.

``--device cuda`` compares ``PagedEngine`` and ``generate`` alone, in bfloat16: there a token may
differ where two are nearly tied.

A ratio is taken within a round and its median over rounds is told: the machine's mood cancels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from command_line import OneLineParser, count
from decode_contestants import CONTESTANTS, Sizes
from report import append_record, print_table

_OURS = "paged"
_ON_A_GPU = ("paged", "generate")
_VOCAB = 4096


@dataclass(slots=True)
class Worker:
    """A contestant's process, its log, and what it says it is."""

    process: subprocess.Popen[str]
    log: Path
    version: str = ""

    def ask(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Seconds and tokens; ``RuntimeError`` with the log's last line if the process died."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(prompts) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(self.last_words()) from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.last_words())
        return cast(dict[str, Any], json.loads(line))

    def last_words(self) -> str:
        """The last line of its log."""
        self.process.wait()
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it ended without a word")


@dataclass(slots=True)
class Results:
    """By batch size and contestant: seconds of each round, and the share of sequences like ours."""

    seconds: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    equal: dict[int, dict[str, list[float]]] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, append the record; the exit status."""
    args = _parse(argv)
    if args.quick:
        args.batch, args.new_tokens, args.prompt_tokens, args.rounds = [2], 8, 12, 1
    sizes = Sizes(
        batch=max(args.batch),
        context=args.prompt_tokens + args.new_tokens + 1,
        new_tokens=args.new_tokens,
        threads=args.threads,
        device=args.device,
        quick=args.quick,
    )
    with tempfile.TemporaryDirectory(prefix="thor-decode-") as folder:
        model = Path(folder) / "model"
        parameters = _save_model(model, sizes["context"], args.device)
        workers, absent = _start(args, model, sizes)
        try:
            results = _measure(workers, args)
        finally:
            _stop(workers)
    metrics = _metrics(results, args.new_tokens)
    versions = {name: worker.version for name, worker in workers.items()}
    params = {"quick": args.quick, "parameters": parameters, "contestants": versions}
    params |= {"absent": absent, "rounds": args.rounds, "threads": args.threads}
    params |= {"device": args.device}
    params |= {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
    append_record(args.output, "decode_throughput", params, metrics)
    _print(metrics, versions, absent)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=(__doc__ or "").partition("\n")[0].removeprefix("r"))
    parser.add_argument("--batch", type=count, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompt-tokens", type=count, default=128, help="at most; half at least")
    parser.add_argument("--new-tokens", type=count, default=128)
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--threads", type=count, default=1, help="torch threads of each contestant")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--vllm-python", type=Path, help="an interpreter that has vLLM")
    parser.add_argument("--quick", action="store_true", help="seconds; the figures mean nothing")
    default = Path(__file__).parent / "results" / "decode_throughput.jsonl"
    parser.add_argument("--output", type=Path, default=default, help="JSON lines, appended to")
    return parser.parse_args(argv)


def _save_model(path: Path, context: int, device: str) -> int:
    """A random Qwen3; returns how many parameters it has."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=_VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=context,
        # Tied and narrow weights repeat one token for ever: equality would say nothing.
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    if device == "cuda":
        model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.save_pretrained(path)
    return sum(p.numel() for p in model.parameters())


def _start(
    args: argparse.Namespace, model: Path, sizes: Sizes
) -> tuple[dict[str, Worker], dict[str, str]]:
    """All contestants, and why others take no part."""
    started: dict[str, Worker] = {}
    workers: dict[str, Worker] = {}
    absent: dict[str, str] = {}
    for name in CONTESTANTS:
        python = args.vllm_python if name == "vllm" else Path(sys.executable)
        if args.device != "cpu" and name not in _ON_A_GPU:
            absent[name] = "compared on a CPU only"
            continue
        if python is None:
            absent[name] = "no --vllm-python given"
            continue
        try:
            started[name] = _spawn(python, name, model, sizes)
        except OSError as error:
            absent[name] = f"{python}: {error.strerror}"
    for name, worker in started.items():
        try:
            worker.version = worker.answer()["ready"]
        except RuntimeError as error:
            absent[name] = str(error)
            _stop({name: worker})
            continue
        print(f"{name}: {worker.version}", flush=True)
        workers[name] = worker
    if _OURS not in workers:
        _stop(workers)
        raise SystemExit(f"{_OURS} does not start: {absent[_OURS]}")
    return workers, absent


def _spawn(python: Path, name: str, model: Path, sizes: Sizes) -> Worker:
    log = model.parent / f"{name}.log"
    script = str(Path(__file__).with_name("decode_contestants.py"))
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            [str(python), script, name, str(model), json.dumps(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    return Worker(process, log)


def _stop(workers: dict[str, Worker]) -> None:
    for worker in workers.values():
        worker.process.communicate()  # closes its stdin, which ends it


def _measure(workers: dict[str, Worker], args: argparse.Namespace) -> Results:
    results = Results()
    # The largest first: what a contestant sizes by its first batch then fits every other.
    for batch in sorted(args.batch, reverse=True):
        seconds = results.seconds[batch] = {name: [] for name in workers}
        equal = results.equal[batch] = {name: [] for name in workers}
        for turn in range(-1, args.rounds):
            prompts = _prompts(batch, args.prompt_tokens, 1000 * batch + turn)
            answers = {name: worker.ask(prompts) for name, worker in workers.items()}
            for name, answer in answers.items():
                lengths = {len(tokens) for tokens in answer["tokens"]}
                if lengths != {args.new_tokens} or len(answer["tokens"]) != batch:
                    raise SystemExit(
                        f"{name} gave {len(answer['tokens'])} sequences of {sorted(lengths)} "
                        f"tokens, expected {batch} of {args.new_tokens}"
                    )
                if turn < 0:  # a warm-up
                    continue
                seconds[name].append(answer["seconds"])
                pairs = zip(answer["tokens"], answers[_OURS]["tokens"], strict=True)
                equal[name].append(sum(a == b for a, b in pairs) / batch)
        print(f"batch {batch}: done", flush=True)
    return results


def _prompts(batch: int, longest: int, seed: int) -> list[list[int]]:
    """Ragged prompts, half as long as the longest at least; the first is the longest."""
    import numpy as np

    rng = np.random.default_rng(seed + 1)
    lengths = [longest, *rng.integers((longest + 1) // 2, longest + 1, batch - 1).tolist()]
    return [rng.integers(0, _VOCAB, length).tolist() for length in lengths]


def _metrics(results: Results, new_tokens: int) -> dict[str, Any]:
    """By batch size: tokens/s (median), our ratio to each other, equality, seconds by round."""
    metrics = {}
    for batch, by_name in sorted(results.seconds.items()):
        ours = by_name[_OURS]
        metrics[f"batch {batch}"] = {
            name: {
                "tokens_per_s": statistics.median(batch * new_tokens / s for s in seconds),
                "ours_over_it": statistics.median(
                    s / o for s, o in zip(seconds, ours, strict=True)
                ),
                "sequences_equal": statistics.mean(results.equal[batch][name]),
                "seconds_by_round": seconds,
            }
            for name, seconds in by_name.items()
        }
    return metrics


def _print(metrics: dict[str, Any], versions: dict[str, str], absent: dict[str, str]) -> None:
    for name, why in absent.items():
        print(f"{name} takes no part: {why}")
    header = ["batch", *(f"{name} tok/s" for name in versions)]
    header += [f"ours / {name}" for name in versions if name != _OURS]
    header += ["equal"]
    rows = []
    for batch, found in metrics.items():
        row = [batch.removeprefix("batch "), *(f"{m['tokens_per_s']:.0f}" for m in found.values())]
        row += [f"{m['ours_over_it']:.2f} x" for name, m in found.items() if name != _OURS]
        rows.append([*row, f"{100 * min(m['sequences_equal'] for m in found.values()):.0f} %"])
    print_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
