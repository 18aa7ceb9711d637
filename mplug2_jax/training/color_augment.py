"""RandAugment's operations on colors, in the compiled step: those of the data pipeline, to one level of 255."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from data_pipelines.augment import DEVICE_OPERATIONS
from mplug2_jax.objectives.forward import DeviceBatch

Pixels = Float[Array, "b t y x 3"]  # whole numbers, 0 to 255
Level = Float[Array, "b 1 1 1 1"]


def augment_colors(batch: DeviceBatch) -> DeviceBatch:
    """Apply a batch's ``color_operations``, if it has any, to its frames, and remove them."""
    if "color_operations" not in batch:
        return batch
    other_arrays = {name: array for name, array in batch.items() if name != "color_operations"}
    return other_arrays | {"frames": apply_color_operations(batch["frames"], batch["color_operations"])}


def apply_color_operations(
    frames: UInt8[Array, "b t y x 3"], operations: Float[Array, "b o 2"]
) -> UInt8[Array, "b t y x 3"]:
    """Apply operations in sequence; see ``data_pipelines.augment.apply_color_operations``."""
    pixels = frames.astype(jnp.float32)
    for i in range(operations.shape[1]):
        number, level = (operations[:, i, column].reshape(-1, 1, 1, 1, 1) for column in (0, 1))
        # All of them, since each example has its own: they are cheap, and all but the statistics fuse into one pass.
        results = [_OPERATIONS[name](pixels, level) for name in DEVICE_OPERATIONS]
        pixels = jnp.select([number == index for index in range(len(results))], results, pixels)
    return pixels.astype(jnp.uint8)


def _auto_contrast(pixels: Pixels, level: Level) -> Pixels:
    """Stretch each color's range, over all frames of an example, to 0..255."""
    low, high = (
        reduce(pixels, axis=(1, 2, 3), keepdims=True) for reduce in (jnp.min, jnp.max)
    )  # fmt: skip
    span = high - low
    # In integers: many results are whole numbers, which a product with a rounded reciprocal would miss.
    stretched = (pixels - low).astype(jnp.int32) * 255 // jnp.maximum(span, 1).astype(jnp.int32)
    return jnp.where(span > 0, stretched.astype(jnp.float32), pixels)


def _posterize(pixels: Pixels, level: Level) -> Pixels:
    step = jnp.exp2(jnp.round(4 * jnp.abs(level)))
    return jnp.floor(pixels / step) * step


def _solarize(pixels: Pixels, level: Level) -> Pixels:
    return jnp.where(pixels < 256 - jnp.round(128 * jnp.abs(level)), pixels, 255 - pixels)


def _brightness(pixels: Pixels, level: Level) -> Pixels:
    return _blend(jnp.zeros(()), pixels, level)


def _contrast(pixels: Pixels, level: Level) -> Pixels:
    """Blend with the mean gray of all frames of an example."""
    return _blend(jnp.floor(_gray(pixels).mean((1, 2, 3, 4), keepdims=True) + 0.5), pixels, level)


def _color(pixels: Pixels, level: Level) -> Pixels:
    return _blend(_gray(pixels), pixels, level)


def _gray(pixels: Pixels) -> Float[Array, "b t y x 1"]:
    """Return the luma of ITU-R 601 in whole numbers, as Pillow rounds it."""
    weights = jnp.array([19595, 38470, 7471], jnp.int32)
    luma = (pixels.astype(jnp.int32) * weights).sum(-1, keepdims=True)
    return ((luma + 0x8000) >> 16).astype(jnp.float32)


def _blend(degenerate: Float[Array, "..."], pixels: Pixels, level: Level) -> Pixels:
    """Blend as Pillow's enhancers do: rounded towards zero."""
    return jnp.floor(jnp.clip(degenerate + (1 + 0.9 * level) * (pixels - degenerate), 0, 255))


_OPERATIONS = {
    "auto_contrast": _auto_contrast, "posterize": _posterize, "solarize": _solarize, "brightness": _brightness,
    "contrast": _contrast, "color": _color,
}  # fmt: skip
