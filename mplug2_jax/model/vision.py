"""The dual-vision encoder: one CLIP ViT for images and videos, with local temporal modeling for videos only.

Images and videos share all weights except the temporal units, which an image batch (t = 1) skips. Frames are folded
into the batch, so attention never crosses frames; only the temporal units and the mean class token do.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.layers import (
    CLIP_EPS,
    MLP,
    Attention,
    LayerNorm,
    Linear,
    gelu,
    make_param,
    quick_gelu,
    scan_layers,
    stack_layers,
    uniform_fan_in,
)  # fmt: skip
from mplug2_jax.model.sequence import AttentionSharding
from mplug2_jax.model.taps import Taps, tap
from mplug2_jax.parallel.config import SEQUENCE
from mplug2_jax.parallel.sharding import activation_spec, constrain, gather_param, num_shards

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
# The release always starts this tower from CLIP, so it does not define an initializer.
VIT_INIT = nnx.initializers.xavier_uniform()


def normalize_pixels(frames: UInt8[Array, "b t y x 3"]) -> Float[Array, "b t y x 3"]:
    """Apply CLIP's normalization on the device, so that bytes are transferred instead of floats."""
    return (frames.astype(jnp.float32) / 255.0 - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)


def sincos_positions(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "p w"]:
    """Return an initial position table: sines and cosines of x and y, as large as embedded patches; 0 for the class.

    Chen et al. 2021, arXiv 2104.02057. In short runs from scratch a class head learns places from these and not from
    small random numbers, which are lost beside patches; contrast learns more slowly from them.
    """
    del key
    rows, width = shape
    grid, num_frequencies = math.isqrt(rows - 1), width // 4
    frequencies = 10_000.0 ** -np.linspace(0, 1, num_frequencies)
    y, x = np.divmod(np.arange(grid * grid), grid)
    phases = [np.outer(axis, frequencies) for axis in (x, y)]
    waves = np.concatenate([wave(phase) for phase in phases for wave in (np.sin, np.cos)], axis=1)
    table = np.zeros(shape)
    table[1:, : waves.shape[1]] = waves
    return jnp.asarray(table, dtype)


def resize_positions(table: Float[Array, "p w"], grid: int) -> Float[Array, "n w"]:
    """Resize the grid of a position table (class row first): bilinear, half-pixel centers, no antialiasing."""
    side = math.isqrt(table.shape[0] - 1)
    if side == grid:
        return table
    patch_rows = table[1:].reshape(side, side, -1)
    patch_rows = jax.image.resize(patch_rows, (grid, grid, patch_rows.shape[-1]), "bilinear", antialias=False)
    return jnp.concatenate([table[:1], patch_rows.reshape(grid * grid, -1)])


def frame_sharding(clips: Any, frames: int) -> tuple[str, int]:
    """Choose how frames, folded into the batch, are sharded: return their logical axis, and the shards of each clip.

    ``clips`` is an int or, in a program for any batch, a symbolic dimension of ``jax.export``.

    If the mesh divides the number of clips, clips are not split and no frame is communicated. Otherwise they are split
    between frames if the mesh divides the number of frames, else not at all.
    """
    clip_shards = num_shards("frames")
    if frames == 1 or clips % num_shards("images") == 0:
        return "images", 1
    return ("images", clip_shards) if frames % clip_shards == 0 else ("batch", 1)


def shift_frames(x: Float[Array, "b t n w"]) -> tuple[Float[Array, "b t n w"], Float[Array, "b t n w"]]:
    """Return the previous and the next frame of each frame; zeros beyond the clip.

    Where clips are sharded, each chip exchanges its first and last frame with its neighbors.
    """
    _, clip_shards = frame_sharding(*x.shape[:2])
    if clip_shards == 1:
        # Pads of negative widths, because XLA fuses them with what reads them, and no concatenations.
        pad, same = functools.partial(jax.lax.pad, x, jnp.zeros((), x.dtype)), (0, 0, 0)
        return pad([same, (1, -1, 0), same, same]), pad([same, (-1, 1, 0), same, same])

    def exchange_halo(x: Array) -> tuple[Array, Array]:  # chips without a sender receive zeros
        first = jax.lax.ppermute(x[:, -1:], SEQUENCE, [(i, i + 1) for i in range(clip_shards - 1)])
        last = jax.lax.ppermute(x[:, :1], SEQUENCE, [(i + 1, i) for i in range(clip_shards - 1)])
        return jnp.concatenate([first, x[:, :-1]], axis=1), jnp.concatenate([x[:, 1:], last], axis=1)

    mesh = jax.sharding.get_abstract_mesh()
    spec = activation_spec(("batch", "frames", None, "mlp"), dict(mesh.shape), x.shape)
    return jax.shard_map(exchange_halo, mesh=mesh, in_specs=spec, out_specs=(spec, spec))(x)


class LocalTemporal(nnx.Module):
    """LN -> down-projection -> depthwise convolution over three frames -> QuickGELU -> up-projection, for patches.

    The convolution is three shifted multiply-adds with zero padding. The up-projection is initialized to zero, so that
    a new unit is the identity.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        width, hidden = config.vision_width, config.vision_width // 2
        self.norm = LayerNorm(width, CLIP_EPS, rngs=rngs)
        self.down = Linear(
            width, hidden, ("embed", "mlp"), dtype=config.dtype, kernel_init=uniform_fan_in(width),
            bias_init=uniform_fan_in(width), rngs=rngs,
        )  # fmt: skip
        self.kernel = make_param(rngs, uniform_fan_in(3), (3, hidden), (None, "mlp"))
        self.bias = make_param(rngs, uniform_fan_in(3), (hidden,), ("mlp",))
        zeros = nnx.initializers.zeros
        self.up = Linear(hidden, width, ("mlp", "embed"), dtype=config.dtype, kernel_init=zeros, rngs=rngs)

    @jax.named_scope("temporal")
    def __call__(self, x: Float[Array, "bt n w"], frames: int) -> Float[Array, "bt n w"]:
        """Compute the update of every token from its frame and the two adjacent ones of ``frames`` per clip."""
        y = self.down(self.norm(x))
        folded = y.shape
        y = y.reshape(-1, frames, *folded[1:])  # not earlier: the norm and the matmuls would be in another layout
        kernel, bias = self.kernel[...].astype(y.dtype), self.bias[...].astype(y.dtype)
        previous, following = shift_frames(y)
        y = previous * kernel[0] + y * kernel[1] + following * kernel[2] + bias
        return self.up(quick_gelu(y).reshape(folded))


class VisionBlock(nnx.Module):
    """CLIP's pre-norm block, with a local temporal unit before each of its two halves."""

    def __init__(self, config: ModelConfig, *, temporal: bool, rngs: nnx.Rngs) -> None:
        width, dtype = config.vision_width, config.dtype
        if temporal:
            self.temporal_1 = LocalTemporal(config, rngs=rngs)
        self.norm_1 = LayerNorm(width, CLIP_EPS, rngs=rngs)
        self.attention = Attention(
            width, config.vision_heads, dtype=dtype, kernel=config.attention, init=VIT_INIT, rngs=rngs
        )
        if temporal:
            self.temporal_2 = LocalTemporal(config, rngs=rngs)
        self.norm_2 = LayerNorm(width, CLIP_EPS, rngs=rngs)
        activation = quick_gelu if config.vision_activation == "quick_gelu" else gelu
        self.mlp = MLP(width, 4 * width, activation, dtype=dtype, init=VIT_INIT, rngs=rngs)

    def __call__(self, x: Float[Array, "bt n w"], frames: int, batch_axis: str = "images") -> Float[Array, "bt n w"]:
        """Apply the block to ``bt = b * frames`` frames; with one frame the temporal units are skipped.

        ``batch_axis`` is the logical axis of ``bt``: see :func:`frame_sharding`.
        """
        if frames > 1:
            x = x + self._temporal_update(self.temporal_1, x, frames)
        x = x + self.attention(self.norm_1(x), sharding=AttentionSharding(batch=batch_axis))
        if frames > 1:
            x = x + self._temporal_update(self.temporal_2, x, frames)
        return x + self.mlp(self.norm_2(x))

    @staticmethod
    def _temporal_update(unit: LocalTemporal, x: Float[Array, "bt n w"], frames: int) -> Float[Array, "bt n w"]:
        # The class token's update is computed and zeroed: cheaper than splitting 257 tokens into 1 + 256.
        update = unit(x, frames)
        return jnp.where((jnp.arange(x.shape[1]) > 0)[:, None], update, jnp.zeros((), update.dtype))


class VisionTower(nnx.Module):
    """Patch embedding, blocks, then one class token (the mean over frames) and all patches of all frames."""

    def __init__(self, config: ModelConfig, *, temporal: bool, rngs: nnx.Rngs) -> None:
        width = config.vision_width
        tubelet_size = 3 if config.temporal_downsampling else 1
        self.patch = Linear(
            tubelet_size * 3 * config.patch_size**2, width, ("patch", "embed"), dtype=config.dtype, bias=False,
            kernel_init=nnx.initializers.lecun_normal(), rngs=rngs,
        )  # fmt: skip
        init = nnx.initializers.truncated_normal(0.02)
        self.class_token = make_param(rngs, init, (width,), ("norm",))
        positions = {"normal": init, "sincos": sincos_positions, "zeros": nnx.initializers.zeros}
        self.positions = make_param(
            rngs, positions[config.positions_init], (config.num_patches + 1, width), ("position", "embed")
        )
        self.norm_pre = LayerNorm(width, CLIP_EPS, rngs=rngs)
        self.blocks = stack_layers(lambda r: VisionBlock(config, temporal=temporal, rngs=r), config.vision_layers, rngs)
        self.norm_post = LayerNorm(width, CLIP_EPS, rngs=rngs)
        self.config, self.temporal = config, temporal

    @jax.named_scope("vision")
    def __call__(
        self, frames: Float[Array, "b t y x 3"], *, rng: PRNGKeyArray | None = None, taps: Taps | None = None
    ) -> Float[Array, "b s w"]:
        """Encode normalized frames: any number of them, of any square size.

        The tower has no dropout; ``rng`` is accepted so that all towers have the same signature.

        Raises:
            UserError: frames that are not square or not a multiple of the patch size, or clips without temporal units.
        """
        b, t = frames.shape[:2]
        if t > 1 and not self.temporal:
            raise UserError(f"video clips of {t} frames need the part 'temporal', which this model does not have")
        patches = self._patches(frames)
        t, n = patches.shape[1], patches.shape[2]
        batch_axis, _ = frame_sharding(b, t)
        patches = constrain(patches.reshape(b * t, n, -1), batch_axis, None, None)
        x = self.patch(patches.astype(self.config.dtype))
        class_token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (b * t, 1, x.shape[-1]))
        x = jnp.concatenate([class_token, x], axis=1)
        x = x + resize_positions(gather_param(self.positions[...], ("position", "embed")), math.isqrt(n)).astype(
            x.dtype
        )
        x = constrain(self.norm_pre(x), batch_axis, None, None)
        tap(taps, "vision/norm_pre", x)

        def body(block: VisionBlock, x: Array, _key: PRNGKeyArray | None, _extra: None) -> tuple[Array, None]:
            return constrain(block(x, t, batch_axis), batch_axis, None, None), None

        x, _ = scan_layers(
            self.blocks, x, body, remat=self.config.remat.vision, unroll=self.config.scan_unroll, taps=taps,
            name="vision/block",
        )  # fmt: skip
        x = x.reshape(b, t, n + 1, -1)
        class_token, x = x[:, :, 0].mean(1, keepdims=True), x[:, :, 1:].reshape(b, t * n, -1)
        # A sum instead of a concatenation: sharded between frames, tokens move to the next chip only, not to all chips.
        x = jnp.pad(class_token, ((0, 0), (0, t * n), (0, 0))) + jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
        x = constrain(self.norm_post(x), "batch", "visual", None)
        tap(taps, "vision/out", x)
        return x

    def _patches(self, frames: Float[Array, "b t y x 3"]) -> Float[Array, "b t2 n p"]:
        """Flatten patches into rows of pixels, ordered (dt, dy, dx, channel), so that a matmul embeds them."""
        b, t, height, width, _ = frames.shape
        p = self.config.patch_size
        if height != width or height % p:
            raise UserError(f"frames are {height}x{width} pixels, expected squares whose side is a multiple of {p}")
        g = height // p
        x = frames.reshape(b, t, g, p, g, p, 3).transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, t, g * g, p * p * 3)
        if not self.config.temporal_downsampling:
            return x
        num_tubelets = self.config.num_tubelets(t)
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
        return jnp.concatenate([padded[:, k : k + 2 * num_tubelets - 1 : 2] for k in range(3)], axis=-1)
