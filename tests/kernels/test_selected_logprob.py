"""selected_logprob against float64 on the reference path (CPU), its contract and its messages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.kernels import (
    IGNORED_TARGET,
    LossSpec,
    fused_linear_grpo,
    make_plan,
    selected_logprob,
)
from thor_fast.kernels.hierarchical_grpo_head import Head
from thor_fast.kernels.selected_logprob import _selected_logprob_op

INF, NAN = math.inf, math.nan
PLAN = make_plan(torch.ones(3).bool(), 0, advantages=torch.ones(3), cu_seqlens=torch.tensor([0, 3]))


# V: 1 (p is 1), odd, a prime past a power of two, an even one; T: one row, and a ragged last chunk.
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (3, 7), (50, 4099), (33, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("temperature", "bias"), [(1.0, False), (0.6, True)])
def test_error_is_within_twice_that_of_torch_in_float32(
    make_problem, tokens, vocab, dtype, temperature, bias
):
    p = make_problem(tokens, vocab, 48, dtype, bias=bias, temperature=temperature)
    got = selected_logprob(
        p.hidden, p.weight, p.targets, temperature=temperature, bias=p.bias, chunk_rows=16
    )
    assert got.dtype is torch.float32
    assert got.shape == (tokens,)
    assert float(got.max()) <= 0.0
    error = float((got.double() - p.truth()).abs().max())
    assert error <= 2 * p.torch_error() + 1e-7


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9),
    vocab=st.integers(1, 70),
    chunk=st.integers(1, 11),
    seed=st.integers(0, 2**31),
)
def test_chunking_never_shows(make_problem, tokens, vocab, chunk, seed):
    p = make_problem(tokens, vocab, 8, seed=seed)
    got = selected_logprob(p.hidden, p.weight, p.targets, chunk_rows=chunk)
    whole = selected_logprob(p.hidden, p.weight, p.targets)
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), p.truth(), rtol=1e-4, atol=1e-4)


def test_relative_precision_survives_as_p_goes_to_one(row_stage):
    # 1 - p is 2e-13: log_softmax in float32 can only answer 0.
    logits = torch.tensor([[30.0, 0.0, 0.0]])
    got = row_stage(logits, torch.tensor([0])).logp
    assert float(got) == pytest.approx(-math.log1p(2 * math.exp(-30)), rel=1e-6)
    assert float(torch.log_softmax(logits, 1)[0, 0]) == 0.0


def test_a_huge_common_offset_cancels(row_stage):
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(1)) * 8
    logits = torch.round(logits * 8) / 8  # exact in float32 also after the offset
    targets = torch.arange(5)
    plain = row_stage(logits, targets).logp
    shifted = row_stage(logits + 2.0**20, targets).logp
    assert torch.equal(plain, shifted)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, -1000.0, 500.0], -500.0),  # exp(500) overflows float32: the guard's row
        ([0.0, -INF, 0.0], -math.log(2)),
        ([-INF, 2.0, -INF], -INF),
        ([-INF, -INF, -INF], NAN),
        ([1.0, INF, 2.0], NAN),
        ([INF, 1.0, 2.0], NAN),
        ([1.0, NAN, 2.0], NAN),
        ([-INF, NAN, 2.0], NAN),
    ],
)
def test_special_values_are_those_of_log_softmax(row_stage, logits, expected):
    row = torch.tensor([logits])
    got = float(row_stage(row, torch.tensor([0])).logp)
    torch_says = float(torch.log_softmax(row, 1)[0, 0])
    assert got == pytest.approx(expected, nan_ok=True)
    assert torch_says == pytest.approx(expected, nan_ok=True)


def test_ignored_targets_are_zero_and_wrong_ones_are_nan(make_problem):
    p = make_problem(5, 11, 4)
    targets = torch.tensor([3, IGNORED_TARGET, -1, 11, 10], dtype=torch.int32)
    got = selected_logprob(p.hidden, p.weight, targets)
    assert got[1] == 0.0
    assert got.isnan().tolist() == [False, False, True, True, False]
    assert not torch.signbit(got[1])


def test_all_targets_ignored(make_problem):
    p = make_problem(4, 11, 4)
    ignored = torch.full((4,), IGNORED_TARGET)
    assert selected_logprob(p.hidden, p.weight, ignored).tolist() == [0.0] * 4


def test_a_minus_inf_bias_takes_padding_out_of_the_vocabulary(make_problem):
    p = make_problem(6, 32, 8)
    padded = torch.cat([p.weight, torch.full((5, 8), 3.0)])
    bias = torch.cat([torch.zeros(32), torch.full((5,), -INF)])
    got = selected_logprob(p.hidden, padded, p.targets, bias=bias)
    torch.testing.assert_close(got, selected_logprob(p.hidden, p.weight, p.targets))


def test_strided_operands_read_as_their_contiguous_copies(make_problem):
    p = make_problem(8, 20, 6)
    hidden, weight, targets = p.hidden.t().contiguous().t(), p.weight[::2], p.targets[::2] // 2
    got = selected_logprob(hidden[::2], weight, targets)
    expected = selected_logprob(hidden[::2].contiguous(), weight.contiguous(), targets.contiguous())
    torch.testing.assert_close(got, expected)


def test_logits_of_one_chunk_at_a_time(make_problem, monkeypatch):
    shapes = []
    product = Head.logits

    def spy(self, part):
        logits = product(self, part)
        shapes.append((tuple(logits.shape), logits.dtype))
        return logits

    monkeypatch.setattr(Head, "logits", spy)
    p = make_problem(10, 17, 4, torch.bfloat16)
    selected_logprob(p.hidden, p.weight, p.targets, chunk_rows=4)
    assert shapes == [((n, 17), torch.float32) for n in (4, 4, 2)]


def test_float64_stays_float64(make_problem):
    p = make_problem(9, 33, 8, torch.float64)
    got = selected_logprob(p.hidden, p.weight, p.targets)
    torch.testing.assert_close(got, p.truth(), rtol=1e-13, atol=1e-13)


def test_scale_softcap_and_a_temperature_per_token(make_problem):
    p = make_problem(9, 33, 8, torch.float64)
    temperature = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    got = selected_logprob(
        p.hidden, p.weight, p.targets, temperature=temperature, softcap=3.0, logit_scale=-0.4
    )
    logits = 3 * torch.tanh(p.hidden @ p.weight.t() * -0.4 / 3)
    scores = torch.log_softmax(logits / temperature[:, None], dim=1)
    torch.testing.assert_close(got, scores.gather(1, p.targets[:, None]).squeeze(1))


def test_a_plan_names_the_rows_that_are_computed(make_problem, monkeypatch):
    p = make_problem(12, 17, 4)
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0]).bool()
    # A row without advantage is of the plan: the penalty for leaving the reference may be read.
    plan = make_plan(
        mask, 0, advantages=torch.tensor([0.0, 1.0]), cu_seqlens=torch.tensor([0, 6, 12])
    )
    whole = selected_logprob(p.hidden, p.weight, p.targets)
    rows = []
    product = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, part: rows.append(part) or product(self, part))
    got = selected_logprob(p.hidden, p.weight, p.targets, plan, chunk_rows=4)
    assert rows == [slice(0, 4), slice(4, 6)]
    torch.testing.assert_close(got[mask], whole[mask])
    assert not got[~mask].any()


# Several chunks, the last one ragged; and one. A temperature per token and per call.
@pytest.mark.parametrize("chunk", [8, None])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_on_policy_ratios_are_exactly_one(make_problem, dtype, chunk, per_token):
    p = make_problem(41, 301, 32, dtype, bias=True)
    gen = torch.Generator().manual_seed(5)
    mask = torch.rand(41, generator=gen) < 0.7
    plan = make_plan(
        mask,
        torch.tensor([0, 1]),
        advantages=torch.randn(41, generator=gen),
        cu_seqlens=torch.tensor([0, 20, 41]),
    )
    by_token = torch.rand(41, generator=gen) + 0.5 if per_token else None
    head = {"bias": p.bias, "chunk_rows": chunk}
    old = selected_logprob(
        p.hidden,
        p.weight,
        p.targets,
        plan,
        temperature=0.8 if by_token is None else by_token,
        softcap=20.0,
        logit_scale=0.9,
        **head,
    )
    # The entropy is one sum more over the same row: it must not change the others' bits.
    for entropy in (False, True):
        spec = LossSpec(temperature=0.8, softcap=20.0, logit_scale=0.9, entropy=entropy)
        out = fused_linear_grpo(
            p.hidden.clone().requires_grad_(),
            p.weight.clone().requires_grad_(),
            p.targets,
            plan,
            old,
            spec=spec,
            temperature=by_token,
            **head,
        )
        assert torch.equal(out.logp, old)
        metrics = out.metrics.wait()
        for level in ("episode", "step"):
            assert metrics[f"{level}/tokens"] > 0
            assert metrics[f"{level}/ratio"] == 1.0
            assert metrics[f"{level}/approx_kl"] == 0.0


def test_no_gradient_is_recorded(make_problem):
    p = make_problem(3, 9, 4)
    got = selected_logprob(p.hidden.clone().requires_grad_(), p.weight, p.targets)
    assert not got.requires_grad


@pytest.mark.parametrize("per_token", [False, True])
def test_custom_op_has_a_schema_and_a_fake_that_hold(make_problem, per_token):
    p = make_problem(4, 9, 3, torch.bfloat16, bias=True)
    temperature = torch.ones(4) if per_token else None
    rows = torch.tensor([0, 2, 3])
    arguments = (
        *(p.hidden, p.weight, p.bias, p.targets, rows, temperature),
        *(LossSpec(temperature=0.7).text, "", 3, False),
    )
    report = torch.library.opcheck(
        _selected_logprob_op, arguments, test_utils=("test_schema", "test_faketensor")
    )
    assert set(report.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(7, 5)}, r"hidden has shape \(7, 5\), expected \(T, 4\) to match"),
        (
            {"weight": torch.zeros(0, 4)},
            r"weight has shape \(0, 4\), expected \(V, H\) with",
        ),
        ({"targets": torch.zeros(6).long()}, r"targets has shape \(6,\), expected \(7,\)"),
        ({"targets": torch.zeros(7)}, r"targets is torch.float32, expected torch.int64"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\), expected \(9,\) to match weight"),
        ({"bias": torch.zeros(9).half()}, r"bias is torch.float16, expected torch.float32"),
        ({"hidden": torch.zeros(7, 4).half()}, r"hidden is torch.float16 and weight is torch.flo"),
        ({"weight": torch.zeros(9, 4, device="meta")}, r"weight is on meta, expected cpu"),
        ({"targets": torch.zeros(7, device="meta").long()}, r"targets is on meta, expected cpu"),
        ({"temperature": 0.0}, r"temperature is 0.0, expected > 0"),
        ({"temperature": NAN}, r"temperature is nan, expected > 0"),
        ({"temperature": INF}, r"temperature is inf, expected a finite number"),
        ({"temperature": torch.ones(3)}, r"temperature has shape \(3,\), expected \(7,\)"),
        ({"softcap": 0.0}, r"softcap is 0.0, expected > 0"),
        ({"logit_scale": 0.0}, r"logit_scale is 0.0, expected a finite number, not 0"),
        ({"plan": PLAN}, r"got 7 rows, expected the plan's 3 tokens"),
        ({"chunk_rows": 0}, r"chunk_rows is 0, expected >= 1"),
        ({"impl": "cuda"}, r"impl is 'cuda', expected 'auto', 'triton' or 'reference'"),
        (
            {"hidden": torch.zeros(7, 4).double(), "weight": torch.zeros(9, 4).double()}
            | {"impl": "triton"},
            r"impl='triton' got torch.float64, expected float32, bfloat16 or float16",
        ),
    ],
)
def test_messages_say_what_was_got_and_expected(change, message):
    arguments = {
        "hidden": torch.zeros(7, 4),
        "weight": torch.zeros(9, 4),
        "targets": torch.zeros(7, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        selected_logprob(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# 2^31 logits in one chunk at V = 151936: the offset of the last rows does not fit 32 bits.
@pytest.mark.parametrize(
    ("tokens", "vocab", "chunk"), [(77, 4099, None), (14_200, 151_936, 14_200)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_float64(make_problem, tokens, vocab, chunk, dtype):
    p = make_problem(tokens, vocab, 64, dtype, device="cuda")
    got = selected_logprob(p.hidden, p.weight, p.targets, chunk_rows=chunk, impl="triton")
    last = slice(-64, None)
    tail = type(p)(p.hidden[last], p.weight, p.targets[last], None, 1.0)
    error = float((got[last].double() - tail.truth()).abs().max())
    assert error <= 2 * tail.torch_error() + 1e-6
