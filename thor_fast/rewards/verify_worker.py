"""The process that does algebra on what a model wrote; ``grader_process.py`` starts and kills it.

Nobody imports this module: it loads sympy. Protocol, JSON lines: ``true`` once when ready; then for
each request ``{"id", "reference", "answer"}`` one reply ``{"id", "equal", "reason"}``, ``equal``
null with the reason where nothing can be said.

Texts go to math-verify's LaTeX grammar, which builds sympy objects; sympy's own string parser,
which evaluates Python, is never called.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import select
import sys
import threading
from typing import Any

from latex2sympy2_extended.latex2sympy2 import (  # type: ignore[import-untyped]
    latex2sympy,
    normalize_latex,
)
from math_verify import LatexExtractionConfig, verify  # type: ignore[import-untyped]
from math_verify.grader import should_treat_as_complex  # type: ignore[import-untyped]

_NORMALISATION = LatexExtractionConfig().normalization_config
# As Python and sympy print them; the grammar would read a product of letters.
_NAME = r"(pi|sin|cos|tan|ln|log)"
_NAMES = re.compile(rf"\\(?:operatorname|mathrm)\{{{_NAME}\}}|(?<![A-Za-z\\]){_NAME}(?![A-Za-z])")
# Simplified in vain: loads and builds what is slow the first time, before a deadline runs.
_WARM_UP = {"reference": r"\sqrt{2}", "answer": "1.4"}


def main(timeout_s: float, memory_bytes: int) -> None:
    """Answer requests until the other end of stdin is closed."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    logging.disable()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    _reply({"id": 0, **_WARM_UP})
    replies.write("true\n")
    for line in sys.stdin:
        _limit_cpu(timeout_s)
        replies.write(json.dumps(_reply(json.loads(line))) + "\n")


def _reply(request: dict[str, Any]) -> dict[str, Any]:
    equal, reason = None, ""
    texts = [request["reference"], request["answer"]]
    try:
        # One choice for both: a real x and a complex x are two symbols.
        is_real = not any(map(should_treat_as_complex, texts))
        reference, answer = (_expression(text, is_real) for text in texts)
        if reference is None:
            reason = "reference"
        else:
            # The reference comes first: verify follows its form.
            equal = answer is not None and verify(
                reference,
                answer,
                allow_set_relation_comp=True,
                timeout_seconds=None,  # it would be SIGALRM
                raise_on_error=True,
            )
    except MemoryError:
        raise  # a heap at its limit is no place to go on
    except Exception as error:  # noqa: BLE001 - anything: it is sympy on arbitrary input
        reason = type(error).__name__
    return {"id": request["id"], "equal": equal, "reason": reason}


def _expression(text: str, is_real: bool) -> Any:
    """The sympy object a text stands for; ``None`` if the grammar does not know it."""
    text = _NAMES.sub(lambda name: f"\\{name[1] or name[2]} ", text.replace("**", "^"))
    latex = normalize_latex(text, _NORMALISATION)
    try:
        return latex2sympy(latex, is_real=is_real, convert_degrees=False, normalization_config=None)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001 - the grammar raises bare Exception for a syntax error
        return None


def _limit_cpu(timeout_s: float) -> None:
    """The kernel ends us where the parent cannot any more, even in C code that holds the GIL."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + timeout_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _end_with_parent() -> None:
    poll = select.poll()
    poll.register(0, 0)  # asks for nothing: only a hang-up is reported
    poll.poll()
    os._exit(0)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
