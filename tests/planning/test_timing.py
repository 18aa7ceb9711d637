"""Step times: bandwidths of real topologies, and optimistic bounds below pessimistic ones."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.model.config import model_config
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.planning.programs import get_topology_devices
from mplug2_jax.planning.timing import (
    MFU_CEILING,
    MFU_TYPICAL,
    Timing,
    bandwidth,
    collective_seconds,
    estimate_timing,
    matmul_passes,
    torus_extents,
)
from mplug2_jax.planning.traffic import Collective
from tests.close import FLOAT64, assert_close
from tests.tpu import topology_mesh


def collective(*axes: str, kind: str = "all-gather", network: str = "ici", group_size: int = 4, **fields) -> Collective:
    values = {"bytes_sent": 1e9, "count": 1, "scope": "f", "shape": "f32[1]", "overlapped": False}
    return Collective(kind=kind, axes=axes, network=network, group_size=group_size, **(values | fields))  # type: ignore[arg-type]


def torus(name: str, slices: int = 1, **axes: int):
    topology = parse_topology(name, slices)
    mesh = MeshConfig(**({"replica": slices, "fsdp": 1} | axes))
    topology_mesh(name, mesh, slices) if not topology.chip.libtpu_variant else None  # skips the test without libtpu
    return topology, make_mesh(mesh, get_topology_devices(topology))


def test_v5p_uses_both_directions_of_every_dimension_that_wraps() -> None:
    topology, mesh = torus("v5p:4x4x4", data=4, fsdp=16)
    assert sorted(torus_extents(("data",), mesh)) == [1, 1, 4]
    assert sorted(torus_extents(("fsdp",), mesh)) == [1, 4, 4]
    assert torus_extents(("data", "fsdp"), mesh) == (4, 4, 4)
    for axes, links in ((("data",), 2), (("fsdp",), 4), (("data", "fsdp"), 6)):
        assert bandwidth(collective(*axes), mesh, topology) == 100e9 * links
    assert bandwidth(collective("fsdp", kind="collective-permute"), mesh, topology) == 100e9


def test_permutes_have_a_latency() -> None:
    topology, mesh = torus("v5p:4x4x4", data=4, fsdp=16)
    permute = collective("fsdp", kind="collective-permute", bytes_sent=1e3, count=1000)
    assert_close(collective_seconds(permute, mesh, topology), 1e6 / 100e9 + 1000 * 5e-6, FLOAT64)
    gather = collective("fsdp", bytes_sent=1e3, count=1000)
    assert_close(collective_seconds(gather, mesh, topology), 1e6 / 400e9, FLOAT64)
    timing = estimate_timing(1e15, 1e9, [permute, gather], mesh, topology)
    assert_close(timing.exposed_seconds, 1e6 / 100e9 + 5e-3 + 1e6 / 400e9, FLOAT64)


@pytest.mark.parametrize(
    ("dtype", "precision", "platform", "passes"),
    [
        ("float32", "highest", "tpu", 6), ("float32", "high", "tpu", 3), ("float32", "default", "tpu", 1),
        ("bfloat16", "highest", "tpu", 1), ("float32", "highest", "gpu", 16), ("float32", "default", "gpu", 2),
        ("float32", "highest", "cpu", 1),
    ],
)  # fmt: skip
def test_float32_matmuls_take_several_passes(dtype: Any, precision: Any, platform: str, passes: int) -> None:
    model = model_config("tiny", dtype=dtype, matmul_precision=precision)
    assert matmul_passes(model, platform) == passes
    topology, mesh = torus("v5p:4x4x4", data=4, fsdp=16)
    one, several = (estimate_timing(1e18, 1e9, [], mesh, topology, count) for count in (1, passes))
    assert several.compute_seconds == passes * one.compute_seconds


def test_half_a_dimension_does_not_wrap() -> None:
    topology, mesh = torus("v5p:4x4x8", data=16, fsdp=4, tensor=2)
    across = torus_extents(("tensor",), mesh)
    assert math.prod(across) == 2
    assert bandwidth(collective("tensor", group_size=2), mesh, topology) == 100e9
    assert bandwidth(collective("data", "fsdp", "tensor"), mesh, topology) == 6 * 100e9


def test_v5e_wraps_in_whole_pods_only() -> None:
    pod, whole = torus("v5e:16x16", data=16, fsdp=16)
    assert bandwidth(collective("fsdp", group_size=16), whole, pod) == 2 * 50e9
    assert bandwidth(collective("data", "fsdp", group_size=256), whole, pod) == 4 * 50e9
    part, smaller = torus("v5e:8x8", data=8, fsdp=8)
    assert bandwidth(collective("fsdp", group_size=8), smaller, part) == 50e9
    assert bandwidth(collective("data", "fsdp", group_size=64), smaller, part) == 2 * 50e9


def test_devices_that_share_a_chip_share_its_links() -> None:
    topology, mesh = torus("tpu7x:2x2x1", fsdp=8)
    assert bandwidth(collective("fsdp", group_size=8), mesh, topology) == 2 * 100e9 / 2
    assert bandwidth(collective("fsdp", kind="collective-permute"), mesh, topology) == 100e9 / 2


def test_slices_communicate_over_dcn() -> None:
    topology, mesh = torus("v5e:2x2", slices=2, fsdp=4)
    assert bandwidth(collective("replica", network="dcn", group_size=2), mesh, topology) == 3.125e9


def test_gpus_use_nvlink_within_a_host_and_the_network_between_hosts() -> None:
    topology = parse_topology("h100:16")
    mesh = make_mesh(MeshConfig(fsdp=8))  # of any devices
    assert bandwidth(collective("fsdp", group_size=8), mesh, topology) == 450e9
    assert bandwidth(collective("fsdp", group_size=16), mesh, topology) == 50e9


seconds = st.floats(0, 1e3)


def timing(compute: float, hbm: float, communication: float, exposed: float) -> Timing:
    return Timing(
        compute_seconds=compute, hbm_seconds=hbm, communication_seconds=communication, exposed_seconds=exposed
    )  # fmt: skip


@given(seconds, seconds, seconds, st.floats(0, 1))
def test_optimistic_is_below_pessimistic(compute: float, hbm: float, sent: float, share: float) -> None:
    times = timing(compute, hbm, sent, sent * share)
    assert max(compute, hbm, sent) <= times.optimistic
    assert times.optimistic <= times.pessimistic * (1 + 1e-9)
    assert times.pessimistic <= compute / MFU_TYPICAL + hbm + sent + 1e-9


collectives = st.builds(dict, bytes_sent=st.floats(0, 1e12), count=st.integers(0, 100), overlapped=st.booleans())


@given(st.lists(collectives, max_size=5), st.floats(0, 1e18), st.floats(0, 1e12))
def test_exposed_communication_is_part_of_communication(values, flops: float, hbm_bytes: float) -> None:
    topology = parse_topology("cpu:8")
    traffic = [collective("fsdp", group_size=8, **fields) for fields in values]
    times = estimate_timing(flops, hbm_bytes, traffic, make_mesh(MeshConfig(fsdp=8)), topology)
    assert 0 <= times.exposed_seconds <= times.communication_seconds
    assert times.communication_seconds == pytest.approx(sum(c.total_bytes for c in traffic) / 10e9)
    overlapped = sum(c.total_bytes for c in traffic if c.overlapped) / 10e9
    difference = times.communication_seconds - times.exposed_seconds
    assert_close(difference, overlapped, FLOAT64, scale=times.communication_seconds)
    assert (times.compute_seconds, times.hbm_seconds) == (flops / 8 / 1e12, hbm_bytes / 50e9)


def test_communication_bounds_the_step_time() -> None:
    """Check that overlap is bounded by compute, whatever the schedule says."""
    times = timing(1.0, 0.5, 10.0, 2.0)
    assert (times.optimistic, times.pessimistic) == (10.0, 10.0)
    assert times.exposed_fraction == 2.0
    busy = timing(17.0, 0.5, 10.0, 2.0)
    assert (busy.optimistic, busy.pessimistic) == (pytest.approx(17 / MFU_CEILING), 17 / MFU_TYPICAL + 2)
    assert timing(0.0, 1.0, 0.0, 0.0).exposed_fraction == math.inf
