"""The device mesh, from a config and whatever devices there are."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.logical import MESH_AXES

_AUTO = (AxisType.Auto,) * len(MESH_AXES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis, from the slowest network to the fastest; one axis may be -1 and takes what is left.

    ``replica``, ``data`` and ``fsdp`` all split the batch; ``replica`` crosses the slices of a multi-slice TPU, and
    ``fsdp`` also splits parameters and optimiser state. ``sequence`` splits the frames of a clip in the vision tower,
    and its tokens after that. ``tensor`` splits heads, MLP width and vocabulary.
    """

    replica: int = 1
    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of every axis on this many devices.

        Raises:
            UserError: axes that do not multiply to the number of devices.
        """
        sizes = {axis: int(getattr(self, axis)) for axis in MESH_AXES}
        open_axes = [axis for axis, size in sizes.items() if size == -1]
        fixed = math.prod(size for size in sizes.values() if size != -1)
        asked = ", ".join(f"config.mesh.{axis}={size}" for axis, size in sizes.items() if size != 1)
        asked = asked or "config.mesh with every axis 1"
        if len(open_axes) > 1:
            raise UserError(f"{asked}: only one axis may be -1, found {len(open_axes)}")
        if any(size < 1 and size != -1 for size in sizes.values()):
            raise UserError(f"{asked}: every axis must be at least 1, or -1 for what is left")
        if open_axes:
            if devices % fixed:
                raise UserError(
                    f"{asked}: {fixed} does not divide the {devices} devices that there are; choose sizes "
                    "whose product does"
                )
            sizes[open_axes[0]] = devices // fixed
        elif fixed != devices:
            raise UserError(
                f"{asked} needs {fixed} devices, but there are {devices}; set one axis to -1 to use them all"
            )
        return sizes


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
    sizes = config.sizes(len(devices))
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
    return AbstractMesh(tuple(config.sizes(devices).values()), MESH_AXES, axis_types=_AUTO)


def num_slices(devices: Sequence[jax.Device]) -> int:
    """How many TPU slices the devices come from. Other devices are one: their order by process is near enough."""
    return len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})
