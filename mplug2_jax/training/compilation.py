"""Compiled programs that outlive their process."""

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from data_pipelines.sources.files import write_atomically

DEFAULT_CACHE_DIR = Path("~/.cache/mplug2_jax/xla")

# What hides collectives behind matmuls: gathers run piecewise beside them, and reductions on the sparse cores, where a
# chip has any. These also become true reduce-scatters that way: left alone, most gradients are summed whole on every
# device and cut afterwards, which sends twice as much.
_TPU = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
}


def compiler_options(kind: str) -> dict[str, bool | float] | None:
    """What XLA is told when it compiles a step for a kind of device: "tpu", "gpu" or "cpu"."""
    return dict(_TPU) if kind == "tpu" else None


def enable_compilation_cache(where: str) -> Path | None:
    """Keeps compiled programs in a folder, so that a restart does not compile again.

    Args:
        where: the config's ``compilation_cache``: a folder, "off", or "auto". On CPUs "auto" has a folder for each kind
            of processor: a home that several machines share would hand one the machine code of another.

    Returns:
        The folder, if programs are kept.

    Raises:
        OSError: a folder that was asked for cannot be made.
    """
    if where == "off":
        return None
    chosen = jax.config.values["jax_compilation_cache_dir"]  # by the environment
    if where == "auto" and chosen:
        return Path(chosen)
    automatic = DEFAULT_CACHE_DIR / f"cpu-{cpu_fingerprint()}" if jax.default_backend() == "cpu" else DEFAULT_CACHE_DIR
    folder = (automatic if where == "auto" else Path(where)).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        if where == "auto":  # a home that cannot be written, as in containers
            return None
        raise
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()  # JAX asks where it is once
    return folder


def cpu_fingerprint() -> str:
    """Return a digest of this machine's kind of processor: its architecture, and all that it can do."""
    told = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told += sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


MANIFEST = "executable.json"
"""Beside compiled programs that ``mplug2 plan --save-executable`` made: of what, and for which machine."""


def program_fingerprint(lowered: Any, devices: Sequence[Any]) -> dict[str, str]:
    """A program and its machine; two that agree in all of it compile to the same executable."""
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


def write_manifest(folder: Path, described: dict[str, str]) -> None:
    """Writes it, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(str(folder / MANIFEST), f"{json.dumps(described, indent=1)}\n".encode())


def aot_cache_miss_reason(lowered: Any, devices: Sequence[Any]) -> str | None:
    """Why the program that was compiled ahead cannot be used here; empty if it can, None if there is none.

    Looks in the folder where compiled programs are kept; only where it finds one is the program written out.
    """
    folder = jax.config.values["jax_compilation_cache_dir"]
    path = Path(folder) / MANIFEST if folder else None
    if path is None or not path.is_file():
        return None
    try:
        kept = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        return f"{path} cannot be read"
    here = program_fingerprint(lowered, devices)
    differ = [f"{key} {kept.get(key)}, here {value}" for key, value in here.items() if kept.get(key) != value]
    return f"{path} is of another: {'; '.join(differ)}" if differ else ""


def cache_everything(folder: Path) -> AbstractContextManager[None]:
    """Compiled programs are kept in a folder, however small and fast to compile they are."""
    return _cache_settings(
        jax_compilation_cache_dir=str(folder),
        jax_enable_compilation_cache=True,
        jax_persistent_cache_min_compile_time_secs=0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    )


def disable_cache() -> AbstractContextManager[None]:
    """Programs are compiled anew."""
    return _cache_settings(jax_enable_compilation_cache=False)


@contextmanager
def _cache_settings(**settings: Any) -> Iterator[None]:
    before = {name: jax.config.values[name] for name in settings}

    def apply(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX asks for its settings once

    try:
        apply(settings)
        yield
    finally:
        apply(before)
