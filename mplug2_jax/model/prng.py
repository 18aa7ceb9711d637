"""The pseudo-random generator of parameters, dropout, token masking, hard negatives and sampling.

Threefry, JAX's default, costs about a hundred operations per number and, on CPUs, a loop per call, which is half of the
compile time of a small step with dropout. None of these uses needs a cryptographic permutation. Here a number is a hash
of (key, position): four multiplications, equal on every mesh and platform, which accelerators fuse into their consumer.
Keys behave like all JAX keys: they can be split, folded, and passed through ``jit``, ``vmap`` and ``scan``.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.extend.random import define_prng_impl
from jax.interpreters import batching, mlir
from jaxtyping import Array, Bool, PRNGKeyArray, UInt32

_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: spreads adjacent positions
_KEY_WORDS = 2  # of 32 bits


def random_key(seed: int | UInt32[Array | np.ndarray, ""]) -> PRNGKeyArray:
    """Return the root key of a seed."""
    return jax.random.key(seed, impl=HASH)


def bernoulli(key: PRNGKeyArray, probability: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Draw booleans that are True with a probability, as ``jax.random.bernoulli``, for masks with several consumers."""
    drawn = jax.random.bernoulli(key, probability, shape)
    return _compute_once.bind(drawn.astype(jnp.uint8), jax.random.key_data(key).ravel()[0]).astype(bool)


def _divide_by_one(x: Array, word: UInt32[Array, ""]) -> Array:
    one = jnp.minimum(word | jnp.uint32(1), jnp.uint32(1)).astype(x.dtype)
    return jax.lax.div(x, jnp.broadcast_to(one, x.shape))


_compute_once = Primitive("compute_once")
"""Unsigned integers unchanged, such that XLA's CPU compiler does not compute them again for each consumer.

It fuses cheap operations into all of their consumers: the hash of a dropout mask into up to 66 places, which takes a
quarter of the time of compiling a small step. A division by a word that is known only at run time is not cheap.
Compilers of other platforms weigh operations against memory traffic; for them it is the identity.
"""
_compute_once.def_impl(lambda x, word: x)
_compute_once.def_abstract_eval(lambda x, word: x)
mlir.register_lowering(_compute_once, lambda context, x, word: [x])
mlir.register_lowering(_compute_once, mlir.lower_fun(_divide_by_one, multiple_results=False), platform="cpu")


def _batch_compute_once(operands: Sequence[Array], dims: Sequence[int | None]) -> tuple[Array, int | None]:
    x, word = operands
    return _compute_once.bind(x, word if dims[1] is None else word[0]), dims[0]


batching.primitive_batchers[_compute_once] = _batch_compute_once


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Permute 32-bit words so that each input bit flips each output bit with probability near one half.

    The constants have the lowest bias for two multiplications in Chris Wellons' hash prospector.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def _hash(key: UInt32[Array, " 2"], high: Array | None, low: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Hash 64-bit positions, given as two words, with a key; ``high`` is None where all high words are 0."""
    x = _mix(low * jnp.uint32(_GOLDEN) + key[0]) + key[1]
    return _mix(x if high is None else x + _mix(high))  # _mix(0) == 0


def _positions(shape: tuple[int, ...]) -> tuple[Array | None, Array]:
    """Return the row-major index of every element as (high word, low word), computed where the element is sharded."""
    first = len(shape)  # the low word indexes the trailing dimensions that fit into 32 bits
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
    return _derive(jnp.zeros(_KEY_WORDS, jnp.uint32), high, words.astype(jnp.uint32))


def _derive(key: UInt32[Array, " 2"], high: Array | None, low: Array) -> UInt32[Array, "... 2"]:
    """Derive one key per position, from a stream other than the numbers of ``key`` itself."""
    other = key ^ jnp.asarray((0x5851F42D, 0x14057B7E), jnp.uint32)
    derived = jnp.stack([_hash(other, high, low), _hash(other[::-1], high, low)], axis=-1)
    return _compute_once.bind(derived, key[0])


@functools.partial(jax.jit, static_argnums=1)  # outlined: a step splits keys and samples masks a hundred times
def _split(key: UInt32[Array, " 2"], shape: tuple[int, ...]) -> UInt32[Array, "... 2"]:
    return _derive(key, *_positions(shape))


@jax.jit
def _fold_in(key: UInt32[Array, " 2"], data: Array) -> UInt32[Array, " 2"]:
    return _derive(key, jnp.uint32(1), jnp.asarray(data).astype(jnp.uint32))  # never equal to a key from split


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_bits(key: UInt32[Array, " 2"], bit_width: int, shape: tuple[int, ...]) -> Array:
    high, low = _positions(shape)
    bits = _hash(key, high, low)
    if bit_width == 64:
        more = _hash(key[::-1], high, low)
        return (bits.astype(jnp.uint64) << 32) | more.astype(jnp.uint64)
    return bits if bit_width == 32 else (bits >> (32 - bit_width)).astype(f"uint{bit_width}")


HASH = define_prng_impl(
    key_shape=(_KEY_WORDS,), seed=_seed, split=_split, random_bits=_random_bits, fold_in=_fold_in, name="hash",
    tag="hash",
)  # fmt: skip
