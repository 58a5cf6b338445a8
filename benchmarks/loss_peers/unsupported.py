"""Why a peer that is installed takes no part."""

from __future__ import annotations

__all__ = ["Unsupported"]


class Unsupported(Exception):  # noqa: N818 - an answer, not an error
    """The message says what the peer needs."""
