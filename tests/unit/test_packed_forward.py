"""The packed forward against one forward per sequence, on tiny models."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, MistralConfig, PreTrainedModel

from thor_fast.errors import ConfigError
from thor_fast.rl import TrainingBatch, hidden_states, pack

from .training_problem import CONFIGS, VOCAB, make_model, make_sequences


def one_batch(*, share_prefixes: bool = False) -> TrainingBatch:
    (batch,) = pack(make_sequences(), max_tokens=1000, share_prefixes=share_prefixes)
    return batch


def alone(model: PreTrainedModel, batch: TrainingBatch) -> torch.Tensor:
    """[T, H]: each sequence by itself, after the prefix that is named for it."""
    found = []
    for number, (start, stop) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
        begin, length = (0, 0) if batch.prefix is None else batch.prefix[number].tolist()
        rows = [*range(begin, begin + length), *range(start, stop)]
        out = model.get_decoder()(input_ids=batch.token_ids[None, rows], use_cache=False)
        found.append(out.last_hidden_state[0, length:])
    return torch.cat(found)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_one_forward_per_sequence(kind, attention, share):
    batch = one_batch(share_prefixes=share)
    model = make_model(kind, attention=attention)
    with torch.no_grad():
        # 4e-7 to 8e-7 were found; norms are float32 in every dtype, so float64 would tell no more.
        assert relative(hidden_states(model, batch), alone(model, batch)) < 5e-6


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_no_row_depends_on_another_sequence(kind, attention, share):
    """Bit by bit: other tokens in one sequence, and no row of the others changes."""
    batch, model = one_batch(share_prefixes=share), make_model(kind, attention=attention)
    with torch.no_grad():
        before = hidden_states(model, batch)
        for number, (start, stop) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
            ids = batch.token_ids.clone()
            # Behind the prompt, which siblings may see.
            first = start + int(batch.loss_mask[start:stop].int().argmax())
            ids[first:stop] = (ids[first:stop] + 1) % VOCAB
            after = hidden_states(model, dataclasses.replace(batch, token_ids=ids))
            same = (before == after).all(dim=1)
            assert not same[first:stop].any(), number
            same[first:stop] = True
            assert same.all(), number


def test_a_later_token_changes_no_earlier_row():
    batch, model = one_batch(share_prefixes=True), make_model()
    ids = batch.token_ids.clone()
    last = batch.cu_seqlens[1:] - 1
    ids[last] = (ids[last] + 1) % VOCAB
    with torch.no_grad():
        before = hidden_states(model, batch)
        after = hidden_states(model, dataclasses.replace(batch, token_ids=ids))
    changed = (before != after).any(dim=1)
    assert changed.nonzero()[:, 0].tolist() == last.tolist()


@pytest.mark.parametrize("share", [False, True])
def test_gradient_checkpointing_changes_no_bit(share):
    batch = one_batch(share_prefixes=share)
    gradients = []
    for checkpointed in (False, True):
        model = make_model().train()
        if checkpointed:
            model.activation_checkpointing_enable()
        hidden_states(model, batch).square().mean().backward()
        gradients.append([p.grad for p in model.get_decoder().parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.any()
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_near_to_the_truth_as_alone(autocast, share):
    """In bfloat16 the two roundings differ; packing may not add to the error."""
    batch = one_batch(share_prefixes=share)
    truth = hidden_states(make_model(dtype=torch.float64), batch).detach()
    model = make_model()
    if not autocast:
        model = model.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = hidden_states(model, batch), alone(model, batch)
    error, unpacked = (relative(out.double(), truth) for out in (found, expected))
    assert 1e-4 < error < 1.5 * unpacked


def test_no_logits_of_the_batch_are_made():
    batch, model = one_batch(), make_model()
    rows = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[:-1].numel()))
    hidden_states(model, batch)
    assert rows == [1]
    assert not model.get_decoder()._forward_hooks


def test_a_model_that_fails_keeps_no_hook():
    batch, model = one_batch(), make_model()
    ids = batch.token_ids.clone()
    ids[0] = VOCAB
    with pytest.raises(IndexError):
        hidden_states(model, dataclasses.replace(batch, token_ids=ids))
    assert not model.get_decoder()._forward_hooks


def test_windows_are_masked_by_the_model_and_share_nothing():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        sliding_window=4,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config)
    batch = one_batch()
    with torch.no_grad():
        assert relative(hidden_states(model, batch), alone(model, batch)) < 5e-6
    with pytest.raises(ConfigError, match="layers that see a window only, expected full attention"):
        hidden_states(model, one_batch(share_prefixes=True))


def test_attention_that_takes_no_mask():
    model = make_model()
    for attention in ("flash_attention_2", "flex_attention"):
        model.config._attn_implementation_internal = attention
        with pytest.raises(ConfigError, match=f"{attention}', expected one that takes a mask"):
            hidden_states(model, one_batch(share_prefixes=True))
    model.config._attn_implementation_internal = "paged|sdpa"
    with pytest.raises(ConfigError, match="expected one that masks packed sequences: flash"):
        hidden_states(model, one_batch())


def test_recurrent_layers():
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    mamba = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="layers of kind linear_attention, expected attention"):
        hidden_states(mamba, one_batch())
    model = make_model()
    model._is_stateful = True  # what is left where a model does not name its layers
    with pytest.raises(ConfigError, match="layers of kind recurrent, expected attention only"):
        hidden_states(model, one_batch())


def test_a_model_in_other_hands(tmp_path):
    """In DDP's: one process of gloo."""
    batch, model = one_batch(), make_model()
    expected = hidden_states(model, batch)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        found = hidden_states(nn.parallel.DistributedDataParallel(model), batch)
        assert torch.equal(found, expected)
    finally:
        torch.distributed.destroy_process_group()
