"""LoRA (arXiv 2106.09685): a part learns by a pair of thin matrices beside each of its kernels, which stay as they are.

The kernel that the model is bound to is W + alpha / rank * a @ b, made anew in every loss, so that the model knows
nothing of it, and whoever evaluates, exports or starts from a run gets ordinary kernels. In the train state a pair
stands beside its kernel, as ``vision/blocks/mlp/up/lora/{a,b}``: in float32, a drawn and b zero, so that a run begins
with the model that it was given. Norms, biases, tables and the temporal units' convolutions of such a part are frozen.

Optimiser groups go by the pair's own path: the vision tower's pairs take the vision tower's rate, each pair its
kernel's factor of ``layer_decay``, and weight decay acts on pairs as on matrices. An average is of the pairs.

What is saved are the moments of full kernels, their average, and their sums over micro-batches and in a checkpoint.
Neither operations nor the gradients' traffic are: the gradient with respect to each merged kernel is formed whole, and
reduced over the mesh, before it becomes that of its pair.
"""

import math
import zlib
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from mplug2_jax.model.mplug2 import Params
from mplug2_jax.training.config import LoraConfig
from mplug2_jax.training.optim.optimizer import is_linear
from mplug2_jax.training.optim.partition import LORA_KEY, part_name

Path = tuple[str, ...]
Kernel = Float[Array, "*layers i o"] | Float[np.ndarray, "*layers i o"]
Pair = dict[str, Any]  # a [*layers, i, rank], b [*layers, rank, o]


def add_adapters(tree: Params, parts: Collection[str], make: Callable[[Path, Any], Pair], path: Path = ()) -> Params:
    """A tree shaped like the parameters, with ``make(path, leaf)`` beside the leaf of every linear kernel of parts."""
    found: Params = {
        name: add_adapters(item, parts, make, (*path, name)) if isinstance(item, dict) else item
        for name, item in tree.items()
    }
    own = (*path, "kernel")
    if "kernel" in tree and is_linear(own) and part_name(own) in parts:
        found[LORA_KEY] = make(own, tree["kernel"])
    return found


def remove_adapters(tree: Params) -> Params:
    """Such a tree without what is beside kernels."""
    return {
        name: remove_adapters(item) if isinstance(item, dict) else item
        for name, item in tree.items()
        if name != LORA_KEY
    }


def adapter_shapes(config: LoraConfig) -> Callable[[Path, Any], Pair]:
    """What makes the shapes of a pair from its kernel's."""

    def make(_: Path, kernel: Any) -> Pair:
        *layers, rows, columns = kernel.shape
        shapes = {"a": (*layers, rows, config.rank), "b": (*layers, config.rank, columns)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    return make


def adapter_axes(_: Path, names: tuple[str | None, ...]) -> Pair:
    """The logical axes of a pair, from its kernel's: the rank stays whole."""
    *layers, rows, columns = names
    return {"a": (*layers, rows, None), "b": (*layers, None, columns)}


def init_adapters(config: LoraConfig, key: PRNGKeyArray) -> Callable[[Path, Any], Pair]:
    """What makes a new pair for a kernel: a of variance 1 / i, which keeps the size of what it maps; b zero."""

    def make(path: Path, kernel: Kernel) -> Pair:
        shapes = adapter_shapes(config)(path, kernel)
        own = jax.random.fold_in(key, zlib.crc32("/".join((*path[:-1], LORA_KEY)).encode()))
        drawn = jax.random.normal(own, shapes["a"].shape) / math.sqrt(kernel.shape[-2])
        return {"a": drawn, "b": jnp.zeros(shapes["b"].shape)}

    return make


def merge_adapter(kernel: Kernel, pair: Pair, scale: float) -> Kernel:
    """The kernel with its pair's product in it, in the kernel's type.

    Every device multiplies in float32, so that what is exported is what was trained.
    """
    with jax.default_matmul_precision("highest"):
        return (kernel + scale * (pair["a"] @ pair["b"])).astype(kernel.dtype)


def merge_adapter_on_devices(kernel: Array, pair: Pair, scale: float) -> Array:
    """The same outside of a compiled function, laid out like the kernel, whatever the processes that hold it."""
    return jax.jit(merge_adapter, static_argnums=2, out_shardings=kernel.sharding)(kernel, pair, scale)


def merge_adapters(params: Params, scale: float, add: Callable[[Any, Pair, float], Any] = merge_adapter) -> Params:
    """Ordinary parameters: every pair in its kernel. Without pairs, they are what they were."""
    plain: Params = {
        name: merge_adapters(item, scale, add) if isinstance(item, dict) else item
        for name, item in params.items()
        if name != LORA_KEY
    }
    if LORA_KEY in params:
        with jax.named_scope("lora"):
            plain["kernel"] = add(params["kernel"], params[LORA_KEY], scale)
    return plain


def stored_adapter(path: Path, stored: Collection[Path]) -> dict[str, Path]:
    """Where among what is stored the pair of a parameter stands; empty for what has none."""
    if path[-1] != "kernel":
        return {}
    return {name: place for name in ("a", "b") if (place := (*path[:-1], LORA_KEY, name)) in stored}
