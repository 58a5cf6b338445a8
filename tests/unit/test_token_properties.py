"""Whatever the tokenizer and however the text is cut into tokens: ids, masks and log-probs survive.

A sampled sequence need not be the one an encoder would choose, so texts are cut at random into
tokens of the vocabulary. Responses mix prose, near-misses and blocks; their code is known from how
they were built, so the detector is checked against the construction, not against itself.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.engines.base import SamplingParams
from thor_fast.engines.scripted import Script, ScriptedEngine
from thor_fast.rollout import ObservationEncoder, RolloutLimits, run_episode
from thor_fast.tools import PythonTool
from thor_fast.tools.base import DetectedCall
from thor_fast.tools.token_text import TokenBytes
from thor_fast.types import ExecutionResult, Status, StopReason, TokenSource

PROMPT = (40, 41, 42)
EOS = 1  # <|im_end|> in the trained tokenizers

PROSE = st.sampled_from(
    [
        "Let me compute.\n",
        "this is written in python\n",
        "x python\nprint(0)\n",
        "use ```python here\n",
        "```python```\n",
        "``\n`a` ``b``\n",
        "é 日本 🎲\n",
        "\n\n",
        "```output\n42\n```\n",
        "```\nplain\n```  \n",
        "```json\n```python\n{}\n```\n",
        "    ```python\n",
    ]
)
OPENING = st.sampled_from(["```python\n", "```py\n", "``` python\n", "```Python \n", "```py\r\n"])
CODE = st.lists(
    st.sampled_from(
        [
            "print(6*7)\n",
            'x = 1 # it\'s """\n',
            "s = '''\n```\n'''\n",
            'def f():\n    """doc\n```python\n1\n```\n"""\n',
            "t = 'left open\n",
            "u = 'a\\\n```\n'\n",
            "v = '' + \"\" ``\n",
            "é = '日本'\n",
        ]
    ),
    max_size=3,
).map("".join)
CLOSING = st.sampled_from(["```\n", "```\n\n", "``` \n", " ```\n"])
BLOCK = st.tuples(OPENING, CODE, CLOSING)


@dataclass
class Response:
    """Text, and for each block where it begins, its code, and where its closing fence ends."""

    data: bytes
    blocks: list[tuple[int, str, int]]


@st.composite
def responses(draw) -> Response:
    data = b""
    blocks = []
    for part in draw(st.lists(st.one_of(PROSE, BLOCK), max_size=6)):
        if isinstance(part, tuple):
            opening, code, closing = part
            start = len(data)
            data += (opening + code + closing).encode()
            blocks.append((start, code, len(data) - len(closing) + closing.index("```") + 3))
        else:
            data += part.encode()
    unclosed = draw(st.sampled_from(["", "```python\nprint(1)\n", "```py\nprint(1)\n``", "so 42"]))
    return Response(data + unclosed.encode(), blocks)


class Cutter:
    """Cuts bytes into tokens of one tokenizer: at random, or always the longest that fits."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.spell = TokenBytes(tokenizer)
        special = set(tokenizer.get_added_tokens_decoder())
        self.by_first: dict[int, list[int]] = {}
        for token_id in range(tokenizer.get_vocab_size()):
            if token_id not in special and self.spell[token_id]:
                self.by_first.setdefault(self.spell[token_id][0], []).append(token_id)

    def cut(self, data: bytes, choose) -> list[int]:
        ids: list[int] = []
        at = 0
        while at < len(data):
            fits = [t for t in self.by_first[data[at]] if data.startswith(self.spell[t], at)]
            ids.append(choose(sorted(fits, key=lambda t: len(self.spell[t]))))
            at += len(self.spell[ids[-1]])
        return ids


@pytest.fixture(scope="module")
def cutters(tokenizers) -> list[Cutter]:
    return [Cutter(t) for t in (tokenizers.words, tokenizers.lines, tokenizers.bytes)]


def random_choice(rng):
    # Long tokens, which merge across fences, are as likely as short ones.
    return lambda fits: rng.choice([fits[-1], rng.choice(fits)])


@settings(deadline=None, max_examples=100)
@given(response=responses(), rng=st.randoms(use_true_random=False))
def test_fires_at_the_same_byte_whatever_the_tokenisation(cutters, response, rng) -> None:
    for cutter in cutters:
        for choose in (random_choice(rng), lambda fits: fits[-1]):
            ids = cutter.cut(response.data, choose)
            ends = [0]
            for token_id in ids:
                ends.append(ends[-1] + len(cutter.spell[token_id]))
            assert ends[-1] == len(response.data)
            drafts: list[DetectedCall] = []
            detector = PythonTool(cutter.tokenizer).detector(drafts.append)
            calls = []
            for i, token_id in enumerate(ids):
                if (call := detector.feed(token_id)) is not None:
                    calls.append((i, call))
                    assert all(call.code.startswith(d.code) for d in drafts)
                    assert all((d.start, d.trailing) == (call.start, "") for d in drafts)
                    drafts.clear()
            assert [c.code for _, c in calls] == [code for _, code, _ in response.blocks]
            for (index, call), (start, _, end) in zip(calls, response.blocks, strict=True):
                assert call.end == index + 1
                assert ends[index] < end <= ends[index + 1]
                assert ends[call.start] <= start < ends[call.start + 1]
                trailing = response.data[end : ends[index + 1]].decode(errors="replace")
                assert call.trailing == trailing


@settings(deadline=None, max_examples=100)
@given(
    turns=st.lists(responses(), min_size=1, max_size=3),
    rng=st.randoms(use_true_random=False),
    watch=st.booleans(),
    chunk=st.integers(1, 9),
    observations=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30)),
)
def test_model_tokens_masks_and_log_probs_survive_any_mix(
    cutters, fake_sandbox, turns, rng, watch, chunk, observations
) -> None:
    cutter = rng.choice(cutters)
    data = b"".join(t.data for t in turns)
    sampled = (*cutter.cut(data, random_choice(rng)), EOS)
    logprobs = tuple(-(i + 1) / 1000 for i in range(len(sampled)))
    printed = iter(observations)
    statuses = [Status.OK, Status.ERROR, Status.TIMEOUT]
    sandbox = fake_sandbox(lambda _: ExecutionResult(rng.choice(statuses), next(printed, "42")))
    engine = ScriptedEngine({PROMPT: [Script(sampled, logprobs)]}, watch=watch, chunk_tokens=chunk)
    encode = ObservationEncoder(cutter.tokenizer)
    t = asyncio.run(
        run_episode(
            engine, sandbox, PythonTool(cutter.tokenizer), PROMPT,
            RolloutLimits(max_response_tokens=10**6, max_tool_calls=10**3),
            encode=encode, sampling=SamplingParams(), eos_token_ids=frozenset({EOS}), session="s",
        )
    )  # fmt: skip
    assert t.stop_reason is StopReason.EOS

    ids, mask, lps = t.token_ids, t.loss_mask.tolist(), t.sampling_logprobs.tolist()
    assert len(ids) == len(mask) == len(lps) == len(t)
    assert tuple(ids[: len(PROMPT)]) == PROMPT
    # Exactly what was sampled, in order, and the loss mask is 1 there and nowhere else.
    assert [i for i, m in zip(ids, mask, strict=True) if m] == list(sampled)
    assert [p for p, m in zip(lps, mask, strict=True) if m] == list(logprobs)
    assert all(p == 0.0 for p, m in zip(lps, mask, strict=True) if not m)
    # What was spliced in is the observations, each tokenised by itself, and never special.
    spliced = [i for i, m in zip(ids, mask, strict=True) if not m][len(PROMPT) :]
    assert spliced == [i for c in t.tool_calls for i in encode(c.observation)]
    assert EOS not in spliced
    # Each call ran once, is followed by its observation, and holds its own fences.
    assert [r.code for r in sandbox.requests] == [c.code for c in t.tool_calls]
    for call in t.tool_calls:
        block = b"".join(cutter.spell[i] for i in ids[call.start : call.end])
        assert call.code in block.decode(errors="replace")
        assert ids[call.end :][: len(encode(call.observation))] == encode(call.observation)
    sources = [s.source for s in t.segments]
    assert sources == [TokenSource.MODEL, TokenSource.TOOL] * (len(sources) // 2) + [
        TokenSource.MODEL
    ]


@settings(deadline=None, max_examples=50)
@given(response=responses(), rng=st.randoms(use_true_random=False))
def test_every_way_of_running_gives_the_same_trajectory(
    cutters, fake_sandbox, response, rng
) -> None:
    cutter = rng.choice(cutters)
    sampled = (*cutter.cut(response.data, random_choice(rng)), EOS)
    seen = set()
    for watch, chunk in ((True, 1), (True, 5), (False, 1), (False, 5), (False, 1000)):
        t = asyncio.run(
            run_episode(
                ScriptedEngine({PROMPT: [Script(sampled)]}, watch=watch, chunk_tokens=chunk),
                fake_sandbox(), PythonTool(cutter.tokenizer), PROMPT, RolloutLimits(10**6, 10**3),
                encode=ObservationEncoder(cutter.tokenizer), sampling=SamplingParams(),
                eos_token_ids=frozenset({EOS}), session="s",
            )
        )  # fmt: skip
        seen.add((tuple(t.token_ids), tuple(t.loss_mask.tolist()), len(t.tool_calls)))
    assert len(seen) == 1
