"""Processes of a CPU cluster find each other's compiled programs."""

import subprocess
import sys
from pathlib import Path

import pytest

from mplug2_jax.launch.local import find_free_port, process_environment
from tests.launch.processes import environment

PROGRAM = """
import jax
from jax.experimental import multihost_utils
from mplug2_jax.parallel.processes import initialize_distributed

counts = {"cache_hits": 0, "cache_misses": 0}

def count(event, **_):
    name = event.rpartition("/")[2]
    if name in counts:
        counts[name] += 1

jax.monitoring.register_event_listener(count)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
initialize_distributed()
print(multihost_utils.process_allgather(jax.process_index()).tolist(), counts)
"""


@pytest.mark.slow
def test_every_process_reads_what_the_first_one_cached(tmp_path: Path) -> None:
    """JAX counts a miss only where it writes the cache."""

    def outputs() -> list[str]:
        address = f"127.0.0.1:{find_free_port()}"
        running = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True,
                env=environment(tmp_path, 1) | process_environment(index, 2, 1, address),
            )
            for index in range(2)
        ]  # fmt: skip
        return [process.communicate(timeout=120)[0].splitlines()[-1] for process in running]

    outputs()
    first, second = outputs()
    assert first == second
    assert first.startswith("[0, 1] ")
    assert "'cache_misses': 0" in first
    assert "'cache_hits': 0" not in first
