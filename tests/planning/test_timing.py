"""Times by hand: bandwidths on real topologies, and floors that are no ceilings."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.planning.programs import get_topology_devices
from mplug2_jax.planning.timing import BEST, ORDINARY, Timing, bandwidth, extents, timing
from mplug2_jax.planning.traffic import Collective
from tests.close import FLOAT64, assert_close
from tests.tpu import topology_mesh


def collective(*axes: str, kind: str = "all-gather", network: str = "ici", size: int = 4, **fields) -> Collective:
    values = {"bytes": 1e9, "times": 1, "name": "f", "shape": "f32[1]", "overlapped": False}
    return Collective(kind=kind, axes=axes, network=network, size=size, **(values | fields))  # type: ignore[arg-type]


def torus(name: str, slices: int = 1, **axes: int):
    topology = parse_topology(name, slices)
    mesh = MeshConfig(**({"replica": slices, "fsdp": 1} | axes))
    topology_mesh(name, mesh, slices) if not topology.chip.libtpu_variant else None  # skips where there is no libtpu
    return topology, make_mesh(mesh, get_topology_devices(topology))


def test_v5p_uses_both_directions_of_every_dimension_that_closes() -> None:
    topology, mesh = torus("v5p:4x4x4", data=4, fsdp=16)
    assert sorted(extents(("data",), mesh)) == [1, 1, 4]
    assert sorted(extents(("fsdp",), mesh)) == [1, 4, 4]
    assert extents(("data", "fsdp"), mesh) == (4, 4, 4)
    for axes, links in ((("data",), 2), (("fsdp",), 4), (("data", "fsdp"), 6)):
        assert bandwidth(collective(*axes), mesh, topology) == 100e9 * links
    assert bandwidth(collective("fsdp", kind="collective-permute"), mesh, topology) == 100e9


def test_half_a_dimension_is_no_ring() -> None:
    topology, mesh = torus("v5p:4x4x8", data=16, fsdp=4, tensor=2)
    across = extents(("tensor",), mesh)
    assert math.prod(across) == 2
    assert bandwidth(collective("tensor", size=2), mesh, topology) == 100e9
    assert bandwidth(collective("data", "fsdp", "tensor"), mesh, topology) == 6 * 100e9


def test_v5e_wraps_round_whole_pods_only() -> None:
    pod, whole = torus("v5e:16x16", data=16, fsdp=16)
    assert bandwidth(collective("fsdp", size=16), whole, pod) == 2 * 50e9
    assert bandwidth(collective("data", "fsdp", size=256), whole, pod) == 4 * 50e9
    part, smaller = torus("v5e:8x8", data=8, fsdp=8)
    assert bandwidth(collective("fsdp", size=8), smaller, part) == 50e9
    assert bandwidth(collective("data", "fsdp", size=64), smaller, part) == 2 * 50e9


def test_devices_that_share_a_chip_share_its_links() -> None:
    topology, mesh = torus("tpu7x:2x2x1", fsdp=8)
    assert bandwidth(collective("fsdp", size=8), mesh, topology) == 2 * 100e9 / 2
    assert bandwidth(collective("fsdp", kind="collective-permute"), mesh, topology) == 100e9 / 2


def test_slices_meet_in_the_network() -> None:
    topology, mesh = torus("v5e:2x2", slices=2, fsdp=4)
    assert bandwidth(collective("replica", network="dcn", size=2), mesh, topology) == 3.125e9


def test_gpus_meet_in_a_switch_and_beyond_it_in_the_network() -> None:
    topology = parse_topology("h100:16")
    mesh = make_mesh(MeshConfig(fsdp=8))  # whose devices do not matter
    assert bandwidth(collective("fsdp", size=8), mesh, topology) == 450e9
    assert bandwidth(collective("fsdp", size=16), mesh, topology) == 50e9


seconds = st.floats(0, 1e3)


@given(seconds, seconds, seconds, st.floats(0, 1))
def test_a_floor_is_no_higher_than_its_ceiling(compute: float, memory: float, network: float, share: float) -> None:
    times = Timing(compute=compute, memory=memory, network=network, exposed=network * share)
    assert max(compute, memory, network) <= times.floor
    assert times.floor <= times.ceiling * (1 + 1e-9)
    assert times.ceiling <= compute / ORDINARY + memory + network + 1e-9


sent = st.builds(dict, bytes=st.floats(0, 1e12), times=st.integers(0, 100), overlapped=st.booleans())


@given(st.lists(sent, max_size=5), st.floats(0, 1e18), st.floats(0, 1e12))
def test_what_is_exposed_is_part_of_the_network(all_sent, executed: float, read: float) -> None:
    topology = parse_topology("cpu:8")
    found = [collective("fsdp", size=8, **each) for each in all_sent]
    times = timing(executed, read, found, make_mesh(MeshConfig(fsdp=8)), topology)
    assert 0 <= times.exposed <= times.network
    assert times.network == pytest.approx(sum(each["bytes"] * each["times"] for each in all_sent) / 10e9)
    hidden = sum(each["bytes"] * each["times"] for each in all_sent if each["overlapped"]) / 10e9
    assert_close(times.network - times.exposed, hidden, FLOAT64, scale=times.network)
    assert (times.compute, times.memory) == (executed / 8 / 1e12, read / 50e9)


def test_a_step_that_only_sends_takes_what_sending_takes() -> None:
    """Behind little work little can be hidden, whatever the schedule says."""
    times = Timing(compute=1.0, memory=0.5, network=10.0, exposed=2.0)
    assert (times.floor, times.ceiling) == (10.0, 10.0)
    assert times.exposed_share == 2.0
    busy = Timing(compute=17.0, memory=0.5, network=10.0, exposed=2.0)
    assert (busy.floor, busy.ceiling) == (pytest.approx(17 / BEST), 17 / ORDINARY + 2)
    assert Timing(compute=0.0, memory=1.0, network=0.0, exposed=0.0).exposed_share == math.inf
