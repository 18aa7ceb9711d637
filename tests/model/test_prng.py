"""The hash generator: uniform, independent between keys, equal on every mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mplug2_jax.model import prng
from mplug2_jax.model.prng import bernoulli, random_key
from tests.close import assert_close

SIGMAS = 5.0  # a fair generator fails one of some hundred such checks once in ten thousand runs; keys are fixed


def chi_square_sigmas(values: np.ndarray, bins: int = 256) -> float:
    """Return the distance of a histogram from a uniform one, in standard deviations."""
    expected = values.size / bins
    statistic = ((np.bincount(values.ravel(), minlength=bins) - expected) ** 2 / expected).sum()
    return float(abs(statistic - (bins - 1)) / np.sqrt(2 * (bins - 1)))


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 7])
@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_uniform_over_positions_and_over_keys(seed: int, shift: int) -> None:
    key = random_key(seed)
    bits = np.asarray(jax.random.bits(key, (1 << 18,)))
    of_split = np.asarray(jax.vmap(jax.random.bits)(jax.random.split(key, 1 << 17)))
    folded = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(1 << 17))
    of_folded = np.asarray(jax.vmap(jax.random.bits)(folded))
    for words in (bits, of_split, of_folded):
        assert chi_square_sigmas((words >> shift) & 255) < SIGMAS


def test_adjacent_positions_rows_and_sibling_keys_are_uncorrelated() -> None:
    key_x, key_y = jax.random.split(random_key(3))
    x, y = (np.asarray(jax.random.uniform(key, (512, 512))).ravel() - 0.5 for key in (key_x, key_y))
    bound = SIGMAS / np.sqrt(x.size)
    assert abs(np.corrcoef(x, y)[0, 1]) < bound
    for lag in (1, 2, 3, 4, 64, 512, 1024):
        assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < bound, lag
        assert abs(np.corrcoef(x[:-lag], y[lag:])[0, 1]) < bound, lag


def test_each_bit_of_a_key_or_position_flips_each_output_bit_half_of_the_time() -> None:
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.integers(0, 2**32, (4096, 2), np.uint32))

    def hashes(words: jax.Array, positions: jax.Array) -> np.ndarray:
        return np.asarray(jax.vmap(lambda k, p: prng._hash(k, None, p))(words, positions))

    positions = jnp.asarray(rng.integers(0, 2**32, 4096, np.uint32))
    before = hashes(keys, positions)
    changes = [(keys.at[:, word].set(keys[:, word] ^ np.uint32(1 << bit)), positions) for word, bit in BITS]
    changes += [(keys, positions ^ np.uint32(1 << bit)) for bit in range(32)]
    for changed in changes:
        flipped = ((before ^ hashes(*changed))[:, None] >> np.arange(32, dtype=np.uint32)) & 1
        assert np.abs(flipped.mean(0) - 0.5).max() < 0.1


BITS = list(itertools.product(range(2), range(32)))


def test_more_than_2_32_positions_do_not_repeat() -> None:
    """A second word indexes the leading dimensions; only a slice is used, so the large array is never allocated."""
    shape = (3, 1 << 16, 1 << 16)
    draw = jax.jit(lambda key: jax.random.bits(key, shape)[:, :1, :64])
    rows = np.asarray(draw(random_key(0)))[:, 0]
    assert len(np.unique(rows)) == rows.size


def test_a_mesh_samples_the_same_as_one_device() -> None:
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    expected = jax.random.bernoulli(random_key(1), 0.3, (8, 6, 10))
    sharded = jax.jit(
        lambda key: jax.random.bernoulli(key, 0.3, (8, 6, 10)),
        out_shardings=NamedSharding(mesh, PartitionSpec("a", "b")),
    )
    np.testing.assert_array_equal(sharded(random_key(1)), expected)
    program = sharded.lower(random_key(1)).compile().as_text()
    assert "all-gather" not in program
    assert "all-reduce" not in program


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.uint32])
def test_narrow_integers_are_uniform_too(dtype: jnp.dtype) -> None:
    words = np.asarray(jax.random.bits(random_key(4), (1 << 17,), dtype)).astype(np.uint32)
    assert chi_square_sigmas(words & 255) < SIGMAS


def test_keys_pass_through_transformations() -> None:
    def total(key: jax.Array) -> jax.Array:
        def add(carry: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            return carry + jax.random.normal(key, (3,)), None

        return jax.lax.scan(add, jnp.zeros(3), jax.random.split(key, 4))[0]

    keys = jax.random.split(random_key(0), 2)
    expected = [sum(np.asarray(jax.random.normal(each, (3,))) for each in jax.random.split(key, 4)) for key in keys]
    assert_close(jax.jit(jax.vmap(total))(keys), np.stack(expected))


@pytest.mark.parametrize("transform", ["none", "vmap", "scan", "gradient of remat"])
def test_masks_are_those_of_jax_under_transformations(transform):
    keys = jax.random.split(random_key(3), 4)
    expected = jnp.stack([jax.random.bernoulli(key, 0.7, (5, 3)) for key in keys])

    def mask(key):
        return bernoulli(key, 0.7, (5, 3))

    def gradient(key):
        return jax.grad(jax.checkpoint(lambda x: (x * mask(key)).sum()))(jnp.ones((5, 3))) != 0

    drawn = {
        "none": lambda: jnp.stack([mask(keys[i]) for i in range(4)]),
        "vmap": lambda: jax.vmap(mask)(keys),
        "scan": lambda: jax.lax.scan(lambda carry, key: (carry, mask(key)), 0, keys)[1],
        "gradient of remat": lambda: jnp.stack([gradient(keys[i]) for i in range(4)]),
    }[transform]
    assert np.array_equal(jax.jit(drawn)(), expected)


def test_a_mask_with_several_readers_is_computed_once_on_cpus_and_costs_other_platforms_nothing(optimized):
    def readers(key, x):
        keep = bernoulli(key, 0.7, x.shape)
        return [(jnp.where(keep, x * i, 0) @ x).sum(0) for i in range(1, 5)]  # matmuls separate the readers

    traced = jax.jit(readers).trace(random_key(3), jnp.ones((64, 64)))
    compiled = traced.lower().compile().as_text()
    hashed = compiled.count("u32[64,64]{1,0} xor(")
    once = jax.jit(lambda key: bernoulli(key, 0.7, (64, 64))).lower(random_key(3)).compile().as_text()
    assert hashed == once.count("u32[64,64]{1,0} xor(") > 0
    assert "divide" not in traced.lower(lowering_platforms=("tpu",)).as_text()
