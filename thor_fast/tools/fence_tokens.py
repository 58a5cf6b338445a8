"""Tokens at which an engine may stop by itself, because they close a block."""

from __future__ import annotations

from typing import Any

from thor_fast.tools.fence import FenceEvent, FenceScanner
from thor_fast.tools.token_text import TokenBytes

__all__ = ["closing_fence_tokens"]

_LANGUAGE = "python"
# A block, and where in it a token may begin: at the start of a line, or behind a line's text.
_BEFORE = (f"```{_LANGUAGE}\n".encode(), f"```{_LANGUAGE}\nx".encode())


def closing_fence_tokens(tokenizer: object) -> frozenset[int]:
    r"""The tokens of a vocabulary that close a fenced block and cannot open one with a language.

    Such a token holds the whole fence and the end of its line (```` ```\n ````, ``\n```\n``): the
    way tokenizers that merge punctuation with newlines (Qwen's, Llama 3's) write nearly every
    closing fence. A bare fence is not among them, since it opens blocks as well; nor are pieces of
    one. Whoever stops at these tokens alone must still read along, and go on where no block was
    closed (a fence in a string, or one that opens a block without a language).

    Raises ``ToolError`` for a tokenizer whose tokens cannot be read one by one.
    """
    tokens = TokenBytes(tokenizer)
    backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return frozenset(i for i in range(backend.get_vocab_size()) if _closes(tokens[i]))


def _closes(token: bytes) -> bool:
    if b"```" not in token or b"\n" not in token:  # nearly every token
        return False
    return any(_closes_behind(before, token) for before in _BEFORE)


def _closes_behind(before: bytes, token: bytes) -> bool:
    scanner = FenceScanner(frozenset({_LANGUAGE}))
    for byte in before:
        scanner.feed(byte)
    for i, byte in enumerate(token, 1):
        if scanner.feed(byte) is FenceEvent.CLOSED:
            return token[i:].lstrip(b"` \t\r").startswith(b"\n")
    return False
