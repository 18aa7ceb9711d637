"""Compiled programs that outlive their process: the compilation cache, and executables compiled ahead of time."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from data_pipelines.storage.file_system import write_atomically
from data_pipelines.storage.paths import RemotePath, to_path
from mplug2_jax.parallel.cpu_cluster import cpu_fingerprint
from mplug2_jax.training.workdir import WorkDir

_MIN_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
DEFAULT_CACHE_DIR = Path("~/.cache/mplug2_jax/xla")

# Overlap collectives with matmuls: all-gathers run piecewise during them, and reductions on the sparse cores, where a
# chip has any. The flags also turn gradient sums into true reduce-scatters: by default most gradients are summed whole
# on every device and sliced afterwards, which sends twice as much.
_TPU_OPTIONS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
}

# Without fusions of the library YNN: for each of them loading a cached program searches the whole program, which takes
# longer than everything else that a restart does.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
_OPTIONS: Mapping[str, Mapping[str, bool | float | str]] = {"tpu": _TPU_OPTIONS, "cpu": _CPU_OPTIONS}


def compiler_options(platform: str) -> dict[str, bool | float | str]:
    """Return XLA's options for a step on a kind of device: "tpu", "gpu" or "cpu"."""
    return dict(_OPTIONS.get(platform, {}))


def enable_compilation_cache(setting: str, workdir: WorkDir) -> Path | None:
    """Cache compiled programs in a folder, so that a restart does not compile them again.

    Small programs are cached too: a restart has some dozens, as the checksums of the restored arrays.

    Args:
        setting: ``config.compilation_cache``: a folder, "off", or "auto". With a work directory in a bucket "auto" is
            there, because the disks of its machines come and go. On CPUs it is one folder per kind of processor: in a
            shared home directory one machine would load machine code for another.
        workdir: of the run.

    Returns:
        The folder; None without a cache.

    Raises:
        OSError: a folder that the config names cannot be created.
    """
    if setting == "off":
        return None
    if _MIN_SECONDS not in os.environ:
        jax.config.update(_MIN_SECONDS.lower(), 0)
    configured = jax.config.values["jax_compilation_cache_dir"]  # by the environment
    if setting == "auto" and configured:
        return to_path(configured)
    default = workdir.compilation_cache if isinstance(workdir.path, RemotePath) else DEFAULT_CACHE_DIR
    if jax.default_backend() == "cpu":
        default /= f"cpu-{cpu_fingerprint()}"
    folder = (default if setting == "auto" else to_path(setting)).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        if setting == "auto":  # a home directory that is not writable, as in containers
            return None
        raise
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()  # JAX reads the setting only once
    return folder


MANIFEST = "executable.json"
"""The file next to executables of ``mplug2 plan --save-executable`` that says what they were compiled from and for."""


def program_fingerprint(lowered: Any, devices: Sequence[Any]) -> dict[str, str]:
    """Return what identifies a program and its machine; equal fingerprints compile to the same executable."""
    digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        **{name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
        "program": digest[:16],
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def write_manifest(folder: Path, fingerprint: dict[str, str]) -> None:
    """Write the manifest of the executables in a folder, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(str(folder / MANIFEST), f"{json.dumps(fingerprint, indent=1)}\n".encode())


def aot_cache_miss_reason(lowered: Any, devices: Sequence[Any]) -> str | None:
    """Return why the executable in the compilation cache, compiled ahead of time, cannot be used here.

    Empty if it can be used, None if there is none; only if there is one is the program hashed.
    """
    folder = jax.config.values["jax_compilation_cache_dir"]
    path = to_path(folder) / MANIFEST if folder else None
    if path is None or not path.is_file():
        return None
    try:
        stored = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        return f"{path} is damaged"
    current = program_fingerprint(lowered, devices)
    changes = [f"{key} {stored.get(key)}, here {value}" for key, value in current.items() if stored.get(key) != value]
    return f"{path} was compiled for {'; '.join(changes)}" if changes else ""


def cache_everything(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Return a context that caches all compiled programs in a folder, however small and fast to compile."""
    return _cache_settings(
        jax_compilation_cache_dir=str(folder),
        jax_enable_compilation_cache=True,
        jax_persistent_cache_min_compile_time_secs=0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    )


def disable_cache() -> contextlib.AbstractContextManager[None]:
    """Return a context that compiles without the cache."""
    return _cache_settings(jax_enable_compilation_cache=False)


@contextlib.contextmanager
def _cache_settings(**settings: Any) -> Iterator[None]:
    previous = {name: jax.config.values[name] for name in settings}

    def apply(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX reads the settings only once

    try:
        apply(settings)
        yield
    finally:
        apply(previous)
