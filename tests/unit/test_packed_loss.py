"""From trajectories to gradients: packed, split and shared against one sequence at a time."""

from __future__ import annotations

import dataclasses
import itertools
from functools import reduce

import pytest
import torch
from transformers import PreTrainedModel

from thor_fast.kernels import KL, LossSpec, logits_grpo
from thor_fast.rl import (
    AdvantagePolicy,
    HierarchicalGRPOLoss,
    TrainingBatch,
    TrainingSequence,
    hidden_states,
    hierarchical_advantages,
    pack,
)
from thor_fast.types import RolloutGroup, StopReason, TokenSource, Trajectory

from .training_problem import CONFIGS, VOCAB, make_model, make_sequences

# Nothing is clipped, so every token that is read has a gradient.
WIDE = LossSpec(clip_low=1.0, clip_high=1e9, dual_clip=None)
LOSSES = {
    "thor": HierarchicalGRPOLoss(),
    "weighted": HierarchicalGRPOLoss(WIDE, level_weight=(1.0, 0.25)),
    "by_sequence": HierarchicalGRPOLoss(WIDE, agg="seq-mean-token-mean"),
    "dr_grpo": HierarchicalGRPOLoss(WIDE, agg="dr_grpo", norm_tokens=16),
    "gspo": HierarchicalGRPOLoss(LossSpec(kind="gspo"), agg="seq-mean-token-mean"),
    "thor_shared": HierarchicalGRPOLoss(WIDE, normalizer="thor"),
    "entropy": HierarchicalGRPOLoss(dataclasses.replace(WIDE, entropy_coef=0.1)),
    "kl": HierarchicalGRPOLoss(dataclasses.replace(WIDE, kl=KL(beta=0.1))),
}


def with_reference(batch: TrainingBatch) -> TrainingBatch:
    return dataclasses.replace(batch, ref_logprobs=batch.old_logprobs - 0.5)


def run(
    model: PreTrainedModel, loss: HierarchicalGRPOLoss, batches: list[TrainingBatch]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum of the batches' losses, and the gradients of all parameters."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        found = loss(hidden_states(model, batch), model.lm_head, with_reference(batch)).loss
        found.backward()
        total += found.detach()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(g.any() for g in gradients.values())
    return total, gradients


def assert_same(found, expected, bound: float) -> None:
    """Loss and each parameter's gradient: norm of the difference over the norm."""
    torch.testing.assert_close(found[0], expected[0], rtol=bound, atol=bound)
    for name, truth in expected[1].items():
        assert float((found[1][name] - truth).norm() / truth.norm()) < bound, name


def plain(
    model: PreTrainedModel, sequences: list[TrainingSequence]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """THOR's loss without clipping, token by token, from whole logits of one trajectory each."""
    sums = [[0.0, 0], [0.0, 0]], [[0.0, 0], [0.0, 0]]
    for sequence in sequences:
        made = sequence.trajectory
        ids = torch.tensor(made.token_ids)
        scores = model(input_ids=ids[None]).logits[0].log_softmax(1)
        for token in range(len(made.prompt_ids), len(made)):
            if not made.loss_mask[token]:
                continue
            logp = scores[token - 1, ids[token]]
            policy, positive = (terms[sequence.level] for terms in sums)
            policy[0] -= sequence.advantage * (logp - made.sampling_logprobs[token]).exp()
            policy[1] += 1
            if sequence.advantage > 0:
                positive[0] -= logp
                positive[1] += 1
    total = sum(policy / count for policy, count in sums[0])
    total = total + WIDE.nll_alpha * sum(value / count for value, count in sums[1])
    model.zero_grad()
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_against_a_loop_over_trajectories(kind, share):
    model, sequences = make_model(kind, tied=kind == "qwen2"), make_sequences()
    expected = plain(model, sequences)
    for max_tokens in (1000, 40):
        batches = pack(sequences, max_tokens=max_tokens, share_prefixes=share)
        assert_same(run(model, HierarchicalGRPOLoss(WIDE), batches), expected, 1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_packed_batch_is_the_sum_of_its_sequences(name):
    """And of any micro-batches, siblings sharing or not: loss and the gradients of the model."""
    loss, sequences, model = LOSSES[name], make_sequences(), make_model()
    settings = {"normalizer": loss.normalizer}
    (whole,) = pack(sequences, max_tokens=1000, **settings)
    expected = run(model, loss, [whole])
    each = pack(sequences, max_tokens=1, **settings)
    assert len(each) == len(sequences)
    splits = [each, pack(sequences, max_tokens=40, **settings)]
    splits += [pack(sequences, max_tokens=n, share_prefixes=True, **settings) for n in (40, 1000)]
    if loss.normalizer == "thor":
        splits = splits[-1:]  # THOR's result depends on the split; sharing alone changes nothing
    for batches in splits:
        assert_same(run(model, loss, batches), expected, 1e-5)


def test_the_loss_of_each_sequence_adds_up():
    """The numbers themselves: every sequence's share, from the packed forward of all."""
    loss, sequences, model = LOSSES["weighted"], make_sequences(), make_model()
    (whole,) = pack(sequences, max_tokens=1000)
    hidden = hidden_states(model, whole).detach()
    total = loss(hidden, model.lm_head, whole).loss
    shares = []
    for start, stop in itertools.pairwise(whole.cu_seqlens.tolist()):
        mask = torch.zeros_like(whole.loss_mask)
        mask[start:stop] = whole.loss_mask[start:stop]
        alone = dataclasses.replace(whole, loss_mask=mask)
        shares.append(loss(hidden, model.lm_head, alone).loss)
    assert len(set(torch.stack(shares).tolist())) == len(sequences)
    torch.testing.assert_close(torch.stack(shares).sum(), total)


def trajectory_of(batch: TrainingBatch, number: int) -> Trajectory:
    """Of a batch's sequence, found again by its advantage."""
    wanted = float(batch.advantages[number])
    (found,) = [s.trajectory for s in make_sequences() if abs(s.advantage - wanted) < 1e-6]
    return found


def rows_before_sampled_tokens(batch: TrainingBatch) -> torch.Tensor:
    """[T] bool: row t where token t + 1 of the same sequence is the model's, by its segment."""
    found = torch.zeros(len(batch.token_ids), dtype=torch.bool)
    for number, (start, stop) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
        made = trajectory_of(batch, number)
        sources: list[TokenSource | None] = [None] * len(made.prompt_ids)
        for segment in made.segments:
            sources += [segment.source] * len(segment)
        laid_out = sources[len(sources) - (stop - start) :]
        sampled = [source is TokenSource.MODEL for source in laid_out[1:]]
        found[start : stop - 1] = torch.tensor(sampled)
    return found


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", ["thor", "weighted", "kl", "entropy", "gspo"])
def test_tool_output_has_no_gradient(name, share):
    """Exactly 0, not nearly: neither states nor logits that predict an observation are pulled."""
    loss, model = LOSSES[name], make_model()
    (batch,) = pack(make_sequences(), max_tokens=1000, share_prefixes=share)
    batch, sampled = with_reference(batch), rows_before_sampled_tokens(batch)
    hidden = hidden_states(model, batch).detach().requires_grad_()
    loss(hidden, model.lm_head, batch).loss.backward()
    logits = model.lm_head(hidden).detach().requires_grad_()
    old, ref = batch.old_logprobs.roll(-1), batch.ref_logprobs.roll(-1)
    targets = batch.token_ids.roll(-1)
    logits_grpo(logits, targets, loss.plan(batch), old, ref, spec=loss.spec).loss.backward()
    for gradient in (hidden.grad, logits.grad):
        assert not gradient[~sampled].any()
        pulled = gradient[sampled].any(dim=1)
        assert pulled.any() if loss.spec.dual_clip else pulled.all()  # clipped tokens are not


def test_what_a_tool_said_is_read_all_the_same():
    """No gradient at its tokens, but what follows depends on them."""
    loss, model = LOSSES["weighted"], make_model()
    (batch,) = pack(make_sequences(), max_tokens=1000)
    observed = []
    for number, start in enumerate(batch.cu_seqlens[:-1].tolist()):
        made = trajectory_of(batch, number)
        if len(made.segments) == 3:
            observed.append(start + len(made.prompt_ids) + len(made.segments[0]))
    ids = batch.token_ids.clone()
    ids[observed] = (ids[observed] + 1) % VOCAB
    other = dataclasses.replace(batch, token_ids=ids)
    values = [loss(hidden_states(model, b), model.lm_head, b).loss for b in (batch, other)]
    assert values[0] != values[1]


@pytest.mark.parametrize("stop", [StopReason.TOOL_FAILURE, StopReason.ENGINE_FAILURE])
def test_what_is_not_scored_is_as_if_it_had_not_been_sampled(stop):
    """Bit by bit, advantages included: of a group of 4 in which one failed, and a group of 3."""
    made = [s.trajectory for s in make_sequences()[:3]]
    for trajectory, reward in zip(made, (1.0, 0.0, 0.5), strict=True):
        trajectory.reward, trajectory.stop_reason = reward, StopReason.EOS
    failed = dataclasses.replace(made[0], reward=None, stop_reason=stop)
    batches = []
    for trajectories in ([*made[:1], failed, *made[1:]], made):
        group = RolloutGroup(made[0].prompt_ids, trajectories)
        sequences = hierarchical_advantages([group], [], AdvantagePolicy())
        batches += pack(sequences, max_tokens=1000)
    with_failure, without = batches
    assert with_failure.counts == without.counts
    for field in ("token_ids", "cu_seqlens", "loss_mask", "advantages", "old_logprobs", "group"):
        assert torch.equal(getattr(with_failure, field), getattr(without, field)), field


def test_sharing_saves_the_siblings_prefixes():
    """Laid-out tokens: of a group, its prefix once and one token more for each further sibling."""
    sequences = make_sequences()
    (alone,) = pack(sequences, max_tokens=1000)
    (shared,) = pack(sequences, max_tokens=1000, share_prefixes=True)
    # Groups of 3, with prompts of 3, 4, 13 and 14 tokens.
    assert len(alone.token_ids) - len(shared.token_ids) == 2 * (2 + 3 + 12 + 13)


def test_levels_do_not_dilute_each_other():
    """The steps' share of the update does not depend on how many there are, unless as in THOR."""
    model, sequences = make_model(), make_sequences()
    by_level = [[s for s in sequences if s.level == level] for level in (0, 1)]
    both, episodes, steps = (
        run(model, LOSSES["weighted"], pack(chosen, max_tokens=1000))[0]
        for chosen in (sequences, *by_level)
    )
    torch.testing.assert_close(both, episodes + steps)
    both, episodes, steps = (
        run(model, LOSSES["thor_shared"], pack(chosen, max_tokens=1000, normalizer="thor"))[0]
        for chosen in (sequences, *by_level)
    )
    assert abs(both - episodes - steps) > 0.1 * abs(both)


def test_counts_add_up_over_ranks():
    """Sequences dealt out to two ranks: with both ranks' counts their losses are the whole's."""
    loss, sequences, model = LOSSES["weighted"], make_sequences(), make_model()
    expected = run(model, loss, pack(sequences, max_tokens=1000))
    ranks = [pack(sequences[rank::2], max_tokens=40) for rank in range(2)]
    total = reduce(type(ranks[0][0].counts).__add__, (batches[0].counts for batches in ranks))
    batches = [dataclasses.replace(b, counts=total) for batches in ranks for b in batches]
    assert_same(run(model, loss, batches), expected, 1e-5)


@pytest.mark.parametrize("name", ["weighted", "by_sequence"])
def test_autocast_is_near_float32(name):
    """As far as bfloat16's rounding of a model of this size goes; sharing prefixes as well."""
    loss, model = LOSSES[name], make_model()
    expected = run(model, loss, pack(make_sequences(), max_tokens=1000))
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, loss, pack(make_sequences(), max_tokens=60, share_prefixes=True))
    assert_same(found, expected, 8e-2)
    assert all(g.dtype is torch.float32 for g in found[1].values())
