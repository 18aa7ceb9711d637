"""Requests of profiles in a bucket: found, removed, asked for seldom, and never waited for."""

from pathlib import Path

import pytest

from data_pipelines.storage.paths import to_path
from mplug2_jax.training.config import ProfileConfig
from mplug2_jax.training.telemetry import profiling
from mplug2_jax.training.telemetry.events import EventLog
from tests import fault_proxy


def test_a_request_in_a_bucket_costs_steps_next_to_nothing(
    bucket: str, proxy: fault_proxy.FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = to_path(f"{bucket}/run")
    profiler = profiling.Profiler(workdir, ProfileConfig(), EventLog())
    (workdir / "profile").write_bytes(b"")
    assert profiler._is_requested()
    assert not (workdir / "profile").exists()
    asked = len(proxy.requests)
    assert not any(profiler._is_requested() for _ in range(100))
    assert len(proxy.requests) == asked
    monkeypatch.setattr(profiling, "_POLL_SECONDS", 0.0)
    profiler = profiling.Profiler(workdir, ProfileConfig(), EventLog())
    with proxy.fault("unavailable"):
        assert not profiler._is_requested()
    (workdir / "profile").write_bytes(b"")
    assert profiler._is_requested()


def test_a_request_on_a_disk_is_found_at_the_next_step(tmp_path: Path) -> None:
    profiler = profiling.Profiler(tmp_path, ProfileConfig(), EventLog())
    assert not profiler._is_requested()
    (tmp_path / "profile").touch()
    assert profiler._is_requested()
    assert not (tmp_path / "profile").exists()
