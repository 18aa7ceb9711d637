"""A report as plain data, and of a program that was compiled."""

import dataclasses
import json

import pytest

from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning.programs import Compiled, training_program
from mplug2_jax.planning.report import fingerprint, make_report
from tests.planning.reports import GIB, report
from tests.runs import small_run

TOPOLOGY = parse_topology("cpu:8")


def test_what_follows_from_the_times() -> None:
    one = report()
    floor, ceiling = one.seconds
    assert (floor, ceiling) == (pytest.approx(1 / 0.85), 2.02)
    assert one.days == (floor, ceiling)  # of as many steps as a day has seconds
    assert one.chip_hours == (floor * 24 * 8, ceiling * 24 * 8)
    assert one.examples_per_second == (64 / ceiling, 64 / floor)


def test_plain_data_is_json_and_comes_back() -> None:
    plain = report().as_json()
    back = json.loads(json.dumps(plain, allow_nan=False))
    assert back.keys() == plain.keys()
    assert back["memory"]["parts"]["optimiser"] == 4 * GIB
    assert back["examples"] == {"clips": 48, "text": 16}
    assert back["seconds"] == list(report().seconds)
    assert back["flops"] == {"step": 5 * 10**15, "executed": 6 * 10**15, "overhead": 0.2}
    assert (back["fits"], back["exposed_share"]) == (True, 0.02)
    assert back["largest_collectives"][0]["axes"] == ["fsdp"]
    assert {f.name for f in dataclasses.fields(report())} <= set(back)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    text = small_run().streams["text"]
    streams = {"text": dataclasses.replace(text, objectives={"mlm": 1.0})}
    config = small_run(mesh=MeshConfig(data=2, fsdp=2, tensor=2), streams=streams, evaluations={})
    return training_program(config, TOPOLOGY).compile()


def test_a_compiled_program_s_report_is_whole(compiled: Compiled) -> None:
    config = compiled.program.spec.config
    made = make_report(compiled, config)
    json.dumps(made.as_json(), allow_nan=False)
    assert (made.name, made.program, made.topology, made.chips) == ("small", "train", "cpu:8", 8)
    assert made.mesh == "data=2, fsdp=2, tensor=2"
    assert made.parameters == compiled.program.spec.definition.num_params()
    assert made.simulated
    assert made.steps == config.steps
    assert {row.axes for row in made.traffic} >= {"fsdp"}
    assert sum(row.bytes for row in made.traffic) > 0
    assert all(0 <= row.exposed <= row.seconds * (1 + 1e-9) for row in made.traffic)
    assert made.timing.network == pytest.approx(sum(row.seconds for row in made.traffic))
    assert made.timing.exposed == pytest.approx(sum(row.exposed for row in made.traffic))
    assert [row.bytes for row in made.traffic] == sorted((row.bytes for row in made.traffic), reverse=True)
    assert 0 < made.mfu[0] <= made.mfu[1] <= 0.85
    assert made.timing.memory > 0
    assert made.largest_arrays


def test_a_fingerprint_is_of_the_program_and_its_machine(compiled: Compiled) -> None:
    program = compiled.program
    again = training_program(program.spec.config, TOPOLOGY)
    assert fingerprint(again) == fingerprint(program)
    other = training_program(dataclasses.replace(program.spec.config, fsdp_gather="step"), TOPOLOGY)
    assert fingerprint(other) != fingerprint(program)
    assert fingerprint(dataclasses.replace(program, topology=parse_topology("h100:8"))) != fingerprint(program)
