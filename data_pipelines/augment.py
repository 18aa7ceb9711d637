"""Random augmentation, the same for all frames of a video: RandAugment, and the release's variants of it."""

import math
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, ImageStat

from data_pipelines.arrays import Float, Float32, UInt8
from data_pipelines.config import MAX_MAGNITUDE

Frames = UInt8[np.ndarray, "t y x 3"]
PilTransform = Callable[[Image.Image, float], Image.Image]
Operation = Callable[[Frames, float], Frames]  # at a level from -1 to 1, whose sign is a direction for some
ColorOperations = Float32[np.ndarray, "o 2"]  # number in DEVICE_OPERATIONS, and level
Affine = Float[np.ndarray, "2 3"]  # from a pixel's position (x, y, 1) to its new one

_GRAY = 128  # fill value


def flip(frames: Frames) -> Frames:
    """Flip horizontally."""
    pixels = np.ascontiguousarray(frames).view("V3")  # whole pixels are copied twice as fast as their bytes
    return np.ascontiguousarray(pixels[:, :, ::-1]).view(np.uint8)


def random_flip(frames: Frames, rng: np.random.Generator) -> Frames:
    """Flip horizontally with probability 0.5."""
    return flip(frames) if rng.random() < 0.5 else frames


def rand_augment(frames: Frames, rng: np.random.Generator, *, num_ops: int, magnitude: float) -> Frames:
    """Apply different random operations of ``OPERATIONS`` in sequence, in random directions.

    Args:
        frames: all change alike, and colors are balanced over all of them, so that a video does not flicker.
        rng: the random generator.
        num_ops: number of operations.
        magnitude: their level, 0 to ``MAX_MAGNITUDE``.
    """
    for name, level in _sample_ops(rng, num_ops, magnitude):
        frames = OPERATIONS[name](frames, level)
    return frames


def rand_augment_for_device(
    frames: Frames, rng: np.random.Generator, *, num_ops: int, magnitude: float
) -> tuple[Frames, ColorOperations]:
    """Apply the operations that :func:`rand_augment` samples, but those of ``DEVICE_OPERATIONS``; return these.

    A row is the number of an operation and its level; -1 and 0 after the last.
    """
    operations = np.tile(np.array([[-1, 0]], np.float32), (num_ops, 1))
    count = 0
    for name, level in _sample_ops(rng, num_ops, magnitude):
        if name in DEVICE_OPERATIONS:
            operations[count] = DEVICE_OPERATIONS.index(name), level
            count += 1
        else:
            frames = OPERATIONS[name](frames, level)
    return frames, operations


def apply_color_operations(frames: Frames, operations: ColorOperations) -> Frames:
    """Apply operations that :func:`rand_augment_for_device` returned."""
    for number, level in operations.tolist():
        if number >= 0:
            frames = OPERATIONS[DEVICE_OPERATIONS[int(number)]](frames, level)
    return frames


def _sample_ops(rng: np.random.Generator, num_ops: int, magnitude: float) -> list[tuple[str, float]]:
    """Sample names and levels of different operations."""
    names = rng.permutation(list(OPERATIONS))[:num_ops].tolist() if num_ops else []
    return [(name, float(magnitude / MAX_MAGNITUDE * rng.choice((-1, 1)))) for name in names]


def release_augment_video(frames: Frames, rng: np.random.Generator, *, flips: bool) -> Frames:
    """Augment a video as the release does: two different operations at magnitude 5, always in the same direction.

    Args:
        frames: all change alike.
        rng: the random generator.
        flips: whether a flip is among the operations, as in pretraining.
    """
    for name in rng.permutation(_RELEASED_VIDEO if flips else _RELEASED_VIDEO[:-1])[:2]:
        frames = _RELEASED[name](frames, 5 / MAX_MAGNITUDE)
    return frames


def release_augment_image(frames: Frames, rng: np.random.Generator) -> Frames:
    """Augment an image as the release does in pretraining: twice, with probability 0.5, an operation at magnitude 7."""
    for name in rng.choice(_RELEASED_IMAGE, 2):
        level = 7 / MAX_MAGNITUDE * rng.choice((-1, 1))
        if rng.random() < 0.5:
            frames = _RELEASED[name](frames, level)
    return frames


def warp(frames: Frames, affine: Affine) -> Frames:
    """Warp like OpenCV's ``warpAffine``: positions count from pixel centers, the outside is gray.

    Interpolation is bilinear in float32, then rounded. OpenCV before 5 rounded positions to 1/32 pixel first.
    """
    _, height, width, _ = frames.shape
    y, x = np.mgrid[:height, :width]
    source = np.einsum("ij,jyx->iyx", _inverse(affine), np.stack([x, y, np.ones_like(x)]))
    left, top = np.floor(source).astype(np.int64)
    fraction_x, fraction_y = (source - np.floor(source)).astype(np.float32)[..., None]
    weight_x, weight_y = 1 - fraction_x, 1 - fraction_y
    padded = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=_GRAY).astype(np.float32)
    columns, rows = left.clip(-1, width) + 1, top.clip(-1, height) + 1
    next_columns, next_rows = (left + 1).clip(-1, width) + 1, (top + 1).clip(-1, height) + 1
    above = padded[:, rows, columns] * weight_x + padded[:, rows, next_columns] * fraction_x
    below = padded[:, next_rows, columns] * weight_x + padded[:, next_rows, next_columns] * fraction_x
    return np.rint(above * weight_y + below * fraction_y).astype(np.uint8)


def _on_stacked_frames(transform: PilTransform) -> Operation:
    """Return an operation on all frames as one tall image, so that what depends on colors is the same for all."""

    def apply(frames: Frames, level: float) -> Frames:
        t, y, x, _ = frames.shape
        stacked = Image.fromarray(np.ascontiguousarray(frames).reshape(t * y, x, 3))
        return np.asarray(transform(stacked, level)).reshape(frames.shape)

    return apply


def _pointwise(transform: PilTransform) -> Operation:
    """Return an operation that changes each value alone, so that a table of 256 values has all of it."""

    def apply(frames: Frames, level: float) -> Frames:
        return _apply_lut(frames, lambda image: transform(image, level))

    return apply


def _apply_lut(frames: Frames, transform: Callable[[Image.Image], Image.Image]) -> Frames:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3))
    table = np.asarray(transform(ramp))[0, :, 0].tobytes()
    return np.frombuffer(frames.tobytes().translate(table), np.uint8).reshape(frames.shape)


def _contrast(frames: Frames, level: float) -> Frames:
    """Blend with the mean gray of all frames, as Pillow does."""
    t, y, x, _ = frames.shape
    gray = Image.fromarray(np.ascontiguousarray(frames).reshape(t * y, x, 3)).convert("L")
    mean = int(ImageStat.Stat(gray).mean[0] + 0.5)
    return _apply_lut(
        frames, lambda image: Image.blend(Image.new("RGB", image.size, (mean,) * 3), image, 1 + 0.9 * level)
    )


def _per_frame(transform: PilTransform) -> Operation:
    """Return an operation on each frame."""
    return lambda frames, level: np.stack([np.asarray(transform(Image.fromarray(frame), level)) for frame in frames])


def _affine(frames: Frames, affine: Affine) -> Frames:
    """Warp with Pillow, with the origin in the center of the image."""
    _, height, width, _ = frames.shape
    inverse, fill = _inverse(_about_center(affine, height, width)).ravel().tolist(), (_GRAY,) * 3
    method, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    transform = _per_frame(lambda image, s: image.transform((width, height), method, inverse, bilinear, fillcolor=fill))
    return transform(frames, 0.0)


def _inverse(affine: Affine) -> Affine:
    return np.linalg.inv(np.vstack([affine, [0, 0, 1]]))[:2]


def _about_center(affine: Affine, height: int, width: int) -> Affine:
    linear, shift = affine[:, :2], affine[:, 2:]
    center = np.array([[width / 2], [height / 2]])
    return np.hstack([linear, shift + center - linear @ center])


def _linear(a: float, b: float, c: float, d: float) -> Affine:
    return np.array([[a, b, 0], [c, d, 0]], np.float64)


def _shift(x: float, y: float) -> Affine:
    return np.array([[1, 0, x], [0, 1, y]], np.float64)


def _rotation(degrees: float) -> Affine:
    """Return a counter-clockwise rotation; y points down."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _linear(cosine, sine, -sine, cosine)


OPERATIONS: Mapping[str, Operation] = {
    "identity": lambda frames, s: frames,
    "auto_contrast": _on_stacked_frames(lambda image, s: ImageOps.autocontrast(image)),
    "equalize": _on_stacked_frames(lambda image, s: ImageOps.equalize(image)),
    "posterize": _pointwise(lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s)))),
    "solarize": _pointwise(lambda image, s: ImageOps.solarize(image, 256 - round(128 * abs(s)))),
    "brightness": _pointwise(lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s)),
    "contrast": _contrast,
    "color": _on_stacked_frames(lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s)),
    "sharpness": _per_frame(lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s)),
    "shear_x": lambda frames, s: _affine(frames, _linear(1.0, 0.3 * s, 0.0, 1.0)),
    "shear_y": lambda frames, s: _affine(frames, _linear(1.0, 0.0, 0.3 * s, 1.0)),
    "translate_x": lambda frames, s: _affine(frames, _shift(0.45 * s * frames.shape[2], 0.0)),
    "translate_y": lambda frames, s: _affine(frames, _shift(0.0, 0.45 * s * frames.shape[1])),
    "rotate": lambda frames, s: _affine(frames, _rotation(30 * s)),
}
"""Operations of ``rand_augment``. None is a flip: left and right may matter."""

DEVICE_OPERATIONS = ("auto_contrast", "posterize", "solarize", "brightness", "contrast", "color")
"""Those that depend on a pixel's color, and on the mean or range of all colors: the device may apply them."""

_RELEASED: Mapping[str, Operation] = {
    "identity": lambda frames, s: frames,
    "auto_contrast": _per_frame(lambda image, s: ImageOps.autocontrast(image)),
    "equalize": _per_frame(lambda image, s: ImageOps.equalize(image)),
    # At magnitude 5 the factor of these three is 1: they change nothing.
    "contrast": _per_frame(lambda image, s: ImageEnhance.Contrast(image).enhance(0.1 + 1.8 * abs(s))),
    "brightness": _per_frame(lambda image, s: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * abs(s))),
    "sharpness": _per_frame(lambda image, s: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * abs(s))),
    "shear_x": lambda frames, s: warp(frames, _linear(1.0, 0.3 * s, 0.0, 1.0)),
    "shear_y": lambda frames, s: warp(frames, _linear(1.0, 0.0, 0.3 * s, 1.0)),
    "translate_x": lambda frames, s: warp(frames, _shift(-10 * s, 0.0)),
    "translate_y": lambda frames, s: warp(frames, _shift(0.0, -10 * s)),
    "rotate": lambda frames, s: warp(frames, _about_center(_rotation(30 * s), *frames.shape[1:3])),
    "flip": lambda frames, s: flip(frames),
}
_GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_RELEASED_VIDEO = ("identity", "contrast", "brightness", "sharpness", *_GEOMETRIC, "flip")
_RELEASED_IMAGE = ("identity", "auto_contrast", "equalize", "brightness", "sharpness", *_GEOMETRIC)
