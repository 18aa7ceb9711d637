import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2_jax.model import attention as module
from mplug2_jax.model import kernels
from mplug2_jax.model.attention import attention
from tests.close import assert_close


def inputs(b=2, l=5, s=7, h=2, k=8, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    query, key, value = (jax.random.normal(r, (b, n, h, k)) for r, n in zip(keys, (l, s, s), strict=False))
    mask = jax.random.bernoulli(keys[3], 0.6, (b, s)).at[:, 0].set(True)
    return query, key, value, mask


def reference(query, key, value, mask=None, causal=False):
    """Compute attention in float64, with loops."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    for b, l, h in np.ndindex(query.shape[:3]):
        scores = key[b, :, h] @ query[b, l, h] / np.sqrt(query.shape[-1])
        if mask is not None:
            scores = np.where(np.asarray(mask)[b], scores, -np.inf)
        if causal:
            scores = np.where(np.arange(len(scores)) <= l, scores, -np.inf)
        weights = np.exp(scores - scores.max())
        out[b, l, h] = (weights / weights.sum()) @ value[b, :, h]
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_xla_matches_a_plain_softmax(masked, causal):
    query, key, value, mask = inputs(l=7)
    mask = mask if masked else None
    out = attention(query, key, value, key_mask=mask, causal=causal, kernel="xla")
    assert_close(out, reference(query, key, value, mask, causal))


def test_16_bit_inputs_are_computed_in_float32():
    query, key, value, mask = inputs()
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    out = attention(*half, key_mask=mask, kernel="xla")
    assert out.dtype == jnp.bfloat16
    assert_close(out, reference(*half, mask), 2**-7)  # weights and result are rounded to 16 bits


def test_dropout_keeps_the_expectation_and_is_off_without_a_key():
    query, key, value, _ = inputs()
    expected = attention(query, key, value, kernel="xla")
    np.testing.assert_array_equal(attention(query, key, value, dropout=0.5, kernel="xla"), expected)
    dropped = jax.vmap(lambda r: attention(query, key, value, dropout=0.5, rng=r, kernel="xla"))
    samples = dropped(jax.random.split(jax.random.key(0), 4000))
    assert float(jnp.abs(samples[0] - expected).max()) > 0.1
    assert float(jnp.abs(samples.mean(0) - expected).max()) < 0.1


@pytest.mark.parametrize(("l", "s"), [(257, 257), (50, 257), (128, 130)])
def test_splash_matches_xla_for_any_length(l, s):
    query, key, value, _ = inputs(b=2, l=l, s=s, h=2, k=64)
    mask = jnp.arange(s)[None] < jnp.array([[s], [s - 57]])

    def loss(kernel, *qkv):
        if kernel == "splash":
            return jnp.sum(kernels.splash(*qkv, mask, interpret=True) ** 2)
        return jnp.sum(attention(*qkv, key_mask=mask, kernel="xla") ** 2)

    splash, xla = (
        jax.jit(jax.value_and_grad(functools.partial(loss, kernel), argnums=(0, 1, 2)))(query, key, value)
        for kernel in ("splash", "xla")
    )
    assert_close(splash, xla)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("l", "s", "causal"), [(257, 257, False), (6, 9, False), (5, 8, False), (7, 7, True)])
def test_cudnn_gets_even_lengths_without_a_mask_and_matches(monkeypatch, l, s, causal, masked):
    dot_product_attention = jax.nn.dot_product_attention

    def fake_cudnn(query, key, value, *, implementation, **kwargs):
        assert implementation == "cudnn"
        assert "mask" not in kwargs
        assert all(x.shape[1] % 2 == 0 and x.shape[-1] % 8 == 0 for x in (query, key, value))
        return dot_product_attention(query, key, value, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fake_cudnn)
    query, key, value, mask = inputs(l=l, s=s)
    mask = mask if masked else None
    out = kernels.cudnn(query, key, value, mask, causal=causal)
    assert_close(out, reference(query, key, value, mask, causal))


def test_block_sizes_divide_padded_lengths():
    assert kernels._block_size(4224, 512) == 384
    assert kernels._block_size(4224, 1536) == 1408
    assert kernels._block_size(128, 512) == 128


@pytest.mark.parametrize(
    ("platform", "l", "dtype", "has_dropout", "causal", "expected"),
    [
        ("tpu", 4097, "bfloat16", False, False, "splash"),
        ("tpu", 257, "bfloat16", False, False, "fused"),
        ("tpu", 257, "bfloat16", True, False, "xla"),
        ("tpu", 128, "bfloat16", False, True, "fused"),
        ("tpu", 32, "bfloat16", False, False, "xla"),
        ("tpu", 513, "bfloat16", False, False, "xla"),
        ("tpu", 4097, "bfloat16", True, False, "xla"),
        ("tpu", 4097, "bfloat16", False, True, "xla"),
        ("gpu", 4097, "bfloat16", False, False, "cudnn"),
        ("gpu", 4097, "float32", False, False, "xla"),
        ("cpu", 4097, "bfloat16", False, False, "xla"),
    ],
)
def test_auto_chooses_by_platform_and_length(monkeypatch, platform, l, dtype, has_dropout, causal, expected):
    monkeypatch.setattr(module, "target_platform", lambda: platform)
    chosen = []
    x = jax.ShapeDtypeStruct((1, l, 16, 64), dtype)
    jax.eval_shape(lambda x: chosen.append(module._choose_kernel(x, x, causal=causal, has_dropout=has_dropout)), x)
    assert chosen == [expected]


def test_kernels_refuse_unsupported_calls():
    query, key, value, _ = inputs()
    with pytest.raises(ValueError, match="does not support dropout"):
        attention(query, key, value, dropout=0.1, rng=jax.random.key(0), kernel="splash")
    with pytest.raises(ValueError, match="causal"):
        attention(query, key, value, causal=True, kernel="splash")
    with pytest.raises(ValueError, match="does not support dropout"):
        attention(query, key, value, dropout=0.1, rng=jax.random.key(0), kernel="fused")
    with pytest.raises(ValueError, match="'fused' takes at most 512 tokens, found 513: use 'auto'"):
        attention(*inputs(l=513)[:3], kernel="fused")
