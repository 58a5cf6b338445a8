"""What a CUDA graph does to a run, on a CPU: its operations again, on the tensors they had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[[], torch.Tensor]

# A graph cannot wait for the device: what reads a number back to Python is refused there too.
READS_BACK = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"}


class Tape(TorchDispatchMode):
    """``Tape.capture(run)`` runs it twice, as a capture does, and returns what plays it again.

    Python is not run again, and no operation gets other tensors than it had: what a step has to
    fill in place, and did not, shows.
    """

    captured, played = 0, 0

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    @classmethod
    def capture(cls, run: Run) -> Run:
        cls.captured += 1
        run()
        tape = cls()
        with tape:
            output = run()

        def replay() -> torch.Tensor:
            cls.played += 1
            tape.play()
            return output

        return replay

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS_BACK:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def play(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            pairs = zip(_tensors(out), _tensors(again), strict=True)
            for old, new in pairs:
                # Views, and what was written in place, are the old memory already.
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def _tensors(out: Any) -> list[torch.Tensor]:
    items = out if isinstance(out, (tuple, list)) else [out]
    return [item for item in items if isinstance(item, torch.Tensor)]
