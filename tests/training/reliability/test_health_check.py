"""The check before the first step names a broken device or link."""

import jax
import jax.numpy as jnp
import pytest

from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.training.reliability import health_check
from mplug2_jax.training.reliability.health_check import DeviceResult, check_devices, find_fault
from mplug2_jax.training.reliability.sdc_check import CorruptionError

NAMES, GOOD = ["a", "b", "c", "d"], DeviceResult(2**30 + 1, 2**30 + 1, 4)


def test_good_devices_pass_on_any_mesh(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="absl")
    check_devices(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    check_devices(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    assert "8 devices and their links passed" in caplog.text
    assert "1 devices and their links passed" in caplog.text


def test_a_device_that_computes_other_bits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = health_check._product_checksum
    monkeypatch.setattr(
        health_check, "_product_checksum", lambda x: right(x) + (jax.lax.axis_index("devices") == 5).astype(jnp.uint32)
    )
    with pytest.raises(CorruptionError, match=rf"{jax.devices()[5]} computed another matrix product than the others:"):
        check_devices(make_mesh(MeshConfig(fsdp=8)))


@pytest.mark.parametrize(
    ("device", "changes", "fault"),
    [
        (0, {}, ""),
        (2, {"product": 1}, "c computed another matrix product than the others"),
        (0, {"received": 1}, "a received other bits than d sent"),
        (3, {"received": 1}, "d received other bits than c sent"),
        (1, {"total": 5}, "b got a wrong sum over all devices"),
    ],
)
def test_faults_are_named(device: int, changes: dict[str, int], fault: str) -> None:
    results = [GOOD._replace(**changes) if i == device else GOOD for i in range(4)]
    assert find_fault(NAMES, results) == fault


def test_two_devices_that_differ_cannot_tell_which_is_broken() -> None:
    pair = [GOOD, GOOD._replace(product=3)]
    assert find_fault(NAMES[:2], pair) == "a, b computed another matrix product than the others (one of these)"
