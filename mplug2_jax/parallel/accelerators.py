"""Accelerator specifications and the topologies built from them, for planning on hardware that is not attached.

Sources: Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" (peak rates, memory, bidirectional
interconnect bandwidth, network bandwidth per pod); NVIDIA's data sheets for A100, H100 and H200 SXM (dense 16-bit
rates, NVLink, 200 to 400 Gbit/s of network each); libtpu's ahead-of-time compiler for the usable memory of each device.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Literal

from mplug2_jax.errors import UserError, did_you_mean

GIB = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChipSpec:
    """Specification of one accelerator. Rates are per chip; one chip may be several JAX devices."""

    name: str
    device_kinds: tuple[str, ...]  # `jax.Device.device_kind`
    platform: Literal["tpu", "gpu", "cpu"]
    peak_flops: float  # FLOP/s, bfloat16 matmuls
    memory_bytes: float  # per device, usable by a program
    memory_bandwidth: float  # bytes/s
    links: int  # to torus neighbors; 1 to a switch that reaches every chip
    link_bandwidth: float  # bytes/s per link, one way
    network_bandwidth: float  # bytes/s between slices, one way
    permute_seconds: float = 5e-6  # latency of a permute to a neighbor: start, one hop and end; assumed, no data sheet
    devices_per_chip: int = 1  # JAX devices
    chips_per_host: int = 4  # in slices of more than one host
    torus_dims: int = 0  # 0: a switch
    max_chips: int = 2**20  # per slice
    gke_accelerator: str = ""  # value of GKE's node selector
    cloud_prefix: str = ""  # prefix of the Cloud TPU API's accelerator types, as in v5p-1024
    cloud_count_unit: Literal["chips", "cores"] = "chips"
    libtpu_variant: str = ""  # libtpu's name for how cores are fused into devices


def peak_flops(device_kind: str) -> float | None:
    """Return the peak FLOP/s of one JAX device, or None for kinds outside the table (CPUs among them)."""
    rates = (chip.peak_flops / chip.devices_per_chip for chip in CHIPS.values() if device_kind in chip.device_kinds)
    return next(rates, None)


# fmt: off
CHIPS: Mapping[str, ChipSpec] = {chip.name: chip for chip in (
    ChipSpec(name="v4", device_kinds=("TPU v4",), platform="tpu", peak_flops=275e12, memory_bytes=30.75 * GIB,
         memory_bandwidth=1228e9, links=6, link_bandwidth=50e9, network_bandwidth=6.25e9, torus_dims=3, max_chips=4096,
         gke_accelerator="tpu-v4-podslice", cloud_prefix="v4", cloud_count_unit="cores", libtpu_variant="megacore"),
    ChipSpec(name="v5e", device_kinds=("TPU v5 lite", "TPU v5e"), platform="tpu", peak_flops=197e12,
         memory_bytes=15.75 * GIB, memory_bandwidth=819e9, links=4, link_bandwidth=50e9, network_bandwidth=3.125e9,
         torus_dims=2, max_chips=256, gke_accelerator="tpu-v5-lite-podslice", cloud_prefix="v5litepod"),
    ChipSpec(name="v5p", device_kinds=("TPU v5", "TPU v5p"), platform="tpu", peak_flops=459e12,
         memory_bytes=95.73 * GIB, memory_bandwidth=2765e9, links=6, link_bandwidth=100e9, network_bandwidth=6.25e9,
         torus_dims=3, max_chips=6144, gke_accelerator="tpu-v5p-slice", cloud_prefix="v5p", cloud_count_unit="cores"),
    ChipSpec(name="v6e", device_kinds=("TPU v6 lite", "TPU v6e"), platform="tpu", peak_flops=918e12,
         memory_bytes=31.24 * GIB, memory_bandwidth=1640e9, links=4, link_bandwidth=100e9, network_bandwidth=12.5e9,
         torus_dims=2, max_chips=256, gke_accelerator="tpu-v6e-slice", cloud_prefix="v6e"),
    ChipSpec(name="tpu7x", device_kinds=("TPU7x",), platform="tpu", peak_flops=2307e12, memory_bytes=94.74 * GIB,
         memory_bandwidth=7380e9, links=6, link_bandwidth=100e9, network_bandwidth=12.5e9, devices_per_chip=2,
         torus_dims=3, max_chips=9216, gke_accelerator="tpu7x"),
    ChipSpec(name="a100", device_kinds=("NVIDIA A100-SXM4-80GB",), platform="gpu", peak_flops=312e12,
         memory_bytes=76 * GIB, memory_bandwidth=2039e9, links=1, link_bandwidth=300e9, network_bandwidth=25e9,
         chips_per_host=8),
    ChipSpec(name="h100", device_kinds=("NVIDIA H100 80GB HBM3",), platform="gpu", peak_flops=989e12,
         memory_bytes=76 * GIB, memory_bandwidth=3350e9, links=1, link_bandwidth=450e9, network_bandwidth=50e9,
         chips_per_host=8),
    ChipSpec(name="h200", device_kinds=("NVIDIA H200",), platform="gpu", peak_flops=989e12, memory_bytes=134 * GIB,
         memory_bandwidth=4800e9, links=1, link_bandwidth=450e9, network_bandwidth=50e9, chips_per_host=8),
    # An assumed share of an ordinary server; no data sheet.
    ChipSpec(name="cpu", device_kinds=(), platform="cpu", peak_flops=1e12,
         memory_bytes=16 * GIB, memory_bandwidth=50e9, links=1, link_bandwidth=10e9, network_bandwidth=1e9,
         chips_per_host=8),
)}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of chips: ``v5p:8x8x8`` is a torus, ``h100:64`` a number of chips on a switch."""

    chip: ChipSpec
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """Return the name of one slice, as :func:`parse_topology` reads it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips_per_slice(self) -> int:
        """Return the number of chips in one slice."""
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        """Return the number of chips in all slices."""
        return self.chips_per_slice * self.slices

    @property
    def devices(self) -> int:
        """Return the number of JAX devices in all slices."""
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts_per_slice(self) -> int:
        """Return the number of hosts in one slice."""
        return -(-self.chips_per_slice // self.chip.chips_per_host)

    @cached_property
    def accelerator_type(self) -> str:
        """Return Cloud TPU's accelerator type of one slice, such as ``v5p-1024``; empty if it has none."""
        units_per_chip = 2 if self.chip.cloud_count_unit == "cores" else 1
        return f"{self.chip.cloud_prefix}-{self.chips_per_slice * units_per_chip}" if self.chip.cloud_prefix else ""

    def __str__(self) -> str:
        return self.name + (f" x {self.slices} slices" if self.slices > 1 else "")


_TORI_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TORI_3D = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
)  # fmt: skip


def topology_names() -> list[str]:
    """Return the common topologies of every TPU, and an example for each other chip."""
    shapes = {2: _TORI_2D, 3: _TORI_3D}
    tori = [f"{c.name}:{s}" for c in CHIPS.values() if c.torus_dims for s in shapes[c.torus_dims]]
    return tori + [f"{c.name}:8" for c in CHIPS.values() if not c.torus_dims]


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Parse ``v5p:8x8x8``, ``v6e:16x16`` or ``h100:64``.

    Raises:
        UserError: an unknown chip or a shape that it does not come in; names the valid ones.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology {text}: chip '{name}' is unknown: {did_you_mean(name, CHIPS)}; example: v5p:8x8x8")
    chip = CHIPS[name]
    valid = ", ".join(n for n in topology_names() if n.startswith(f"{name}:"))
    words = shape.split("x") if chip.torus_dims else [shape]
    # int() refuses numbers of thousands of digits.
    if not all(w.isdecimal() and len(w) < 10 and int(w) for w in words) or len(words) != max(chip.torus_dims, 1):
        raise UserError(
            f"--topology {text}: expected {'a torus' if chip.torus_dims else 'a number of devices'}: {valid}"
        )
    sizes = tuple(map(int, words))
    if math.prod(sizes) > chip.max_chips:
        raise UserError(f"--topology {text}: a slice of {name} has at most {chip.max_chips:,} chips: {valid}")
    if chip.torus_dims == 2 and f"{name}:{shape}" not in topology_names():
        raise UserError(f"--topology {text}: {name} does not come in this shape: {valid}")
    if chip.torus_dims == 3 and shape not in _TORI_3D and any(size % 4 for size in sizes):
        raise UserError(f"--topology {text}: large slices of {name} are multiples of 4 in every dimension: {valid}")
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        raise UserError(f"--slices {slices}: expected at least 1, and more than 1 for TPUs only")
    return Topology(chip, sizes, slices)
