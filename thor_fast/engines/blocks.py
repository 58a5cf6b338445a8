"""Who holds which block of the KV pool: reference counts and the prefix cache. No torch here.

A block is a fixed number of token positions, named by its index. It is in one of three states::

    free --- take ---> held by one or more --- last give_back, without a key ---> free
                         |            ^
    last give_back,      v            | share, once found by its key
    with a key:        cached --------+
                         +------- take, the longest unused first, if none is free ---> held

A *key* names the content of a full block: a digest of the previous block's key and of its own
token ids, down to a root that differs from one version of the weights to the next. Blocks with
equal keys hold equal KV, so a new sequence takes over the longest chain of keys it shares with an
old one. A block may be written only while it has one holder and no key.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from thor_fast.errors import EngineError

__all__ = ["BlockPool", "chain_key", "root_key"]

# 128 bits: two different prefixes share a key once in 2**64 blocks.
_KEY_BYTES = 16


def root_key(version: int) -> bytes:
    """What the chains of one version of the weights start from."""
    return hashlib.blake2b(b"weights %d" % version, digest_size=_KEY_BYTES).digest()


def chain_key(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a block with ``token_ids`` that follows the block (or root) of ``previous``."""
    content = previous + array("q", token_ids).tobytes()
    return hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()


class BlockPool:
    """``size`` blocks. Raises ``EngineError`` for every operation its states do not allow."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._holders = [0] * size
        # The lowest first: a sequence that grows alone lies in one piece.
        self._free = list(range(size))[::-1]
        self._by_key: dict[bytes, int] = {}
        self._keys: list[bytes | None] = [None] * size
        self._cached: OrderedDict[int, None] = OrderedDict()  # the longest unused first

    @property
    def available(self) -> int:
        """How many blocks :meth:`take` can give: the free ones and the cached ones."""
        return len(self._free) + len(self._cached)

    def holders(self, block: int) -> int:
        return self._holders[block]

    def take(self) -> int:
        """A block of unknown content for one holder; the longest unused cached one if none is free.

        Raises ``EngineError`` if every block is held.
        """
        if self._free:
            block = self._free.pop()
        elif self._cached:
            self.forget_key(next(iter(self._cached)))
            block = self._free.pop()
        else:
            raise EngineError(f"all {self.size} KV blocks are held, expected one to take")
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One holder more, of a block that is held or cached."""
        if self._holders[block] == 0:
            if block not in self._cached:
                raise EngineError(f"KV block {block} is free, expected one that is held or cached")
            del self._cached[block]
        self._holders[block] += 1

    def give_back(self, block: int) -> None:
        """One holder less; without any, a block with a key is cached and another is free."""
        if self._holders[block] == 0:
            raise EngineError(f"KV block {block} has no holder, expected at least one")
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def find(self, key: bytes) -> int | None:
        """The block with that content, held or cached."""
        return self._by_key.get(key)

    def set_key(self, block: int, key: bytes) -> None:
        """Name the content of a held block that is full. The first block of a key keeps it."""
        if self._holders[block] == 0 or self._keys[block] is not None:
            raise EngineError(
                f"KV block {block} has {self._holders[block]} holders and "
                f"{'no' if self._keys[block] is None else 'a'} key, expected a holder and no key"
            )
        if key not in self._by_key:
            self._by_key[key] = block
            self._keys[block] = key

    def forget_key(self, block: int) -> None:
        """The content is about to change, or not to be found again."""
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None
            if self._holders[block] == 0:
                del self._cached[block]
                self._free.append(block)
