"""What all modes of the rollout benchmark run on: engine, sandbox, tokenizer, limits."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fresh_interpreters import FreshInterpreters
from report import first_line
from rollout_tools import TOOLS, WAITING_SLOTS, PreparedSandbox, PreparedStreams

from thor_fast.engines.base import Engine
from thor_fast.errors import ConfigError
from thor_fast.rollout.limits import RolloutLimits
from thor_fast.sandbox.base import Sandbox
from thor_fast.sandbox.tiers import choose_tier
from thor_fast.synthetic import Task, tiny_policy_path
from thor_fast.tools import closing_fence_tokens

__all__ = ["Setup", "build"]

# THOR's max_interaction_round.
_MAX_TOOL_CALLS = 5
# For a model that was not trained on the synthetic tasks and has a chat template.
_INSTRUCTION = (
    "{} Compute with Python: write a ```python block, its output will be shown to you. "
    "Put the final answer in \\boxed{{}}."
)


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything a run needs but the choice of mode.

    ``fresh`` starts a sandbox with a new interpreter per snippet, for the mode that is THOR's way
    in this, too.
    ``memo``: whether equal snippets of a group may run once.
    """

    engine: Engine
    sandbox: Sandbox
    fresh: Callable[[], PreparedSandbox]
    tokenizer: Any
    limits: RolloutLimits
    eos_token_ids: frozenset[int]
    seed: int
    group_size: int
    memo: bool

    def prompt(self, task: Task) -> str:
        """The prompt as text, in the model's chat template if it has one."""
        return _prompt(self.tokenizer, task)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, or of a prompt and what follows it, as text."""
        return _encode(self.tokenizer, text)


def build(args: argparse.Namespace, tasks: Sequence[Task]) -> Setup:
    """Engine, sandbox, tokenizer. Raises ``ThorError`` for what cannot work, cheap checks first."""
    path: Path = args.model or tiny_policy_path()
    if not (path / "config.json").is_file():
        raise ConfigError(f"--model: no model at {str(path)!r}, expected a folder with config.json")
    if args.engine == "vllm":
        vllm_engine = _vllm_engine()
    if args.engine == "scripted" and args.kv_tokens is not None:
        raise ConfigError("--kv-tokens: the scripted engine has no pool, expected paged or vllm")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model: no tokenizer at {str(path)!r}: {first_line(error)}") from error
    encode = partial(_encode, tokenizer)
    prompts = [_prompt(tokenizer, task) for task in tasks]
    longest = max(len(encode(prompt)) for prompt in prompts)
    if longest >= args.max_context:
        raise ConfigError(
            f"--max-context is {args.max_context}, expected more than the longest prompt, {longest}"
        )
    sizes = {"max_sequences": args.max_sequences, "max_context": args.max_context}
    engine: Engine
    if args.engine == "scripted":
        from scripted_solutions import scripted_engine

        engine = scripted_engine(tokenizer, tasks, prompts, encode, seed=args.seed, **sizes)
    elif args.engine == "vllm":
        engine = vllm_engine.from_pretrained(
            path,
            pause_token_ids=closing_fence_tokens(tokenizer),
            splice_kv=True,
            **sizes,
            **_vllm_pool(args.kv_tokens),
        )
    else:
        import torch

        from thor_fast.engines.paged import PagedEngine

        device = "cuda" if torch.cuda.is_available() else None
        # On 2 cores all modes are 1.4 times slower where torch takes both: its threads spin while
        # the event loop and the snippets want to run.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - len(_tool_cpus())))
        engine = PagedEngine.from_pretrained(path, device=device, kv_tokens=args.kv_tokens, **sizes)
    return Setup(
        engine=engine,
        # vLLM's processes take all cores: snippets kept to one of them wait for it.
        sandbox=_sandbox(args.sandbox, args.tools, None if args.engine == "vllm" else _tool_cpus()),
        fresh=partial(_fresh, args.tools),
        tokenizer=tokenizer,
        limits=RolloutLimits(max_response_tokens=args.max_context, max_tool_calls=_MAX_TOOL_CALLS),
        eos_token_ids=frozenset({tokenizer.eos_token_id}),
        seed=args.seed,
        group_size=args.group_size,
        # Another service, which `slow` stands for, may answer otherwise the next time.
        memo=args.tools != "slow",
    )


def _vllm_engine() -> Any:
    # Its processes tell of every step they take, unless the caller wants to hear it.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            "--engine vllm: the package vllm is missing, expected pip install 'thor_fast[vllm]'"
        ) from error
    try:
        return importlib.import_module("thor_fast.engines.vllm").VLLMEngine
    except ImportError as error:
        raise ConfigError(f"--engine vllm: {error}, expected thor_fast with its engine") from error


def _vllm_pool(kv_tokens: int | None) -> dict[str, int]:
    # The smallest blocks that vLLM has on a GPU and on a CPU.
    import torch

    block = 16 if torch.cuda.is_available() else 32
    if kv_tokens is None:
        return {"block_size": block}
    # It keeps one for itself.
    return {"block_size": block, "num_gpu_blocks_override": kv_tokens // block + 1}


def _tool_cpus() -> list[int]:
    """A quarter of the cores, the last ones."""
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[-max(1, len(cpus) // 4) :]


def _sandbox(name: str, tools: str, cpus: list[int] | None) -> Sandbox:
    """Warm for what its snippets will import."""
    if name == "fresh":
        return _fresh(tools)
    from thor_fast.sandbox import NativeSandbox

    slots = WAITING_SLOTS if tools == "slow" else None
    native = NativeSandbox(slots=slots, cpus=cpus)
    imports = ("import math", "import sympy") if tools in ("mixed", "sympy") else ("import math",)
    native.warm_up(*(native.tiers[choose_tier(line, native.tiers)].name for line in imports))
    return PreparedStreams(native, TOOLS[tools])


def _fresh(tools: str) -> PreparedSandbox:
    return PreparedSandbox(FreshInterpreters(), TOOLS[tools])


def _has_template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def _prompt(tokenizer: Any, task: Task) -> str:
    if not _has_template(tokenizer):
        return task.prompt
    messages = [{"role": "user", "content": _INSTRUCTION.format(task.question)}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _encode(tokenizer: Any, text: str) -> list[int]:
    # A template writes the special tokens into the text already.
    ids: list[int] = tokenizer(text, add_special_tokens=not _has_template(tokenizer))["input_ids"]
    return ids
