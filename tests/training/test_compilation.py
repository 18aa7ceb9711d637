"""The compilation cache: its folder, whatever was compiled before; manifests of executables, damaged ones too."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from data_pipelines.storage.paths import to_path
from mplug2_jax.parallel.cpu_cluster import cpu_fingerprint
from mplug2_jax.training.compilation import (
    MANIFEST,
    aot_cache_miss_reason,
    cache_everything,
    enable_compilation_cache,
    program_fingerprint,
    write_manifest,
)
from mplug2_jax.training.workdir import WorkDir


def lowered(times: int):
    return jax.jit(lambda x: x * times + 1).lower(np.ones(5, np.float32))


def test_everything_compiled_in_the_context_is_cached_and_nothing_after(tmp_path: Path) -> None:
    """JAX has opened another cache for an earlier compilation."""
    before = jax.config.values["jax_compilation_cache_dir"]
    lowered(3).compile()
    with cache_everything(tmp_path):
        lowered(5).compile()
    cached = sorted(path.name for path in tmp_path.glob("*-cache"))
    assert len(cached) == 1
    assert jax.config.values["jax_compilation_cache_dir"] == before
    lowered(7).compile()
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == cached


def test_the_cache_folder_is_the_config_s_or_one_per_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str
) -> None:
    before = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setenv("HOME", str(tmp_path))
    workdir = WorkDir(tmp_path / "run")
    try:
        assert enable_compilation_cache("off", workdir) is None
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "environment"))
        assert enable_compilation_cache("auto", workdir) == tmp_path / "environment"
        assert enable_compilation_cache(str(tmp_path / "own"), workdir) == tmp_path / "own"
        jax.config.update("jax_compilation_cache_dir", None)
        processor = f"cpu-{cpu_fingerprint()}"
        assert enable_compilation_cache("auto", workdir) == tmp_path / ".cache" / "mplug2_jax" / "xla" / processor
        jax.config.update("jax_compilation_cache_dir", None)
        remote = WorkDir(to_path(f"{bucket}/run"))
        assert enable_compilation_cache("auto", remote) == to_path(f"{bucket}/run/compilation-cache/{processor}")
        (tmp_path / "file").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
        jax.config.update("jax_compilation_cache_dir", None)
        assert enable_compilation_cache("auto", workdir) is None
        with pytest.raises(NotADirectoryError):
            enable_compilation_cache(str(tmp_path / "file" / "kept"), workdir)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_the_manifest_says_whether_the_executable_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = program_fingerprint(lowered(3), jax.devices())
    assert fingerprint["devices"] == "8 x cpu"
    with cache_everything(tmp_path):
        assert aot_cache_miss_reason(lowered(3), jax.devices()) is None  # no executable
        write_manifest(tmp_path, fingerprint)
        assert aot_cache_miss_reason(lowered(3), jax.devices()) == ""
        sentence = aot_cache_miss_reason(lowered(5), jax.devices()[:4])
        assert sentence is not None
        assert f"{tmp_path / MANIFEST} was compiled for devices 8 x cpu, here 4 x cpu; program" in sentence
        for broken in ("", "{", "[1]", "null", "3"):
            (tmp_path / MANIFEST).write_text(broken)
            assert aot_cache_miss_reason(lowered(3), jax.devices()) == f"{tmp_path / MANIFEST} is damaged"
