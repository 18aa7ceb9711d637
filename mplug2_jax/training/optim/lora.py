"""LoRA (arXiv 2106.09685): a part learns by an adapter, a pair of thin matrices, for each of its frozen kernels.

The model is bound to the kernels W + alpha / rank * a @ b, merged anew in every loss, so that the model code knows
nothing of adapters, and evaluation, export and initialization from a run read ordinary kernels. In the train state an
adapter stands next to its kernel, as ``vision/blocks/mlp/up/lora/{a,b}``: in float32, ``a`` drawn and ``b`` zero, so
that a run begins with the model that it was given. Norms, biases, tables and the temporal units' convolutions of such a
part are frozen.

The optimizer groups adapters by their own path: those of the vision tower take the vision tower's learning rate, each
takes its kernel's ``layer_decay`` scale, and weight decay acts on them as on kernels. An EMA averages the adapters.

LoRA saves the moments of full kernels, their EMA, their sums over micro-batches, and their space in checkpoints. It
saves neither operations nor the traffic of gradients: the gradient of each merged kernel is formed whole, and reduced
over the mesh, before it becomes that of its adapter.
"""

import math
import zlib
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray

from mplug2_jax.model.mplug2 import Params
from mplug2_jax.training.config import LoraConfig
from mplug2_jax.training.optim.optimizer import is_linear
from mplug2_jax.training.optim.partition import LORA_KEY, part_name

Path = tuple[str, ...]
Kernel = Float[Array, "*layers i o"] | Float[np.ndarray, "*layers i o"]
Adapter = dict[str, Any]  # a [*layers, i, rank], b [*layers, rank, o]


def add_adapters(tree: Params, parts: Collection[str], make: Callable[[Path, Any], Adapter], path: Path = ()) -> Params:
    """Add ``make(path, leaf)`` next to the leaf of every linear kernel of the parts."""
    added: Params = {
        name: add_adapters(item, parts, make, (*path, name)) if isinstance(item, dict) else item
        for name, item in tree.items()
    }
    kernel = (*path, "kernel")
    if "kernel" in tree and is_linear(kernel) and part_name(kernel) in parts:
        added[LORA_KEY] = make(kernel, tree["kernel"])
    return added


def remove_adapters(tree: Params) -> Params:
    """Return such a tree without its adapters."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(tree).items() if LORA_KEY not in path})


def adapter_shapes(config: LoraConfig) -> Callable[[Path, Any], Adapter]:
    """Return the function that gives an adapter's shapes from its kernel's."""

    def make(_: Path, kernel: Any) -> Adapter:
        *layers, rows, columns = kernel.shape
        shapes = {"a": (*layers, rows, config.rank), "b": (*layers, config.rank, columns)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    return make


def adapter_axes(_: Path, logical_axes: tuple[str | None, ...]) -> Adapter:
    """Return an adapter's logical axes from its kernel's; the rank is not sharded."""
    *layers, rows, columns = logical_axes
    return {"a": (*layers, rows, None), "b": (*layers, None, columns)}


def init_adapters(config: LoraConfig, key: PRNGKeyArray) -> Callable[[Path, Any], Adapter]:
    """Return the function that initializes a kernel's adapter: ``a`` with variance 1 / i, ``b`` with zeros."""

    def make(path: Path, kernel: Kernel) -> Adapter:
        shapes = adapter_shapes(config)(path, kernel)
        adapter_key = jax.random.fold_in(key, zlib.crc32("/".join((*path[:-1], LORA_KEY)).encode()))
        a = jax.random.normal(adapter_key, shapes["a"].shape) / math.sqrt(kernel.shape[-2])
        return {"a": a, "b": jnp.zeros(shapes["b"].shape)}

    return make


def merge_adapter(kernel: Kernel, adapter: Adapter, scale: float) -> Kernel:
    """Add an adapter's scaled product to its kernel, in the kernel's dtype.

    Every device multiplies in float32, so that what is exported is what was trained.
    """
    with jax.default_matmul_precision("highest"):
        return (kernel + scale * (adapter["a"] @ adapter["b"])).astype(kernel.dtype)


def merge_adapter_on_devices(kernel: Array, adapter: Adapter, scale: float) -> Array:
    """Merge an adapter outside of compiled functions; the result is sharded like the kernel, over all processes."""
    return jax.jit(merge_adapter, static_argnums=2, out_shardings=kernel.sharding)(kernel, adapter, scale)


def merge_adapters(params: Params, scale: float, merge: Callable[[Any, Adapter, float], Any] = merge_adapter) -> Params:
    """Return ordinary parameters: every adapter merged into its kernel. Without adapters, nothing changes."""
    merged: Params = {
        name: merge_adapters(item, scale, merge) if isinstance(item, dict) else item
        for name, item in params.items()
        if name != LORA_KEY
    }
    if LORA_KEY in params:
        with jax.named_scope("lora"):
            merged["kernel"] = merge(params["kernel"], params[LORA_KEY], scale)
    return merged


def stored_adapter(path: Path, stored: Collection[Path]) -> dict[str, Path]:
    """Return the paths of a parameter's adapter among the stored ones; empty if it has none."""
    if path[-1] != "kernel":
        return {}
    return {name: adapter_path for name in ("a", "b") if (adapter_path := (*path[:-1], LORA_KEY, name)) in stored}
