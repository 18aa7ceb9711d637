"""Digests of arrays: 32 bits by which a damaged checkpoint or a wrong computation is told, the same on any mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """The sum, modulo 2**32, of every element's bits mixed with its place.

    A sum has no order, so shards add up to what the whole array gives. The mixing is one to one: a single element that
    changes, in however many bits, always changes the digest; anything else goes unseen once in 2**32 times.
    """
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for dim in reversed(range(x.ndim)):  # no reshape, which would move shards
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= x.shape[dim]
    return jnp.sum(_mix(bits.astype(jnp.uint32) + _mix(place + jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3, a permutation of 32-bit words that changes half of the bits for any one."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


_checksum = jax.jit(checksum)  # compiled once for each shape, of which a state has far fewer than arrays


def checksums(tree: Any) -> dict[str, int]:
    """The digest of every array of a tree, by its name. Runs where the arrays are."""
    # One after the other: many collectives in flight at once starve each other on simulated devices.
    return {
        leaf_name(path): int(_checksum(_on_device(leaf))) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _on_device(x: Any) -> Any:
    """An array that rests in its host's memory, where nothing is computed, comes to the devices that share it."""
    if not isinstance(x, jax.Array) or x.sharding.memory_kind != "pinned_host":
        return x
    return jax.device_put(x, x.sharding.with_memory_kind("device"))


def mismatched(found: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    """The names of both whose digests differ."""
    return [name for name, value in found.items() if name in expected and expected[name] != value]


def leaf_name(path: Any) -> str:
    """A leaf's path as ``params/decoder/kernel``: the same for what is saved and what Orbax gives back."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
