"""Meshes of TPUs that are not attached, for ahead-of-time compilation."""

import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh

LOW_EFFORT = {"exec_time_optimization_effort": -1.0}
"""Options of ``compile`` that halve its time."""


def topology_mesh(name: str, config: MeshConfig, slices: int = 1) -> Mesh:
    """Make a config's mesh over a named topology; skip the test where libtpu is not installed."""
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPU topologies, is not installed here")
    return make_mesh(
        config, topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices
    )
