"""Reinforce a tiny policy: ``python -m thor_fast.synthetic.reinforce --output DIR``.

The real path on one CPU core: embedded engine, native sandbox, exact answer reward, and the trainer
of :mod:`thor_fast.rl.trainer`. Everything that decides the outcome is in the configuration, but for
what threads and timing do to the last bits (docs/training.md).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from thor_fast.config import load_toml
from thor_fast.engines.paged import PagedEngine
from thor_fast.errors import ConfigError, DataError, TrainingError
from thor_fast.rewards import MathAnswerReward
from thor_fast.rl.settings import TrainerConfig
from thor_fast.rl.trainer import Trainer
from thor_fast.rollout.renderer import Renderer
from thor_fast.rollout.scheduler import Prompt
from thor_fast.rollout.splice import ObservationEncoder
from thor_fast.sandbox import NativeSandbox, Sandbox
from thor_fast.synthetic.policy import load_policy, tiny_policy_path
from thor_fast.synthetic.tasks import TRAIN_SEED, Task, task_set
from thor_fast.tools.python_tool import PythonTool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

__all__ = ["ReinforceConfig", "default_config_path", "main", "make_trainer"]

_MAX_SEQUENCES = 64
_MAX_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class ReinforceConfig:
    """``tasks``: so many of the training split, all families in turn; then they come again."""

    tasks: int = 2000
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise ConfigError(f"tasks is {self.tasks}, expected >= 1")


def default_config_path() -> Path:
    """Settings that suit the committed policy, inside the package."""
    return Path(__file__).parent / "reinforce.toml"


def make_trainer(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sandbox: Sandbox,
    tasks: list[Task],
    config: TrainerConfig,
    *,
    output_dir: Path | None = None,
    resume: bool = False,
) -> Trainer:
    """A trainer of ``model``, asked for solutions in Python; close ``trainer.engine`` after it."""
    render = Renderer(tokenizer)
    return Trainer(
        model,
        PagedEngine(model, max_sequences=_MAX_SEQUENCES, max_context=_MAX_CONTEXT),
        sandbox,
        PythonTool(tokenizer),
        [Prompt(render.prompt(t.prompt), t.answer, t.task_id) for t in tasks],
        encode=ObservationEncoder(tokenizer),
        reward=MathAnswerReward(render),
        eos_token_ids=frozenset({tokenizer.eos_token_id}),
        config=config,
        output_dir=output_dir,
        resume=resume,
    )


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="metrics, checkpoints, policy")
    parser.add_argument("--config", type=Path, default=default_config_path(), help="TOML file")
    parser.add_argument("--policy", type=Path, default=tiny_policy_path(), help="where to begin")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args(argv)
    try:
        config = load_toml(args.config, ReinforceConfig)
        model, tokenizer = load_policy(args.policy)
        tasks = task_set(config.tasks, TRAIN_SEED)
        with NativeSandbox() as sandbox:
            trainer = make_trainer(
                model, tokenizer, sandbox, tasks, config.trainer,
                output_dir=args.output, resume=args.resume,
            )  # fmt: skip
            try:
                trainer.train()
            finally:
                asyncio.run(trainer.engine.aclose())
    except (ConfigError, DataError) as error:
        parser.error(str(error))
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 1
    trainer.save_policy(args.output / "policy")
    tokenizer.save_pretrained(args.output / "policy")
    print(f"policy in {args.output / 'policy'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
