"""The plan for terminals: all figures, in units that people read."""

import dataclasses
import re

import pytest

from mplug2_jax.planning.memory import Memory
from mplug2_jax.planning.text import aligned, duration, quantity, size_of, span, text_report
from tests.planning.reports import GIB, report


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (quantity(12.44e12, "FLOP"), "12.4 TFLOP"), (quantity(0.0, "B"), "0 B"), (quantity(999.0), "999"),
        (quantity(1e15), "1 P"), (quantity(1500, "B"), "1.5 kB"), (size_of(1.5 * GIB), "1.50 GiB"),
        (size_of(2.0**20), "1.0 MiB"),
        (duration(1.0), "1 s"), (duration(0.0123), "12.3 ms"), (duration(0.0), "0 ms"),
        (span((3.14159, 4.2)), "3.14 to 4.2"), (span((12345.6, 2e6)), "12,346 to 2,000,000"),
    ],
)  # fmt: skip
def test_figures_in_words(found: str, said: str) -> None:
    assert found == said


def test_columns_are_as_wide_as_their_widest() -> None:
    assert list(aligned([("a", "1"), ("bcd", "234")])) == ["  a      1", "  bcd  234"]
    assert list(aligned([])) == []


def test_every_figure_is_there() -> None:
    text = text_report(report())
    for line in (
        r"mine, train: 123,456 parameters on v5p:2x2x2 \(8 chips\), mesh data=2, fsdp=4",
        "examples a step: clips 48, text 16",
        r"memory of a device: 10\.00 GiB of 40\.00 GiB \(25%\)",
        r"  optimiser +4\.00 GiB +40%",
        r"  machine code +0\.50 GiB +5%",
        r"operations a step: 5 PFLOP, 78\.1 TFLOP an example; computed twice: 20\.0%",
        r"  clips / vision +3 PFLOP +60\.0% +62\.5 TFLOP each",
        r"  text / mlm alone +1 PFLOP +20\.0% +62\.5 TFLOP each",
        "sent by a device: 25 GB a step",
        r"  all-gather +fsdp +ici +24 GB +24 +60 ms +0 ms",
        r"  all-gather +bf16\[64,128\] +x 24 +24 GB +vision/layers",
        "  a loop in decoder/search is counted to its greatest length",
        r"  network +80 ms +20 ms not hidden: 2\.0% of compute",
        r"  predicted  1\.18 s to 2\.02 s, MFU 41% to 72%, 31\.7 to 54\.4 examples/s",
        r"  86,400 steps: 1\.18 to 2\.02 days, 226 to 388 chip-hours",
        r"  1\.50 GiB +3 x bf16\[8,1024\] +vision/layers/mlp",
        r"traced in 1\.5 s, compiled in 61\.0 s",
        "it fits",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), line
    assert "simulated" not in text
    assert "host" not in text


def test_what_is_otherwise_is_said() -> None:
    memory = Memory(parts={"parameters": 3 * GIB}, peak=3 * GIB, capacity=2 * GIB, host=GIB)
    text = text_report(report(memory=memory, simulated=True, program="questions"))
    assert "compiled for simulated CPUs in place of these chips" in text
    assert "  and in its host's memory: 1.00 GiB" in text
    assert text.endswith("it does not fit, by 1.00 GiB")
    assert "chip-hours" not in text


def test_one_device_sends_nothing() -> None:
    alone = dataclasses.replace(report(), traffic=(), largest_collectives=(), largest_arrays=())
    assert "sent by a device: 0 B a step" in text_report(alone)
