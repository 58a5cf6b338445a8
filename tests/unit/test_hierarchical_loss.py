"""``HierarchicalGRPOLoss`` against a plain loop over sequences, in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from thor_fast.kernels import KL, Counts, LossSpec
from thor_fast.rl import HierarchicalGRPOLoss, TrainingBatch

VOCAB, HIDDEN = 23, 6


def make_batch(lengths: tuple[int, ...] = (5, 1, 7, 2, 6), seed: int = 0) -> TrainingBatch:
    """Every second sequence is of a step; its first half is prefix. An empty one may be among."""
    gen = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    mask, level = [], []
    for number, length in enumerate(lengths):
        prefix = max(1, length // 2) if number % 2 else 1
        drawn = torch.rand(length, generator=gen) < 0.7
        drawn[:prefix] = False
        mask.append(drawn)
        level.append(number % 2)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    advantages = torch.randn(len(lengths), generator=gen, dtype=torch.float64)
    return TrainingBatch(
        token_ids=torch.randint(0, VOCAB, (tokens,), generator=gen),
        cu_seqlens=bounds,
        loss_mask=torch.cat(mask),
        level=torch.tensor(level),
        advantages=advantages.float(),
        old_logprobs=-3 + torch.randn(tokens, generator=gen, dtype=torch.float64) * 0.3,
        ref_logprobs=-3 + torch.randn(tokens, generator=gen, dtype=torch.float64) * 0.3,
        rollout_weight=torch.rand(tokens, generator=gen) * 2,
        temperature=0.5 + torch.rand(tokens, generator=gen),
    )


def make_head(seed: int = 0, *, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=torch.float64)


def make_hidden(batch: TrainingBatch, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    shape = (len(batch.token_ids), HIDDEN)
    return torch.randn(shape, generator=gen, dtype=torch.float64).requires_grad_()


def plain_loss(
    hidden: torch.Tensor, head: torch.nn.Linear, batch: TrainingBatch, spec: LossSpec
) -> torch.Tensor:
    """THOR's loss token by token; each level has its own denominators. PPO with dual clip only."""
    sums = {name: [0.0, 0.0] for name in ("tokens", "positive")}
    policy, kl, nll = ([hidden.new_zeros(()) for _ in range(2)] for _ in range(3))
    bounds = batch.cu_seqlens.tolist()
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        level, advantage = int(batch.level[number]), float(batch.advantages[number])
        for token in range(start + 1, stop):
            if not batch.loss_mask[token]:
                continue
            logits = head(hidden[token - 1]) / batch.temperature[token]
            logp = logits.log_softmax(0)[batch.token_ids[token]]
            ratio = (logp - batch.old_logprobs[token]).exp()
            clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
            loss = torch.maximum(-advantage * ratio, -advantage * clipped)
            if advantage < 0:
                loss = torch.minimum(loss, torch.tensor(-advantage * spec.dual_clip))
            policy[level] = policy[level] + batch.rollout_weight[token].double() * loss
            x = batch.ref_logprobs[token] - logp
            kl[level] = kl[level] + x.exp() - x - 1
            sums["tokens"][level] += 1
            if advantage > 0:
                nll[level] = nll[level] - logp
                sums["positive"][level] += 1
    total = hidden.new_zeros(())
    for level in range(2):
        term = policy[level] + (0.0 if spec.kl is None else spec.kl.beta * kl[level])
        total = total + term / max(1.0, sums["tokens"][level])
        total = total + spec.nll_alpha * nll[level] / max(1.0, sums["positive"][level])
    return total


@pytest.mark.parametrize("spec", [LossSpec(), LossSpec(kl=KL(beta=0.1))])
@pytest.mark.parametrize("lengths", [(5, 1, 7, 2, 6), (3,), (4, 0, 9), (1, 1)])
def test_equals_a_loop_over_sequences(spec, lengths):
    batch, head = make_batch(lengths), make_head()
    hidden = make_hidden(batch)
    plain = plain_loss(hidden, head, batch, spec)
    inputs = [hidden, head.weight, head.bias]
    expected = torch.autograd.grad(plain, inputs, allow_unused=True) if plain.requires_grad else []
    found = HierarchicalGRPOLoss(spec)(hidden, head, batch)
    gradients = torch.autograd.grad(found.loss, inputs)
    # Weights and advantages of a plan are float32.
    torch.testing.assert_close(found.loss, plain.detach(), rtol=1e-6, atol=1e-7)
    if not expected:
        assert not batch.loss_mask.any()
        assert all(not g.any() for g in gradients)
    for gradient, truth in zip(gradients, expected, strict=False):
        torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-7)


def test_log_probs_are_of_the_next_token_of_the_same_sequence():
    batch, head = make_batch(), make_head()
    batch = dataclasses.replace(batch, temperature=None, advantages=torch.ones(5))
    hidden = make_hidden(batch)
    found = HierarchicalGRPOLoss()(hidden, head, batch)
    scores = head(hidden).log_softmax(1)
    starts = set(batch.cu_seqlens.tolist())
    rows = 0
    for token in range(len(batch.token_ids)):
        row = token - 1
        if token not in starts and batch.loss_mask[token]:
            truth = scores[row, batch.token_ids[token]].detach()
            torch.testing.assert_close(found.logp[row], truth)
            rows += 1
        elif row >= 0:
            assert found.logp[row] == 0
    assert rows == int(batch.loss_mask.sum()) > 0


def test_no_gradient_crosses_a_border():
    batch, head = make_batch(), make_head()
    hidden = make_hidden(batch)
    never_clipped = LossSpec(clip_low=1.0, clip_high=1e9, dual_clip=None)
    HierarchicalGRPOLoss(never_clipped)(hidden, head, batch).loss.backward()
    last = batch.cu_seqlens[1:] - 1
    assert not hidden.grad[last].any()
    read = torch.zeros(len(hidden), dtype=torch.bool)
    read[:-1] = batch.loss_mask[1:]
    assert hidden.grad[read].abs().sum(dim=1).min() > 0
    assert not hidden.grad[~read].any()


def test_what_is_beyond_a_border_changes_nothing():
    """The first token of a sequence is nobody's target: any other token in its place is as good."""
    batch, head = make_batch(), make_head()
    hidden = make_hidden(batch)
    before = HierarchicalGRPOLoss()(hidden, head, batch).loss
    firsts = batch.cu_seqlens[:-1]
    ids = batch.token_ids.clone()
    ids[firsts] = (ids[firsts] + 1) % VOCAB
    old = batch.old_logprobs.clone()
    old[firsts] = float("nan")
    other = dataclasses.replace(batch, token_ids=ids, old_logprobs=old)
    assert HierarchicalGRPOLoss()(hidden, head, other).loss == before


def test_values_by_token_are_moved_like_those_by_sequence():
    batch, head = make_batch(), make_head()
    hidden = make_hidden(batch)
    lengths = batch.cu_seqlens.diff()
    by_token = dataclasses.replace(
        batch,
        advantages=batch.advantages.repeat_interleave(lengths),
        level=batch.level.repeat_interleave(lengths),
        loss_mask=batch.loss_mask.to(torch.int8),
    )
    loss = HierarchicalGRPOLoss()
    assert loss(hidden, head, by_token).loss == loss(hidden, head, batch).loss


def test_micro_batches_add_up_to_the_batch():
    whole, head = make_batch((5, 4, 7, 2, 6, 3)), make_head()
    hidden = make_hidden(whole)
    loss = HierarchicalGRPOLoss(agg="seq-mean-token-mean", level_weight=(1.0, 0.5))
    expected = torch.autograd.grad(loss(hidden, head, whole).loss, [hidden, head.weight])
    cut, tokens = 2, int(whole.cu_seqlens[2])
    parts = []
    for sequences, positions in (
        (slice(0, cut), slice(0, tokens)),
        (slice(cut, None), slice(tokens, None)),
    ):
        bounds = whole.cu_seqlens[sequences.start : None if sequences.stop is None else cut + 1]
        per_token = {
            name: getattr(whole, name)[positions]
            for name in (
                *("token_ids", "loss_mask", "old_logprobs"),
                *("ref_logprobs", "rollout_weight", "temperature"),
            )
        }
        part = TrainingBatch(
            cu_seqlens=bounds - bounds[0],
            level=whole.level[sequences],
            advantages=whole.advantages[sequences],
            **per_token,
        )
        parts.append((part, hidden.detach()[positions].clone().requires_grad_()))
    counts = [loss.plan(part).counts for part, _ in parts]
    total = counts[0] + counts[1]
    assert total == loss.plan(whole).counts
    assert isinstance(total, Counts)
    head.weight.grad = None
    values = []
    for part, states in parts:
        found = loss(states, head, dataclasses.replace(part, counts=total)).loss
        found.backward()
        values.append(found.detach())
    torch.testing.assert_close(torch.cat([s.grad for _, s in parts]), expected[0])
    torch.testing.assert_close(head.weight.grad, expected[1])
    torch.testing.assert_close(sum(values), loss(hidden, head, whole).loss.detach())


def test_gradients_reach_a_transformer():
    """Packed sequences, restarted positions, tied weights: as a trainer has them."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    batch = dataclasses.replace(make_batch(), temperature=None, ref_logprobs=None)
    bounds = batch.cu_seqlens.tolist()
    spans = [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def states() -> torch.Tensor:
        each = [model.model(input_ids=batch.token_ids[None, span]) for span in spans]
        return torch.cat([out.last_hidden_state[0] for out in each])

    loss = HierarchicalGRPOLoss()
    first = loss(states(), model.lm_head, batch)
    # On-policy: the log-probs a batch brings are those of the policy itself.
    old = torch.cat([torch.zeros(1), first.logp[:-1]])
    batch = dataclasses.replace(batch, old_logprobs=old)
    found = loss(states(), model.lm_head, batch)
    metrics = found.metrics.wait()
    for level in ("episode", "step"):
        assert metrics[f"{level}/tokens"] > 0
        assert metrics[f"{level}/ratio"] == 1.0
    found.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    before = found.loss.item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    assert loss(states(), model.lm_head, batch).loss.item() < before


def test_a_weight_alone_is_a_head_without_bias():
    batch, head = make_batch(), make_head(bias=False)
    hidden = make_hidden(batch)
    loss = HierarchicalGRPOLoss()
    assert loss(hidden, head.weight, batch).loss == loss(hidden, head, batch).loss


def test_metrics_name_both_levels():
    batch, head = make_batch(), make_head()
    metrics = HierarchicalGRPOLoss(drop_zero_adv=False)(make_hidden(batch), head, batch).metrics
    found = metrics.wait()
    lengths = batch.cu_seqlens.diff()
    level = batch.level.repeat_interleave(lengths)
    for number, name in enumerate(("episode", "step")):
        assert found[f"{name}/tokens"] == int((batch.loss_mask & (level == number)).sum())


def test_rows_do_not_carry_what_thor_divides_by():
    batch, head = make_batch(), make_head()
    hidden = make_hidden(batch)
    loss = HierarchicalGRPOLoss(normalizer="thor")
    whole = loss(hidden, head, batch).loss
    half = loss(hidden, head, dataclasses.replace(batch, step_sequences=10)).loss
    torch.testing.assert_close(half, whole / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": torch.ones(21, dtype=torch.bool)}, "loss_mask is set on token 0, the first"),
        (
            {"loss_mask": torch.ones(4, dtype=torch.bool)},
            r"loss_mask has shape \(4,\), expected \(",
        ),
        ({"old_logprobs": torch.zeros(20)}, r"old_logprobs has shape \(20,\), expected \(21,\)"),
        ({"ref_logprobs": torch.zeros(2)}, r"ref_logprobs has shape \(2,\), expected \(21,\)"),
        ({"rollout_weight": torch.zeros(2)}, r"rollout_weight has shape \(2,\), expected \(21,\)"),
        ({"temperature": torch.ones(2)}, r"temperature has shape \(2,\), expected \(21,\)"),
        ({"token_ids": torch.zeros(21)}, r"token_ids is torch.float32 \(21,\), expected torch.int"),
        (
            {"advantages": torch.zeros(4)},
            r"advantages has shape \(4,\), expected \(21,\) or \(5,\)",
        ),
        ({"cu_seqlens": torch.tensor([0, 9])}, r"cu_seqlens is \[0, 9\], expected 0 to 21"),
        ({"cu_seqlens": torch.tensor([0, 30, 21])}, r"cu_seqlens is \[0, 30, 21\], expected asc"),
        ({"level": torch.full((5,), 2)}, r"level has 2, expected 0 \(episode\) or 1 \(step\)"),
        ({"step_sequences": 9}, "mini_batch_sequences is 9, expected only with 'thor'"),
    ],
)
def test_a_batch_that_does_not_fit(change, message):
    batch = dataclasses.replace(make_batch(), **change)
    with pytest.raises(ValueError, match=message):
        HierarchicalGRPOLoss()(make_hidden(make_batch()), make_head(), batch)


def test_settings_that_do_not_fit_are_found_at_once():
    with pytest.raises(ValueError, match="agg is 'mean', expected one of token-mean"):
        HierarchicalGRPOLoss(agg="mean")
    with pytest.raises(ValueError, match="norm_tokens is None with agg='dr_grpo'"):
        HierarchicalGRPOLoss(agg="dr_grpo")
    with pytest.raises(ValueError, match="normalizer is 'mean', expected 'global', 'thor'"):
        HierarchicalGRPOLoss(normalizer="mean")


def test_counts_are_not_thor_s():
    counts = Counts((1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    batch = dataclasses.replace(make_batch(), counts=counts)
    with pytest.raises(ValueError, match="counts are given, expected None with normalizer='thor'"):
        HierarchicalGRPOLoss(normalizer="thor")(make_hidden(batch), make_head(), batch)


def test_a_head_of_another_kind():
    batch = make_batch()
    with pytest.raises(TypeError, match=r"lm_head is torch\.nn\.\S+Sequential, expected torch"):
        HierarchicalGRPOLoss()(make_hidden(batch), torch.nn.Sequential(make_head()), batch)


def test_a_missing_reference_is_named():
    batch = dataclasses.replace(make_batch(), ref_logprobs=None)
    with pytest.raises(ValueError, match="ref_logp is None, expected log-probs of the reference"):
        HierarchicalGRPOLoss(LossSpec(kl=KL()))(make_hidden(batch), make_head(), batch)
