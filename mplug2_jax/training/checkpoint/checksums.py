"""Checksums of arrays: 32 bits that expose a damaged checkpoint or a wrong computation, the same on any mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Return the sum, modulo 2**32, of every element's bits mixed with its index.

    A sum has no order, so shards add up to the value of the whole array. The mixing is a bijection: changing a single
    element, in any number of bits, always changes the checksum; other changes collide once in 2**32 times.
    """
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for dim in reversed(range(x.ndim)):  # no reshape, which would move shards
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= x.shape[dim]
    mixed_index = _murmur3_finalizer(index + jnp.uint32(0x9E3779B9))
    return jnp.sum(_murmur3_finalizer(bits.astype(jnp.uint32) + mixed_index), dtype=jnp.uint32)


def _murmur3_finalizer(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Apply MurmurHash3's finalizer, a permutation of 32-bit words that flips half of the bits for any flipped one."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


_checksum = jax.jit(checksum)  # compiled once per shape; a state has far fewer shapes than arrays


def checksums(tree: Any) -> dict[str, int]:
    """Return the checksum of every array of a tree by its name. They are computed where the arrays are."""
    # One after the other: many collectives in flight at once starve each other on simulated devices.
    return {name: int(_checksum(_on_device(leaf))) for name, leaf in leaves_by_name(tree).items()}


def _on_device(x: Any) -> Any:
    """Move an array from its host's memory, where nothing is computed, to the devices that share it."""
    if not isinstance(x, jax.Array) or x.sharding.memory_kind != "pinned_host":
        return x
    return jax.device_put(x, x.sharding.with_memory_kind("device"))


def find_mismatches(actual: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    """Return the names that both have, with different checksums."""
    return [name for name, value in actual.items() if name in expected and expected[name] != value]


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their names."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def leaf_name(path: Any) -> str:
    """Return a leaf's path as ``params/decoder/kernel``: the same for what is saved and what Orbax returns."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
