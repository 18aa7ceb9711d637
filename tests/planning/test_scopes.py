"""Scopes of the model from operation names, and that every matmul of the model has one."""

import jax
import pytest

from mplug2_jax.model.config import model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.objectives.language import caption_loss
from mplug2_jax.planning.scopes import pretty_scope
from mplug2_jax.training.telemetry.flops import count_flops


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(step)/jvp(vision)/while/body/closed_call/checkpoint/mlp/dot_general", "vision/mlp"),
        ("jit(step)/jvp(vision/blocks)/mlp/dot_general", "vision/blocks/mlp"),
        ("jit(step)/transpose(jvp(vision))/while/body/closed_call/mlp/dot_general", "vision/mlp (backward)"),
        (
            "jit(step)/transpose(jvp(vision))/while/body/checkpoint/rematted_computation/mlp/jit(gelu)/mul",
            "vision/mlp (recomputed)",
        ),
        ("jit(step)/jvp()/while/body/reduce_sum", "reduce_sum"),
        ("jit(step)/transpose(jvp())/while/body/add", "add (backward)"),
        ("jit(step)/decoder/attention/bhls,bhsk->bhlk/dot_general", "decoder/attention"),
        ("jit(step)/vmap(jit(inner))/text/cond/branch_1_fun/tanh", "text"),
        ("jit(step)/jvp(vision)/while", "vision"),
        ("state['params']['vision']", "state['params']['vision']"),
        ("copy.9", "copy.9"),
    ],
)
def test_scopes_are_the_models(op_name, scope):
    assert pretty_scope(op_name) == scope


def test_every_matmul_of_the_model_is_in_a_scope():
    config = model_config("tiny")
    model_def = define_model(config, ("vision", "temporal", "universal", "decoder"))
    batch = {
        "frames": jax.ShapeDtypeStruct((2, 2, config.image_size, config.image_size, 3), "uint8"),
        "target": jax.ShapeDtypeStruct((2, 4), "int32"),
        "target_weights": jax.ShapeDtypeStruct((2, 4), "float32"),
    }

    def loss(params, batch):
        return caption_loss(ForwardPass(model_def.bind(params), batch)).loss

    counts = count_flops(loss, model_def.shapes, batch)
    assert set(counts) == {"vision", "universal", "decoder"}
