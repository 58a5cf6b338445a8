"""Text <-> tokens at the two ends: prompts on the way in, people and rewards on the way out.

Nothing in between turns tokens into text and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from thor_fast.tools.token_text import TokenBytes
from thor_fast.types import Trajectory

__all__ = ["Renderer"]

_FENCE = b"```"


class Renderer:
    """``tokenizer``: a Hugging Face fast tokenizer (``ToolError`` if its tokens cannot be read)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens = TokenBytes(tokenizer)

    def prompt(self, text: str) -> tuple[int, ...]:
        """Prompt ids of plain text, with the special tokens the tokenizer puts around a text."""
        return tuple(self._tokenizer(text)["input_ids"])

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Prompt ids of a conversation, up to where the assistant is to speak."""
        encoded = self._tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, return_dict=True
        )
        return tuple(encoded["input_ids"])

    def text(self, token_ids: Iterable[int]) -> str:
        """What tokens spell, special ones included; bytes that are not UTF-8 become U+FFFD."""
        return self._bytes(token_ids).decode(errors="replace")

    def response(self, trajectory: Trajectory) -> str:
        """All after the prompt: what the model wrote and what it was shown."""
        return self.text(trajectory.response_ids)

    def answer(self, trajectory: Trajectory) -> str:
        r"""What the model said itself: neither its calls nor their observations.

        This is what an answer is looked for in: a ``\boxed{}`` in printed output, or in the
        program that would print it, is not one.
        """
        tokens = trajectory.token_ids
        mask = trajectory.loss_mask
        said = bytearray()
        position = len(trajectory.prompt_ids)
        for call in trajectory.tool_calls:
            said += self._said(tokens, mask, position, call.start)
            # The tokens at either end may hold words, too: only what lies between the first and
            # the last fence is the call.
            block = self._bytes(tokens[call.start : call.end])
            said += block[: block.find(_FENCE)] + block[block.rfind(_FENCE) + len(_FENCE) :]
            position = call.end
        said += self._said(tokens, mask, position, len(tokens))
        return said.decode(errors="replace")

    def _said(self, tokens: list[int], mask: npt.NDArray[np.int8], start: int, end: int) -> bytes:
        return self._bytes(t for t, m in zip(tokens[start:end], mask[start:end], strict=True) if m)

    def _bytes(self, token_ids: Iterable[int]) -> bytes:
        return b"".join(self._tokens[t] for t in token_ids)
