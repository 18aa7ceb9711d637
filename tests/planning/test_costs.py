"""Operations by stream, tower and objective: they add up, scale with the batch, and are XLA's to 3 %."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from mplug2_jax.model.config import RematConfig
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning.costs import Costs, prediction_costs, training_costs
from mplug2_jax.planning.programs import abstract_batch, blueprint, evaluation_program
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.step import streams_loss
from mplug2_jax.training.telemetry.flops import count_flops
from mplug2_jax.training.telemetry.step_flops import count_gradient_flops
from tests.runs import small_model, small_run

TOPOLOGY = parse_topology("cpu:8")


def only_text(objectives: dict[str, float] | None = None, **fields) -> RunConfig:
    chosen = dataclasses.replace(small_run().streams["text"], objectives=objectives or {"mlm": 1.0})
    return small_run(**({"streams": {"text": chosen}, "evaluations": {}} | fields))


def planned(config: RunConfig):
    plan = blueprint(config, TOPOLOGY)
    return plan, {name: abstract_batch(s.data, plan) for name, s in config.streams.items()}


def gradient(config: RunConfig, *, remat: bool = False) -> int:
    plan, batches = planned(config)
    return count_gradient_flops(plan, config.streams, batches, remat=remat).total()


@functools.cache
def whole() -> Costs:
    return training_costs(*planned(small_run()))


@functools.cache
def text() -> Costs:
    return training_costs(*planned(only_text({"mlm": 1.0, "ilm": 0.5})))


def resized(config: RunConfig, times: int) -> RunConfig:
    def larger(each):
        return dataclasses.replace(each, data=dataclasses.replace(each.data, batch_size=times * each.data.batch_size))

    return dataclasses.replace(config, streams={name: larger(each) for name, each in config.streams.items()})


def all_kept(kind: str) -> RematConfig:
    return RematConfig(**dict.fromkeys(("vision", "text", "fusion", "decoder"), kind))


def loss_and_arguments(config: RunConfig):
    """The loss as a step has it, on one device."""
    plan, batches = planned(config)

    def loss(params, batches):
        return streams_loss(plan, params, None, {}, batches, jax.random.key(0), jnp.zeros(()))[0]

    arguments = (plan.definition.shapes, batches)
    return loss, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)


def added_up(config: RunConfig, costs: Costs) -> None:
    loss, arguments = loss_and_arguments(config)
    assert costs.step == count_flops(jax.value_and_grad(loss), *arguments).total()
    for name, chosen in config.streams.items():
        total = sum(costs.towers[name].values())
        assert set(costs.objectives[name]) == set(chosen.objectives)
        assert all(0 < alone <= total for alone in costs.objectives[name].values())
        assert sum(costs.objectives[name].values()) >= total  # what they share, each would pay for
        assert all(count > 0 for count in costs.towers[name].values())


def test_towers_add_up_to_the_gradient() -> None:
    costs = training_costs(*planned(only_text()))
    added_up(only_text(), costs)
    assert "text" in costs.towers["text"]
    assert not {"vision", "decoder"} & set(costs.towers["text"])
    assert (costs.recomputed, costs.overhead, costs.executed) == (0, 0, costs.step)


@pytest.mark.slow
def test_no_objective_alone_is_more_than_its_stream() -> None:
    added_up(only_text({"mlm": 1.0, "ilm": 0.5}), text())
    assert {"text", "decoder"} <= set(text().towers["text"])


@pytest.mark.slow
def test_towers_of_all_streams_add_up_to_the_gradient_of_the_whole_loss() -> None:
    added_up(small_run(), whole())
    assert {"vision", "text", "universal", "fusion", "decoder"} <= set(whole().towers["image_text"])
    pictures, clips = (whole().towers[name]["vision"] for name in ("image_text", "video_text"))
    assert clips > 2 * pictures  # two frames, and what joins them
    assert whole().towers["text"] == text().towers["text"]  # whatever stands beside it


def test_twice_the_batch_is_twice_the_work() -> None:
    assert gradient(resized(only_text(), 2)) == 2 * gradient(only_text())


@pytest.mark.slow
def test_similarities_of_all_with_all_are_four_times_as_many_for_twice_the_batch() -> None:
    doubled = training_costs(*planned(resized(small_run(), 2)))
    for name, towers in whole().towers.items():
        for tower, count in towers.items():
            more = doubled.towers[name][tower]
            assert (2 * count <= more <= 4 * count) if tower == "objectives" else more == 2 * count, (name, tower)


@pytest.mark.slow
def test_what_is_not_kept_is_computed_again() -> None:
    plain = gradient(only_text())
    none, dots, full = (
        gradient(only_text(model=small_model(remat=all_kept(kind))), remat=True) for kind in ("none", "dots", "full")
    )
    assert plain == none < dots < full < 4 / 3 * plain + 1  # a forward pass is a third of forward and backward
    assert gradient(only_text(model=small_model(remat=all_kept("full")))) == plain  # what the maths needs stays


@pytest.mark.slow
def test_what_is_computed_again_is_told_apart() -> None:
    again = training_costs(*planned(only_text(model=small_model(remat=all_kept("full")))))
    assert again.recomputed > 0
    assert again.executed == again.step + again.recomputed
    assert again.overhead == again.recomputed / again.step


def test_the_mesh_gathers_and_kernels_leave_the_count_alone() -> None:
    mesh = MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)
    other = only_text(mesh=mesh, fsdp_gather="step", model=small_model(attention="splash"))
    assert gradient(other) == gradient(only_text())


def test_a_stream_s_count_is_within_3_percent_of_xla_s(optimized: None) -> None:
    """Wide enough that element-wise work, which XLA counts and we do not, is little."""
    model = small_model(
        width=256, mlp_width=1024, scan_unroll=2, dropout=0.0, attention_dropout=0.0, attention="xla"
    )  # fmt: skip
    config = only_text(model=model)
    loss, arguments = loss_and_arguments(config)
    theirs = jax.jit(jax.grad(loss)).lower(*arguments).compile().cost_analysis()["flops"]
    assert gradient(config) == pytest.approx(theirs, rel=0.03)


@pytest.mark.slow
def test_a_search_counts_to_its_greatest_length() -> None:
    counts = []
    for longest in (3, 5):
        config = small_run()
        tasks = dataclasses.replace(
            config.tasks, search=dataclasses.replace(config.tasks.search, max_length=longest)
        )  # fmt: skip
        program = evaluation_program(dataclasses.replace(config, tasks=tasks), TOPOLOGY, "questions")
        costs = prediction_costs(program)
        assert set(costs.towers) == {"questions"}
        assert (costs.recomputed, costs.objectives) == (0, {})
        counts.append(costs.towers["questions"])
    assert counts[0]["vision"] == counts[1]["vision"]
    assert counts[0]["decoder"] < counts[1]["decoder"]
