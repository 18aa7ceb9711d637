"""Clusters of CPUs: processes that simulate hosts read one cache of compiled programs."""

import contextlib
import functools
import hashlib
import platform
from pathlib import Path
from typing import Any

from jax._src import cache_key


@functools.cache
def cpu_fingerprint() -> str:
    """Return a hash of this machine's kind of processor: its architecture and instruction sets."""
    facts = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        facts += sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def share_cached_programs() -> None:
    """Let every process of a CPU cluster read the programs that process 0 caches.

    JAX's cache key contains a fingerprint of the topology. On CPUs it differs between processes, and only process 0
    writes the cache, so the others would compile every program at every start. The key contains the kind of processor
    and of every device instead. No public setting of JAX does this; if a later version ignores this one, processes
    compile as before.
    """
    cache_key._hash_accelerator_config = _hash_cpu_cluster


def _hash_cpu_cluster(hash_obj: Any, accelerators: Any) -> None:
    hash_obj.update(cpu_fingerprint().encode())
    for device in accelerators.flat:
        hash_obj.update(device.device_kind.encode())
