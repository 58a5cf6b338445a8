"""What the tests of vLLM share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module")
def vllm_environment():
    """Variables that vLLM and the processes it starts read: quiet, offline, one thread."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }.items():
            patch.setenv(name, value)
        yield
        # vLLM leaves a ZeroMQ context open; found at exit, that would be an error.
        gc.collect()
