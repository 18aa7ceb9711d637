"""The step: equal losses on any mesh, gradient accumulation, one compilation, a donated state, its randomness."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.config import ExampleConfig
from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.errors import UserError
from mplug2_jax.objectives.config import DistillationConfig, VlcConfig, VlmConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.config import OptimizerConfig, RunConfig, ScheduleConfig
from mplug2_jax.training.loop import data_position, device_batches, open_streams
from mplug2_jax.training.optim.schedule import make_schedule
from mplug2_jax.training.state import RunSpec, make_run_spec
from mplug2_jax.training.step import jit_train_step, make_train_step
from mplug2_jax.training.workdir import special_tokens
from tests.close import CHAIN, assert_close, assert_equal
from tests.runs import QUESTION, small_model, small_run, stream, text_run

ONE = MeshConfig(data=1, fsdp=1, tensor=1)
EIGHT = MeshConfig(fsdp=2, sequence=2, tensor=2)


def make_spec(config: RunConfig, tokenizer: Tokenizer, mesh: MeshConfig) -> RunSpec:
    devices = jax.devices() if mesh is EIGHT else jax.devices()[:1]
    return make_run_spec(config, special_tokens(tokenizer), make_mesh(mesh, devices))


def run(config: RunConfig, tokenizer: Tokenizer, mesh: MeshConfig, steps: int) -> tuple[Any, list[dict[str, float]]]:
    spec = make_spec(config, tokenizer, mesh)
    state, step = spec.init(), make_train_step(spec)
    batches, history = device_batches(open_streams(config, tokenizer), spec.mesh, 0), []
    for _ in range(steps):
        state, metrics = step(state, next(batches)[0])
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def all_streams_run() -> RunConfig:
    """Return a run with all objectives. A large eps keeps updates by gradients that are rounding noise negligible."""
    streams = {
        name: dataclasses.replace(small_run().streams[name], objectives=objectives)
        for name, objectives in (
            ("image_text", {"vlc": 1.0, "vlm": 1.0}), ("video_text", {"vlc": 1.0, "ilm": 1.0}), ("text", {"mlm": 0.5})
        )
    }  # fmt: skip
    model = small_model(attention_dropout=0.1)
    return small_run(streams=streams, model=model, optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-2))


@pytest.fixture(scope="module")
def one_device(tokenizer: Tokenizer):
    return run(all_streams_run(), tokenizer, ONE, 3)


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["layer", "step"])
def test_eight_devices_give_the_losses_of_one(one_device, tokenizer: Tokenizer, gather: Any) -> None:
    """Dropout, masking and hard negatives are on: randomness does not depend on the mesh."""
    state, history = run(dataclasses.replace(all_streams_run(), fsdp_gather=gather), tokenizer, EIGHT, 3)
    for actual, expected in zip(history, one_device[1], strict=True):
        assert_close(actual, expected, CHAIN)
    assert_close(state["params"], one_device[0]["params"], CHAIN)


@pytest.mark.slow
def test_every_objective_of_every_stream_is_reported_and_weighted(one_device) -> None:
    first = one_device[1][0]
    total = sum(
        weight * first[f"{name}/{objective}/loss"]
        for name, stream_config in all_streams_run().streams.items()
        for objective, weight in stream_config.objectives.items()
    )
    assert_close(first["loss"], total)


def answer_run(**overrides: Any) -> RunConfig:
    """Return a run of the release's question answering, whose loss is a plain mean over questions."""
    examples = ExampleConfig(instructions=QUESTION, instruction_length=12, target_length=6)
    return small_run(
        model=small_model(dropout=0.0), streams={"q": stream("video", 8, examples, answer=1.0)},
        evaluations={}, **overrides,
    )  # fmt: skip


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch(tokenizer: Tokenizer) -> None:
    full, full_history = run(answer_run(), tokenizer, ONE, 1)
    micro, micro_history = run(answer_run(grad_accum_steps=2), tokenizer, ONE, 1)
    assert_close(micro_history[0]["loss"], full_history[0]["loss"])
    assert_close(micro_history[0]["gradient_norm"], full_history[0]["gradient_norm"], CHAIN)
    assert_close(micro["opt"], full["opt"], CHAIN)


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gathering_per_step_equals_gathering_per_layer(tokenizer: Tokenizer, times: int) -> None:
    config = text_run(grad_accum_steps=times, optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-2))
    per_layer, per_layer_history = run(dataclasses.replace(config, fsdp_gather="layer"), tokenizer, EIGHT, 2)
    per_step, per_step_history = run(dataclasses.replace(config, fsdp_gather="step"), tokenizer, EIGHT, 2)
    for actual, expected in zip(per_step_history, per_layer_history, strict=True):
        assert_close(actual, expected)
    assert_close(per_step["params"], per_layer["params"])
    moves = [float(abs(p).max()) for p in jax.tree.leaves(per_step["opt"]) if p.ndim]
    assert max(moves) > 0


@pytest.mark.slow
def test_muon_gives_the_losses_of_one_device_on_eight_and_continues_from_a_checkpoint(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = text_run(optimizer=OptimizerConfig(kind="muon", learning_rate=1e-2, eps=1e-2))
    one, expected = run(config, tokenizer, ONE, 3)
    eight, history = run(config, tokenizer, EIGHT, 3)
    for actual, other in zip(history, expected, strict=True):
        assert_close(actual, other, CHAIN)
    assert_close(eight["params"], one["params"], CHAIN)

    spec = make_spec(config, tokenizer, EIGHT)
    moment = eight["opt"][1].inner_states["muon"].inner_state[0].mu["text"]["layers"]["mlp"]["up"]["kernel"]
    kernel = eight["params"]["text"]["layers"]["mlp"]["up"]["kernel"]
    assert moment.sharding == kernel.sharding
    assert kernel.addressable_shards[0].data.size == kernel.size // 4

    streams, step = open_streams(config, tokenizer), make_train_step(spec)
    batches, state = device_batches(streams, spec.mesh, 0), spec.init()
    for _ in range(2):
        state, _ = step(state, next(batches)[0])
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    checkpoints.save(state, data_position(2, streams))
    checkpoints.close()
    restored, _ = Checkpoints(tmp_path, config.checkpoint, read_only=True).restore(spec.shapes)
    state, _ = step(restored, next(batches)[0])
    assert_equal(state, eight)


def test_shards_are_initialized_on_their_devices(tokenizer: Tokenizer) -> None:
    spec = make_spec(answer_run(), tokenizer, EIGHT)
    state = spec.init()
    for array, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(spec.shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    kernel = state["params"]["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4  # over fsdp and tensor
    moment = jax.tree.leaves(state["opt"], is_leaf=lambda x: isinstance(x, dict))[1]
    assert moment["decoder"]["layers"]["mlp"]["up"]["kernel"].sharding == kernel.sharding
    single = make_spec(answer_run(), tokenizer, ONE).init()
    assert_close(state["params"], single["params"])


@pytest.mark.parametrize("kind", ["cosine", "linear", "rsqrt", "wsd", "released"])
def test_runs_with_other_seeds_and_learning_rates_share_a_program(kind: Any, tokenizer: Tokenizer) -> None:
    schedule = ScheduleConfig(
        kind=kind, warmup_steps=1, decay_steps=2 * (kind == "wsd"), end_lr=1e-5 * (kind != "rsqrt")
    )
    programs = []
    for seed, rate in ((0, 1e-3), (2**31 + 5, 2e-3)):
        optimizer = OptimizerConfig(learning_rate=rate, vision_learning_rate=rate / 2)
        config = text_run(seed=seed, optimizer=optimizer, schedule=schedule, steps=300)
        spec = make_spec(config, tokenizer, MeshConfig())
        batches = next(device_batches(open_streams(config, tokenizer), spec.mesh, 0))[0]
        programs.append(jit_train_step(spec).lower(spec.shapes, batches, spec.hyperparam_shapes).as_text())
        for group, peak in (("rest", rate), ("vision", rate / 2)):
            expected = make_schedule(schedule, peak, 300)
            for step in map(jnp.int32, (0, 2, 30, 299)):
                assert_close(spec.schedules[group](step), expected(step))
    assert programs[0] == programs[1]


def test_the_program_of_shapes_is_the_program_of_a_run(tokenizer: Tokenizer) -> None:
    """So plans can compile a run's program ahead of time."""
    config = text_run()
    spec = make_spec(config, tokenizer, EIGHT)
    batches = next(device_batches(open_streams(config, tokenizer), spec.mesh, 0))[0]
    with jax.set_mesh(spec.mesh):
        planned = jit_train_step(spec).lower(spec.shapes, batches, spec.hyperparam_shapes).as_text()
        assert make_train_step(spec).trace(spec.init(), batches).lower().as_text() == planned
        assert jit_train_step(spec).lower(spec.shapes, batches, spec.hyperparams).as_text() != planned


def test_the_step_compiles_once_and_donates_the_state(tokenizer: Tokenizer) -> None:
    config = answer_run()
    spec = make_spec(config, tokenizer, ONE)
    state, step = spec.init(), make_train_step(spec)
    batches = device_batches(open_streams(config, tokenizer), spec.mesh, 0)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        old_state = state
        batch = next(batches)[0]
        state, _ = step(state, batch)
        assert len(compiled) >= 1
        assert step.is_compiled(batch)  # with the options, so the bits, of the run's program
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old_state["params"]))
        compiled.clear()
        for _ in range(2):
            state, metrics = step(state, next(batches)[0])
        assert np.isfinite(float(metrics["loss"]))
        assert compiled == []
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.slow
def test_the_teacher_follows_and_its_queue_fills(tokenizer: Tokenizer) -> None:
    images = small_run().streams["image_text"]
    config = small_run(
        streams={"image_text": dataclasses.replace(images, objectives={"vlc": 1.0, "answer": 1.0})},
        evaluations={},
        tasks=TasksConfig(
            vlc=VlcConfig(queue_size=16),
            distillation=DistillationConfig(momentum=0.5, average_fusion=False, ramp_steps=4),
        ),
    )  # fmt: skip
    fresh = make_spec(config, tokenizer, ONE).init()
    start = jax.tree.map(np.asarray, fresh["params"])
    state, history = run(config, tokenizer, ONE, 3)
    assert all(np.isfinite(list(metrics.values())).all() for metrics in history)
    queue = state["queues"]["image_text"]
    assert int(queue.pointer) == 8  # 3 x 8 examples: once around and a half
    assert (np.asarray(queue.ids) >= 0).all()
    teacher = state["teacher"]
    # The first step's learning rate is 0, so the third EMA update is the first with changed parameters.
    for part, moves in (("vision", True), ("fusion", False)):
        same = [
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(teacher[part]), jax.tree.leaves(start[part]), strict=True)
        ]
        assert all(same) != moves


def test_a_queue_needs_a_teacher() -> None:
    from mplug2_jax.errors import UserError

    with pytest.raises(UserError, match=r"queue_size=16 is filled by a teacher: set config.tasks.distillation"):
        small_run(tasks=TasksConfig(vlc=VlcConfig(queue_size=16)))


@pytest.mark.parametrize("group", [3, 16])
def test_groups_of_negatives_divide_a_micro_batch(group: int) -> None:
    message = f"image_text: 8 examples per micro-batch are not a multiple of config.tasks.vlm.group_size={group}; use"
    with pytest.raises(UserError, match=message):
        small_run(tasks=TasksConfig(vlm=VlmConfig(group_size=group)))


def test_the_seed_changes_initialization_and_data_order(tokenizer: Tokenizer) -> None:
    a, b = answer_run(), answer_run(seed=1)
    first, second = (make_spec(config, tokenizer, ONE).init()["params"] for config in (a, b))
    assert not np.array_equal(first["decoder"]["embeddings"]["words"], second["decoder"]["embeddings"]["words"])
    ids = [open_streams(config, tokenizer)["q"].batch(0).arrays["example_id"].tolist() for config in (a, b)]
    assert ids[0] != ids[1]
