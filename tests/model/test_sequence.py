"""Attention over a sharded sequence matches one device, in values and gradients, for every algorithm and length."""

import functools

import jax
import jax.numpy as jnp
import pytest

from mplug2_jax.model import layers, ring, sequence
from mplug2_jax.model.attention import attention
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.model.sequence import AttentionSharding
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from tests.close import BFLOAT16, assert_close
from tests.runs import small_model

CLIP = AttentionSharding(queries="visual", keys="visual")
SHARDINGS = {
    "text to clip": AttentionSharding(keys="visual"),
    "clip to latents": AttentionSharding(queries="visual"),
    "clip to clip": CLIP,
}


def inputs(l: int, s: int, b: int = 4, h: int = 2, k: int = 8):
    keys = jax.random.split(jax.random.key(l + s), 4)
    query, key, value = (jax.random.normal(r, (b, n, h, k)) for r, n in zip(keys, (l, s, s), strict=False))
    return (query, key, value), jax.random.bernoulli(keys[3], 0.6, (b, s)).at[:, 0].set(True)


def loss(qkv, mask, sharding, dropout=0.0):
    out = attention(*qkv, key_mask=mask, sharding=sharding, dropout=dropout, rng=jax.random.key(7))
    return jnp.sum(out**2 * (1 + jnp.arange(out.size).reshape(out.shape) % 3)), out


def assert_matches_one_device(l, s, sharding, mesh: MeshConfig, dropout: float = 0.0) -> None:
    qkv, mask = inputs(l, s)
    values = jax.value_and_grad(functools.partial(loss, sharding=sharding, dropout=dropout), has_aux=True)
    expected = jax.jit(values)(qkv, mask)
    with jax.set_mesh(make_mesh(mesh)):
        found = jax.jit(values)(qkv, mask)
    assert_close(found, expected)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_sharded_attention_matches_one_device(sharding: str, dropout: float) -> None:
    l, s = {"text to clip": (5, 13), "clip to latents": (13, 4), "clip to clip": (13, 13)}[sharding]
    assert_matches_one_device(l, s, SHARDINGS[sharding], MeshConfig(sequence=2, tensor=2), dropout)


@pytest.mark.parametrize(("length", "shards"), [(17, 4), (5, 8), (16, 8)])
def test_lengths_that_do_not_divide_and_chips_without_tokens(length: int, shards: int) -> None:
    assert_matches_one_device(length, length, CLIP, MeshConfig(sequence=shards))
    assert_matches_one_device(3, length, SHARDINGS["text to clip"], MeshConfig(sequence=shards))


@pytest.mark.parametrize(("length", "shards", "query_block"), [(13, 4, 512), (9, 8, 512), (29, 2, 4)])
def test_keys_that_do_not_fit_use_the_ring(monkeypatch, length: int, shards: int, query_block: int) -> None:
    monkeypatch.setattr(sequence, "_MAX_GATHER_BYTES", 0)
    monkeypatch.setattr(ring, "_QUERY_BLOCK", query_block)
    ring_calls = []
    record = lambda *args: ring_calls.append(args[0].shape) or ring.ring_attention(*args)  # noqa: E731
    monkeypatch.setattr(sequence, "ring_attention", record)
    assert_matches_one_device(length, length, CLIP, MeshConfig(sequence=shards, tensor=2 if shards < 8 else 1))
    assert ring_calls


def test_a_16_bit_ring_is_close_to_float32() -> None:
    qkv, mask = inputs(16, 16)
    half = [x.astype(jnp.bfloat16) for x in qkv]
    with jax.set_mesh(make_mesh(MeshConfig(sequence=4))):
        spec = jax.P(None, "sequence")
        run = jax.jit(
            jax.shard_map(lambda *x: ring.ring_attention(*x, "sequence"), in_specs=(spec,) * 4, out_specs=spec)
        )
        out = run(*half, mask)
    assert out.dtype == jnp.bfloat16
    assert_close(out, attention(*qkv, key_mask=mask), BFLOAT16)


def test_a_ring_gathers_nothing(monkeypatch) -> None:
    monkeypatch.setattr(sequence, "_MAX_GATHER_BYTES", 0)
    qkv, mask = inputs(16, 16)
    mesh = make_mesh(MeshConfig(sequence=8))
    arguments = jax.device_put((qkv, mask), jax.NamedSharding(mesh, jax.P(None, "sequence")))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(functools.partial(loss, sharding=CLIP), has_aux=True))
        program = gradient.lower(*arguments).compile().as_text()
    assert "collective-permute" in program
    assert "all-gather" not in program


def test_causal_attention_over_a_sharded_sequence_is_refused() -> None:
    qkv, _ = inputs(8, 8)
    with jax.set_mesh(make_mesh(MeshConfig(sequence=8))), pytest.raises(ValueError, match="causal"):
        attention(*qkv, causal=True, sharding=CLIP)


@pytest.mark.slow
def test_a_model_matches_one_device_with_sharded_frames_and_tokens(monkeypatch) -> None:
    """Compare tower, universal layers and decoder, with dropout, and matmuls as on a TPU, which are not flattened."""
    monkeypatch.setattr(layers, "target_platform", lambda: "tpu")
    model_def = define_model(small_model(universal_layers=2), ("vision", "temporal", "text", "universal", "decoder"))
    params = model_def.init(jax.random.key(0))
    up = params["vision"]["blocks"]["temporal_1"]["up"]  # initialized to zero, which would hide the frames around
    up["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), up["kernel"].shape)
    clips = jax.random.randint(jax.random.key(2), (2, 4, 16, 16, 3), 0, 256).astype(jnp.uint8)
    words = jax.random.randint(jax.random.key(3), (2, 5), 1, 256)

    def loss(params):
        model = model_def.bind(params)
        visual = model.encode_visual(clips, rng=jax.random.key(4))
        logits = model.decoder(words, None, visual, rng=jax.random.key(5))
        return jnp.sum(jax.nn.log_softmax(logits) ** 2) / 1e3 + jnp.sum(visual[:, 0] ** 3), (visual, logits)

    step = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(step)(params)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, sequence=4))):
        found = jax.jit(step)(params)
    assert_close(found, expected)
