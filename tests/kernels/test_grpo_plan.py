"""make_plan: every aggregation mode against a plain loop, which rows are read, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.kernels import KL, Counts, LossSpec, make_plan
from thor_fast.kernels.hierarchical_grpo_plan import AGGREGATIONS

NO_NLL = LossSpec(nll_alpha=0.0)
BY_LENGTH = ("seq-mean-token-sum-norm", "dr_grpo")


@st.composite
def batches(draw):
    """Per sequence: its level, its advantage, and its tokens' mask; some are empty or masked."""
    sequence = st.tuples(
        st.integers(0, 1),
        st.sampled_from([-1.5, -1e-8, 0.0, 5e-8, 0.25, 2.0]),
        st.lists(st.booleans(), max_size=7),
    )
    return draw(st.lists(sequence, max_size=6))


def plan_of(batch, **changes):
    masks = [m for _, _, mask in batch for m in mask]
    lengths = [len(mask) for _, _, mask in batch]
    each = batch
    if len(masks) == len(batch):  # then make_plan reads them by token
        each = [one for one in batch for _ in one[2]]
    return make_plan(
        torch.tensor(masks, dtype=torch.bool),
        torch.tensor([level for level, _, _ in each], dtype=torch.long),
        advantages=torch.tensor([adv for _, adv, _ in each]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        **changes,
    )


def loop_weights(batch, agg, norm_tokens, level_weight, shared, fraction):
    """Policy and NLL weight of each token under the mask, one at a time."""
    tokens, sequences, positive = [0, 0], [0, 0], [0, 0]
    for level, adv, mask in batch:
        tokens[level] += sum(mask)
        sequences[level] += any(mask)
        positive[level] += sum(mask) if adv > 1e-7 else 0
    if shared:
        tokens, sequences, positive = ([sum(pair)] * 2 for pair in (tokens, sequences, positive))
    policy, nll = [], []
    for level, adv, mask in batch:
        scale = level_weight[level] * fraction
        for _ in range(sum(mask)):
            if agg == "token-sum":
                share = 1.0
            elif agg in ("token-mean", "dapo", "bnpo"):
                share = 1 / tokens[level]
            elif agg in ("seq-mean-token-sum", "luspo"):
                share = 1 / sequences[level]
            elif agg == "seq-mean-token-mean":
                share = 1 / sequences[level] / sum(mask)
            else:
                share = 1 / sequences[level] / norm_tokens
            policy.append(share * scale)
            nll.append(scale / positive[level] if adv > 1e-7 else 0.0)
    return policy, nll


@pytest.mark.parametrize("agg", AGGREGATIONS)
@settings(max_examples=25, deadline=None)
@given(batch=batches(), shared=st.booleans(), others=st.integers(0, 5))
def test_weights_are_those_of_a_plain_loop(agg, batch, shared, others):
    norm = 100 if agg in BY_LENGTH else None
    kwargs = {"agg": agg, "norm_tokens": norm, "level_weight": (1.0, 0.3)}
    fraction = 1.0
    if shared:
        kwargs |= {"normalizer": "thor", "mini_batch_sequences": len(batch) + others}
        fraction = len(batch) / max(len(batch) + others, 1)
    rows = plan_of(batch, **kwargs).trainable
    policy, nll = loop_weights(batch, agg, norm, (1.0, 0.3), shared, fraction)
    assert rows.policy_weight.tolist() == pytest.approx(policy, rel=1e-6)
    assert rows.term_weight.tolist() == pytest.approx(policy, rel=1e-6)
    assert rows.nll_weight.tolist() == pytest.approx(nll, rel=1e-6)
    expected = [i for i, m in enumerate(m for _, _, mask in batch for m in mask) if m]
    assert rows.rows.tolist() == expected


# One level at a time, so that a denominator taken over both would show.
@pytest.mark.parametrize("level", [0, 1])
def test_each_level_is_a_mean_of_its_own(level):
    batch = [(0, 1.0, [True] * 3), (1, -1.0, [True] * 5), (1, 1.0, [True] * 2)]
    for agg in AGGREGATIONS[:1] + AGGREGATIONS[3:4]:
        rows = plan_of(batch, agg=agg).trainable
        assert float(rows.policy_weight[rows.level == level].sum()) == pytest.approx(1.0)
    rows = plan_of(batch, normalizer="thor").trainable
    assert float(rows.policy_weight.sum()) == pytest.approx(1.0)
    assert float(rows.policy_weight[rows.level == level].sum()) == pytest.approx([0.3, 0.7][level])


@settings(max_examples=60, deadline=None)
@given(batch=batches(), cut=st.integers(0, 6), agg=st.sampled_from(AGGREGATIONS))
def test_micro_batches_with_the_counts_of_all_have_the_weights_of_the_single_batch(batch, cut, agg):
    kwargs = {"agg": agg, "norm_tokens": 100 if agg in BY_LENGTH else None}
    whole, parts = plan_of(batch, **kwargs), (batch[:cut], batch[cut:])
    counts = plan_of(parts[0], **kwargs).counts + plan_of(parts[1], **kwargs).counts
    assert counts == whole.counts
    for name in ("policy_weight", "nll_weight", "term_weight"):
        split = [getattr(plan_of(p, normalizer=counts, **kwargs).trainable, name) for p in parts]
        assert torch.equal(torch.cat(split), getattr(whole.trainable, name))


def test_counts_add_and_refuse_anything_else():
    one = Counts((1.0, 2.0), (3.0, 4.0), (5.0, 6.0))
    assert one + one == Counts((2.0, 4.0), (6.0, 8.0), (10.0, 12.0))
    with pytest.raises(TypeError):
        one + (1.0, 2.0)  # noqa: RUF005 - a tuple's own addition is what must not happen


BATCH = [
    (0, 1.0, [True, False, True]),
    (0, 0.0, [True, True]),
    (1, -1.0, [False, True, True]),
    (1, 2.0, [False]),
    (1, 0.0, [True]),
]
# Rows by token: 0 2 | 3 4 | 6 7 | - | 9
ALL, SPEAKING, POSITIVE = [0, 2, 3, 4, 6, 7, 9], [0, 2, 6, 7], [0, 2]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (LossSpec(), SPEAKING),
        (LossSpec(kind="gspo"), SPEAKING),
        (LossSpec(kl=KL()), ALL),
        (LossSpec(kl=KL(beta=0.0)), ALL),  # asked for in the metrics
        (LossSpec(entropy=True), ALL),
        (LossSpec(entropy_coef=-0.1), ALL),
    ],
)
def test_rows_without_advantage_are_left_out_where_nothing_depends_on_them(spec, expected):
    assert plan_of(BATCH).select(spec).rows.tolist() == expected
    assert plan_of(BATCH, drop_zero_adv=False).select(spec).rows.tolist() == ALL
    assert plan_of(BATCH).select(spec, depends_on_advantage=False).rows.tolist() == ALL


# IcePop and MIS put weights to 0, here on tokens 0 and 6; TIS truncates at 2.
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (NO_NLL, [2, 7]),
        (LossSpec(), [0, 2, 7]),  # token 0 has an NLL term, which rollouts do not weigh
        (LossSpec(kind="gspo", nll_alpha=0.0), SPEAKING),  # both are in their sequence's mean
    ],
)
def test_rollout_weights_of_zero_leave_rows_out(spec, expected):
    ratio = torch.tensor([9.0, 1.0, 5.0, 1.0, 1.0, 1.0, 0.1, 1.5, 1.0, 1.0])
    weight = torch.where((ratio < 0.5) | (ratio > 8), 0.0, ratio.clamp(max=2.0))
    plan, plain = plan_of(BATCH, rollout_weight=weight), plan_of(BATCH)
    assert plan.select(spec).rows.tolist() == expected
    assert torch.equal(
        plan.trainable.policy_weight, plain.trainable.policy_weight * weight[plain.trainable.rows]
    )
    assert torch.equal(plan.trainable.term_weight, plain.trainable.term_weight)
    assert plan.counts == plain.counts


def test_a_sequence_where_weight_and_advantage_are_on_different_rows_is_read_whole():
    # geo_mean's advantage is the sequence's mean: row 0 has a loss though its own advantage is 0.
    plan = make_plan(
        torch.ones(3, dtype=torch.bool),
        0,
        advantages=torch.tensor([0.0, 1.0, 0.0]),
        cu_seqlens=torch.tensor([0, 2, 3]),
        rollout_weight=torch.tensor([1.0, 0.0, 1.0]),
    )
    assert plan.select(NO_NLL).rows.tolist() == []
    by_sequence = LossSpec(kind="geo_mean", nll_alpha=0.0)
    assert plan.select(by_sequence).rows.tolist() == [0, 1]


def test_sequences_are_numbered_by_the_rows_that_are_read():
    chosen = plan_of(BATCH).select(LossSpec())
    assert chosen.sequence.tolist() == [0, 0, 1, 1]
    assert chosen.bounds.tolist() == [0, 2, 4]
    assert plan_of(BATCH).trainable.bounds.tolist() == [0, 2, 4, 6, 7]


def test_a_level_of_weight_zero_is_not_read():
    assert plan_of(BATCH, level_weight=(1.0, 0.0)).select(LossSpec()).rows.tolist() == POSITIVE


def test_sequence_ids_say_what_bounds_say():
    mask = torch.ones(6, dtype=torch.bool)
    adv = torch.tensor([1.0, -1.0, 0.5])
    by_ids = make_plan(mask, 0, advantages=adv, seq_ids=torch.tensor([4, 4, 7, 9, 9, 9]))
    by_bounds = make_plan(mask, 0, advantages=adv, cu_seqlens=torch.tensor([0, 2, 3, 6]))
    for one, other in zip(by_ids.trainable, by_bounds.trainable, strict=True):
        assert torch.equal(one, other)


def test_groups_of_one_keep_their_reward_and_groups_without_variance_are_counted():
    # THOR: the advantage of a group of one is its reward; of equal rewards it is 0.
    rewards, group = [1.0, 1.0, 1.0, 0.0, 1.0], torch.tensor([3, 5, 5, 8, 8])
    of = [[r for r, g in zip(rewards, group, strict=True) if g == own] for own in group]
    adv = []
    for reward, rest in zip(rewards, of, strict=True):
        mean = sum(rest) / len(rest)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rest) / max(len(rest) - 1, 1))
        adv.append(reward if len(rest) == 1 else (reward - mean) / (deviation + 1e-6))
    plan = make_plan(
        torch.ones(10, dtype=torch.bool),
        0,
        advantages=torch.tensor(adv),
        cu_seqlens=torch.arange(0, 11, 2),
        group=group,
    )
    assert (plan.groups, plan.groups_without_signal) == (3, 1)
    assert plan.select(LossSpec()).rows.tolist() == [0, 1, 6, 7, 8, 9]
    assert plan.trainable.advantage[:2].tolist() == [1.0, 1.0]


def test_nothing_at_all():
    for bounds in ([0], [0, 0, 0]):
        plan = make_plan(
            torch.zeros(0, dtype=torch.bool),
            0,
            advantages=torch.zeros(0),
            cu_seqlens=torch.tensor(bounds),
        )
        assert plan.select(LossSpec()).rows.shape == (0,)
        assert plan.counts == Counts((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(4)}, r"mask is torch.float32 \(4,\) on cpu, expected torch.bool"),
        ({"cu_seqlens": None}, "expected either cu_seqlens or seq_ids"),
        ({"seq_ids": torch.zeros(4)}, "expected either cu_seqlens or seq_ids"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens is \[0, 3\], expected 0 to 4"),
        ({"cu_seqlens": torch.tensor([0, 5, 4])}, r"\[0, 5, 4\], expected ascending bounds"),
        (
            {"cu_seqlens": None, "seq_ids": torch.tensor([1, 0, 0, 0])},
            r"seq_ids has shape \(4,\), expected \(4,\) without a descent",
        ),
        ({"level": torch.tensor([0, 2])}, r"level has 2, expected 0 \(episode\) or 1 \(step\)"),
        ({"level": torch.tensor([0.5, 0.5])}, "level is torch.float32, expected integers"),
        ({"level": torch.zeros(3).long()}, r"level has shape \(3,\), expected \(4,\) or \(2,\)"),
        ({"advantages": torch.zeros(3)}, r"advantages has shape \(3,\), expected \(4,\) or \(2,\)"),
        ({"advantages": torch.tensor([math.nan, 0])}, "advantages hold NaN or infinity under the"),
        ({"rollout_weight": torch.ones(3)}, r"rollout_weight has shape \(3,\), expected \(4,\)"),
        ({"rollout_weight": -torch.ones(4)}, "rollout_weight holds values under the mask that are"),
        ({"agg": "mean"}, "agg is 'mean', expected one of token-mean, token-sum"),
        ({"agg": "dr_grpo"}, "norm_tokens is None with agg='dr_grpo', expected a number with"),
        ({"norm_tokens": 5}, "norm_tokens is 5 with agg='token-mean', expected a number with"),
        ({"agg": "dr_grpo", "norm_tokens": 0}, "norm_tokens is 0, expected >= 1"),
        ({"level_weight": (1.0, -1.0)}, r"level_weight is \(1.0, -1.0\), expected two finite"),
        ({"level_weight": (1.0,)}, r"level_weight is \(1.0,\), expected two finite"),
        ({"normalizer": "verl"}, "normalizer is 'verl', expected 'global', 'thor' or Counts"),
        ({"mini_batch_sequences": 4}, "mini_batch_sequences is 4, expected only with 'thor'"),
        (
            {"normalizer": "thor", "mini_batch_sequences": 1},
            "mini_batch_sequences is 1, expected at least the 2 here",
        ),
        ({"group": torch.zeros(3)}, r"group has shape \(3,\), expected \(2,\)"),
    ],
)
def test_messages_say_what_was_got_and_expected(change, message):
    given = {
        "mask": torch.ones(4, dtype=torch.bool),
        "level": 0,
        "advantages": torch.ones(2),
        "cu_seqlens": torch.tensor([0, 1, 4]),
    } | change
    with pytest.raises(ValueError, match=message):
        make_plan(given.pop("mask"), given.pop("level"), **given)


def test_values_outside_of_the_mask_do_not_matter():
    plan = make_plan(
        torch.tensor([True, False]),
        0,
        advantages=torch.tensor([1.0, math.nan]),
        cu_seqlens=torch.tensor([0, 1, 2]),
        rollout_weight=torch.tensor([1.0, math.inf]),
    )
    assert plan.trainable.advantage.tolist() == [1.0]
