"""The environment of real processes."""

import os
from pathlib import Path


def environment(folder: Path, devices: int) -> dict[str, str]:
    """Return an environment with simulated CPU devices, whose processes share compiled programs."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
