"""The mesh's axes, and how many devices lie along each."""

import dataclasses
import math

from mplug2_jax.errors import UserError

SEQUENCE = "sequence"
MESH_AXES = ("replica", "data", "fsdp", SEQUENCE, "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis, from the slowest network to the fastest; one axis may be -1 and takes what is left.

    ``replica``, ``data`` and ``fsdp`` all split the batch; ``replica`` crosses the slices of a multi-slice TPU, and
    ``fsdp`` also splits parameters and optimiser state. ``sequence`` splits the frames of a clip in the vision tower,
    and its tokens after that. ``tensor`` splits heads, MLP width and vocabulary.
    """

    replica: int = 1  # slices, or groups of them; splits the batch
    data: int = 1  # splits the batch
    fsdp: int = -1  # splits the batch, parameters and optimiser state; -1: what is left
    sequence: int = 1  # splits the visual tokens of clips
    tensor: int = 1  # splits heads, MLP width and vocabulary

    def axis_sizes(self, devices: int) -> dict[str, int]:
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
