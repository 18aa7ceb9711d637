"""The report as plain data, and of a compiled program."""

import dataclasses
import json

import pytest

from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning.programs import CompiledProgram, trace_training
from mplug2_jax.planning.report import fingerprint, make_report
from tests.planning import reports
from tests.planning.reports import GIB
from tests.runs import text_run

TOPOLOGY = parse_topology("cpu:8")


def test_derived_times() -> None:
    report = reports.make_report()
    low, high = report.step_seconds
    assert (low, high) == (pytest.approx(1 / 0.85), 2.02)
    assert report.days == (low, high)  # as there are 86,400 steps
    assert report.chip_hours == (low * 24 * 8, high * 24 * 8)
    assert report.examples_per_second == (64 / high, 64 / low)


def test_plain_data_survives_json() -> None:
    report = reports.make_report()
    plain = report.to_json()
    back = json.loads(json.dumps(plain, allow_nan=False))
    assert back.keys() == plain.keys()
    assert back["memory"]["breakdown"]["optimizer"] == 4 * GIB
    assert back["examples"] == {"clips": 48, "text": 16}
    assert back["step_seconds"] == list(report.step_seconds)
    assert back["flops"] == {"model": 5 * 10**15, "hardware": 6 * 10**15, "recompute_overhead": 0.2}
    assert (back["fits"], back["exposed_fraction"], back["format_version"]) == (True, 0.02, 2)
    assert back["largest_collectives"][0]["axes"] == ["fsdp"]
    assert {f.name for f in dataclasses.fields(report)} <= set(back)


@pytest.fixture(scope="module")
def compiled() -> CompiledProgram:
    return trace_training(text_run(mesh=MeshConfig(data=2, fsdp=2, tensor=2)), TOPOLOGY).compile()


def test_a_report_of_a_compiled_program_is_complete(compiled: CompiledProgram) -> None:
    config = compiled.program.spec.config
    report = make_report(compiled, config)
    json.dumps(report.to_json(), allow_nan=False)
    assert (report.name, report.program, report.topology, report.chips) == ("small", "train", "cpu:8", 8)
    assert report.mesh == "data=2, fsdp=2, tensor=2"
    assert report.parameters == compiled.program.spec.model_def.num_params()
    assert report.simulated
    assert report.steps == config.steps
    assert {row.axes for row in report.traffic} >= {"fsdp"}
    assert sum(row.bytes for row in report.traffic) > 0
    assert all(0 <= row.exposed_seconds <= row.seconds * (1 + 1e-9) for row in report.traffic)
    assert report.timing.communication_seconds == pytest.approx(sum(row.seconds for row in report.traffic))
    assert report.timing.exposed_seconds == pytest.approx(sum(row.exposed_seconds for row in report.traffic))
    assert [row.bytes for row in report.traffic] == sorted((row.bytes for row in report.traffic), reverse=True)
    assert 0 < report.mfu[0] <= report.mfu[1] <= 0.85
    assert report.timing.hbm_seconds > 0
    assert report.largest_buffers


def test_a_fingerprint_identifies_the_program_and_its_topology(compiled: CompiledProgram) -> None:
    program = compiled.program
    repeated = trace_training(program.spec.config, TOPOLOGY)
    assert fingerprint(repeated) == fingerprint(program)
    other = trace_training(dataclasses.replace(program.spec.config, fsdp_gather="step"), TOPOLOGY)
    assert fingerprint(other) != fingerprint(program)
    assert fingerprint(dataclasses.replace(program, topology=parse_topology("h100:8"))) != fingerprint(program)
