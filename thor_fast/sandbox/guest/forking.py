"""A fork that the code which runs here does not notice: random numbers go on where they were.

Loaded from its file inside the guest interpreter: the standard library only.
"""

from __future__ import annotations

import posix  # not os: what a block has replaced there is not what we call
import random

unnoticed = False
"""True while such a fork is made, for hooks that would otherwise give the child its own numbers."""


def fork_unnoticed() -> int:
    """As ``os.fork``."""
    global unnoticed
    state = random._inst.getstate()  # noqa: SLF001
    unnoticed = True
    try:
        pid = posix.fork()
    finally:
        unnoticed = False
    if pid == 0:
        random._inst.setstate(state)  # noqa: SLF001
    return pid
