"""Observation text -> tokens. The only text that is tokenised after the prompt.

The tokens before it stay as the model sampled them, so the observation is tokenised alone: merges
never reach across the seam, in either direction.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from thor_fast.errors import ToolError
from thor_fast.types import Segment, TokenSource

__all__ = ["ObservationEncoder", "splice_observation"]


class ObservationEncoder:
    """Text -> token ids, as a continuation: no special tokens, no space put in front.

    What a snippet prints must not end the turn: the text of a special token (``<|im_end|>``) is
    spelled with ordinary tokens. ``tokenizer``: a Hugging Face fast tokenizer or the
    ``tokenizers.Tokenizer`` inside one, else ``ToolError``. It is copied, so that neither its
    settings of the moment (truncation, padding) nor ours leak into the other.
    """

    def __init__(self, tokenizer: object) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise ToolError(
                f"tokenizer is a {type(tokenizer).__name__}, expected a Hugging Face fast "
                "tokenizer (one with a backend_tokenizer)"
            )
        spec = json.loads(backend.to_str())
        spec["truncation"] = spec["padding"] = None
        for part in ("normalizer", "pre_tokenizer"):
            spec[part] = _without_prefix(spec[part])
        self._backend = type(backend).from_str(json.dumps(spec))
        self._backend.encode_special_tokens = True

    def __call__(self, text: str) -> list[int]:
        # A lone surrogate is not text and cannot be tokenised.
        clean = text.encode("utf-8", "replace").decode()
        ids: list[int] = self._backend.encode(clean, add_special_tokens=False).ids
        return ids


def splice_observation(encode: Callable[[str], Sequence[int]], text: str) -> Segment:
    """The segment that holds ``text``: source TOOL, so mask 0 and no log-probs."""
    return Segment(TokenSource.TOOL, tuple(encode(text)))


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer (as JSON) that puts no space before the first word."""
    if part is None or part["type"] == "Prepend":
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            inner = [_without_prefix(p) for p in part[key]]
            return {**part, key: [p for p in inner if p is not None]}
    match part["type"]:
        case "ByteLevel":
            return {**part, "add_prefix_space": False}
        case "Metaspace":
            return {**part, "prepend_scheme": "never"}
    return part
