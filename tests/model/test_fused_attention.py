"""The fused kernel in interpret mode against float64, and compiled for every kind of TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from mplug2_jax.model.attention import attention
from mplug2_jax.model.fused_attention import fused_attention
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from tests.close import assert_close
from tests.tpu import topology_mesh


def reference(query, key, value, mask, causal, dout):
    """Return the result and the gradients in float64."""
    query, key, value, dout = (np.asarray(x, np.float64) for x in (query, key, value, dout))
    scale = query.shape[-1] ** -0.5
    scores = np.einsum("blhk,bshk->bhls", query, key) * scale
    if mask is not None:
        scores = np.where(mask[:, None, None], scores, -1e30)
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = np.einsum("blhk,bshk->bhls", dout, value)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bhls,bshk->blhk", weights, value), np.einsum("bhls,bshk->blhk", dscores, key),
        np.einsum("bhls,blhk->bshk", dscores, query), np.einsum("bhls,blhk->bshk", weights, dout),
    )  # fmt: skip


def run(l, s, h, k, *, masked=False, causal=False, dtype="float32", b=2):
    """Return results and gradients of the kernel, and those in float64."""
    rng = np.random.default_rng(l + 1000 * s)
    query, dout = (jnp.asarray(rng.normal(size=(b, l, h, k)), dtype) for _ in range(2))
    key, value = (jnp.asarray(rng.normal(size=(b, s, h, k)), dtype) for _ in range(2))
    mask = (rng.random((b, s)) < 0.7) | (np.arange(s) == 0) if masked else None
    valid = None if mask is None else jnp.asarray(mask)
    attend = functools.partial(fused_attention, key_mask=valid, causal=causal, interpret=True)
    out, vjp = jax.vjp(jax.jit(attend), query, key, value)
    return (out, *vjp(dout)), reference(query, key, value, mask, causal, dout)


@pytest.mark.parametrize(
    ("l", "s", "h", "k", "masked", "causal"),
    [
        (1, 1, 1, 64, False, False),  # smaller than a tile
        (257, 257, 2, 64, False, False),  # a frame of the large model
        (16, 32, 4, 32, True, False),  # whole tiles
        (17, 33, 4, 32, True, False),  # one row more
        (20, 20, 2, 64, True, True),
        (31, 9, 3, 48, True, False),  # heads that do not fill 128 lanes, and three of them
        (40, 40, 1, 128, False, True),
        (9, 512, 2, 80, True, False),  # heads that are padded
        (5, 9, 2, 16, True, False),  # all heads in fewer than 128 lanes
    ],
)
def test_values_and_gradients_are_those_of_attention(l, s, h, k, masked, causal):
    assert_close(*run(l, s, h, k, masked=masked, causal=causal))


def test_16_bit_inputs_are_summed_in_float32():
    found, expected = run(33, 65, 2, 64, masked=True, dtype="bfloat16")
    assert all(x.dtype == jnp.bfloat16 for x in found)
    assert_close(found, expected, 2**-6)  # probabilities, their gradients and results are rounded to 16 bits


@pytest.mark.slow
@pytest.mark.parametrize("length", [*range(1, 512, 37), 511, 512])
def test_lengths_up_to_the_longest(length):
    k = (32, 64, 128)[length % 3]
    assert_close(*run(length, length, 128 // k, k, masked=True, causal=bool(length % 2), b=1))


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_kernel_compiles_for_every_tpu(topology):
    """Compile values and gradients, on one device and with examples and heads sharded."""
    mesh = topology_mesh(topology, MeshConfig(data=-1, fsdp=1, tensor=2))
    cases = [
        (257, 257, 16, 64, "bfloat16", False),
        (128, 128, 16, 64, "bfloat16", True),
        (100, 77, 4, 48, "float32", False),
    ]
    for l, s, h, k, dtype, causal in cases:
        for sharding in (
            SingleDeviceSharding(mesh.devices.flat[0]), NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
        ):  # fmt: skip
            query, key = (jax.ShapeDtypeStruct((4, n, h, k), dtype, sharding=sharding) for n in (l, s))

            def loss(query, key, value, causal=causal):
                return attention(query, key, value, causal=causal, kernel="fused").astype("float32").sum()

            grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
            if isinstance(sharding, NamedSharding):
                with jax.set_mesh(mesh):
                    text = grad.lower(query, key, key).compile().as_text()
            else:
                text = grad.lower(query, key, key).compile().as_text()
            assert text.count("tpu_custom_call") >= 2
            assert "f32[4,16,257,257]" not in text


def test_gradients_are_not_summed_over_mesh_axes_of_size_1():
    """In a loop XLA keeps such an all-reduce, with copies to and from its layout."""
    x = jax.ShapeDtypeStruct((4, 257, 4, 64), "bfloat16")
    with jax.set_mesh(make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))):
        gradient = jax.make_jaxpr(jax.grad(lambda *qkv: attention(*qkv, kernel="fused").sum().astype("float32")))
        assert "psum" not in str(gradient(x, x, x))
