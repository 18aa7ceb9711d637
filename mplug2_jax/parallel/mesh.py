"""The device mesh, from a config and whatever devices there are."""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.config import MESH_AXES, MeshConfig

_AUTO = (AxisType.Auto,) * len(MESH_AXES)


def describe_mesh(mesh: Mesh) -> str:
    """The axes that split anything, as ``data=2, fsdp=4``."""
    return ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "of one device"


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the given devices, or over all that JAX sees, ordered so that neighbours are near.

    The devices may be those of a topology that is not here, for ahead-of-time compilation. On several TPU slices only
    ``replica`` crosses from one to another.

    Raises:
        UserError: axes that do not multiply to the number of devices, or replicas that do not follow the slices.
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
        within = tuple((sizes | {"replica": sizes["replica"] // slices}).values())
        across = (slices,) + (1,) * (len(within) - 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=_AUTO)


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of so many devices that nobody has: enough to say where arrays would live."""
    return AbstractMesh(tuple(config.axis_sizes(devices).values()), MESH_AXES, axis_types=_AUTO)


def num_slices(devices: Sequence[jax.Device]) -> int:
    """How many TPU slices the devices come from. Other devices are one: their order by process is near enough."""
    return len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})
