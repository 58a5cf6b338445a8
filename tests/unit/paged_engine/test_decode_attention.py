"""Which attention decodes, and that FlashInfer and FlashAttention are asked what they document.

Neither can run here: fakes with the documented signatures compute in plain torch what the arguments
say. On a GPU tests/unit/test_decode_graphs_gpu.py compares the real ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from thor_fast.engines.decode_attention import GATHER, choose_attention
from thor_fast.engines.model_twin import Heads
from thor_fast.engines.paged_attention import KVPool

SCALE = 0.3


def paged(
    query: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], pages: Any, n: int, scale: float
) -> torch.Tensor:
    """One row: ``query`` [Hq, D] over ``n`` tokens of ``pages`` [B, Hkv, D] each, in float32."""
    keys, values = (part[pages].flatten(0, 1)[:n].float() for part in cache)
    shared = query.float().view(keys.shape[1], -1, query.shape[1])
    weights = torch.einsum("hgd,nhd->hgn", shared, keys).mul(scale).softmax(-1)
    return torch.einsum("hgn,nhd->hgd", weights, values).reshape(query.shape).to(query.dtype)


class FakeWrapper:
    """https://docs.flashinfer.ai/api/decode.html, as far as it says what is computed."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert float_workspace_buffer.numel() == 128 * 1024 * 1024
        assert not float_workspace_buffer.any()
        assert kv_layout == "NHD"
        assert use_cuda_graph
        buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
        assert all(b is not None and b.dtype == torch.int32 for b in buffers)
        self.indptr, self.indices, self.last = buffers
        assert len(self.indptr) == len(self.last) + 1

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        sm_scale: float | None = None,
    ) -> None:
        given = indptr, indices, last_page_len
        assert all(t.dtype == torch.int32 and t.device.type == "cpu" for t in given)
        assert len(last_page_len) == len(self.last)
        assert 1 <= int(last_page_len.min()) <= int(last_page_len.max()) <= page_size
        assert int(indptr[-1]) == len(indices) <= len(self.indices)
        self.indptr.copy_(indptr)
        self.indices[: len(indices)] = indices
        self.last.copy_(last_page_len)
        self.shape, self.page_size = (num_qo_heads, num_kv_heads, head_dim), page_size
        self.dtypes, self.scale = (q_data_type, kv_data_type), sm_scale

    def run(self, q: torch.Tensor, paged_kv_cache: Any) -> torch.Tensor:
        keys, values = paged_kv_cache
        assert q.is_contiguous()
        assert (q.shape[1], *keys.shape[2:]) == self.shape
        assert keys.shape == values.shape
        assert keys.shape[1] == self.page_size
        assert self.dtypes == (q.dtype, keys.dtype)
        rows = []
        for row, last, first, end in zip(q, self.last, self.indptr, self.indptr[1:], strict=False):
            n = (int(end) - int(first) - 1) * self.page_size + int(last)
            pages = self.indices[int(first) : int(end)].long()
            rows.append(paged(row, paged_kv_cache, pages, n, self.scale))
        return torch.stack(rows)


class FakeFlashInfer:
    BatchDecodeWithPagedKVCacheWrapper = FakeWrapper


class FakeFlashAttention:
    """The docstring of flash_attn 2.8's ``flash_attn_with_kvcache``."""

    @staticmethod
    def flash_attn_with_kvcache(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        cache_seqlens: torch.Tensor,
        block_table: torch.Tensor,
        softmax_scale: float,
    ) -> torch.Tensor:
        assert cache_seqlens.dtype == block_table.dtype == torch.int32
        assert block_table.is_contiguous()
        assert k_cache.shape[1] % 256 == 0
        assert q.shape[1] == 1
        rows = zip(q[:, 0], block_table.long(), cache_seqlens.tolist(), strict=True)
        cache = k_cache, v_cache
        out = [paged(row, cache, pages, n, softmax_scale) for row, pages, n in rows]
        return torch.stack(out)[:, None]


MODULES = {"flashinfer": FakeFlashInfer, "flash_attn": FakeFlashAttention}


def heads(dtype: torch.dtype = torch.bfloat16, width: int = 64, **other: Any) -> Heads:
    return Heads(
        torch.zeros(1, 2, 1, width, dtype=dtype), **{"queries": 6, "scale": SCALE, **other}
    )


@pytest.mark.parametrize(
    ("installed", "block_size", "asked", "expected"),
    [
        ({"flashinfer", "flash_attn"}, 16, heads(), "FlashInfer"),
        ({"flashinfer"}, 256, heads(torch.float16, 128), "FlashInfer"),
        ({"flash_attn"}, 16, heads(), "gathered blocks"),
        ({"flash_attn"}, 256, heads(), "FlashAttention"),
        ({"flash_attn"}, 512, heads(torch.float16, 80), "FlashAttention"),
        ({"flashinfer", "flash_attn"}, 512, heads(width=80), "FlashAttention"),
        ({"flashinfer", "flash_attn"}, 256, heads(scale=None), "FlashAttention"),
        ({"flash_attn"}, 384, heads(), "gathered blocks"),
        ({"flash_attn"}, 256, heads(width=288), "gathered blocks"),
        ({"flashinfer", "flash_attn"}, 256, heads(torch.float32), "gathered blocks"),
        (set(), 256, heads(), "gathered blocks"),
    ],
)
def test_the_fastest_that_is_there_and_can_is_chosen(
    installed: set[str], block_size: int, asked: Heads, expected: str
) -> None:
    kind = choose_attention(
        asked, block_size, lambda name: MODULES[name] if name in installed else None
    )
    assert kind.name == expected
    assert kind.by_width == (expected == "gathered blocks")


def test_what_cannot_be_imported_is_not_there() -> None:
    """By the real import: neither is installed where there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("this machine may have them")
    assert choose_attention(heads(), 256) is GATHER


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("module", "size"), [("flashinfer", 4), ("flashinfer", 16), ("flash_attn", 256)]
)
def test_the_kernels_are_asked_for_what_the_gather_computes(
    module: str, size: int, dtype: torch.dtype
) -> None:
    """Full, nearly full and fresh last pages, one token, rows that pad; step after step."""
    rows, width, layers, shape = 5, 4, 2, heads(dtype)
    generator = torch.Generator().manual_seed(0)
    pool = KVPool(24, size, layers, shape.keys)
    pool._kv.copy_(torch.randn(pool._kv.shape, generator=generator))
    load = {module: MODULES[module]}.get
    kernel = choose_attention(shape, size, load).build(pool, rows, width)
    gather = GATHER.build(pool, rows, width)
    order = np.random.default_rng(0)
    for lengths in (
        [1, size, size + 1, 4 * size, 3 * size - 1],
        [2 * size, 1, 1, 1, 1],
        [size - 1, 2, 2 * size + 1, size + 2, 4 * size - 1],
    ):
        table = np.stack([order.permutation(24)[:width] for _ in range(rows)])
        for attention in (kernel, gather):
            attention.plan(np.array(lengths), table)
        query = torch.randn(6, rows, 64, generator=generator).to(dtype).transpose(0, 1)
        for layer in range(layers):
            got, expected = (a.attend(layer, query, SCALE) for a in (kernel, gather))
            assert got.shape == query.shape
            assert got.dtype == dtype
            # Torch rounds weights and results to the dtype, the fakes only results.
            bound = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(got, expected, atol=bound, rtol=bound)
