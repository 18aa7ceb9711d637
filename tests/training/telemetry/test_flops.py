"""Counted operations against closed forms and against what XLA says of the compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mplug2_jax.model.config import model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.objectives.language import caption_loss
from mplug2_jax.training.telemetry.flops import count_flops, training_flops

X = jax.ShapeDtypeStruct((5, 7), "float32")
W = jax.ShapeDtypeStruct((7, 7), "float32")
PRODUCT = 2 * 5 * 7 * 7


def xla_flops(fn, *args):
    """Return what XLA counts in the compiled program; it counts loops once, and element-wise work too."""
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_a_matmul_is_two_operations_for_each_multiply_add():
    assert count_flops(lambda x, w: x @ w, X, W).total() == PRODUCT
    assert count_flops(lambda x, w: x @ w, X, W).total() == xla_flops(lambda x, w: x @ w, X, W)


def test_batched_and_contracted_dimensions_count_as_they_multiply():
    a, b = jax.ShapeDtypeStruct((2, 3, 4, 5), "float32"), jax.ShapeDtypeStruct((2, 3, 6, 5), "float32")
    assert count_flops(lambda a, b: jnp.einsum("xyij,xykj->xyik", a, b), a, b).total() == 2 * (2 * 3) * 4 * 6 * 5
    assert count_flops(lambda a, b: jnp.einsum("xyij,xykj->ik", a, b), a, b).total() == 2 * 4 * 6 * (2 * 3 * 5)


def test_element_wise_work_is_not_counted():
    assert count_flops(lambda x: jnp.tanh(x).sum() + (x * x).mean(), X).total() == 0


def test_a_loop_counts_its_body_as_often_as_it_runs():
    def looped(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=11)[0]

    def nested(x, w):
        return jax.lax.scan(lambda x, _: (looped(x, w), None), x, length=3)[0]

    assert count_flops(looped, X, W).total() == 11 * PRODUCT
    assert count_flops(nested, X, W).total() == 3 * 11 * PRODUCT
    unrolled = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=11, unroll=11)[0]  # noqa: E731
    assert xla_flops(unrolled, X, W) == 11 * PRODUCT


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.vmap], ids=["jit", "checkpoint", "vmap"])
def test_programs_inside_programs_are_counted(wrap):
    inner = wrap(lambda x, w: jnp.sin(x @ w))
    if wrap is jax.vmap:
        args = [jax.ShapeDtypeStruct((4, *x.shape), x.dtype) for x in (X, W)]
        assert count_flops(inner, *args).total() == 4 * PRODUCT
    else:
        assert count_flops(lambda x, w: inner(x, w) + 1, X, W).total() == PRODUCT


def test_gradients_and_recomputation_are_counted_as_they_are_traced():
    def layer(w, x):
        return jnp.sin(x @ w) @ w

    def count(layer):
        return count_flops(jax.value_and_grad(lambda w, x: layer(w, x).sum()), W, X).total() / PRODUCT

    # Two products forward; backward one for the first's output and two for the weight; x itself needs none.
    assert count(layer) == 2 + 3
    assert count(jax.checkpoint(layer)) == 2 + 1 + 3  # the first product is computed again
    assert training_flops(layer, W, X) == 3 * 2 * PRODUCT


def test_named_scopes_split_the_count_by_the_outermost():
    def program(x, w):
        with jax.named_scope("vision"):
            x = x @ w
            with jax.named_scope("mlp"):
                x = jax.lax.scan(lambda x, _: (x @ w, None), x, length=4)[0]
        with jax.named_scope("text"):
            x = jax.jit(jnp.matmul)(x, w)
        return x @ w

    assert count_flops(program, X, W) == {"vision": 5 * PRODUCT, "text": PRODUCT, "": PRODUCT}


def test_counting_runs_nothing_and_needs_no_memory():
    huge = jax.ShapeDtypeStruct((10**6, 10**6), "float32")
    assert count_flops(lambda a: a @ a, huge).total() == 2 * 10**18


# Wide enough that element-wise work, which XLA counts and we do not, is below 3 %.
MODEL = model_config(
    "tiny", dtype="float32", width=512, heads=4, mlp_width=2048, vision_width=512, vision_layers=2, universal_layers=1,
    decoder_layers=2,
)  # fmt: skip


def caption_program(unroll):
    """Return a caption loss without dropout, and its abstract arguments."""
    model_def = define_model(dataclasses.replace(MODEL, scan_unroll=unroll), ("vision", "universal", "decoder"))
    batch = {
        "frames": jax.ShapeDtypeStruct((2, 1, 32, 32, 3), "uint8"),
        "target": jax.ShapeDtypeStruct((2, 32), "int32"),
        "target_weights": jax.ShapeDtypeStruct((2, 32), "float32"),
    }
    return lambda params, batch: caption_loss(ForwardPass(model_def.bind(params), batch)).loss, (
        model_def.shapes,
        batch,
    )


@pytest.mark.parametrize("differentiate", [False, True], ids=["loss", "gradient"])
def test_a_models_count_is_within_3_percent_of_xlas(differentiate):
    loss, arguments = caption_program(unroll=MODEL.vision_layers)
    program = jax.value_and_grad(loss) if differentiate else loss
    ours, theirs = count_flops(program, *arguments).total(), xla_flops(program, *arguments)
    assert 0.97 * theirs < ours <= theirs


def test_scanned_layers_count_as_unrolled_ones_and_training_as_three_forwards():
    scanned, arguments = caption_program(unroll=1)
    unrolled, _ = caption_program(unroll=MODEL.vision_layers)
    assert count_flops(scanned, *arguments) == count_flops(unrolled, *arguments)
    gradient = count_flops(jax.value_and_grad(scanned), *arguments).total()
    assert training_flops(scanned, *arguments) == gradient


def test_a_shards_work_counts_for_every_shard_and_once_where_it_is_replicated():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    x = jax.ShapeDtypeStruct((8, 7), "float32")
    product = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(split, whole), out_specs=split)
    assert count_flops(product, x, W).total() == 2 * 8 * 7 * 7
