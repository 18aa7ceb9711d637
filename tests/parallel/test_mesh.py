"""Meshes from a config: sizes, the inferred axis, and errors."""

import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.config import MESH_AXES, MeshConfig
from mplug2_jax.parallel.mesh import abstract_mesh, make_mesh
from tests.tpu import topology_mesh


@given(
    fixed=st.fixed_dictionaries({axis: st.integers(1, 6) for axis in MESH_AXES}), inferred=st.sampled_from(MESH_AXES)
)
def test_an_axis_of_minus_1_takes_the_remaining_devices(fixed: dict[str, int], inferred: str) -> None:
    assert MeshConfig(**(fixed | {inferred: -1})).axis_sizes(math.prod(fixed.values())) == fixed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "3 does not divide the 8 devices"),
        (MeshConfig(data=2, fsdp=2, tensor=1), "needs 4 devices, but there are 8; set one axis to -1"),
        (MeshConfig(data=-1, fsdp=-1), "only one axis may be -1, found 2"),
        (MeshConfig(data=0), "every axis must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: MeshConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.axis_sizes(8)


def test_a_mesh_contains_every_device_once() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}


def test_a_mesh_of_some_devices() -> None:
    assert make_mesh(MeshConfig(), jax.devices()[:2]).size == 2


def test_an_abstract_mesh_needs_no_devices() -> None:
    mesh = abstract_mesh(MeshConfig(replica=4, tensor=8), 4096)
    assert dict(mesh.shape) == {"replica": 4, "data": 1, "fsdp": 128, "sequence": 1, "tensor": 8}
    with pytest.raises(UserError, match="does not divide the 100 devices"):
        abstract_mesh(MeshConfig(tensor=8), 100)


def test_only_replicas_cross_slices() -> None:
    mesh = topology_mesh("v5e:2x2", MeshConfig(replica=4, fsdp=2, tensor=1), slices=2)
    assert dict(mesh.shape) == {"replica": 4, "data": 1, "fsdp": 2, "sequence": 1, "tensor": 1}
    slices = [{device.slice_index for device in replica.flat} for replica in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]


def test_slices_without_replicas_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"replica=1 on 2 slices of 4 devices: .*set config.mesh.replica to a multiple of 2"
    ):
        topology_mesh("v5e:2x2", MeshConfig(), slices=2)
