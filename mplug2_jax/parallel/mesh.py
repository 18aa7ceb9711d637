"""The device mesh, from a config and whatever devices there are."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.logical import MESH_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1 and takes what is left.

    ``data`` and ``fsdp`` both split the batch; ``fsdp`` also splits parameters and optimiser state. ``tensor`` splits
    heads, MLP width and vocabulary.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of every axis on this many devices.

        Raises:
            UserError: axes that do not multiply to the number of devices.
        """
        sizes = {axis: int(getattr(self, axis)) for axis in MESH_AXES}
        open_axes = [axis for axis, size in sizes.items() if size == -1]
        fixed = math.prod(size for size in sizes.values() if size != -1)
        asked = ", ".join(f"config.mesh.{axis}={size}" for axis, size in sizes.items())
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


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the given devices, or over all that JAX sees, ordered so that neighbours are near."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
