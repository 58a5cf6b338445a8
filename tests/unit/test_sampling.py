"""Noise, the inverse CDF, and the log-probs that go with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thor_fast.engines.base import SamplingParams
from thor_fast.engines.sampling import SamplingRow, noise_key, sample, uniforms


def row(position: int = 0, **params: float) -> SamplingRow:
    settings = SamplingParams(**params)  # type: ignore[arg-type]
    return SamplingRow(settings, noise_key(settings.seed), position)


def rows(n: int, **params: float) -> list[SamplingRow]:
    return [row(position, **params) for position in range(n)]


def noise(seed: int, start: int, n: int) -> np.ndarray:
    keys = np.full(n, noise_key(seed), np.uint64)
    return uniforms(keys, np.arange(start, start + n, dtype=np.uint64))


def test_noise_is_frozen() -> None:
    """Recorded rollouts replay only while these numbers stay what they are."""
    assert noise(0, 0, 2).tolist() == [0.23286544795475594, 0.5277580838124728]
    assert noise(2**64 + 5, 0, 3).tolist() == noise(5, 0, 3).tolist()
    assert noise(-1, 0, 3).tolist() == noise(2**64 - 1, 0, 3).tolist()


@pytest.mark.parametrize("axis", ["positions", "seeds"])
def test_noise_is_uniform_along_positions_and_along_seeds(axis: str) -> None:
    n = 20_000
    if axis == "positions":
        u = noise(1, 0, n)
    else:
        keys = np.array([noise_key(seed) for seed in range(n)], np.uint64)
        u = uniforms(keys, np.full(n, 17, np.uint64))
    assert u.min() >= 0
    assert u.max() < 1
    # Kolmogorov-Smirnov at 1e-4: 2.23 / sqrt(n).
    gap = np.abs(np.sort(u) - (np.arange(n) + 0.5) / n).max()
    assert gap < 2.23 / np.sqrt(n)
    # Neighbours are uncorrelated: the estimate's standard deviation is 1 / sqrt(n).
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(n)


@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=9),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**40),
)
def test_token_and_logprob_follow_from_the_definition(
    logits: list[float], temperature: float, seed: int, position: int
) -> None:
    tokens, logprobs = sample(
        torch.tensor([logits]), [row(position, temperature=temperature, seed=seed)]
    )
    scaled = np.asarray(logits, np.float64) / np.float32(temperature)
    truth = scaled - scaled.max()
    truth -= np.log(np.exp(truth).sum())
    # float32 against float64 arithmetic on logits up to 8 / 0.3: 30 * 2**-23, a few times over.
    assert logprobs[0] == pytest.approx(truth[tokens[0]], abs=2e-5)
    cdf = np.exp(truth).cumsum()
    u = noise(seed, position, 1)[0]
    low = cdf[tokens[0] - 1] if tokens[0] else 0.0
    assert low - 1e-5 <= u <= cdf[tokens[0]] + 1e-5


def test_frequencies_match_probabilities_under_top_k_and_top_p() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
    n = 4000
    p = torch.softmax(logits[0].double(), -1).numpy()
    cases = {
        (0, 1.0): p,
        (2, 1.0): np.where(np.arange(5) < 2, p, 0),
        (0, 0.8): np.where(np.arange(5) < 2, p, 0),  # 0.64 + 0.23 is the first sum over 0.8
        (3, 0.95): np.where(np.arange(5) < 3, p, 0),  # of the three kept, 0.91 is short of 0.95
        (1, 1.0): np.where(np.arange(5) < 1, p, 0),
    }
    for (top_k, top_p), weights in cases.items():
        tokens, logprobs = sample(
            logits.expand(n, -1), rows(n, top_k=top_k, top_p=top_p, seed=top_k)
        )
        expected = weights / weights.sum()
        seen = np.bincount(tokens, minlength=5) / n
        assert (seen[expected == 0] == 0).all()
        # Five standard deviations of a proportion.
        assert np.abs(seen - expected).max() < 5 * 0.5 / np.sqrt(n)
        # The log-prob is that of the distribution before the filters.
        np.testing.assert_allclose(logprobs, np.log(p)[tokens], atol=1e-6)


def test_filters_keep_exactly_k_of_equal_tokens() -> None:
    tokens, _ = sample(torch.zeros(500, 7), rows(500, top_k=3))
    assert set(tokens.tolist()) == {0, 1, 2}


def test_greedy_takes_the_maximum_and_reports_temperature_one() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 5.0]])
    tokens, logprobs = sample(logits, rows(2, temperature=0.0))
    assert tokens.tolist() == [1, 0]
    truth = torch.log_softmax(logits.double(), -1)
    np.testing.assert_allclose(logprobs, [truth[0, 1], truth[1, 0]], atol=1e-6)


def test_rows_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    mixed = [
        row(9, seed=1),
        row(9, seed=2, top_k=4),
        row(3, seed=3, temperature=0.0),
        row(4, seed=4, temperature=0.7, top_p=0.5),
        row(5, seed=5, top_k=2, top_p=0.9),
        row(6, seed=6, temperature=3.0),
    ]
    tokens, logprobs = sample(logits, mixed)
    for i, alone in enumerate(mixed):
        token, logprob = sample(logits[i : i + 1], [alone])
        assert (token[0], logprob[0]) == (tokens[i], logprobs[i])


def test_tokens_of_no_weight_are_never_drawn() -> None:
    logits = torch.full((2000, 6), float("-inf"))
    logits[:, 1] = 0.0
    logits[:, 4] = 0.0
    tokens, logprobs = sample(logits, rows(2000))
    assert set(tokens.tolist()) == {1, 4}
    np.testing.assert_allclose(logprobs, np.log(0.5), atol=1e-6)


def test_nan_logits_give_a_nan_logprob_and_leave_other_rows_alone() -> None:
    logits = torch.zeros(2, 3)
    logits[0, 1] = float("nan")
    tokens, logprobs = sample(logits, rows(2))
    assert np.isnan(logprobs[0])
    assert 0 <= tokens[0] < 3
    assert logprobs[1] == pytest.approx(-np.log(3), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_float_dtype_are_worked_on_in_float32(dtype: torch.dtype) -> None:
    logits = torch.linspace(-2, 2, 11).to(dtype)[None]
    tokens, logprobs = sample(logits, rows(1))
    truth = torch.log_softmax(logits.double(), -1)[0, tokens[0]]
    assert logprobs[0] == pytest.approx(float(truth), abs=1e-6)
