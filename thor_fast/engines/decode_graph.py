"""Steps that only decode, replayed as CUDA graphs: one launch instead of one per operation.

A graph has fixed shapes, so there is one per *bucket*: rows, and blocks per row, each rounded up
to a power of two. A bucket is captured when a step first needs it, after a run to warm up; every
step fills the bucket's tensors and replays it::

    chunks -> bucket -- known ------------------------------> fill -> replay -> logits
                 |                                              ^
                 +-- new --> StaticStep, fill, run, capture ----+
                                             | fails
                                             v
              with the gather, if it was another attention; else PagedStep from then on

Nothing but :class:`CudaCapture` needs a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch

from thor_fast.engines.decode_attention import GATHER, AttentionKind, choose_attention
from thor_fast.engines.model_twin import Heads, Step
from thor_fast.engines.paged_attention import Chunk, KVPool, PagedStep
from thor_fast.engines.static_step import StaticStep

__all__ = ["CudaCapture", "DecodeGraphs", "decode_graphs"]

_Forward = Callable[[Step], torch.Tensor]
_Run = Callable[[], torch.Tensor]


def decode_graphs(
    pool: KVPool, heads: Heads, *, max_rows: int, max_blocks: int
) -> DecodeGraphs | None:
    """``None`` off a GPU: elsewhere padding costs, and launches do not."""
    if pool.device.type != "cuda":
        return None
    kind = choose_attention(heads, pool.block_size)
    capture = partial(CudaCapture, pool.device)
    return DecodeGraphs(pool, kind, capture, max_rows=max_rows, max_blocks=max_blocks)


class CudaCapture:
    """Turns runs over fixed tensors into graphs that share one pool of memory.

    They may: graphs run one after the other, and an output is read before the next one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, run: _Run) -> _Run:
        """Run once, capture, and return what replays ``run`` into the same output."""
        with torch.cuda.device(self._stream.device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                run()  # libraries set themselves up, kernels are compiled
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Thread-local: a trainer may allocate on another thread meanwhile.
            with torch.cuda.graph(
                graph,
                pool=self._memory,
                stream=self._stream,
                capture_error_mode="thread_local",
            ):
                output = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


class DecodeGraphs:
    """The graphs of one engine, by bucket; used on its thread only.

    ``new_capture`` makes what captures, anew after each :meth:`drop`.
    """

    def __init__(
        self,
        pool: KVPool,
        kind: AttentionKind,
        new_capture: Callable[[], Callable[[_Run], _Run]],
        *,
        max_rows: int,
        max_blocks: int,
    ) -> None:
        self._pool, self._kind = pool, kind
        self._max_rows, self._max_blocks = max_rows, max_blocks
        self._new_capture, self._capture = new_capture, new_capture()
        self._buckets: dict[tuple[int, int], tuple[StaticStep, _Run]] = {}
        self._given_up = False

    def drop(self) -> None:
        """Forget all graphs: they read weights where those lay when they were captured."""
        self._buckets.clear()
        self._capture = self._new_capture()

    def logits(self, forward: _Forward, chunks: Sequence[Chunk]) -> torch.Tensor:
        """[n, V] for ``chunks`` of one token each, valid until the next call.

        ``forward`` is the same from one :meth:`drop` to the next.
        """
        while not self._given_up:
            shape = self._bucket(chunks)
            if shape in self._buckets or self._add(shape, forward, chunks):
                step, replay = self._buckets[shape]
                step.fill(chunks)
                return replay()[: len(chunks)]
        return forward(PagedStep(self._pool, chunks))

    def _bucket(self, chunks: Sequence[Chunk]) -> tuple[int, int]:
        rows = _round_up(len(chunks), self._max_rows)
        if not self._kind.by_width:
            return rows, self._max_blocks
        longest = max(chunk.start for chunk in chunks)
        return rows, _round_up(longest // self._pool.block_size + 1, self._max_blocks)

    def _add(self, shape: tuple[int, int], forward: _Forward, chunks: Sequence[Chunk]) -> bool:
        """Capture a bucket; where that fails, False, and another way from now on."""
        try:
            step = StaticStep(self._pool, *shape, self._kind.build(self._pool, *shape))
            step.fill(chunks)
            self._buckets[shape] = step, self._capture(partial(forward, step))
        except Exception as error:  # noqa: BLE001 - a step need not be captured to be run
            without = "CUDA graphs" if self._kind is GATHER else self._kind.name
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            self._given_up, self._kind = self._kind is GATHER, GATHER
            self.drop()
            message = f"the engine decodes without {without}, which failed: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return False
        return True


def _round_up(n: int, most: int) -> int:
    """The power of two from ``n`` on, ``most`` at most."""
    return min(1 << (n - 1).bit_length(), most)
