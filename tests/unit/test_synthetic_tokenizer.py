"""The committed tokenizer: round trip, single digits, merges across the fence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.errors import DataError
from thor_fast.synthetic import load_policy, load_tiny_policy, task_set
from thor_fast.synthetic.tokenizer import BOS, EOS, PAD, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tiny_policy()[1]


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not any(special in text for special in (BOS, EOS, PAD)):
        assert tokenizer.decode(ids) == text


def test_prompt_starts_with_bos_and_special_tokens_are_known(tokenizer):
    for task in task_set(7, seed=2):
        ids = tokenizer(task.prompt)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == task.prompt
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)


def test_digits_are_never_merged(tokenizer):
    ids = tokenizer.encode("2718281828-45*90", add_special_tokens=False)
    assert [tokenizer.decode([i]) for i in ids] == list("2718281828-45*90")
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    assert not [p for p in pieces if any(c.isdigit() for c in p) and len(p) > 1]


def test_merges_cross_the_fence(tokenizer):
    pieces = {tokenizer.decode([i]) for i in range(len(tokenizer))}
    assert "```\n" in pieces
    ids = tokenizer.encode("print(1)\n```\n", add_special_tokens=False)
    assert tokenizer.decode(ids[-1:]) == "```\n"


def test_building_again_gives_the_same_tokenizer():
    texts = [t.prompt for t in task_set(700, seed=1)]
    first, again = (build_tokenizer(texts, vocab_size=300) for _ in range(2))
    assert first.get_vocab() == again.get_vocab()
    assert len(first) <= 300


def test_folder_without_a_model_is_told(tmp_path):
    with pytest.raises(DataError, match=r"has no config\.json, expected a folder written by"):
        load_policy(tmp_path)
