"""The mesh axes and their sizes."""

import dataclasses
import math

from mplug2_jax.errors import UserError

SEQUENCE = "sequence"
MESH_AXES = ("replica", "data", "fsdp", SEQUENCE, "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Size of each mesh axis, from the slowest network to the fastest; one axis may be -1 for the remaining devices.

    ``replica``, ``data`` and ``fsdp`` all shard the batch. ``replica`` spans the slices of a multi-slice TPU; ``fsdp``
    also shards parameters and optimizer state. ``sequence`` shards the frames of a video clip in the vision tower, and
    its tokens after that. ``tensor`` shards heads, MLP width and vocabulary.
    """

    replica: int = 1  # TPU slices; shards the batch
    data: int = 1  # shards the batch
    fsdp: int = -1  # shards the batch, parameters and optimizer state; -1: the remaining devices
    sequence: int = 1  # shards the visual tokens of video clips
    tensor: int = 1  # shards heads, MLP width and vocabulary

    def axis_sizes(self, num_devices: int) -> dict[str, int]:
        """Return the size of every axis on ``num_devices`` devices.

        Raises:
            UserError: axes whose sizes do not multiply to the number of devices.
        """
        sizes = {axis: int(getattr(self, axis)) for axis in MESH_AXES}
        open_axes = [axis for axis, size in sizes.items() if size == -1]
        fixed = math.prod(size for size in sizes.values() if size != -1)
        given = ", ".join(f"config.mesh.{axis}={size}" for axis, size in sizes.items() if size != 1)
        given = given or "config.mesh with every axis 1"
        if len(open_axes) > 1:
            raise UserError(f"{given}: only one axis may be -1, found {len(open_axes)}")
        if any(size < 1 and size != -1 for size in sizes.values()):
            raise UserError(f"{given}: every axis must be at least 1, or -1 for the remaining devices")
        if open_axes:
            if num_devices % fixed:
                raise UserError(
                    f"{given}: {fixed} does not divide the {num_devices} devices; choose sizes whose product does"
                )
            sizes[open_axes[0]] = num_devices // fixed
        elif fixed != num_devices:
            raise UserError(
                f"{given} needs {fixed} devices, but there are {num_devices}; set one axis to -1 to use them all"
            )
        return sizes


def elastic_slice_counts(num_slices: int, minimum: int) -> list[int]:
    """Return the numbers of slices, from ``minimum`` on, with which a run on ``num_slices`` can go on.

    They divide the number of slices: then the global batch splits into whole micro-batches again.
    """
    return [count for count in range(minimum, num_slices + 1) if num_slices % count == 0]
