"""Device meshes from a config."""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.config import MESH_AXES, MeshConfig

_AUTO = (AxisType.Auto,) * len(MESH_AXES)


def describe_mesh(mesh: Mesh) -> str:
    """Return the axes larger than 1, as in ``data=2, fsdp=4``."""
    return ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "of one device"


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh over the given devices, or over all devices of JAX, ordered so that neighbors are physically close.

    The devices may be those of a topology that is not attached, for ahead-of-time compilation. On several TPU slices
    only ``replica`` crosses slices.

    Raises:
        UserError: axes whose sizes do not multiply to the number of devices, or replicas that do not match the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.axis_sizes(len(devices))
    slices = num_slices(devices)
    if sizes["replica"] % slices:
        raise UserError(
            f"config.mesh.replica={sizes['replica']} on {slices} slices of {len(devices) // slices} devices: only "
            f"replicas may cross slices; set config.mesh.replica to a multiple of {slices}"
        )
    if slices == 1:
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    else:
        per_slice = tuple((sizes | {"replica": sizes["replica"] // slices}).values())
        across_slices = (slices,) + (1,) * (len(per_slice) - 1)
        grid = mesh_utils.create_hybrid_device_mesh(per_slice, across_slices, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=_AUTO)


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """Return a mesh of ``num_devices`` devices that need not exist: enough to shard shapes."""
    return AbstractMesh(tuple(config.axis_sizes(num_devices).values()), MESH_AXES, axis_types=_AUTO)


def num_slices(devices: Sequence[jax.Device]) -> int:
    """Count the TPU slices that the devices belong to. Other devices count as one: their order by process suffices."""
    return len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})
