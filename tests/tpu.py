"""Meshes of TPUs that are not here, for ahead-of-time compilation."""

import pytest
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from mplug2_jax.parallel.logical import MESH_AXES
from mplug2_jax.parallel.mesh import MeshConfig


def topology_mesh(name: str, config: MeshConfig) -> Mesh:
    """The mesh of a config over a named topology; skips the test where libtpu is not installed."""
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPU topologies, is not installed here")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    shape = tuple(config.sizes(len(devices)).values())
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
