"""Where a block starts and ends, and that it fires once, at the closing fence."""

from __future__ import annotations

import pytest

from thor_fast.errors import ToolError
from thor_fast.rollout.splice import ObservationEncoder
from thor_fast.sandbox.base import Sandbox
from thor_fast.tools import ExecutionLimits, PythonTool
from thor_fast.tools.base import DetectedCall, Tool
from thor_fast.types import ExecutionResult, Status


def detect(tokenizer, text: str) -> list[DetectedCall]:
    detector = PythonTool(tokenizer).detector()
    ids = ObservationEncoder(tokenizer)(text)  # no dummy prefix, which would indent the text
    return [call for call in map(detector.feed, ids) if call is not None]


RUNS = {
    "plain": ("```python\nprint(1)\n```", ["print(1)\n"]),
    "short name": ("```py\nprint(1)\n```", ["print(1)\n"]),
    "space before the name": ("``` python\nprint(1)\n```", ["print(1)\n"]),
    "blanks behind the name": ("```python \t\nprint(1)\n```", ["print(1)\n"]),
    "capitals": ("```Python\nprint(1)\n```", ["print(1)\n"]),
    "carriage returns": ("```python\r\nprint(1)\r\n```\r\n", ["print(1)\r\n"]),
    "empty block": ("```python\n```", [""]),
    "after prose": ("so we get\n```python\n1\n```\n", ["1\n"]),
    "two blocks": ("```py\n1\n```\n\nand\n\n```py\n2\n```\n", ["1\n", "2\n"]),
    "indented in a list": ("1. a\n   ```python\n   if x:\n     y\n   ```\n", ["if x:\n  y\n"]),
    "four backticks": ("````python\nx\n```\ny\n````", ["x\n```\ny\n"]),
    "closing fence with an info string": ("```python\nx\n```python\n", ["x\n"]),
    "not UTF-8 split": ("```python\nprint('日本 é')\n```", ["print('日本 é')\n"]),
    "fence in a triple-quoted string": (
        "```python\ns = '''\n```\n'''\nprint(s)\n```",
        ["s = '''\n```\n'''\nprint(s)\n"],
    ),
    "fence in a docstring": (
        '```python\ndef f():\n    r"""doc\n```python\n1\n```\n    """\n```',
        ['def f():\n    r"""doc\n```python\n1\n```\n    """\n'],
    ),
    "fence in a continued string": ("```py\ns = 'a\\\n```\n'\n```", ["s = 'a\\\n```\n'\n"]),
    "escaped quotes in a triple string": (
        '```py\ns = """\\"""\n```\n"""\n```',
        ['s = """\\"""\n```\n"""\n'],
    ),
    "other quotes in a triple string": (
        "```py\ns = '''\"\"\" it's ''\n```\n'''\n```",
        ["s = '''\"\"\" it's ''\n```\n'''\n"],
    ),
    "string left open on its line": ("```py\nprint('a)\n```", ["print('a)\n"]),
    "apostrophe in a comment": ('```py\n# don\'t """\n```', ['# don\'t """\n']),
    "triple quotes in a comment": ('```py\n# """ and\n```', ['# """ and\n']),
    "empty strings": ("```py\na = ''\nb = \"\"\n```", ["a = ''\nb = \"\"\n"]),
    "hash in a string": ("```py\na = '#'''\n```", ["a = '#'''\n"]),
    "raw string ending in a backslash and quote": ("```py\nr'\\''\n```", ["r'\\''\n"]),
    "backticks inside a line": ("```py\nx = 1 ```\n```", ["x = 1 ```\n"]),
    "after another block": ("```output\n1\n```\n```py\n1\n```", ["1\n"]),
    "after a bare block": ("```\ntext\n```  \n```py\n1\n```", ["1\n"]),
    "after inline code on a line of its own": ("```python```\n```py\n1\n```", ["1\n"]),
}


@pytest.mark.parametrize("case", RUNS)
def test_blocks_that_run(tokenizer, case: str) -> None:
    text, codes = RUNS[case]
    assert [call.code for call in detect(tokenizer, text)] == codes


SILENT = {
    "prose ending in python": "we do it in python\nprint(1)\n```\n",
    "prose ending in python before a bare block": "this is python\n```\nprint(1)\n```\n",
    "fence inside a line": "use ```python\nprint(1)\n```\n",
    "inline code": "```python``` is how\nprint(1)\n```",
    "two backticks": "``python\nprint(1)\n``",
    "four spaces make it a listing": "    ```python\nprint(1)\n```\n",
    "another language": "```pycon\n>>> 1\n```\n",
    "more than the language": "```python title=x\n1\n```\n",
    "unclosed block": "```python\nprint(1)\n",
    "unclosed block, fence begun": "```python\nprint(1)\n``",
    "unclosed string": '```python\ns = """\n```\n',
    "python quoted in a markdown block": "```markdown\n```python\n1\n",
    "python quoted in an output block": "```output\n```python\n1\n",
    "nothing": "",
}


@pytest.mark.parametrize("case", SILENT)
def test_text_that_is_no_call(tokenizer, case: str) -> None:
    assert detect(tokenizer, SILENT[case]) == []


def test_python_inside_another_block_is_quoted_until_that_block_closes(tokenizer) -> None:
    text = "````markdown\n```python\n1\n```\n````\n```python\n2\n```\n"
    assert [call.code for call in detect(tokenizer, text)] == ["2\n"]


def test_positions_and_trailing_with_merged_fences(tokenizers) -> None:
    # This tokenizer has learnt tokens that hold a fence, its newlines and words on both sides.
    ids = tokenizers.lines.encode("Let me compute.\n```python\nprint(6*7)\n```\n\nSo").ids
    spelled = [tokenizers.lines.decode([i]) for i in ids]
    assert spelled == ["Let me co", "mpute.\n```python\nprint(6*7", ")\n```\n\nSo"]
    detector = PythonTool(tokenizers.lines).detector()
    calls = [detector.feed(i) for i in ids]
    assert calls == [None, None, DetectedCall("print(6*7)\n", 1, 3, "\n\nSo")]


def test_a_token_that_closes_one_block_and_opens_the_next(tokenizers) -> None:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(tokenizers.bytes.to_str())
    tokenizer.add_tokens([AddedToken("\n```\n```py\n")])
    text = "```py\n1\n```\n```py\n2\n```"
    first, second = detect(tokenizer, text)
    assert (first.code, first.end, first.trailing) == ("1\n", 8, "\n```py\n")
    assert (second.code, second.start) == ("2\n", 7)


def test_positions_count_skipped_tokens(tokenizers) -> None:
    detector = PythonTool(tokenizers.bytes).detector()
    encode = tokenizers.bytes.encode
    first = [detector.feed(t) for t in encode("ab\n```py\n1\n```").ids]
    assert first[:-1] == [None] * 13
    assert first[-1] == DetectedCall("1\n", 3, 14, "")
    detector.skip(100)
    second = [detector.feed(t) for t in encode("```py\n2\n```").ids]
    assert second[-1] == DetectedCall("2\n", 114, 125, "")


def test_start_is_the_token_of_the_first_backtick(tokenizers) -> None:
    detector = PythonTool(tokenizers.bytes).detector()
    calls = [detector.feed(t) for t in tokenizers.bytes.encode("`a`\n  ```py\n```").ids]
    assert calls[-1] == DetectedCall("", 6, 15, "")


def test_after_skipping_a_line_starts(tokenizers) -> None:
    encode = tokenizers.bytes.encode
    detector = PythonTool(tokenizers.bytes).detector()
    for token in encode("in the middle of a line").ids:
        detector.feed(token)
    detector.skip(3)
    assert [detector.feed(t) for t in encode("```py\n3\n```").ids][-1] is not None


def drafts(tokenizer, text: str) -> list[tuple[str, int, int]]:
    seen: list[DetectedCall] = []
    detector = PythonTool(tokenizer).detector(seen.append)
    for token in tokenizer.encode(text).ids:
        detector.feed(token)
    assert all(draft.trailing == "" for draft in seen)
    return [(draft.code, draft.start, draft.end) for draft in seen]


def test_a_draft_comes_where_a_statement_begins(tokenizers) -> None:
    text = "x\n```py\nfor a in b:\n  c\n\nelse: d\ne(\n)\n``f``\n(g)\n# h\n'i'\n```"
    heads = ["for ", "else:", "e(", "\n(", "\n'"]
    ends = [text.index(head) + len(head) for head in heads]
    # The first line has nothing above it; a blank line, a comment or a backtick begins nothing.
    assert drafts(tokenizers.bytes, text) == [(text[8:end], 2, end) for end in ends[1:]]


def test_drafts_of_an_indented_block_are_as_its_code(tokenizers) -> None:
    text = "  ```py\n  a\n  b \n    c\n d \n  ```"
    assert [code for code, *_ in drafts(tokenizers.bytes, text)] == ["a\nb ", "a\nb \n  c\nd "]


def test_no_draft_outside_a_block_to_run(tokenizers) -> None:
    assert drafts(tokenizers.bytes, "a b\nc d\n```output\ne f\ng h\n```\ni j\n") == []


def test_drafts_of_the_next_block_start_anew(tokenizers) -> None:
    text = "```py\na\nb \n```\n```py\nc\nd \n```"
    assert [code for code, *_ in drafts(tokenizers.bytes, text)] == ["a\nb ", "c\nd "]


def test_detectors_do_not_share_state(tokenizers) -> None:
    tool = PythonTool(tokenizers.bytes)
    one, other = tool.detector(), tool.detector()
    ids = tokenizers.bytes.encode("```py\n1\n```").ids
    for token in ids[:-1]:
        assert one.feed(token) is None
    assert other.feed(ids[-1]) is None
    assert one.feed(ids[-1]) is not None


def test_request_carries_the_limits(tokenizers) -> None:
    tool: Tool = PythonTool(
        tokenizers.bytes, limits=ExecutionLimits(timeout_s=2.5, max_processes=3)
    )
    request = tool.request(DetectedCall("x", 0, 1, ""))
    assert (request.code, request.language, request.timeout_s) == ("x", "python", 2.5)
    assert (request.max_processes, request.memory_bytes) == (3, None)


@pytest.mark.parametrize(
    ("trailing", "text"),
    [
        ("", "\n```output\n42\n```\n"),
        ("\n", "```output\n42\n```\n"),
        (" ", "\n```output\n42\n```\n"),
    ],
)
def test_observation_starts_on_its_own_line(tokenizers, trailing: str, text: str) -> None:
    tool = PythonTool(tokenizers.bytes)
    result = ExecutionResult(Status.OK, stdout="42\n")
    assert tool.observation(DetectedCall("", 0, 1, trailing), result) == text


def test_the_fake_sandbox_keeps_the_protocol(fake_sandbox) -> None:
    assert isinstance(fake_sandbox(), Sandbox)


def test_a_tokenizer_without_a_backend_is_refused() -> None:
    with pytest.raises(ToolError, match=r"is a object, expected a Hugging Face fast tokenizer"):
        PythonTool(object())
