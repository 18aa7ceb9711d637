"""Building blocks of all towers: linear maps, norms, attention, the BERT layer, and scans over stacked layers.

Random keys are arguments: ``rng=None`` means evaluation. No module has random state, so a step's dropout is a function
of (seed, step) alone.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mplug2_jax.model.attention import attention
from mplug2_jax.model.config import AttentionKernel, ModelConfig, Remat
from mplug2_jax.model.prng import bernoulli
from mplug2_jax.model.sequence import REPLICATED, AttentionSharding
from mplug2_jax.model.taps import Taps, tap
from mplug2_jax.parallel.sharding import all_gather_param, params_are_gathered, reduce_scatter_grad, target_platform

Initializer = Callable[..., Array]
DOT = "dot"  # checkpoint name of the outputs of linear maps, which the remat policy "dots" saves
EMBEDDING_INIT: Initializer = nnx.initializers.normal(0.02)  # BERT's
BERT_EPS = 1e-12
CLIP_EPS = 1e-5

Layer = TypeVar("Layer", bound=nnx.Module)


def split_rng(rng: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
    """Split a key into ``count`` keys; without a key return ``count`` Nones."""
    return [None] * count if rng is None else list(jax.random.split(rng, count))


def dropout(x: Float[Array, "..."], rate: float, rng: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Apply inverted dropout; the identity without a key or with rate 0."""
    if rng is None or rate == 0.0:
        return x
    keep = bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute x * sigmoid(1.702 x), CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute the exact (erf) GELU, BERT's activation."""
    return jax.nn.gelu(x, approximate=False)


def make_param(
    rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...], logical_axes: tuple[str | None, ...]
) -> nnx.Param[jax.Array]:
    """Make a float32 parameter that carries its logical axis names."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=logical_axes)


def kernel_init(config: ModelConfig) -> Initializer:
    """Return the initializer of kernels outside the vision tower."""
    return nnx.initializers.normal(config.init_std)


def uniform_fan_in(fan_in: int) -> Initializer:
    """Return torch's default initializer of convolutions: uniform within 1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def matmul(
    x: Float[Array, "*batch i"], weight: Float[Array, "a b"],
    logical_axes: tuple[str | None, str | None] | None = None, *, tied: bool = False,
) -> Float[Array, "*batch o"]:  # fmt: skip
    """Compute ``x @ weight`` ([i, o]), or ``x @ weight.T`` of a tied table ([o, i]), in the dtype of ``x``.

    With the ``logical_axes`` of a parameter, its shards are gathered for this use, after the cast to the dtype of
    ``x``: half the bytes in 16 bits. The custom gradient has the weight's dtype: 16-bit compute accumulates and reduces
    float32 gradients, which JAX's own rule would round first.
    """
    return _matmul(x, weight, None if params_are_gathered() else logical_axes, tied)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: Array, weight: Array, logical_axes: tuple[str | None, ...] | None, tied: bool) -> Array:
    return _dot(x, _cast_and_gather(weight, x.dtype, logical_axes), (x.ndim - 1,), (1 if tied else 0,), x.dtype)


def _cast_and_gather(weight: Array, dtype: Any, logical_axes: tuple[str | None, ...] | None) -> Array:
    weight = weight.astype(dtype)
    return weight if logical_axes is None else all_gather_param(weight, logical_axes)


def _dot(x: Array, y: Array, x_dims: tuple[int, ...], y_dims: tuple[int, ...], dtype: Any) -> Array:
    return jax.lax.dot_general(x, y, ((x_dims, y_dims), ((), ())), preferred_element_type=dtype)


def _matmul_fwd(
    x: CustomVJPPrimal, weight: CustomVJPPrimal, logical_axes: tuple[str | None, ...] | None, tied: bool
) -> tuple[Array, tuple[Array | None, Array]]:
    # A frozen weight has no gradient, and so its input is not saved.
    return _matmul(x.value, weight.value, logical_axes, tied), (x.value if weight.perturbed else None, weight.value)


def _matmul_bwd(
    logical_axes: tuple[str | None, ...] | None, tied: bool, residuals: tuple[Array | None, Array], dy: Array
) -> tuple[Array, Array | None]:
    x, weight = residuals
    dx = _dot(
        dy, _cast_and_gather(weight, dy.dtype, logical_axes), (dy.ndim - 1,), (0 if tied else 1,), dy.dtype
    )  # y has x's dtype
    if x is None:
        return dx, None
    lhs, rhs = (dy, x) if tied else (x, dy)
    if target_platform() == "cpu":  # its matmuls copy operands that are contracted over several dimensions
        lhs, rhs = lhs.reshape(-1, lhs.shape[-1]), rhs.reshape(-1, rhs.shape[-1])
    batch_dims = tuple(range(lhs.ndim - 1))
    dweight = _dot(lhs, rhs, batch_dims, batch_dims, weight.dtype)
    return dx, dweight if logical_axes is None else reduce_scatter_grad(dweight, logical_axes)


_matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


class Linear(nnx.Module):
    """Linear map whose kernel [in, out] and bias [out] carry logical axis names; computes in ``dtype``."""

    def __init__(
        self, in_dim: int, out_dim: int, logical_axes: tuple[str | None, str | None], *, dtype: str, rngs: nnx.Rngs,
        kernel_init: Initializer, bias_init: Initializer = nnx.initializers.zeros, bias: bool = True,
    ) -> None:  # fmt: skip
        self.kernel = make_param(rngs, kernel_init, (in_dim, out_dim), logical_axes)
        if bias:
            self.bias = make_param(
                rngs, bias_init, (out_dim,), ("norm" if logical_axes[1] == "embed" else logical_axes[1],)
            )
        self.has_bias, self.dtype, self.logical_axes = bias, dtype, logical_axes

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        """Apply the map to the last axis."""
        y = matmul(x.astype(self.dtype), self.kernel[...], self.logical_axes)
        # Named with its bias: without it, a pass would write both sums, and the backward pass would add it again.
        return checkpoint_name(y + self.bias[...].astype(y.dtype) if self.has_bias else y, DOT)


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis, in float32; the result has the dtype of the input."""

    def __init__(self, dim: int, eps: float, *, rngs: nnx.Rngs) -> None:
        self.scale = make_param(rngs, nnx.initializers.ones, (dim,), ("norm",))
        self.bias = make_param(rngs, nnx.initializers.zeros, (dim,), ("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Normalize the last axis."""
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self attention, or cross attention to a memory."""

    def __init__(
        self, width: int, heads: int, *, dtype: str, kernel: AttentionKernel, dropout: float = 0.0, init: Initializer,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        def make_projection() -> Linear:
            return Linear(width, width, ("embed", "heads"), dtype=dtype, kernel_init=init, rngs=rngs)

        self.query, self.key, self.value = make_projection(), make_projection(), make_projection()
        self.out = Linear(width, width, ("heads", "embed"), dtype=dtype, kernel_init=init, rngs=rngs)
        self.heads, self.kernel, self.dropout = heads, kernel, dropout

    def _split_heads(self, x: Float[Array, "b l d"]) -> Float[Array, "b l h k"]:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def project(self, memory: Float[Array, "b s d"]) -> tuple[Float[Array, "b s h k"], Float[Array, "b s h k"]]:
        """Project a memory to keys and values, for use by many queries."""
        return self._split_heads(self.key(memory)), self._split_heads(self.value(memory))

    def attend(
        self,
        x: Float[Array, "br l d"],
        keys: Float[Array, "b s h k"],
        values: Float[Array, "b s h k"],
        key_mask: Bool[Array, "b s"] | None = None,
        *,
        causal: bool = False,
        rng: PRNGKeyArray | None = None,
        sharding: AttentionSharding = REPLICATED,
    ) -> Float[Array, "br l d"]:
        """Attend from ``x`` to projected keys and values.

        ``x`` may have r sequences per memory (br = b*r); they are concatenated as queries of one memory, so that keys
        and values are never copied.
        """
        query = self._split_heads(self.query(x))
        folded = query.reshape(keys.shape[0], -1, *query.shape[2:])
        if folded.shape[0] != query.shape[0] and causal:
            raise ValueError("causal attention needs one memory per sequence")
        out = attention(
            folded, keys, values, key_mask=key_mask, causal=causal, dropout=self.dropout, rng=rng, kernel=self.kernel,
            sharding=sharding,
        )  # fmt: skip
        return self.out(out.reshape(*x.shape[:2], -1))

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "br l d"],
        memory: Float[Array, "b s d"] | None = None,
        key_mask: Bool[Array, "b s"] | None = None,
        *,
        causal: bool = False,
        rng: PRNGKeyArray | None = None,
        sharding: AttentionSharding = REPLICATED,
    ) -> Float[Array, "br l d"]:
        """Apply self attention, or cross attention if there is a memory."""
        keys, values = self.project(x if memory is None else memory)
        return self.attend(x, keys, values, key_mask, causal=causal, rng=rng, sharding=sharding)


class MLP(nnx.Module):
    """Two linear maps with an activation between them."""

    def __init__(
        self, width: int, hidden: int, activation: Callable[[Array], Array], *, dtype: str, init: Initializer,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.up = Linear(width, hidden, ("embed", "mlp"), dtype=dtype, kernel_init=init, rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), dtype=dtype, kernel_init=init, rngs=rngs)
        self.activation = activation

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Apply the two maps."""
        return self.down(self.activation(self.up(x)))


class BertLayer(nnx.Module):
    """BERT's post-norm layer: self attention, optional cross attention to a memory, MLP."""

    def __init__(self, config: ModelConfig, *, cross: bool, rngs: nnx.Rngs) -> None:
        init = kernel_init(config)

        def make_attention() -> Attention:
            return Attention(
                config.width, config.heads, dtype=config.dtype, kernel=config.attention,
                dropout=config.attention_dropout, init=init, rngs=rngs,
            )  # fmt: skip

        self.self_attention = make_attention()
        self.self_norm = LayerNorm(config.width, BERT_EPS, rngs=rngs)
        if cross:
            self.cross_attention = make_attention()
            self.cross_norm = LayerNorm(config.width, BERT_EPS, rngs=rngs)
        self.mlp = MLP(config.width, config.mlp_width, gelu, dtype=config.dtype, init=init, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, BERT_EPS, rngs=rngs)
        self.dropout = config.dropout

    def add_self(self, x: Float[Array, "b l d"], update: Float[Array, "b l d"], rng: PRNGKeyArray | None) -> Array:
        """Add the residual of self attention and normalize."""
        return self.self_norm(x + dropout(update, self.dropout, rng))

    def add_cross(self, x: Float[Array, "b l d"], update: Float[Array, "b l d"], rng: PRNGKeyArray | None) -> Array:
        """Add the residual of cross attention and normalize."""
        return self.cross_norm(x + dropout(update, self.dropout, rng))

    def add_mlp(self, x: Float[Array, "b l d"], rng: PRNGKeyArray | None) -> Float[Array, "b l d"]:
        """Apply the MLP, add its residual and normalize."""
        return self.mlp_norm(x + dropout(self.mlp(x), self.dropout, rng))

    def __call__(
        self,
        x: Float[Array, "br l d"],
        mask: Bool[Array, "br l"] | None = None,
        memory: Float[Array, "b s d"] | None = None,
        memory_mask: Bool[Array, "b s"] | None = None,
        *,
        causal: bool = False,
        rng: PRNGKeyArray | None = None,
        visual: Literal["x", "memory", "neither"] = "neither",
    ) -> Float[Array, "br l d"]:
        """Apply the layer, without cross attention if there is no memory. ``visual`` names the long visual sequence."""
        rngs = split_rng(rng, 5)
        x_axis, memory_axis = ("visual" if visual == name else None for name in ("x", "memory"))
        sharding = AttentionSharding(queries=x_axis, keys=x_axis)
        update = self.self_attention(x, None, mask, causal=causal, rng=rngs[0], sharding=sharding)
        x = self.add_self(x, update, rngs[1])
        if memory is not None:
            sharding = AttentionSharding(queries=x_axis, keys=memory_axis)
            update = self.cross_attention(x, memory, memory_mask, rng=rngs[2], sharding=sharding)
            x = self.add_cross(x, update, rngs[3])
        return self.add_mlp(x, rngs[4])


def stack_layers(make_layer: Callable[[nnx.Rngs], Layer], depth: int, rngs: nnx.Rngs) -> Layer:
    """Make ``depth`` layers as one module whose parameters have a leading "layers" axis."""
    make_stack = nnx.split_rngs(splits=depth)(
        nnx.vmap(make_layer, in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    )
    return make_stack(rngs)


def slice_layers(layers: Layer, index: int | slice) -> Layer:
    """Return one layer of a stack, or a contiguous slice of it."""
    graphdef, params = nnx.split(layers, nnx.Param)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p[index], params))


def all_gather_module(module: Layer, dtype: str) -> Layer:
    """All-gather a module's parameters once for a loop, with kernels cast to the compute dtype.

    Trace its uses under :func:`~mplug2_jax.parallel.sharding.assume_params_gathered`.
    """
    graphdef, params = nnx.split(module, nnx.Param)

    def gather(path: tuple[Any, ...], param: nnx.Variable[jax.Array]) -> nnx.Variable[jax.Array]:
        value = param[...].astype(dtype) if path[-1] == "kernel" else param[...]
        return param.replace(all_gather_param(value, param.get_metadata("out_sharding")))

    gathered: Layer = nnx.merge(graphdef, nnx.map_state(gather, params))
    return gathered


def num_layers(layers: nnx.Module) -> int:
    """Return the number of layers in a stack."""
    return int(jax.tree.leaves(nnx.state(layers, nnx.Param))[0].shape[0])


_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(DOT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def scan_layers(
    layers: Layer, x: Array, body: Callable[[Layer, Array, PRNGKeyArray | None, Any], tuple[Array, Any]], *,
    rng: PRNGKeyArray | None = None, per_layer: Any = None, remat: Remat = "none", unroll: int = 1,
    taps: Taps | None = None, name: str = "",
) -> tuple[Array, Any]:  # fmt: skip
    """Scan ``body(layer, x, rng, extra) -> (x, out)`` over a stack of layers; compiled once for any depth.

    ``per_layer`` is a tree with a leading layer axis, whose slices are passed to the body as ``extra``. Returns the
    last ``x``, and the ``out`` of all layers stacked. If the tap ``name`` is requested, it gets every layer's ``x``.
    """
    graphdef, params = nnx.split(layers, nnx.Param)
    depth = num_layers(layers)
    keys = None if rng is None else jax.random.split(rng, depth)
    is_tapped = taps is not None and bool(name) and taps.is_requested(name)

    def step(x: Array, layer_inputs: tuple[Any, PRNGKeyArray | None, Any]) -> tuple[Array, Any]:
        layer_params, key, extra = layer_inputs
        x, out = body(nnx.merge(graphdef, layer_params), x, key, extra)
        return x, (out, x if is_tapped else None)

    if remat != "none":
        step = jax.checkpoint(step, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    x, (outs, all_x) = jax.lax.scan(step, x, (params, keys, per_layer), unroll=min(unroll, depth))
    if is_tapped:
        tap(taps, name, all_x)
    return x, outs
