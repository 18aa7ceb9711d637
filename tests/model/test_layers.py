import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mplug2_jax.model.config import model_config
from mplug2_jax.model.layers import BertLayer, LayerNorm, dropout, matmul, scan_layers, slice_layers, stack_layers
from tests.close import assert_close

CONFIG = model_config("tiny", dtype="float32", width=32, heads=4, mlp_width=64)


@pytest.fixture(scope="module")
def layers():
    with nnx.use_eager_sharding(False):
        return stack_layers(lambda r: BertLayer(CONFIG, cross=False, rngs=r), 3, nnx.Rngs(0))


def body(layer, x, key, _extra):
    return layer(x, rng=key), None


@pytest.mark.parametrize("tied", [False, True])
def test_matmul_has_the_values_and_gradients_of_a_product(tied):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    weight = jax.random.normal(jax.random.key(1), (5, 4) if tied else (4, 5))
    out = jax.random.normal(jax.random.key(2), (2, 3, 5))

    def custom(x, w):
        return jnp.sum(matmul(x, w, tied=tied) * out)

    def reference(x, w):
        return jnp.sum((x @ (w.T if tied else w)) * out)

    assert_close(jax.value_and_grad(custom, (0, 1))(x, weight), jax.value_and_grad(reference, (0, 1))(x, weight))


def test_matmul_gives_float32_gradients_to_float32_weights_of_16_bit_compute():
    x = jax.random.normal(jax.random.key(0), (512, 4)).astype(jnp.bfloat16)
    weight = jnp.ones((4, 2), jnp.float32)
    grad = jax.grad(lambda w: matmul(x, w).astype(jnp.float32).sum())(weight)
    assert grad.dtype == jnp.float32
    assert matmul(x, weight).dtype == jnp.bfloat16
    # Rounded to 16 bits, these sums of 512 numbers would be off by about 1e-2.
    assert_close(grad[:, 0], np.asarray(x, np.float64).sum(0))


def test_layer_norm_computes_in_float32_and_returns_its_input_dtype():
    with nnx.use_eager_sharding(False):
        norm = LayerNorm(8, 1e-12, rngs=nnx.Rngs(0))
    x = 1000 + jax.random.normal(jax.random.key(0), (3, 8))
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    assert_close(norm(x), expected, 1e-6, scale=1000)  # which the mean cancels
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout_is_a_function_of_its_key():
    x = jnp.ones((1000,))
    dropped = dropout(x, 0.25, jax.random.key(1))
    np.testing.assert_array_equal(dropped, dropout(x, 0.25, jax.random.key(1)))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_array_equal(dropout(x, 0.25, None), x)


def test_a_scan_matches_a_loop(layers):
    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    scanned, _ = scan_layers(layers, x, body)
    looped = x
    for i in range(3):
        looped = slice_layers(layers, i)(looped)
    assert_close(scanned, looped)


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("unroll", [1, 3])
def test_remat_and_unrolling_change_neither_values_nor_gradients(layers, remat, unroll):
    graphdef, params = nnx.split(layers, nnx.Param)
    x, weights = jax.random.normal(jax.random.key(0), (2, 2, 5, 32))

    def run(params, **options):
        out, _ = scan_layers(nnx.merge(graphdef, params), x, body, rng=jax.random.key(3), **options)
        return jnp.sum(out * weights)  # the unweighted sum of normalized values is zero, and so are its gradients

    expected = jax.jit(jax.value_and_grad(run))(params)
    found = jax.jit(jax.value_and_grad(lambda p: run(p, remat=remat, unroll=unroll)))(params)
    assert_close(found, expected)


def test_remat_saves_fewer_residuals(layers):
    graphdef, params = nnx.split(layers, nnx.Param)
    x = jnp.zeros((2, 5, 32))

    def num_residuals(remat):
        def run(params):
            return scan_layers(nnx.merge(graphdef, params), x, body, remat=remat)[0].sum()

        _, backward = jax.eval_shape(lambda p: jax.vjp(run, p), params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert num_residuals("full") < num_residuals("dots") < num_residuals("none")
