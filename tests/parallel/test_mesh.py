"""Meshes from a config: sizes, the open axis, and sentences for what does not fit."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.mesh import MeshConfig, make_mesh


@given(data=st.integers(1, 8), tensor=st.integers(1, 8), left=st.integers(1, 8))
def test_the_open_axis_takes_what_is_left(data: int, tensor: int, left: int) -> None:
    sizes = MeshConfig(data=data, fsdp=-1, tensor=tensor).sizes(data * tensor * left)
    assert sizes == {"data": data, "fsdp": left, "tensor": tensor}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "3 does not divide the 8 devices"),
        (MeshConfig(data=2, fsdp=2, tensor=1), "needs 4 devices, but there are 8; set one axis to -1"),
        (MeshConfig(data=-1, fsdp=-1), "only one axis may be -1, found 2"),
        (MeshConfig(data=0), "every axis must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_a_sentence(config: MeshConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.sizes(8)


def test_every_device_is_there_once() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}


def test_fewer_devices_than_there_are() -> None:
    assert make_mesh(MeshConfig(), jax.devices()[:2]).size == 2
