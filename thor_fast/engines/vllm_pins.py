"""KV of paused sequences, held in vLLM's block pool until somebody needs the room.

The scheduler's half of :mod:`thor_fast.engines.vllm_connector`, without vLLM in it. A pin holds one
reference to each block of a finished request, the partly filled last one included. It is soft: as
soon as a request would have to wait or be preempted for lack of blocks, those that a request has
been resumed from give way, then the least recently used, and nothing but a prefill is lost with
them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["BlockPool", "Pin", "PinTable"]


class BlockPool(Protocol):
    """What is used of vLLM's ``v1/core/block_pool.py``; blocks are passed through unseen."""

    def touch(self, blocks: Sequence[Any]) -> None:
        """One more reference to each."""
        ...

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """One reference less; without any, the first of them are evicted first."""
        ...

    def get_num_free_blocks(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Pin:
    """``tokens[i]`` has its KV in ``blocks[i // block_size]``, under the weights of ``salt``."""

    tokens: tuple[int, ...]
    blocks: tuple[Any, ...]
    salt: str | None

    def shared(self, tokens: Sequence[int], salt: str | None) -> int:
        """How many leading ``tokens`` have their KV here; none under other weights.

        Never all of them: the logits after the last one are not kept.
        """
        if salt != self.salt:
            return 0
        n = min(len(self.tokens), len(tokens) - 1)
        # A resumed sequence extends what it had: one comparison in C settles nearly every call.
        if self.tokens[:n] == tuple(tokens[:n]):
            return n
        return next(i for i in range(n) if self.tokens[i] != tokens[i])


class PinTable:
    """Pins by name, in the order in which they give way."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._pins: OrderedDict[str, Pin] = OrderedDict()
        self._spent: set[str] = set()

    def __len__(self) -> int:
        return len(self._pins)

    def add(self, name: str, pin: Pin) -> None:
        """Hold the blocks of ``pin``; one of the same name is dropped."""
        # Before the old one goes: blocks that both hold must not become free in between.
        self._pool.touch(pin.blocks)
        self.drop([name])
        self._pins[name] = pin

    def use(self, name: str) -> Pin | None:
        """The pin of that name, from now on the most recently used."""
        if name in self._pins:
            self._pins.move_to_end(name)
            self._spent.discard(name)
        return self._pins.get(name)

    def spend(self, name: str) -> None:
        """Let that pin give way before all others: what it holds has been taken over."""
        if name in self._pins:
            self._pins.move_to_end(name, last=False)
            self._spent.add(name)

    def drop(self, names: Iterable[str]) -> None:
        """Give the blocks of these pins back; unknown names are ignored."""
        for name in names:
            pin = self._pins.pop(name, None)
            self._spent.discard(name)
            if pin is not None:
                # As vLLM frees a request: the tail is evicted before what it stands on.
                self._pool.free_blocks(reversed(pin.blocks))

    def clear(self) -> None:
        self.drop(list(self._pins))

    def make_room(
        self, n_blocks: int, *, keep: Collection[str] = (), only_spent: bool = False
    ) -> bool:
        """Drop pins outside ``keep``, spent and old ones first, until ``n_blocks`` are free.

        Whether any was dropped.
        """
        n_before = len(self._pins)
        among = [name for name in self._pins if name in self._spent or not only_spent]
        for name in [name for name in among if name not in keep]:
            if self._pool.get_num_free_blocks() >= n_blocks:
                break
            self.drop([name])
        return len(self._pins) < n_before
