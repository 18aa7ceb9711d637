"""The pseudo-random generator behind fresh parameters, dropout masks, masked words, hard negatives and sampling.

Threefry, JAX's default, costs about a hundred operations per number and, on CPUs, a loop per call, which is half of
what a small step with dropout takes to compile. None of these uses needs a cryptographic permutation. Here a number is
a hash of (key, position): four multiplications that fuse into whatever reads them, equal on every mesh and platform.
Keys behave as all of JAX's do: they can be split, folded, and passed through ``jit``, ``vmap`` and ``scan``.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl
from jaxtyping import Array, PRNGKeyArray, UInt32

_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: neighbouring positions land far apart
_WORDS = 2  # of a key, 32 bits each


def random_key(seed: int) -> PRNGKeyArray:
    """Return the root key of everything that a seed decides."""
    return jax.random.key(seed, impl=HASH)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Permute 32-bit words so that each input bit flips each output bit with a probability near one half.

    The constants are those of Chris Wellons' hash prospector with the lowest bias for two multiplications.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def _hash(key: UInt32[Array, " 2"], high: Array | None, low: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Hash 64-bit positions, given as two words, with a key; ``high`` is None where it is 0 for all."""
    x = _mix(low * jnp.uint32(_GOLDEN) + key[0]) + key[1]
    return _mix(x if high is None else x + _mix(high))  # a permutation that leaves 0 where it is


def _positions(shape: tuple[int, ...]) -> tuple[Array | None, Array]:
    """Return the row-major index of every element as (high word, low word), each computed where the element lives."""
    first = len(shape)  # the low word counts positions within the trailing dimensions that fit it
    while first and math.prod(shape[first - 1 :]) < 2**32:
        first -= 1

    def index(dims: range) -> Array:
        total = jnp.zeros(shape, jnp.uint32)
        for dim in dims:
            stride = math.prod(shape[dim + 1 : dims.stop])
            total += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride)
        return total

    return index(range(first)) if first else None, index(range(first, len(shape)))


def _seed(seed: Array) -> UInt32[Array, " 2"]:
    words = jnp.asarray(seed)
    high = (words >> 32).astype(jnp.uint32) if words.dtype.itemsize == 8 else None
    return _derive(jnp.zeros(_WORDS, jnp.uint32), high, words.astype(jnp.uint32))


def _derive(key: UInt32[Array, " 2"], high: Array | None, low: Array) -> UInt32[Array, "... 2"]:
    """Return one new key for each position; its words never meet the numbers that ``key`` itself draws."""
    other = key ^ jnp.asarray((0x5851F42D, 0x14057B7E), jnp.uint32)
    return jnp.stack([_hash(other, high, low), _hash(other[::-1], high, low)], axis=-1)


@functools.partial(jax.jit, static_argnums=1)  # outlined: a step splits keys and draws masks a hundred times
def _split(key: UInt32[Array, " 2"], shape: tuple[int, ...]) -> UInt32[Array, "... 2"]:
    return _derive(key, *_positions(shape))


@jax.jit
def _fold_in(key: UInt32[Array, " 2"], data: Array) -> UInt32[Array, " 2"]:
    return _derive(key, jnp.uint32(1), jnp.asarray(data).astype(jnp.uint32))  # never a key that splitting gives


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_bits(key: UInt32[Array, " 2"], bit_width: int, shape: tuple[int, ...]) -> Array:
    high, low = _positions(shape)
    bits = _hash(key, high, low)
    if bit_width == 64:
        more = _hash(key[::-1], high, low)
        return (bits.astype(jnp.uint64) << 32) | more.astype(jnp.uint64)
    return bits if bit_width == 32 else (bits >> (32 - bit_width)).astype(f"uint{bit_width}")


HASH = define_prng_impl(
    key_shape=(_WORDS,), seed=_seed, split=_split, random_bits=_random_bits, fold_in=_fold_in, name="hash", tag="hash"
)
