"""Programs of a run for machines that need not be here: the same arrays as in training, and sentences for the rest."""

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
    blueprint,
    evaluation_program,
    get_topology_devices,
    tokens_of,
    training_program,
)
from mplug2_jax.training.compilation import disable_cache
from mplug2_jax.training.config import RunConfig, TokenizerConfig
from mplug2_jax.training.state import make_run_spec
from tests.runs import small_run

TOPOLOGY = parse_topology("cpu:8")
SPLIT = MeshConfig(data=2, fsdp=2, sequence=1, tensor=2)


def texts(**fields) -> RunConfig:
    chosen = dataclasses.replace(small_run().streams["text"], objectives={"mlm": 1.0})
    return small_run(**({"streams": {"text": chosen}, "evaluations": {}} | fields))


@pytest.mark.parametrize("mesh", [MeshConfig(), SPLIT, MeshConfig(fsdp=1, sequence=2, tensor=4)])
def test_abstract_batches_are_what_is_put_on_the_mesh(mesh: MeshConfig) -> None:
    config = small_run(mesh=mesh)
    spec, tokenizer = blueprint(config, TOPOLOGY), train_wordpiece(vocabulary_texts(60), 160)
    for name, stream in config.streams.items():
        real = put_batch(Stream(stream.data, tokenizer, name=name, seed=0).batch(0).arrays, spec.mesh)
        said = abstract_batch(stream.data, spec)
        assert said.keys() == real.keys()
        for key, array in real.items():
            assert (said[key].shape, said[key].dtype) == (array.shape, array.dtype), key
            assert said[key].sharding.is_equivalent_to(array.sharding, array.ndim), key


def test_an_evaluation_s_batch_says_which_rows_count() -> None:
    data = small_run().evaluations["questions"].data
    spec = blueprint(texts(), TOPOLOGY)
    said = abstract_batch(data, spec, mask=True)
    assert (said["example_mask"].shape, said["example_mask"].dtype) == ((8,), np.bool_)
    assert "example_mask" not in abstract_batch(data, spec)


def test_the_plan_is_the_training_s() -> None:
    config = texts(mesh=SPLIT)
    spec = blueprint(config, TOPOLOGY)
    trained = make_run_spec(config, tokens_of(config), spec.mesh)
    assert jax.tree.map(str, spec.shapes) == jax.tree.map(str, trained.shapes)
    assert spec.mesh.devices.size == 8


def test_bert_s_ids_stand_in_for_a_tokeniser_that_is_elsewhere() -> None:
    away = small_run(tokenizer=TokenizerConfig(path="/nowhere/vocab.txt"))
    assert tokens_of(away).mask == 103
    assert tokens_of(small_run()) != tokens_of(away)


def test_a_traced_step_keeps_what_it_was_traced_for() -> None:
    program = training_program(texts(mesh=SPLIT), TOPOLOGY)
    assert (program.name, program.topology) == ("train", TOPOLOGY)
    assert set(program.batches) == {"text"}
    assert set(program.state) == {"params", "opt", "step"}
    assert program.seconds > 0


def test_what_is_compiled_for_a_plan_is_compiled_anew() -> None:
    """A program that the cache has would tell nothing of its compile time; afterwards the cache is back."""
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
    ("config", "sentence"),
    [
        (texts(mesh=MeshConfig(data=3)), "config.mesh.data=3, config.mesh.fsdp=-1: 3 does not divide the 8 devices"),
        (texts(mesh=MeshConfig(fsdp=4)), "config.mesh.fsdp=4 needs 4 devices, but there are 8"),
        (
            texts(grad_accum_steps=2),
            "config.streams.text.data.batch_size / config.grad_accum_steps=4 does not split over the",
        ),
    ],
)
def test_what_does_not_fit_the_machine_is_a_sentence(config: RunConfig, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        training_program(config, TOPOLOGY)
    assert sentence in str(caught.value)


def test_objectives_that_read_what_no_batch_brings_are_a_sentence() -> None:
    chosen = texts().streams["text"]
    silent = dataclasses.replace(chosen.data, examples=dataclasses.replace(chosen.data.examples, text_length=0))
    with pytest.raises(UserError, match=r"config\.streams\.text: task 'mlm' reads text"):
        training_program(texts(streams={"text": dataclasses.replace(chosen, data=silent)}), TOPOLOGY)


def test_an_unknown_evaluation_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"--evaluation question: did you mean 'questions'\? \(valid: questions\)"):
        evaluation_program(small_run(), TOPOLOGY, "question")
    with pytest.raises(UserError, match=r"task 'answer' needs the parts decoder, .*, which this model lacks \(it has"):
        evaluation_program(texts(evaluations=small_run().evaluations), TOPOLOGY, "questions")
    heldout = small_run().evaluations["questions"]
    odd = dataclasses.replace(heldout, data=dataclasses.replace(heldout.data, batch_size=6))
    with pytest.raises(UserError, match=r"config\.evaluations\.questions\.data\.batch_size=6 does not split over"):
        evaluation_program(small_run(evaluations={"questions": odd}), TOPOLOGY, "questions")


def test_simulated_devices_are_as_many_as_jax_was_started_with() -> None:
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
def test_devices_of_tpus_are_libtpu_s(name: str, slices: int, kind: str) -> None:
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPU topologies, is not installed here")
    topology = parse_topology(name, slices)
    devices = get_topology_devices(topology)
    assert len(devices) == topology.devices
    assert {device.device_kind for device in devices} == {kind}
    assert kind in topology.chip.device_kinds
