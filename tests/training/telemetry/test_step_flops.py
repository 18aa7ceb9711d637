"""Operations counted from a step's own trace are those of its gradient, or are left to a trace of their own."""

import dataclasses

import jax
import pytest

from mplug2_jax.model.config import RematConfig, SpecialTokens
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.planning.programs import abstract_batch
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.state import RunSpec, make_run_spec
from mplug2_jax.training.step import jit_train_step
from mplug2_jax.training.telemetry.step_flops import count_gradient_flops, count_traced_step_flops
from tests.runs import small_model, small_run


def make_spec(config: RunConfig, **axes: int) -> RunSpec:
    return make_run_spec(config, SpecialTokens(begin=1, end=2, mask=3), make_mesh(MeshConfig(**axes), jax.devices()))


def test_a_steps_trace_holds_the_matmuls_of_its_gradient() -> None:
    """Those of contrast, too, which are computed in shards."""
    config = small_run(fsdp_gather="step")
    one = dataclasses.replace(config, streams={"pictures": config.streams["image_text"]})
    spec = make_spec(one, fsdp=4, tensor=2)
    batches = {name: abstract_batch(stream.data, spec) for name, stream in one.streams.items()}
    with jax.set_mesh(spec.mesh):
        traced = jit_train_step(spec).trace(spec.shapes, batches, spec.hyperparam_shapes)
    counted = count_traced_step_flops(spec, traced.jaxpr)
    assert counted is not None
    assert counted == count_gradient_flops(spec, one.streams, batches, remat=False)


@pytest.mark.parametrize(
    ("model", "axes"),
    [
        ({"remat": RematConfig(text="dots")}, {"fsdp": 8}),
        ({"attention": "splash"}, {"fsdp": 8}),
        ({}, {"fsdp": 4, "sequence": 2}),
    ],
)
def test_a_trace_that_holds_other_matmuls_is_not_counted(model: dict[str, object], axes: dict[str, int]) -> None:
    assert count_traced_step_flops(make_spec(small_run(model=small_model(**model)), **axes), None) is None
