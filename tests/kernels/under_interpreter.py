"""What the files that run under Triton's interpreter have in common."""

from __future__ import annotations

import pytest

from thor_fast.kernels.hierarchical_grpo_triton import BLOCK

# Triton 3.6's interpreter takes scalars out of arrays in a way that numpy 2.3 warns of.
SCALARS_OF_ARRAYS = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
# Nothing but logits; and all that a head may do to them.
HEADS = [{}, {"bias": True, "logit_scale": -0.7, "softcap": 5.0}]
# One entry; below, at, and past one block by an odd amount (a masked tail); two blocks and odd.
VOCABS = [1, 37, BLOCK, BLOCK + 1, 2 * BLOCK + 13]
TRUNCATED = 2.0**-7  # bfloat16 has 8 bits, and the interpreter drops the rest
