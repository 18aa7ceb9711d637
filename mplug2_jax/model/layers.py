"""Building blocks that every tower uses: linear maps, norms, attention, the BERT layer, and stacked depth.

Randomness is an argument: ``rng=None`` means evaluation. Nothing here holds random state, so that a step's dropout is a
function of (seed, step) alone.
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
from mplug2_jax.model.sequence import REPLICATED, AttentionSharding
from mplug2_jax.model.taps import Taps, tap
from mplug2_jax.parallel.sharding import all_gather_param, params_are_gathered, reduce_scatter_grad, target_platform

Initializer = Callable[..., Array]
EMBEDDING_INIT: Initializer = nnx.initializers.normal(0.02)  # BERT's
DOT = "dot"  # the name under which the outputs of linear maps are kept by the remat policy "dots"
BERT_EPS = 1e-12
CLIP_EPS = 1e-5

Layer = TypeVar("Layer", bound=nnx.Module)


def split_rng(rng: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
    """``count`` independent keys, or as many Nones."""
    return [None] * count if rng is None else list(jax.random.split(rng, count))


def dropout(x: Float[Array, "..."], rate: float, rng: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Inverted dropout; the identity without a key or a rate."""
    if rng is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """X * sigmoid(1.702 x): CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact (erf) form: BERT's activation."""
    return jax.nn.gelu(x, approximate=False)


def make_param(
    rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> nnx.Param[jax.Array]:
    """A float32 parameter that carries its logical axis names."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes)


def kernel_init(config: ModelConfig) -> Initializer:
    """Return how a fresh kernel outside the vision tower is drawn."""
    return nnx.initializers.normal(config.init_std)


def uniform_fan_in(fan_in: int) -> Initializer:
    """Torch's default for convolutions: uniform within 1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def matmul(
    x: Float[Array, "*batch i"],
    weight: Float[Array, "a b"],
    names: tuple[str | None, str | None] | None = None,
    *,
    tied: bool = False,
) -> Float[Array, "*batch o"]:
    """``x @ weight`` ([i, o]), or ``x @ weight.T`` of a tied table ([o, i]), in the dtype of ``x``.

    With the logical ``names`` of a parameter its shards are gathered for this use alone, already in the dtype of ``x``:
    half the bytes where that has 16 bits. The gradient of the weight is written out, so that it comes in the weight's
    dtype: 16-bit compute then accumulates and reduces float32 gradients, which JAX's own rule would round first.
    """
    return _matmul(x, weight, None if params_are_gathered() else names, tied)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: Array, weight: Array, names: tuple[str | None, ...] | None, tied: bool) -> Array:
    return _dot(x, _used(weight, x.dtype, names), (x.ndim - 1,), (1 if tied else 0,), x.dtype)


def _used(weight: Array, dtype: Any, names: tuple[str | None, ...] | None) -> Array:
    weight = weight.astype(dtype)
    return weight if names is None else all_gather_param(weight, names)


def _dot(x: Array, y: Array, over_x: tuple[int, ...], over_y: tuple[int, ...], dtype: Any) -> Array:
    return jax.lax.dot_general(x, y, ((over_x, over_y), ((), ())), preferred_element_type=dtype)


def _matmul_forward(
    x: CustomVJPPrimal, weight: CustomVJPPrimal, names: tuple[str | None, ...] | None, tied: bool
) -> tuple[Array, tuple[Array | None, Array]]:
    # A frozen weight asks for no gradient of its own, and so for no input to be kept.
    return _matmul(x.value, weight.value, names, tied), (x.value if weight.perturbed else None, weight.value)


def _matmul_backward(
    names: tuple[str | None, ...] | None, tied: bool, saved: tuple[Array | None, Array], dy: Array
) -> tuple[Array, Array | None]:
    x, weight = saved
    dx = _dot(dy, _used(weight, dy.dtype, names), (dy.ndim - 1,), (0 if tied else 1,), dy.dtype)  # y has x's dtype
    if x is None:
        return dx, None
    left, right = (dy, x) if tied else (x, dy)
    if target_platform() == "cpu":  # its matmuls copy operands that are contracted over several dimensions
        left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    rows = tuple(range(left.ndim - 1))
    gradient = _dot(left, right, rows, rows, weight.dtype)
    return dx, gradient if names is None else reduce_scatter_grad(gradient, names)


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


class Linear(nnx.Module):
    """A linear map whose kernel [in, out] and bias [out] carry logical axis names; computes in ``dtype``."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        axes: tuple[str | None, str | None],
        *,
        dtype: str,
        rngs: nnx.Rngs,
        kernel_init: Initializer,
        bias_init: Initializer = nnx.initializers.zeros,
        bias: bool = True,
    ) -> None:
        self.kernel = make_param(rngs, kernel_init, (in_dim, out_dim), axes)
        if bias:
            self.bias = make_param(rngs, bias_init, (out_dim,), ("norm" if axes[1] == "embed" else axes[1],))
        self.has_bias, self.dtype, self.axes = bias, dtype, axes

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        """Maps the last axis."""
        y = checkpoint_name(matmul(x.astype(self.dtype), self.kernel[...], self.axes), DOT)
        return y + self.bias[...].astype(y.dtype) if self.has_bias else y


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, in float32, returned in the dtype of its input."""

    def __init__(self, dim: int, eps: float, *, rngs: nnx.Rngs) -> None:
        self.scale = make_param(rngs, nnx.initializers.ones, (dim,), ("norm",))
        self.bias = make_param(rngs, nnx.initializers.zeros, (dim,), ("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Normalises the last axis."""
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention of ``x`` over itself or over a memory."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        dtype: str,
        kernel: AttentionKernel,
        dropout: float = 0.0,
        init: Initializer,
        rngs: nnx.Rngs,
    ) -> None:
        def project() -> Linear:
            return Linear(width, width, ("embed", "heads"), dtype=dtype, kernel_init=init, rngs=rngs)

        self.query, self.key, self.value = project(), project(), project()
        self.out = Linear(width, width, ("heads", "embed"), dtype=dtype, kernel_init=init, rngs=rngs)
        self.heads, self.kernel, self.dropout = heads, kernel, dropout

    def _split(self, x: Float[Array, "b l d"]) -> Float[Array, "b l h k"]:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def project(self, memory: Float[Array, "b s d"]) -> tuple[Float[Array, "b s h k"], Float[Array, "b s h k"]]:
        """Keys and values of a memory, for use by many queries."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    def attend(
        self,
        x: Float[Array, "br l d"],
        keys: Float[Array, "b s h k"],
        values: Float[Array, "b s h k"],
        key_mask: Bool[Array, "b s"] | None = None,
        *,
        causal: bool = False,
        rng: PRNGKeyArray | None = None,
        layout: AttentionSharding = REPLICATED,
    ) -> Float[Array, "br l d"]:
        """Queries of ``x`` over projected keys and values.

        ``x`` may hold r sequences for each memory (br = b*r); they are laid side by side as queries of one memory, so
        that keys and values are never copied.
        """
        query = self._split(self.query(x))
        folded = query.reshape(keys.shape[0], -1, *query.shape[2:])
        if folded.shape[0] != query.shape[0] and causal:
            raise ValueError("causal attention needs one memory per sequence")
        out = attention(
            folded, keys, values, key_mask=key_mask, causal=causal, dropout=self.dropout, rng=rng, kernel=self.kernel,
            layout=layout,
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
        layout: AttentionSharding = REPLICATED,
    ) -> Float[Array, "br l d"]:
        """Self attention, or cross attention when a memory is given."""
        keys, values = self.project(x if memory is None else memory)
        return self.attend(x, keys, values, key_mask, causal=causal, rng=rng, layout=layout)


class MLP(nnx.Module):
    """Two linear maps around an activation."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Callable[[Array], Array],
        *,
        dtype: str,
        init: Initializer,
        rngs: nnx.Rngs,
    ) -> None:
        self.up = Linear(width, hidden, ("embed", "mlp"), dtype=dtype, kernel_init=init, rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), dtype=dtype, kernel_init=init, rngs=rngs)
        self.activation = activation

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Applies the two maps."""
        return self.down(self.activation(self.up(x)))


class BertLayer(nnx.Module):
    """BERT's post-norm layer: self attention, cross attention if it has one and is given a memory, MLP."""

    def __init__(self, config: ModelConfig, *, cross: bool, rngs: nnx.Rngs) -> None:
        init = kernel_init(config)

        def attend() -> Attention:
            return Attention(
                config.width, config.heads, dtype=config.dtype, kernel=config.attention,
                dropout=config.attention_dropout, init=init, rngs=rngs,
            )  # fmt: skip

        self.self_attention = attend()
        self.self_norm = LayerNorm(config.width, BERT_EPS, rngs=rngs)
        if cross:
            self.cross_attention = attend()
            self.cross_norm = LayerNorm(config.width, BERT_EPS, rngs=rngs)
        self.mlp = MLP(config.width, config.mlp_width, gelu, dtype=config.dtype, init=init, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, BERT_EPS, rngs=rngs)
        self.dropout = config.dropout

    def add_self(self, x: Float[Array, "b l d"], update: Float[Array, "b l d"], rng: PRNGKeyArray | None) -> Array:
        """The residual around self attention."""
        return self.self_norm(x + dropout(update, self.dropout, rng))

    def add_cross(self, x: Float[Array, "b l d"], update: Float[Array, "b l d"], rng: PRNGKeyArray | None) -> Array:
        """The residual around cross attention."""
        return self.cross_norm(x + dropout(update, self.dropout, rng))

    def add_mlp(self, x: Float[Array, "b l d"], rng: PRNGKeyArray | None) -> Float[Array, "b l d"]:
        """The MLP with its residual."""
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
        """Runs the layer; without a memory it is an ordinary BERT layer. ``visual`` says which is the long sequence."""
        r = split_rng(rng, 5)
        own, other = ("visual" if visual == name else None for name in ("x", "memory"))
        update = self.self_attention(
            x, None, mask, causal=causal, rng=r[0], layout=AttentionSharding(queries=own, keys=own)
        )
        x = self.add_self(x, update, r[1])
        if memory is not None:
            layout = AttentionSharding(queries=own, keys=other)
            x = self.add_cross(x, self.cross_attention(x, memory, memory_mask, rng=r[2], layout=layout), r[3])
        return self.add_mlp(x, r[4])


def stack_layers(make: Callable[[nnx.Rngs], Layer], depth: int, rngs: nnx.Rngs) -> Layer:
    """``depth`` layers as one module whose parameters have a leading "layers" axis."""
    build = nnx.split_rngs(splits=depth)(
        nnx.vmap(make, in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    )
    return build(rngs)


def slice_layers(layers: Layer, index: int | slice) -> Layer:
    """One layer of a stack, or a contiguous part of it."""
    graphdef, params = nnx.split(layers, nnx.Param)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p[index], params))


def all_gather_module(module: Layer, dtype: str) -> Layer:
    """A module with its parameters gathered, and kernels in the dtype that they compute in: for a loop of many uses.

    Its uses are traced under :func:`~mplug2_jax.parallel.sharding.gathered_before`.
    """
    graphdef, params = nnx.split(module, nnx.Param)

    def gather(path: tuple[Any, ...], parameter: nnx.Variable[jax.Array]) -> nnx.Variable[jax.Array]:
        value = parameter[...].astype(dtype) if path[-1] == "kernel" else parameter[...]
        return parameter.replace(all_gather_param(value, parameter.get_metadata("out_sharding")))

    gathered: Layer = nnx.merge(graphdef, nnx.map_state(gather, params))
    return gathered


def num_layers(layers: nnx.Module) -> int:
    """How many layers a stack holds."""
    return int(jax.tree.leaves(nnx.state(layers, nnx.Param))[0].shape[0])


_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(DOT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def scan_layers(
    layers: Layer,
    x: Array,
    body: Callable[[Layer, Array, PRNGKeyArray | None, Any], tuple[Array, Any]],
    *,
    rng: PRNGKeyArray | None = None,
    carry_in: Any = None,
    remat: Remat = "none",
    unroll: int = 1,
    taps: Taps | None = None,
    name: str = "",
) -> tuple[Array, Any]:
    """Runs ``body(layer, x, rng, extra) -> (x, out)`` over a stack, compiled once for any depth.

    ``carry_in`` is a tree with a leading layer axis whose slices reach the body as ``extra``; the ``out`` of all layers
    come back stacked. With a tap called ``name``, so do the outputs of every layer.
    """
    graphdef, params = nnx.split(layers, nnx.Param)
    depth = num_layers(layers)
    keys = None if rng is None else jax.random.split(rng, depth)
    wanted = taps is not None and bool(name) and taps.is_requested(name)

    def step(x: Array, per_layer: tuple[Any, PRNGKeyArray | None, Any]) -> tuple[Array, Any]:
        layer_params, key, extra = per_layer
        x, out = body(nnx.merge(graphdef, layer_params), x, key, extra)
        return x, (out, x if wanted else None)

    if remat != "none":
        step = jax.checkpoint(step, policy=_POLICIES[remat], prevent_cse=False)
    x, (outs, every) = jax.lax.scan(step, x, (params, keys, carry_in), unroll=min(unroll, depth))
    if wanted:
        tap(taps, name, every)
    return x, outs
