"""Training transcripts: real outputs, the asked-for share of failures, masks by provenance."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.errors import ConfigError
from thor_fast.rollout.splice import ObservationEncoder
from thor_fast.synthetic import TRAINED_FAMILIES, generate, load_tiny_policy, task_set
from thor_fast.synthetic.data import batches, encode
from thor_fast.synthetic.execution import run_trusted
from thor_fast.synthetic.faults import FAULTS, break_program
from thor_fast.synthetic.transcripts import Shares, direct_transcript, tool_transcript
from thor_fast.tools.dialect import THOR_DIALECT
from thor_fast.tools.python_tool import PythonTool
from thor_fast.types import Status, TokenSource

TROUBLED = Shares(direct=0.0, first_fault=0.5, later_fault=0.5, give_up=0.3)
SMOOTH = Shares(direct=0.0, first_fault=0.0, later_fault=0.0, give_up=0.0)
TASKS = st.builds(
    generate, st.sampled_from(TRAINED_FAMILIES), st.integers(0, 99), st.integers(0, 9_999)
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tiny_policy()[1]


def _codes(transcript):
    text = "".join(t.text for t in transcript.turns if t.source is TokenSource.MODEL)
    return re.findall(r"```python\n(.*?)\n```\n", text, re.DOTALL)


@given(TASKS, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_every_observation_is_what_running_the_block_gives(task, seed):
    transcript = tool_transcript(task, random.Random(seed), TROUBLED)
    shown = [t.text for t in transcript.turns if t.source is TokenSource.TOOL]
    results = [run_trusted(code) for code in _codes(transcript)]
    assert shown == [THOR_DIALECT.render(r) for r in results]
    sources = [t.source for t in transcript.turns]
    assert sources == [TokenSource.MODEL, TokenSource.TOOL] * len(shown) + [TokenSource.MODEL]


@given(TASKS, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_ends_right_unless_it_gives_up(task, seed):
    transcript = tool_transcript(task, random.Random(seed), TROUBLED)
    right = transcript.turns[-1].text.endswith(f"\\boxed{{{task.answer}}}.")
    gave_up = "I must guess." in transcript.turns[-1].text
    assert right != gave_up
    if gave_up:
        assert run_trusted(_codes(transcript)[-1]).status is Status.ERROR


@given(TASKS, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_broken_programs_fail(task, seed):
    for step in task.steps:
        broken = break_program(random.Random(seed), step.code)
        assert broken != step.code
        assert run_trusted(broken).status is Status.ERROR


def test_every_fault_occurs():
    codes = [step.code for task in task_set(70, seed=3) for step in task.steps]
    for fault in FAULTS:
        broken = [b for b in map(fault, codes) if b is not None]
        assert any(run_trusted(b).status is Status.ERROR for b in broken), fault


def test_program_that_cannot_be_broken_is_told():
    with pytest.raises(ValueError, match="no fault makes this program fail"):
        break_program(random.Random(0), "pass")


def test_no_failures_where_none_are_asked_for():
    for task in task_set(35, seed=4):
        transcript = tool_transcript(task, random.Random(0), SMOOTH)
        assert _codes(transcript) == [step.code for step in task.steps]


def test_direct_answer_has_no_tool_turn():
    task = generate("powers", 4, 0)
    transcript = direct_transcript(task)
    assert transcript.prompt == task.direct_prompt
    assert [t.source for t in transcript.turns] == [TokenSource.MODEL]


def test_share_out_of_range_is_told():
    with pytest.raises(ConfigError, match=r"give_up is 1\.5, expected 0 to 1"):
        Shares(direct=0.0, first_fault=0.0, later_fault=0.0, give_up=1.5)


@given(TASKS, st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_training_tokens_are_those_of_a_rollout(tokenizer, task, seed):
    """The runtime's own detector finds each block, and its splice gives the tokens trained on."""
    transcript = tool_transcript(task, random.Random(seed), TROUBLED)
    encoder = ObservationEncoder(tokenizer)
    ids, mask = encode(tokenizer, encoder, transcript)
    tool = PythonTool(tokenizer)
    detector = tool.detector()
    position = len(tokenizer(transcript.prompt)["input_ids"])
    assert not any(mask[:position])
    calls = []
    while position < len(ids):
        call = detector.feed(ids[position])
        assert mask[position]
        position += 1
        if call is not None:
            calls.append(call.code.rstrip("\n"))
            spliced = encoder(tool.observation(call, run_trusted(call.code)))
            assert ids[position : position + len(spliced)] == spliced
            assert not any(mask[position : position + len(spliced)])
            position += len(spliced)
            detector.skip(len(spliced))
    assert calls == _codes(transcript)
    assert ids[-1] == tokenizer.eos_token_id


def test_batches_pad_on_the_right_and_mask_the_padding(tokenizer):
    shares = Shares(direct=0.15, first_fault=0.2, later_fault=0.1, give_up=0.25)
    source = batches(tokenizer, seed=7, shares=shares, batch_tokens=2048)
    batch = next(source)
    assert batch.token_ids.shape == batch.mask.shape
    assert batch.token_ids.numel() <= 2048
    padding = batch.token_ids == tokenizer.pad_token_id
    assert not bool((padding & batch.mask).any())
    assert bool((padding[:, 1:] >= padding[:, :-1]).all())
    ends = (batch.token_ids == tokenizer.eos_token_id) & batch.mask
    assert ends.sum(dim=1).tolist() == [1] * len(batch.token_ids)
