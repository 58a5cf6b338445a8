"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from report import first_line

from thor_fast.errors import ThorError

__all__ = ["OneLineParser", "count", "exit_status"]


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Without the usage in front of it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def exit_status(program: str, run: Callable[[], int]) -> int:
    """What ``run`` returns, or 2 for what cannot work, 130 when interrupted: told in one line."""
    try:
        return run()
    except ThorError as error:
        print(f"{program}: error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def count(text: str) -> int:
    """The type of an option that says how many."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)
