"""The committed tiny policy: where it lies and how to load it. Torch is imported on loading."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from thor_fast.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

__all__ = ["load_policy", "load_tiny_policy", "tiny_policy_path"]


def tiny_policy_path() -> Path:
    """The folder with weights, tokenizer, recipe and measured accuracy, inside the package."""
    return Path(__file__).parent / "tiny_policy"


def load_tiny_policy() -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The committed policy in float32, in evaluation mode, and its tokenizer. Needs no network."""
    return load_policy(tiny_policy_path())


def load_policy(path: Path) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A policy saved by :mod:`thor_fast.synthetic.train`, as :func:`load_tiny_policy`.

    Raises ``DataError`` where ``path`` holds no model.
    """
    if not (path / "config.json").is_file():
        raise DataError(f"{path} has no config.json, expected a folder written by synthetic.train")
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model.eval()  # type: ignore[no-untyped-call]
    return model, cast("PreTrainedTokenizerFast", tokenizer)
