import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2_jax.model.config import model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.model.taps import Taps
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.placement import make_param_shardings
from tests.close import BFLOAT16, assert_close

CAPTION = ("vision", "temporal", "universal", "decoder")
QUESTION = ("vision", "temporal", "text", "universal", "fusion", "decoder")
EVERYTHING = (*QUESTION, "mlm", "contrastive", "matching")


@pytest.mark.parametrize(
    ("size", "parts", "count"),
    [
        ("base", QUESTION, 379_952_442),
        ("large", QUESTION, 1_031_533_370),
        ("base", CAPTION, 256_881_210),
        ("large", CAPTION, 621_853_498),
    ],
)
def test_parameter_counts_are_those_that_the_releases_gradient_reaches(size, parts, count):
    assert define_model(model_config(size), parts).num_params() == count


@pytest.mark.parametrize(
    ("parts", "present", "absent"),
    [
        (("text", "universal", "mlm"), {"text", "universal", "mlm"}, {"latents", "cross_attention", "visual_norm"}),
        (("vision", "universal", "classifier"), {"vision", "universal", "latents"}, {"temporal_1", "decoder", "text"}),
        (CAPTION, {"temporal_1", "decoder"}, {"text", "fusion", "contrastive"}),
    ],
)
def test_unused_parts_have_no_parameters(parts, present, absent):
    shapes = define_model(model_config("tiny", num_classes=10), parts).shapes
    keys = {str(key.key) for path, _ in jax.tree_util.tree_leaves_with_path(shapes) for key in path}
    assert present <= keys
    assert not absent & keys


def test_every_parameter_has_a_name_per_axis():
    model_def = define_model(model_config("tiny", num_classes=10), (*EVERYTHING, "classifier"))
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    axes = jax.tree.leaves(model_def.logical_axes, is_leaf=is_axes)
    shapes = jax.tree.leaves(model_def.shapes)
    assert [len(a) for a in axes] == [len(s.shape) for s in shapes]


def test_16_bit_compute_has_float32_parameters():
    model_def = define_model(model_config("tiny", dtype="bfloat16", dropout=0.0), QUESTION)
    params = jax.jit(model_def.init)(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    images = jnp.zeros((1, 1, 32, 32, 3), jnp.uint8)
    tokens = jax.eval_shape(lambda p: model_def.bind(p).encode_visual(images), params)
    assert tokens.dtype == jnp.bfloat16


def test_16_bit_compute_is_close_to_float32():
    params = jax.jit(define_model(model_config("tiny"), CAPTION).init)(jax.random.key(0))
    clip = jax.random.randint(jax.random.key(1), (2, 3, 32, 32, 3), 0, 256).astype(jnp.uint8)

    def tokens(dtype):
        model_def = define_model(model_config("tiny", dtype=dtype), CAPTION)
        return jax.jit(lambda p: model_def.bind(p).encode_visual(clip))(params)

    assert_close(tokens("bfloat16"), tokens("float32"), BFLOAT16)


def test_taps_have_the_requested_intermediates_and_no_effect():
    model_def = define_model(model_config("tiny", dtype="float32"), CAPTION)
    params = jax.jit(model_def.init)(jax.random.key(0))
    clip = jnp.ones((1, 2, 32, 32, 3))
    taps = Taps(["vision/block", "visual/out"])

    @jax.jit
    def run(params):
        return model_def.bind(params).encode_visual(clip, taps=taps), dict(taps)

    out, tapped = run(params)
    assert set(tapped) == {"vision/block", "visual/out"}
    assert tapped["vision/block"].shape == (4, 2, 17, 128)
    np.testing.assert_array_equal(tapped["visual/out"], out)

    def program(taps):
        return str(jax.make_jaxpr(lambda p: model_def.bind(p).encode_visual(clip, taps=taps))(params))

    assert program(None) == program(Taps([]))


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_large_model_is_initialized_in_shards():
    from tests.tpu import LOW_EFFORT, topology_mesh

    mesh = topology_mesh("v5p:2x2x2", MeshConfig())
    model_def = define_model(model_config("large"), QUESTION)
    sharded = make_param_shardings(model_def.shapes, model_def.logical_axes, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        compiled = jax.jit(model_def.init, out_shardings=sharded.shardings).lower(key).compile(LOW_EFFORT)
    memory = compiled.memory_analysis()
    total = 4 * model_def.num_params()
    assert memory.output_size_in_bytes < 1.1 * total / 8
    assert memory.temp_size_in_bytes < 0.1 * total
