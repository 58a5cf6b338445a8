"""Packing: every token once, about itself what its trajectory says, and the same each time."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.errors import ConfigError, DataError
from thor_fast.kernels import Counts
from thor_fast.rl import HierarchicalGRPOLoss, TrainingBatch, TrainingSequence, pack
from thor_fast.rl.forward import attention_mask, position_ids
from thor_fast.types import Segment, TokenSource, Trajectory

from .training_problem import make_prompt, make_sequences, make_trajectory


@st.composite
def sequence_lists(draw: st.DrawFn) -> list[TrainingSequence]:
    """Groups of one prompt each; some prompts are a single token, some trajectories have no run."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    found = []
    for group in range(draw(st.integers(0, 4))):
        prompt = make_prompt(rng, draw(st.integers(1, 9)))
        for _ in range(draw(st.integers(1, 4))):
            runs = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
            made = make_trajectory(rng, prompt, runs)
            found.append(TrainingSequence(made, group % 2, rng.choice((-1.0, 0.0, 0.5)), group))
    return found


def unpacked(batch: TrainingBatch) -> list[tuple]:
    """What a batch says about each sequence, its shared prefix put before it again."""
    found = []
    for number, (start, stop) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
        begin, length = (0, 0) if batch.prefix is None else batch.prefix[number].tolist()
        rows = [*range(begin, begin + length), *range(start, stop)]
        mask = [False] * length + batch.loss_mask[start:stop].tolist()
        logprobs = [0.0] * length + batch.old_logprobs[start:stop].tolist()
        about = tuple(float(f[number]) for f in (batch.level, batch.advantages, batch.group))
        found.append((tuple(batch.token_ids[rows].tolist()), tuple(mask), tuple(logprobs), about))
    return found


def expected_of(sequence: TrainingSequence) -> tuple:
    made = sequence.trajectory
    logprobs = torch.tensor(made.sampling_logprobs).float().tolist()
    about = tuple(
        float(torch.tensor(float(v))) for v in (sequence.level, sequence.advantage, sequence.group)
    )
    return (
        tuple(made.token_ids),
        tuple(made.loss_mask.astype(bool).tolist()),
        tuple(logprobs),
        about,
    )


@settings(deadline=None)
@given(sequence_lists(), st.integers(1, 60), st.booleans())
def test_a_batch_is_what_its_trajectories_say(sequences, max_tokens, share):
    batches = pack(sequences, max_tokens=max_tokens, share_prefixes=share)
    found = [about for batch in batches for about in unpacked(batch)]
    assert sorted(found) == sorted(map(expected_of, sequences))
    for batch in batches:
        alone = len(batch.cu_seqlens) == 2
        assert len(batch.token_ids) <= max_tokens or alone
        # Nothing predicts a sequence's first token.
        assert not batch.loss_mask[batch.cu_seqlens[:-1]].any()


@settings(deadline=None)
@given(sequence_lists(), st.integers(1, 60), st.booleans())
def test_packing_again_gives_the_same(sequences, max_tokens, share):
    first, second = (pack(sequences, max_tokens=max_tokens, share_prefixes=share) for _ in range(2))
    assert [unpacked(b) for b in first] == [unpacked(b) for b in second]


@settings(deadline=None)
@given(sequence_lists(), st.integers(1, 60), st.booleans())
def test_counts_are_of_the_whole_step(sequences, max_tokens, share):
    batches = pack(sequences, max_tokens=max_tokens, share_prefixes=share)
    masks = [(s, int(s.trajectory.loss_mask.sum())) for s in sequences]
    expected = Counts(
        *(
            tuple(float(sum(of(s, n) for s, n in masks if s.level == level)) for level in (0, 1))
            for of in (
                lambda _, n: n,
                lambda _, n: n > 0,
                lambda s, n: n * (s.advantage > 0),
            )
        )
    )
    parts = Counts((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    for batch in batches:
        assert batch.counts == expected
        parts += HierarchicalGRPOLoss().plan(batch).counts
    assert not batches or parts == expected


@settings(deadline=None)
@given(sequence_lists(), st.integers(1, 60), st.booleans())
def test_a_token_sees_its_own_sequence_and_its_prefix(sequences, max_tokens, share):
    """The mask, pair by pair, against a token's place in its trajectory."""
    for batch in pack(sequences, max_tokens=max_tokens, share_prefixes=share):
        places, mask = position_ids(batch).tolist(), attention_mask(batch)
        for number, (start, stop) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
            begin, length = (0, 0) if batch.prefix is None else batch.prefix[number].tolist()
            assert places[start:stop] == list(range(length, length + stop - start))
            assert places[begin : begin + length] == list(range(length))
            for row in range(start, stop):
                seen = {*range(begin, begin + length), *range(start, row + 1)}
                assert set(mask[row].nonzero()[:, 0].tolist()) == seen


def test_siblings_share_what_is_before_them():
    rng = random.Random(0)
    prompt = (10, 11, 12)
    made = [make_trajectory(rng, prompt, (n,)) for n in (2, 3, 1)]
    sequences = [TrainingSequence(t, 1, 1.0, 0) for t in made]
    (batch,) = pack(sequences, max_tokens=100, share_prefixes=True)
    a, b, c = (t.response_ids for t in made)
    assert batch.token_ids.tolist() == [*prompt, *a, 12, *b, 12, *c]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 11]
    assert batch.prefix.tolist() == [[0, 0], [0, 2], [0, 2]]
    assert position_ids(batch).tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 2, 3]
    assert batch.loss_mask.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 1]


def test_a_family_that_does_not_fit_is_shared_in_parts():
    rng = random.Random(0)
    prompt = make_prompt(rng, 20)
    made = [make_trajectory(rng, prompt, (4,)) for _ in range(5)]
    sequences = [TrainingSequence(t, 1, 1.0, 0) for t in made]
    batches = pack(sequences, max_tokens=29, share_prefixes=True)
    assert [len(b.token_ids) for b in batches] == [29, 29, 24]
    assert [b.prefix is None for b in batches] == [False, False, True]


def test_first_fit_longest_first():
    rng = random.Random(0)
    made = [make_trajectory(rng, (1,), (n - 1,)) for n in (3, 9, 5, 4, 6)]
    sequences = [TrainingSequence(t, 0, 1.0, g) for g, t in enumerate(made)]
    batches = pack(sequences, max_tokens=10)
    assert [b.group.tolist() for b in batches] == [[1], [4, 3], [2, 0]]
    assert [b.group.tolist() for b in pack(sequences, max_tokens=2)] == [[1], [4], [2], [3], [0]]


def test_nothing_gives_no_batch():
    assert pack([], max_tokens=8) == []


def test_thors_normalizer_has_the_sequences_of_the_step():
    sequences = make_sequences()
    for batch in pack(sequences, max_tokens=30, normalizer="thor"):
        assert batch.counts is None
        assert batch.step_sequences == len(sequences)
        assert HierarchicalGRPOLoss(normalizer="thor").plan(batch).tokens == len(batch.token_ids)


def test_a_temperature_is_told_where_it_is_not_1():
    sequences = make_sequences()
    assert all(b.temperature is None for b in pack(sequences, max_tokens=30))
    for batch in pack(sequences, max_tokens=30, temperature=0.5):
        torch.testing.assert_close(batch.temperature, torch.full(batch.token_ids.shape, 0.5))


def test_settings_and_data_that_make_no_sense():
    sequences = make_sequences()
    with pytest.raises(ConfigError, match="max_tokens is 0, expected >= 1"):
        pack(sequences, max_tokens=0)
    for wrong in (0.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="expected a finite number > 0"):
            pack(sequences, max_tokens=9, temperature=wrong)
    with pytest.raises(ConfigError, match="normalizer is 'mean', expected 'global' or 'thor'"):
        pack(sequences, max_tokens=9, normalizer="mean")
    bare = Trajectory(())
    bare.append(Segment(TokenSource.MODEL, (1,), (-1.0,)))
    with pytest.raises(DataError, match="a trajectory has an empty prompt, expected at least one"):
        pack([dataclasses.replace(sequences[0], trajectory=bare)], max_tokens=9)
