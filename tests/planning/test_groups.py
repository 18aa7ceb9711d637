"""Device groups in each of the compiler's formats, and the mesh axes that they span."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.planning.groups import cross_slice_span, group_span, parse_groups, parse_pairs
from tests.tpu import topology_mesh


def cube() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), order=st.randoms(), split=st.integers(0, 3)
)  # fmt: skip
def test_the_iota_format_is_reshaped_and_transposed(sizes, order, split):
    axes = list(range(len(sizes)))
    order.shuffle(axes)
    count = math.prod(sizes)
    members = [d for d in range(1, count + 1) if count % d == 0]
    width = members[split % len(members)]
    expected = np.arange(count).reshape(sizes).transpose(axes).reshape(count // width, width)
    text = f"[{count // width},{width}]<=[{','.join(map(str, sizes))}]T({','.join(map(str, axes))})"
    assert parse_groups(text, count).tolist() == expected.tolist()


def test_the_iota_format_without_a_transposition_is_in_order():
    assert parse_groups("[2,4]<=[8]", 8).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), chosen=st.sets(st.integers(0, 3), min_size=1)
)  # fmt: skip
def test_the_mesh_format_groups_along_its_axes(sizes, chosen):
    axes = [a for a in sorted(chosen) if a < len(sizes)] or [0]
    ungrouped = [a for a in range(len(sizes)) if a not in axes]
    group_size = math.prod(sizes[a] for a in axes)
    expected = np.arange(math.prod(sizes)).reshape(sizes).transpose(ungrouped + axes).reshape(-1, group_size)
    mesh_axes = ",".join(f"'axis_{a}'={size}" for a, size in enumerate(sizes))
    group_axes = ",".join(f"'axis_{a}'" for a in axes)
    text = f"mesh[{mesh_axes}] {{{group_axes}}}"
    assert parse_groups(text, math.prod(sizes)).tolist() == expected.tolist()


def test_factors_of_axes_and_permuted_devices():
    ids = np.arange(8)
    assert parse_groups("mesh['a'=8] {'a':(1)2}", 8).tolist() == ids.reshape(2, 4).T.tolist()
    assert parse_groups("mesh['a'=8] {'a':(2)2}", 8).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert parse_groups("mesh['a'=8] {'a':(4)2}", 8).tolist() == ids.reshape(4, 2).tolist()
    assert parse_groups("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", 8).tolist() == [
        [0, 4], [1, 5], [2, 6], [3, 7],
    ]  # fmt: skip
    assert parse_groups("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", 4).tolist() == [[0, 2], [1, 3]]


def test_explicit_lists_and_an_empty_one_of_all_devices():
    assert parse_groups("{{0,2},{1,3}}, dimensions={0}", 4).tolist() == [[0, 2], [1, 3]]
    assert parse_groups("{}", 4).tolist() == [[0, 1, 2, 3]]
    assert parse_pairs("{{0,1},{1,2},{3,3}}").tolist() == [[0, 1], [1, 2]]
    with pytest.raises(ValueError, match="unknown format of replica groups: nothing"):
        parse_groups("nothing", 4)


@pytest.mark.parametrize(
    ("text", "axes", "size"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",), 2),
        ("[4,2]<=[8]", ("tensor",), 2),
        ("[2,4]<=[2,2,2]T(2,0,1)", ("data", "fsdp"), 4),
        ("[2,4]<=[8]", ("fsdp", "tensor"), 4),
        ("{{0,5},{1,4},{2,7},{3,6}}", ("data", "tensor"), 2),
        ("{}", ("data", "fsdp", "tensor"), 8),
        ("[8,1]<=[8]", (), 1),
    ],
)
def test_axes_are_those_along_which_members_differ(text, axes, size):
    span = group_span(parse_groups(text, 8), cube(), 8)
    assert (span.axes, span.network, span.size) == (axes, "ici", size)


def test_devices_are_numbered_by_mesh_position_not_by_id():
    mesh = topology_mesh("v5e:4x4", MeshConfig(data=2, fsdp=4, tensor=2))
    ids = [device.id for device in mesh.devices.flat]
    assert ids != sorted(ids)  # otherwise this test shows nothing
    assert group_span(parse_groups("[4,4]<=[8,2]T(1,0)", 16), mesh, 16).axes == ("fsdp",)


def test_groups_across_slices_use_dcn():
    mesh = topology_mesh("v5e:2x2", MeshConfig(replica=4, fsdp=2), slices=2)
    across, within = parse_groups("{{0,4}}", 8), parse_groups("{{0,2}}", 8)
    assert (group_span(across, mesh, 8).network, group_span(across, mesh, 8).axes) == ("dcn", ("replica",))
    assert (group_span(within, mesh, 8).network, group_span(within, mesh, 8).axes) == ("ici", ("replica",))
    # A program for several slices numbers the devices of one, and reaches the others by transfers.
    assert group_span(parse_groups("{{0,1},{2,3}}", 4), mesh, 4).axes == ("fsdp",)
    assert (cross_slice_span(mesh).network, cross_slice_span(mesh).size) == ("dcn", 2)
    assert cross_slice_span(mesh).axes == ("replica",)


def test_thousands_of_devices():
    mesh = make_mesh(MeshConfig())
    wide = jax.sharding.Mesh(np.resize(mesh.devices, (1, 32, 64, 1, 1)), mesh.axis_names)
    assert group_span(parse_groups("[64,32]<=[32,64]T(1,0)", 2048), wide, 2048).axes == ("data",)
