"""A check of all devices and links before the first step: a broken one is found in seconds and not after hours."""

import collections
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt32

from mplug2_jax.parallel.processes import allgather_dict
from mplug2_jax.training.checkpoint.checksums import checksum
from mplug2_jax.training.reliability.sdc_check import CorruptionError

_SIZE = 1024  # of the matrix, which fills a matrix unit
_AXIS = "devices"


class DeviceResult(NamedTuple):
    """The checksums of one device, as 32-bit words."""

    product: int  # the checksum of a matrix product
    received: int  # that of the device before it, which sent it
    total: int  # the sum of all devices' checksums


def check_devices(mesh: Mesh) -> None:
    """Compute one product on every device, send its checksum to the next device, add all up, and compare the bits.

    A collective: all processes of the run call it.

    Raises:
        CorruptionError: names the device, or the link between two devices.
    """
    start = time.monotonic()
    devices = list(mesh.devices.flat)
    row = Mesh(np.array(devices), (_AXIS,))
    rows, columns = np.indices((_SIZE, _SIZE))
    matrix = ((rows * 7 + columns * 13) % 31 - 15).astype(jnp.bfloat16)  # an argument: constants are folded
    probe = jax.jit(jax.shard_map(_probe, mesh=row, in_specs=PartitionSpec(), out_specs=PartitionSpec(_AXIS)))
    output = probe(jax.device_put(matrix, NamedSharding(row, PartitionSpec())))
    local = {shard.device.id: np.asarray(shard.data)[0].tolist() for shard in output.addressable_shards}
    results = {device: DeviceResult(*words) for device, words in allgather_dict(local).items()}
    if fault := find_fault([str(device) for device in devices], [results[device.id] for device in devices]):
        raise CorruptionError(f"before the first step, {fault}: remove the device, and start again")
    logging.info("%d devices and their links passed a check in %.1f s", len(devices), time.monotonic() - start)


def _probe(matrix: Float[Array, "n n"]) -> UInt32[Array, "1 3"]:
    """Return this device's result; call it inside ``shard_map`` over all devices."""
    product = _product_checksum(matrix)
    count = jax.lax.axis_size(_AXIS)
    received = jax.lax.ppermute(product, _AXIS, [(i, (i + 1) % count) for i in range(count)])
    return jnp.stack([product, received, jax.lax.psum(product, _AXIS)])[None]


def _product_checksum(matrix: Float[Array, "n n"]) -> UInt32[Array, ""]:
    return checksum(jnp.dot(matrix, matrix, preferred_element_type=jnp.float32))


def find_fault(devices: Sequence[str], results: Sequence[DeviceResult]) -> str:
    """Return what is wrong with which device or link; empty if nothing is.

    Args:
        devices: their names, in the order in which each sends to the next, and the last to the first.
        results: of the devices.
    """
    (expected, count), *_ = collections.Counter(result.product for result in results).most_common(1)
    wrong = [device for device, result in zip(devices, results, strict=True) if result.product != expected]
    if wrong:
        is_clear = 2 * count > len(devices)
        suspects = ", ".join(wrong if is_clear else devices)
        return f"{suspects} computed another matrix product than the others" + ("" if is_clear else " (one of these)")
    for i, result in enumerate(results):
        if result.received != results[i - 1].product:
            return f"{devices[i]} received other bits than {devices[i - 1]} sent"
    total = expected * len(devices) % 2**32
    wrong = [device for device, result in zip(devices, results, strict=True) if result.total != total]
    return f"{', '.join(wrong)} got a wrong sum over all devices" if wrong else ""
