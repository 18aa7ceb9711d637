"""Programs of a run, compiled ahead of time: the same arrays as in training, and errors for what does not fit."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.loader import Stream
from data_pipelines.tokenizers import train_wordpiece
from mplug2_jax.errors import UserError
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.placement import put_batch
from mplug2_jax.planning.programs import (
    abstract_batch,
    get_topology_devices,
    load_special_tokens,
    make_run_spec_for_topology,
    trace_evaluation,
    trace_training,
)
from mplug2_jax.training.compilation import disable_cache
from mplug2_jax.training.config import RunConfig, TokenizerConfig
from mplug2_jax.training.state import make_run_spec
from tests.runs import small_run, text_run

TOPOLOGY = parse_topology("cpu:8")
MESH = MeshConfig(data=2, fsdp=2, sequence=1, tensor=2)


@pytest.mark.parametrize("mesh", [MeshConfig(), MESH, MeshConfig(fsdp=1, sequence=2, tensor=4)])
def test_abstract_batches_match_sharded_batches(mesh: MeshConfig) -> None:
    config = small_run(mesh=mesh)
    spec, tokenizer = make_run_spec_for_topology(config, TOPOLOGY), train_wordpiece(vocabulary_texts(60), 160)
    for name, stream in config.streams.items():
        real = put_batch(Stream(stream.data, tokenizer, name=name, seed=0).batch(0).arrays, spec.mesh)
        abstract = abstract_batch(stream.data, spec)
        assert abstract.keys() == real.keys()
        for key, array in real.items():
            assert (abstract[key].shape, abstract[key].dtype) == (array.shape, array.dtype), key
            assert abstract[key].sharding.is_equivalent_to(array.sharding, array.ndim), key


def test_an_evaluation_s_batch_has_a_mask() -> None:
    data = small_run().evaluations["questions"].data
    spec = make_run_spec_for_topology(text_run(), TOPOLOGY)
    mask = abstract_batch(data, spec, mask=True)["example_mask"]
    assert (mask.shape, mask.dtype) == ((8,), np.bool_)
    assert "example_mask" not in abstract_batch(data, spec)


def test_the_spec_is_that_of_training() -> None:
    config = text_run(mesh=MESH)
    spec = make_run_spec_for_topology(config, TOPOLOGY)
    trained = make_run_spec(config, load_special_tokens(config), spec.mesh)
    assert jax.tree.map(str, spec.shapes) == jax.tree.map(str, trained.shapes)
    assert spec.mesh.devices.size == 8


def test_bert_s_ids_replace_a_missing_tokenizer() -> None:
    missing = small_run(tokenizer=TokenizerConfig(path="/nowhere/vocab.txt"))
    assert load_special_tokens(missing).mask == 103
    assert load_special_tokens(small_run()) != load_special_tokens(missing)


def test_a_traced_step_names_its_arguments() -> None:
    program = trace_training(text_run(mesh=MESH), TOPOLOGY)
    assert (program.name, program.topology) == ("train", TOPOLOGY)
    assert set(program.batches) == {"text"}
    assert set(program.state) == {"params", "opt", "step"}
    assert program.trace_seconds > 0


def test_programs_of_a_plan_are_not_taken_from_the_cache() -> None:
    """Check that the cache, which would hide the compile time, is disabled, and enabled again afterwards."""
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    try:
        with disable_cache():
            jax.jit(lambda x: x * 3 + 1)(np.ones(7))
        assert not [event for event in events if event.endswith(("cache_hits", "compile_requests_use_cache"))]
        jax.jit(lambda x: x * 5 + 1)(np.ones(7))
        assert [event for event in events if event.endswith("compile_requests_use_cache")]
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (text_run(mesh=MeshConfig(data=3)), "config.mesh.data=3, config.mesh.fsdp=-1: 3 does not divide the 8 devices"),
        (text_run(mesh=MeshConfig(fsdp=4)), "config.mesh.fsdp=4 needs 4 devices, but there are 8"),
        (
            text_run(grad_accum_steps=2),
            "config.streams.text.data.batch_size / config.grad_accum_steps=4 does not split over the",
        ),
    ],
)
def test_errors_of_runs_that_do_not_fit(config: RunConfig, message: str) -> None:
    with pytest.raises(UserError) as caught:
        trace_training(config, TOPOLOGY)
    assert message in str(caught.value)


def test_the_error_of_objectives_that_read_missing_inputs() -> None:
    stream = text_run().streams["text"]
    textless = dataclasses.replace(stream.data, examples=dataclasses.replace(stream.data.examples, text_length=0))
    with pytest.raises(UserError, match=r"config\.streams\.text: task 'mlm' reads text"):
        trace_training(text_run(streams={"text": dataclasses.replace(stream, data=textless)}), TOPOLOGY)


def test_errors_of_evaluations() -> None:
    with pytest.raises(UserError, match=r"--evaluation question: did you mean 'questions'\? \(valid: questions\)"):
        trace_evaluation(small_run(), TOPOLOGY, "question")
    with pytest.raises(UserError, match=r"task 'answer' needs the parts decoder, .*, which this model lacks \(it has"):
        trace_evaluation(text_run(evaluations=small_run().evaluations), TOPOLOGY, "questions")
    heldout = small_run().evaluations["questions"]
    indivisible = dataclasses.replace(heldout, data=dataclasses.replace(heldout.data, batch_size=6))
    with pytest.raises(UserError, match=r"config\.evaluations\.questions\.data\.batch_size=6 does not split over"):
        trace_evaluation(small_run(evaluations={"questions": indivisible}), TOPOLOGY, "questions")


def test_simulated_devices_are_limited_by_those_of_jax() -> None:
    assert get_topology_devices(parse_topology("cpu:4")) == jax.devices()[:4]
    assert len(get_topology_devices(parse_topology("h100:8"))) == 8
    with pytest.raises(UserError, match="is planned on 64 simulated CPU devices, but JAX was started with 8; unset"):
        get_topology_devices(parse_topology("h100:64"))


@pytest.mark.parametrize(
    ("name", "slices", "kind"),
    [
        ("v5e:1x1", 1, "TPU v5 lite"), ("v6e:1x1", 1, "TPU v6 lite"), ("v5p:2x2x1", 1, "TPU v5"),
        ("v4:2x2x1", 1, "TPU v4"), ("tpu7x:2x2x1", 1, "TPU7x"), ("v5e:2x4", 3, "TPU v5 lite"),
    ],
)  # fmt: skip
def test_tpu_devices_are_libtpu_s(name: str, slices: int, kind: str) -> None:
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPU topologies, is not installed here")
    topology = parse_topology(name, slices)
    devices = get_topology_devices(topology)
    assert len(devices) == topology.devices
    assert {device.device_kind for device in devices} == {kind}
    assert kind in topology.chip.device_kinds
