"""The report as text: every value, with its unit."""

import dataclasses
import re

import pytest

from mplug2_jax.planning.memory import Memory
from mplug2_jax.planning.text import format_bytes, format_quantity, format_range, format_report, format_seconds
from tests.planning.reports import GIB, make_report


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_quantity(12.44e12, "FLOP"), "12.4 TFLOP"), (format_quantity(0.0, "B"), "0 B"),
        (format_quantity(999.0), "999"),
        (format_quantity(1e15), "1 P"), (format_quantity(1500, "B"), "1.5 kB"), (format_bytes(1.5 * GIB), "1.50 GiB"),
        (format_bytes(2.0**20), "1.0 MiB"),
        (format_seconds(1.0), "1 s"), (format_seconds(0.0123), "12.3 ms"), (format_seconds(0.0), "0 ms"),
        (format_range((3.14159, 4.2)), "3.14 to 4.2"), (format_range((12345.6, 2e6)), "12,346 to 2,000,000"),
    ],
)  # fmt: skip
def test_values_have_units(text: str, expected: str) -> None:
    assert text == expected


def test_every_value_is_there() -> None:
    text = format_report(make_report(ramped=("clips",)))
    for line in (
        r"mine, train: 123,456 parameters on v5p:2x2x2 \(8 chips\), mesh data=2, fsdp=4",
        "global batch: clips 48, text 16",
        "for all steps, although the batch_ramp of clips sets other sizes at first",
        r"HBM per device: 10\.00 GiB of 40\.00 GiB \(25%\)",
        r"  optimizer +4\.00 GiB +40%",
        r"  generated code +0\.50 GiB +5%",
        r"FLOPs per step: 5 PFLOP, 78\.1 TFLOP per example; recomputed: 20\.0%",
        r"  clips / vision +3 PFLOP +60\.0% +62\.5 TFLOP per example",
        r"  text / mlm alone +1 PFLOP +20\.0% +62\.5 TFLOP per example",
        r"HBM traffic per device: 4 GB per step; 2 GB if every scope read its inputs and wrote its outputs once",
        r"  vision/attention \(backward\) +3 GB +1 GB +75\.0% +dot_general 67%, copy 33%",
        r"  by tower: vision 3 GB, text 1 GB",
        "communication per device: 25 GB per step",
        r"  all-gather +fsdp +ici +24 GB +24 +60 ms +0 ms",
        r"  all-gather +bf16\[64,128\] +x 24 +24 GB +vision/layers",
        "  the loop in decoder/search counts with its maximum length",
        r"  communication +80 ms +20 ms exposed: 2\.0% of compute",
        r"  predicted: 1\.18 s to 2\.02 s, MFU 41% to 72%, 31\.7 to 54\.4 examples/s",
        r"  86,400 steps: 1\.18 to 2\.02 days, 226 to 388 chip-hours",
        r"  1\.50 GiB +3 x bf16\[8,1024\] +vision/layers/mlp",
        r"traced in 1\.5 s, compiled in 61\.0 s",
        "fits",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), line
    assert "simulated" not in text
    assert "host" not in text


def test_exceptions_are_reported() -> None:
    memory = Memory(breakdown={"parameters": 3 * GIB}, peak=3 * GIB, capacity=2 * GIB, host=GIB)
    text = format_report(make_report(memory=memory, simulated=True, program="questions"))
    assert "compiled for simulated CPU devices" in text
    assert "  offloaded to host memory: 1.00 GiB" in text
    assert text.endswith("does not fit: 1.00 GiB over")
    assert "chip-hours" not in text


def test_float32_matmuls_in_several_passes_are_reported() -> None:
    report = make_report()
    exact = dataclasses.replace(report, timing=dataclasses.replace(report.timing, matmul_passes=6))
    assert "at peak FLOP/s; float32 matmuls take 6 times as long" in format_report(exact)
    assert "float32 matmuls" not in format_report(report)


def test_one_device_has_no_communication() -> None:
    single = dataclasses.replace(make_report(), traffic=(), largest_collectives=(), largest_buffers=())
    assert "communication per device: 0 B per step" in format_report(single)
