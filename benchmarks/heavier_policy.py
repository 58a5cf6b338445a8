"""The tiny policy at the price of a larger model: the same function, more arithmetic per token.

Random weights of any size write no Python, and a policy that does is not at hand on a machine
without a network. So the tiny policy gets more layers that add nothing (their last projections are
zero) and wider feed-forward layers (what is added is zero). It says what it said, to the bit on
the machine this was written on, and costs what a model of that shape costs::

    python benchmarks/heavier_policy.py FOLDER --layers 8 --intermediate 1024
    python benchmarks/rollout_throughput.py --model FOLDER ...
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import OneLineParser, count, exit_status

from thor_fast.errors import ConfigError
from thor_fast.synthetic import load_tiny_policy

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

__all__ = ["heavier"]


def heavier(model: Qwen3ForCausalLM, *, layers: int, intermediate: int) -> Qwen3ForCausalLM:
    """``model`` with ``layers`` layers, feed-forward ones ``intermediate`` wide.

    Raises ``ConfigError`` for fewer or narrower ones than it has.
    """
    import torch

    config = copy.deepcopy(model.config)
    for name, got, least in (
        ("layers", layers, config.num_hidden_layers),
        ("intermediate", intermediate, config.intermediate_size),
    ):
        if got < least:
            raise ConfigError(f"--{name} is {got}, expected at least the tiny policy's {least}")
    config.num_hidden_layers, config.intermediate_size = layers, intermediate
    config.layer_types = config.layer_types[:1] * layers
    larger = type(model)(config).eval()
    known = model.state_dict()
    with torch.no_grad():
        for name, weight in larger.state_dict().items():
            if name in known:
                weight.zero_()[tuple(map(slice, known[name].shape))] = known[name]
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
    return larger


def run(args: argparse.Namespace) -> int:
    """Save it; returns 0, raises ``ThorError``."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model, tokenizer = load_tiny_policy()
    larger = heavier(model, layers=args.layers, intermediate=args.intermediate)
    larger.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    print(f"{larger.num_parameters() / 1e6:.1f} M parameters, as {args.folder}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for what cannot work, 130 when interrupted."""
    assert __doc__ is not None
    parser = OneLineParser(
        prog="heavier_policy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where to save it")
    parser.add_argument("--layers", type=count, default=8, help="default: 8; the tiny one has 4")
    parser.add_argument(
        "--intermediate", type=count, default=1024, help="default: 1024; it has 384"
    )
    args = parser.parse_args(argv)
    return exit_status("heavier_policy", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
