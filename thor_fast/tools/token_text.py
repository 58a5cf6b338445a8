"""The bytes behind a token id, for tokenizers that join tokens without looking at neighbours.

Bytes and not text: one character may be spread over several tokens. A fast tokenizer's decoder is a
list of steps; the ones understood here act on each token alone, so that the bytes of a sequence are
the bytes of its tokens, one after the other:

* byte-level BPE (GPT-2, Llama 3, Qwen): each character of a token stands for one byte;
* sentencepiece style (Llama 2, Gemma): ``▁`` is a space, ``<0x0A>`` is the byte 10.

The tokenizer comes in as an object; nothing here imports ``tokenizers`` or ``transformers``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from thor_fast.errors import ToolError

__all__ = ["TokenBytes"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_Step = Callable[[str], str | bytes]


class TokenBytes:
    """Token id -> bytes, looked up on first use and remembered.

    ``tokenizer``: a Hugging Face fast tokenizer or the ``tokenizers.Tokenizer`` inside one. Added
    tokens, special or not, give the text they are written as. An id without a token gives no bytes:
    models have more embedding rows than tokens and may sample from the padding. Raises
    ``ToolError`` for a tokenizer whose tokens cannot be read one by one (slow, WordPiece, ...).
    """

    def __init__(self, tokenizer: object) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "id_to_token") or not hasattr(backend, "get_added_tokens_decoder"):
            raise ToolError(
                f"tokenizer is a {type(tokenizer).__name__}, expected a Hugging Face fast "
                "tokenizer (one with a backend_tokenizer)"
            )
        self._id_to_token: Callable[[int], str | None] = backend.id_to_token
        self._steps = _decoder_steps(backend.decoder)
        self._cache = {
            token_id: str(token.content).encode()
            for token_id, token in backend.get_added_tokens_decoder().items()
        }

    def __getitem__(self, token_id: int) -> bytes:
        known = self._cache.get(token_id)
        if known is None:
            known = self._cache[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        text: str | bytes = self._id_to_token(token_id) or ""
        for step in self._steps:
            if isinstance(text, bytes):
                break
            text = step(text)
        return text if isinstance(text, bytes) else text.encode()


def _decoder_steps(decoder: Any) -> list[_Step]:
    """One function per decoder step that changes a token; ``ToolError`` for steps that mix them."""
    if decoder is None:
        raise ToolError(
            "tokenizer has no decoder, so its tokens are joined with spaces; expected a byte-level "
            "or sentencepiece-style one"
        )
    spec = json.loads(decoder.__getstate__())  # a few lines of JSON; to_str() dumps the vocabulary
    parts = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    steps: list[_Step] = []
    fused = False
    for part in parts:
        match part:
            case {"type": "ByteLevel"}:
                steps.append(_from_byte_alphabet)
            case {"type": "ByteFallback"}:
                steps.append(_from_byte_token)
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                steps.append(_replacement(old, new))
            case {"type": "Metaspace", "replacement": mark}:
                steps.append(_replacement(mark, " "))
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip"} if fused:
                # Removes the space a sentencepiece tokenizer puts before the first word of a text;
                # a response continues one.
                pass
            case _:
                raise ToolError(
                    f"tokenizer's decoder has the step {part}, expected only ByteLevel, "
                    "ByteFallback, Replace of a string, Metaspace, Fuse, or Strip after Fuse"
                )
    return steps


def _replacement(old: str, new: str) -> _Step:
    return lambda text: text.replace(old, new)


def _from_byte_token(text: str) -> str | bytes:
    match = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else text


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet (``bytes_to_unicode`` of its encoder.py): one printable character per byte.

    Bytes that print as themselves in Latin-1 do so; the other 68 follow from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(0x100) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def _from_byte_alphabet(text: str) -> bytes:
    # A token with a character outside the alphabet stands for its own text, as in the decoder of
    # the tokenizers library: a detector runs inside the engine's step and must not raise there.
    try:
        return bytes(_ALPHABET[c] for c in text)
    except KeyError:
        return text.encode()
