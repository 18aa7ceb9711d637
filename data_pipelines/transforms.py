"""Cropping and resizing of images and frames. Augmentation is in ``augment.py``."""

import dataclasses
import math
from typing import Literal

import numpy as np
from av import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from data_pipelines.arrays import Float, Int, Int16, UInt8

Method = Literal["antialiased", "cropped", "nearest", "bicubic"]

_MAX_TRIES = 10  # of a random crop, before a center crop
_MIN_ASPECT, _MAX_ASPECT = 3 / 4, 4 / 3  # of a random crop, width by height


@dataclasses.dataclass(frozen=True)
class CropWindow:
    """A crop of an image, or of every frame of a video, and how it is resized to ``size`` x ``size`` pixels.

    Methods: "antialiased" is Pillow's bicubic filter, which also reads pixels just outside the window; "cropped" is the
    same filter on the window alone; "nearest" and "bicubic" are torch's, without antialiasing, as the release uses them
    for videos.
    """

    top: int
    left: int
    height: int
    width: int
    size: int
    method: Method = "antialiased"

    @property
    def min_decode_scale(self) -> float:
        """Return the smallest scale, at most 1, at which an image may be decoded without losing needed pixels."""
        return min(1.0, self.size / min(self.height, self.width)) if self.method == "antialiased" else 1.0

    def apply_pil(self, image: Image.Image, scale: float = 1.0) -> UInt8[np.ndarray, "size size 3"]:
        """Crop and resize an RGB image that was decoded at ``scale``."""
        if self.method in ("nearest", "bicubic"):
            return self.apply_array(np.asarray(image))
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        if self.method == "cropped":
            resized = image.crop(box).resize((self.size, self.size), Image.Resampling.BICUBIC)
        else:
            left, top, right, bottom = (scale * side for side in box)
            resized = image.resize((self.size, self.size), Image.Resampling.BICUBIC, (left, top, right, bottom))
        return np.asarray(resized)

    def apply_swscale(self, image: Image.Image, scale: float = 1.0) -> UInt8[np.ndarray, "size size 3"]:
        """Crop and resize like ``apply_pil``, but by libswscale: it reads only the window, rounded to whole pixels."""
        left, top, right, bottom = (
            round(scale * side) for side in (self.left, self.top, self.left + self.width, self.top + self.height)
        )
        box = (left, top, max(right, left + 1), max(bottom, top + 1))
        frame = VideoFrame.from_ndarray(np.asarray(image.crop(box)), format="rgb24")
        scaled = VideoReformatter().reformat(
            frame, self.size, self.size, "rgb24", interpolation=Interpolation.BICUBIC, threads=1
        )
        return scaled.to_ndarray()

    def apply_array(self, frame: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "size size 3"]:
        """Crop and resize a frame. Bicubic values below 0 or above 255 wrap around, as in the release."""
        window = frame[self.top : self.top + self.height, self.left : self.left + self.width]
        if window.shape[:2] == (self.size, self.size):
            return window
        if self.method == "nearest":
            return resize_nearest(window, self.size)
        if self.method == "bicubic":
            return resize_bicubic(window, self.size).astype(np.uint8)
        return self.apply_pil(Image.fromarray(frame))


def full_frame(height: int, width: int, size: int, method: Method = "antialiased") -> CropWindow:
    """Return the window of the full frame, stretched to a square."""
    return CropWindow(0, 0, height, width, size, method)


def square_crop(height: int, width: int, size: int, position: int = 1) -> CropWindow:
    """Return the square of the shorter side at position 0 (left or top), 1 (center), or 2 (right or bottom).

    Position 1 equals a resize of the shorter side followed by a center crop.
    """
    side = min(height, width)
    return CropWindow((height - side) * position // 2, (width - side) * position // 2, side, side, size)


def random_resized_crop(
    height: int, width: int, size: int, rng: np.random.Generator, *, min_area: float, method: Method = "antialiased"
) -> CropWindow:
    """Return a random window of ``min_area`` to all of the image's area, with an aspect of 3:4 to 4:3.

    The rule is torchvision's, which the release follows: ten tries, then the largest center crop of a valid aspect.

    Args:
        height: of the image, in pixels.
        width: of the image.
        size: height and width after resizing.
        rng: the random generator.
        min_area: smallest area, as a fraction of the image's.
        method: of resizing.
    """
    for _ in range(_MAX_TRIES):
        area = height * width * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(math.log(_MIN_ASPECT), math.log(_MAX_ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h, endpoint=True)), int(rng.integers(width - w, endpoint=True))
            return CropWindow(top, left, h, w, size, method)
    w, h = min(width, round(height * _MAX_ASPECT)), min(height, round(width / _MIN_ASPECT))
    return CropWindow((height - h) // 2, (width - w) // 2, h, w, size, method)


def resize_nearest(frame: UInt8[np.ndarray, "y x 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Resize by copying the pixels that torch's "nearest" chooses."""
    rows, columns = (_nearest(length, size) for length in frame.shape[:2])
    return frame[rows[:, None], columns]


def _nearest(length: int, size: int) -> Int[np.ndarray, " size"]:
    """Return the source of each new pixel as torch computes it, in float32: floor(i * length / size)."""
    scale = np.float32(length) / np.float32(size)
    source: Int[np.ndarray, " size"] = np.floor(np.arange(size, dtype=np.float32) * scale).astype(np.int64)
    return source.clip(max=length - 1)


def resize_bicubic(frame: UInt8[np.ndarray, "y x 3"], size: int) -> Int16[np.ndarray, "size size 3"]:
    """Resize like torch's "bicubic" without antialiasing, truncating towards zero.

    Overshoot below 0 and above 255 is kept. The arithmetic is that of torch's scalar kernel, bit for bit, in float32
    and columns first. Its vectorized kernels round differently, and differ by one where a result is nearly an integer.
    """
    rows, row_weights = _cubic_taps(frame.shape[0], size)
    columns, column_weights = _cubic_taps(frame.shape[1], size)
    used, rows = np.unique(rows, return_inverse=True)  # upscaling uses all rows, downscaling skips some
    frame = frame[used]
    across = sum(frame[:, columns[tap]] * column_weights[tap][:, None] for tap in range(4))
    resized = sum(across[rows[tap]] * row_weights[tap][:, None, None] for tap in range(4))
    return resized.astype(np.int16)


def _cubic_taps(length: int, size: int) -> tuple[Int[np.ndarray, "4 size"], Float[np.ndarray, "4 size"]]:
    """Return the four source pixels of each new one, and their float32 weights: Keys' cubic with a = -0.75."""
    scale, half, a = np.float32(length) / np.float32(size), np.float32(0.5), np.float32(-0.75)
    source = (np.arange(size, dtype=np.float32) + half) * scale - half
    first = np.floor(source)
    fraction = source - first

    def near(x: Float[np.ndarray, " size"]) -> Float[np.ndarray, " size"]:  # distance at most 1
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Float[np.ndarray, " size"]) -> Float[np.ndarray, " size"]:  # distance 1 to 2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = np.stack([far(fraction + 1), near(fraction), near(1 - fraction), far((1 - fraction) + 1)])
    return (first.astype(np.int64) + np.arange(-1, 3)[:, None]).clip(0, length - 1), weights
