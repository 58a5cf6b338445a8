"""Public face of the kernels: fused operations on torch tensors, each with a plain-torch twin.

Importing this package loads torch; Triton is loaded by the first call that runs a Triton kernel.
The sources are the repository's ``kernels/``, which knows nothing of thor_fast.
"""

from __future__ import annotations

from thor_fast.kernels.selected_logprob import IGNORED_TARGET, selected_logprob

__all__ = ["IGNORED_TARGET", "selected_logprob"]
