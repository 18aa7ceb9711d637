"""Parsing of topologies, and errors that name the valid ones."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.accelerators import CHIPS, parse_topology, peak_flops, topology_names

FACTS = {  # chips, hosts, devices, accelerator type
    "v5p:8x8x8": (512, 128, 512, "v5p-1024"),
    "v5p:2x2x1": (4, 1, 4, "v5p-8"),
    "v4:4x4x8": (128, 32, 128, "v4-256"),
    "v5e:16x16": (256, 64, 256, "v5litepod-256"),
    "v5e:1x1": (1, 1, 1, "v5litepod-1"),
    "v6e:8x16": (128, 32, 128, "v6e-128"),
    "tpu7x:4x4x4": (64, 16, 128, ""),
    "h100:64": (64, 8, 64, ""),
    "h200:9": (9, 2, 9, ""),
    "cpu:8": (8, 1, 8, ""),
}


@pytest.mark.parametrize("name", FACTS)
def test_sizes_of_known_topologies(name: str) -> None:
    topology = parse_topology(name)
    assert (topology.chips, topology.hosts_per_slice, topology.devices, topology.accelerator_type) == FACTS[name]
    assert (topology.name, str(topology)) == (name, name)


def test_several_slices_multiply_chips_but_not_hosts_per_slice() -> None:
    topology = parse_topology("v5p:4x4x4", 3)
    assert (topology.chips, topology.chips_per_slice, topology.devices, topology.hosts_per_slice) == (192, 64, 192, 16)
    assert (topology.name, str(topology), topology.accelerator_type) == ("v5p:4x4x4", "v5p:4x4x4 x 3 slices", "v5p-128")


@given(st.sampled_from(topology_names()))
def test_every_listed_topology_round_trips(name: str) -> None:
    topology = parse_topology(name)
    assert topology.name == name
    assert topology.devices == math.prod(topology.shape) * topology.chip.devices_per_chip


cubes = st.lists(st.integers(1, 4).map(lambda n: 4 * n), min_size=3, max_size=3)


@given(st.sampled_from([c for c in CHIPS.values() if c.torus_dims == 3]), cubes)
def test_a_3d_torus_may_have_any_multiples_of_4(chip, sides) -> None:
    topology = parse_topology(f"{chip.name}:{'x'.join(map(str, sides))}")
    assert topology.shape == tuple(sides)
    assert topology.chips == math.prod(sides)


@given(st.sampled_from([c for c in CHIPS.values() if not c.torus_dims]), st.integers(1, 2**20))
def test_a_switch_connects_any_number_of_chips(chip, number: int) -> None:
    topology = parse_topology(f"{chip.name}:{number}")
    assert topology.devices == number
    assert (
        (topology.hosts_per_slice - 1) * chip.chips_per_host < number <= topology.hosts_per_slice * chip.chips_per_host
    )


alphabet = st.text("0123456789x:-. v5epch", max_size=12)


@given(st.one_of(alphabet, st.text(max_size=8), st.tuples(st.sampled_from(sorted(CHIPS)), alphabet).map(":".join)))
def test_any_text_is_a_topology_or_an_error_that_names_valid_ones(text: str) -> None:
    try:
        topology = parse_topology(text)
    except UserError as error:
        message = str(error)
    else:
        assert parse_topology(topology.name) == topology
        return
    assert message.startswith(f"--topology {text}: ")
    chip = text.partition(":")[0]
    reason = message.removeprefix(f"--topology {text}: ")
    if chip in CHIPS:
        assert all(name in reason for name in topology_names() if name.startswith(f"{chip}:"))
    else:
        assert all(name in reason for name in CHIPS)
    assert "\n" not in reason.replace(chip, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("v5x:4x4", "chip 'v5x' is unknown: did you mean 'v5p'"),
        ("", "chip '' is unknown: valid: a100, cpu"),
        ("v5p", "expected a torus: v5p:2x2x1, v5p:2x2x2"),
        ("v5p:8x8", "expected a torus"),
        ("v5p:8x8x8x1", "expected a torus"),
        ("v5p:8x8x0", "expected a torus"),
        ("v5p:8x8x-8", "expected a torus"),
        ("v5p:6x4x4", "large slices of v5p are multiples of 4 in every dimension"),
        ("v5p:32x32x32", "a slice of v5p has at most 6,144 chips"),
        ("v5e:16x32", "a slice of v5e has at most 256 chips"),
        ("v5e:3x5", "v5e does not come in this shape: v5e:1x1, v5e:2x2"),
        ("h100:8x8", "expected a number of devices: h100:8"),
        ("cpu:0", "expected a number of devices: cpu:8"),
        ("h100:999999999", "a slice of h100 has at most 1,048,576 chips"),
        pytest.param("h100:" + "9" * 5000, "expected a number of devices", id="digits"),
    ],
)
def test_invalid_topologies_are_refused(text: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        parse_topology(text)
    assert reason in str(error.value)


@pytest.mark.parametrize(("text", "slices"), [("v5p:4x4x4", 0), ("v5p:4x4x4", -1), ("cpu:8", 2), ("h100:8", 2)])
def test_invalid_slice_counts_are_refused(text: str, slices: int) -> None:
    with pytest.raises(UserError, match=f"--slices {slices}: expected at least 1, and more than 1 for TPUs only"):
        parse_topology(text, slices)


def test_peak_flops_are_per_device() -> None:
    assert peak_flops("TPU v5") == 459e12
    assert peak_flops("TPU v5 lite") == peak_flops("TPU v5e") == 197e12
    assert peak_flops("TPU7x") == 2307e12 / 2
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
