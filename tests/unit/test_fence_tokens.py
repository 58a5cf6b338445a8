"""Which tokens close a block and open none: by hand, and against the detector."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models

from thor_fast.errors import ToolError
from thor_fast.synthetic import load_tiny_policy
from thor_fast.tools import PythonTool, closing_fence_tokens

# G with a dot is a space, C with a dot a newline, in the alphabet of byte-level tokenizers.
CLOSING = [
    "```Ċ",
    "````ĊĊ",
    "Ċ```Ċ",
    "ĠĠ```Ċ",
    ")Ċ```ĠĊ",
    "```ĊSo",
]
OTHERS = [
    "`",
    "``",
    "```",
    "Ċ```",
    "```python",
    "```pythonĊ",
    "x```Ċ",
    "ĠĠĠĠ```Ċ",
    "``Ċ",
    "Ċ",
    "```xĊ",
    "python",
]


def test_the_whole_fence_with_the_end_of_its_line() -> None:
    vocabulary = {token: i for i, token in enumerate([*CLOSING, *OTHERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert closing_fence_tokens(tokenizer) == frozenset(range(len(CLOSING)))


def test_the_tiny_policys_tokenizer_closes_with_one_of_them() -> None:
    _, tokenizer = load_tiny_policy()
    closing = closing_fence_tokens(tokenizer)
    assert closing
    ids = tokenizer.encode("```python\nprint(1)\n```\n", add_special_tokens=False)
    detector = PythonTool(tokenizer).detector()
    calls = [detector.feed(token_id) for token_id in ids]
    assert [call is not None for call in calls] == [token_id in closing for token_id in ids]
    assert calls[-1] is not None


def test_a_tokenizer_that_cannot_be_read() -> None:
    with pytest.raises(ToolError, match="expected a Hugging Face fast tokenizer"):
        closing_fence_tokens(object())
