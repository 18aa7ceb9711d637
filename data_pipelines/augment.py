"""Random changes of pixels, the same for all frames of a clip: RandAugment as we do it, and in the release's forms."""

import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageEnhance, ImageOps

from data_pipelines.config import MAX_MAGNITUDE

Clip = UInt8[np.ndarray, "t y x 3"]
Change = Callable[[Image.Image], Image.Image]
Operation = Callable[[Clip, float], Clip]  # with a strength from -1 to 1, of which some take the sign as a direction
Affine = Float[np.ndarray, "2 3"]  # from the place of a pixel, (x, y, 1), to where it moves

_GREY = 128  # where pixels moved away and none came


def flip(clip: Clip) -> Clip:
    """Left becomes right."""
    return clip[:, :, ::-1]


def random_flip(clip: Clip, rng: np.random.Generator) -> Clip:
    """By even chance a flip."""
    return flip(clip) if rng.random() < 0.5 else clip


def rand_augment(clip: Clip, rng: np.random.Generator, *, num_ops: int, magnitude: float) -> Clip:
    """Different random operations of ``OPERATIONS`` one after the other, in random directions.

    Args:
        clip: frames; all are treated alike, and colours are balanced over all of them, so that a clip does not flicker.
        rng: the randomness.
        num_ops: how many operations.
        magnitude: how strong, 0 to ``MAX_MAGNITUDE``.
    """
    for name in rng.permutation(list(OPERATIONS))[:num_ops] if num_ops else ():
        clip = OPERATIONS[name](clip, magnitude / MAX_MAGNITUDE * rng.choice((-1, 1)))
    return clip


def release_augment_clip(clip: Clip, rng: np.random.Generator, *, flips: bool) -> Clip:
    """The release's augmentation of videos: two different operations at magnitude 5, always in the same direction.

    Args:
        clip: frames; all are treated alike.
        rng: the randomness.
        flips: whether a flip is among the operations, as in pretraining.
    """
    for name in rng.permutation(_RELEASED_CLIP if flips else _RELEASED_CLIP[:-1])[:2]:
        clip = _RELEASED[name](clip, 5 / MAX_MAGNITUDE)
    return clip


def release_augment_image(clip: Clip, rng: np.random.Generator) -> Clip:
    """The release's augmentation of pictures in pretraining: twice, by even chance, any operation at magnitude 7."""
    for name in rng.choice(_RELEASED_IMAGE, 2):
        strength = 7 / MAX_MAGNITUDE * rng.choice((-1, 1))
        if rng.random() < 0.5:
            clip = _RELEASED[name](clip, strength)
    return clip


def warp(clip: Clip, affine: Affine) -> Clip:
    """Moves pixels as OpenCV's ``warpAffine`` does: places count from pixel centres, what is outside is grey.

    Pixels are interpolated between four in float32 and rounded. OpenCV before 5 rounded the places to 1/32 pixel first.
    """
    _, height, width, _ = clip.shape
    y, x = np.mgrid[:height, :width]
    source = np.einsum("ij,jyx->iyx", _inverse(affine), np.stack([x, y, np.ones_like(x)]))
    left, top = np.floor(source).astype(np.int64)
    past_x, past_y = (source - np.floor(source)).astype(np.float32)[..., None]
    near_x, near_y = 1 - past_x, 1 - past_y
    rimmed = np.pad(clip, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=_GREY).astype(np.float32)
    columns, rows = left.clip(-1, width) + 1, top.clip(-1, height) + 1
    next_columns, next_rows = (left + 1).clip(-1, width) + 1, (top + 1).clip(-1, height) + 1
    above = rimmed[:, rows, columns] * near_x + rimmed[:, rows, next_columns] * past_x
    below = rimmed[:, next_rows, columns] * near_x + rimmed[:, next_rows, next_columns] * past_x
    return np.rint(above * near_y + below * past_y).astype(np.uint8)


def _together(clip: Clip, change: Change) -> Clip:
    """Changes all frames as one tall picture: what depends on its colours is then one for all."""
    t, y, x, _ = clip.shape
    return np.asarray(change(Image.fromarray(np.ascontiguousarray(clip).reshape(t * y, x, 3)))).reshape(clip.shape)


def _each(clip: Clip, change: Change) -> Clip:
    return np.stack([np.asarray(change(Image.fromarray(frame))) for frame in clip])


def _move(clip: Clip, affine: Affine) -> Clip:
    """Moves pixels by Pillow, with the origin in the middle of the picture."""
    _, height, width, _ = clip.shape
    back = _inverse(_about_centre(affine, height, width)).ravel().tolist()

    def moved(image: Image.Image) -> Image.Image:
        method = Image.Resampling.BILINEAR
        return image.transform((width, height), Image.Transform.AFFINE, back, method, fillcolor=(_GREY,) * 3)

    return _each(clip, moved)


def _inverse(affine: Affine) -> Affine:
    return np.linalg.inv(np.vstack([affine, [0, 0, 1]]))[:2]


def _about_centre(affine: Affine, height: int, width: int) -> Affine:
    linear, shift = affine[:, :2], affine[:, 2:]
    middle = np.array([[width / 2], [height / 2]])
    return np.hstack([linear, shift + middle - linear @ middle])


def _linear(a: float, b: float, c: float, d: float) -> Affine:
    return np.array([[a, b, 0], [c, d, 0]], np.float64)


def _shift(x: float, y: float) -> Affine:
    return np.array([[1, 0, x], [0, 1, y]], np.float64)


def _rotation(degrees: float) -> Affine:
    """Counter-clockwise, as y points down."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _linear(cosine, sine, -sine, cosine)


def _rotate_released(clip: Clip, strength: float) -> Clip:
    return warp(clip, _about_centre(_rotation(30 * strength), *clip.shape[1:3]))


OPERATIONS: Mapping[str, Operation] = {
    "identity": lambda clip, s: clip,
    "auto_contrast": lambda clip, s: _together(clip, ImageOps.autocontrast),
    "equalize": lambda clip, s: _together(clip, ImageOps.equalize),
    "posterize": lambda clip, s: _together(clip, lambda image: ImageOps.posterize(image, 8 - round(4 * abs(s)))),
    "solarize": lambda clip, s: _together(clip, lambda image: ImageOps.solarize(image, 256 - round(128 * abs(s)))),
    "brightness": lambda clip, s: _together(clip, lambda image: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s)),
    "contrast": lambda clip, s: _together(clip, lambda image: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s)),
    "color": lambda clip, s: _together(clip, lambda image: ImageEnhance.Color(image).enhance(1 + 0.9 * s)),
    "sharpness": lambda clip, s: _each(clip, lambda image: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s)),
    "shear_x": lambda clip, s: _move(clip, _linear(1.0, 0.3 * s, 0.0, 1.0)),
    "shear_y": lambda clip, s: _move(clip, _linear(1.0, 0.0, 0.3 * s, 1.0)),
    "translate_x": lambda clip, s: _move(clip, _shift(0.45 * s * clip.shape[2], 0.0)),
    "translate_y": lambda clip, s: _move(clip, _shift(0.0, 0.45 * s * clip.shape[1])),
    "rotate": lambda clip, s: _move(clip, _rotation(30 * s)),
}
"""Ours. None of them is a flip: what is left and what is right may matter."""

_RELEASED: Mapping[str, Operation] = {
    "identity": lambda clip, s: clip,
    "auto_contrast": lambda clip, s: _each(clip, ImageOps.autocontrast),
    "equalize": lambda clip, s: _each(clip, ImageOps.equalize),
    # At magnitude 5 the factor of these three is 1: they do nothing.
    "contrast": lambda clip, s: _each(clip, lambda image: ImageEnhance.Contrast(image).enhance(0.1 + 1.8 * abs(s))),
    "brightness": lambda clip, s: _each(clip, lambda image: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * abs(s))),
    "sharpness": lambda clip, s: _each(clip, lambda image: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * abs(s))),
    "shear_x": lambda clip, s: warp(clip, _linear(1.0, 0.3 * s, 0.0, 1.0)),
    "shear_y": lambda clip, s: warp(clip, _linear(1.0, 0.0, 0.3 * s, 1.0)),
    "translate_x": lambda clip, s: warp(clip, _shift(-10 * s, 0.0)),
    "translate_y": lambda clip, s: warp(clip, _shift(0.0, -10 * s)),
    "rotate": _rotate_released,
    "flip": lambda clip, s: flip(clip),
}
_MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_RELEASED_CLIP = ("identity", "contrast", "brightness", "sharpness", *_MOVES, "flip")
_RELEASED_IMAGE = ("identity", "auto_contrast", "equalize", "brightness", "sharpness", *_MOVES)
