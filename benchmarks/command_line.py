"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
from typing import NoReturn

__all__ = ["OneLineParser", "count"]


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Without the usage in front of it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def count(text: str) -> int:
    """The type of an option that says how many."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)
