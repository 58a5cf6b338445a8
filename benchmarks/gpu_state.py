"""What nvidia-smi says of the GPU: a rate means little without the clocks it was measured at."""

from __future__ import annotations

import subprocess

__all__ = ["gpu_state"]

_FIELDS = {
    "name": "name",
    "driver_version": "driver",
    "clocks.sm": "sm_clock_mhz",
    "clocks.max.sm": "most_sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "memory.total": "memory_mib",
}


def gpu_state() -> dict[str, str] | None:
    """Of the first GPU, as text; ``None`` where there is no nvidia-smi that answers."""
    query = f"--query-gpu={','.join(_FIELDS)}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    values = run.stdout.strip().split(", ")
    return dict(zip(_FIELDS.values(), values, strict=False))
