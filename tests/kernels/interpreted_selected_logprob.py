"""The Triton row kernel under Triton's interpreter; started by test_triton_interpreter.py.

Not collected by name: ``TRITON_INTERPRET=1`` must be set before the kernels are imported, and a
stray read in the interpreter is a segmentation fault, so this runs in a process of its own. The
interpreter cannot show races, alignment or the rounding of the real device.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from thor_fast.kernels import IGNORED_TARGET, selected_logprob
from thor_fast.kernels.selected_logprob_reference import row_logprob_reference
from thor_fast.kernels.selected_logprob_triton import BLOCK, INTERPRETED, row_logprob_triton

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _ieee():
    # The interpreter computes in numpy, which warns about the infinities a GPU just computes with.
    with np.errstate(all="ignore"):
        yield


def test_the_interpreter_is_on():
    assert INTERPRETED


# V: one entry; below, at, and past one block by an odd amount (a masked tail); two blocks and odd.
@pytest.mark.parametrize("vocab", [1, 37, BLOCK, BLOCK + 1, 2 * BLOCK + 13])
@pytest.mark.parametrize(("bias", "temperature"), [(False, 1.0), (True, 0.6)])
def test_agrees_with_float64(make_problem, vocab, bias, temperature):
    p = make_problem(5, vocab, 16, torch.bfloat16, bias=bias, temperature=temperature)
    got = selected_logprob(
        p.hidden,
        p.weight,
        p.targets,
        temperature=temperature,
        bias=p.bias,
        chunk_tokens=3,
        impl="triton",
    )
    error = float((got.double() - p.truth()).abs().max())
    assert error <= 2 * p.torch_error() + 5e-7


@pytest.mark.parametrize("position", ["first", "last"])
def test_target_at_the_edges_of_a_row(position):
    logits = torch.randn(3, BLOCK + 5, generator=torch.Generator().manual_seed(2))
    targets = torch.full((3,), 0 if position == "first" else BLOCK + 4)
    got = row_logprob_triton(logits, targets, None, 1.0)
    torch.testing.assert_close(got, row_logprob_reference(logits, targets, None, 1.0))


def test_special_rows_come_out_as_the_reference_has_them():
    logits = torch.tensor(
        [
            [30.0, 0.0, 0.0],
            [0.0, -1000.0, 500.0],
            [0.0, 100.0, 1.0],
            [0.0, -INF, 0.0],
            [-INF, 2.0, -INF],
            [-INF, -INF, -INF],
            [1.0, INF, 2.0],
            [INF, 1.0, 2.0],
            [1.0, NAN, 2.0],
            [-INF, NAN, 2.0],
            [2.0**20, 2.0**20 + 1, 2.0**20 - 1],
        ]
    )
    targets = torch.zeros(len(logits), dtype=torch.int64)
    got = row_logprob_triton(logits, targets, None, 1.0)
    expected = row_logprob_reference(logits, targets, None, 1.0)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0, equal_nan=True)


def test_minus_inf_in_the_whole_first_block(make_problem):
    # A masked vocabulary: online softmaxes that start from the first block's maximum give NaN here.
    logits = torch.randn(2, BLOCK + 40, generator=torch.Generator().manual_seed(3))
    logits[:, :BLOCK] = -INF
    targets = torch.tensor([BLOCK + 1, 5])
    got = row_logprob_triton(logits, targets, None, 1.0)
    expected = torch.log_softmax(logits, 1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_ignored_and_wrong_targets_read_nothing():
    # Row stride 0 and one element: any read at the target's column would be out of bounds.
    logits = torch.zeros(1, 1).expand(4, 1)
    targets = torch.tensor([IGNORED_TARGET, 2**40, -(2**40), 0])
    got = row_logprob_triton(logits, targets, None, 1.0)
    assert got[0] == 0.0
    assert got.isnan().tolist() == [False, True, True, False]


def test_rows_with_a_stride_and_strided_targets():
    wide = torch.randn(4, 60, generator=torch.Generator().manual_seed(4))
    logits, targets = wide[:, :33], torch.arange(8)[::2]
    got = row_logprob_triton(logits, targets, None, 1.0)
    torch.testing.assert_close(got, row_logprob_reference(logits, targets, None, 1.0))


def test_no_rows():
    empty = torch.empty(0, 8)
    got = selected_logprob(empty, torch.zeros(5, 8), torch.empty(0).long(), impl="triton")
    assert got.shape == (0,)
