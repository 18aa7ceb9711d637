"""Which part of a picture is seen, and how it becomes size x size pixels. What is done to those: ``augment.py``."""

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Int16, UInt8
from PIL import Image

Method = Literal["antialiased", "cropped", "nearest", "bicubic"]

_TRIES = 10  # of a random window, before the middle is taken
_NARROWEST, _WIDEST = 3 / 4, 4 / 3  # a random window, width by height


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of every frame of a clip, and the way in which it becomes ``size`` x ``size`` pixels.

    The methods: "antialiased" is Pillow's bicubic filter, which also sees what is just outside the window; "cropped" is
    the same filter on the window alone; "nearest" and "bicubic" are torch's, without antialiasing, as the release uses
    them for videos.
    """

    top: int
    left: int
    height: int
    width: int
    size: int
    method: Method = "antialiased"

    @property
    def shrink(self) -> float:
        """How much smaller than it is a picture may be decoded, because the window needs no more pixels."""
        return min(1.0, self.size / min(self.height, self.width)) if self.method == "antialiased" else 1.0

    def of_picture(self, picture: Image.Image, scale: float = 1.0) -> UInt8[np.ndarray, "size size 3"]:
        """The window's pixels of an RGB picture that was decoded at ``scale``."""
        if self.method in ("nearest", "bicubic"):
            return self.of_frame(np.asarray(picture))
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        if self.method == "cropped":
            resized = picture.crop(box).resize((self.size, self.size), Image.Resampling.BICUBIC)
        else:
            left, top, right, bottom = (scale * side for side in box)
            resized = picture.resize((self.size, self.size), Image.Resampling.BICUBIC, (left, top, right, bottom))
        return np.asarray(resized)

    def of_frame(self, frame: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "size size 3"]:
        """The window's pixels of a frame. Bicubic ones below 0 or above 255 wrap round, as they do in the release."""
        window = frame[self.top : self.top + self.height, self.left : self.left + self.width]
        if window.shape[:2] == (self.size, self.size):
            return window
        if self.method == "nearest":
            return resize_nearest(window, self.size)
        if self.method == "bicubic":
            return resize_bicubic(window, self.size).astype(np.uint8)
        return self.of_picture(Image.fromarray(frame))


def whole(height: int, width: int, size: int, method: Method = "antialiased") -> Window:
    """The whole picture, whatever its aspect."""
    return Window(0, 0, height, width, size, method)


def square(height: int, width: int, size: int, place: int = 1) -> Window:
    """A square of the shorter side: the left or uppermost (0), that in the middle (1), the right or lowest (2).

    That in the middle is what a resize of the shorter side and a centre crop leave.
    """
    side = min(height, width)
    return Window((height - side) * place // 2, (width - side) * place // 2, side, side, size)


def random_window(
    height: int, width: int, size: int, rng: np.random.Generator, *, min_area: float, method: Method = "antialiased"
) -> Window:
    """A part that covers ``min_area`` to all of the picture, 3:4 to 4:3 in aspect, anywhere.

    The rule is torchvision's, which the release follows: ten tries, then the largest part in the middle whose aspect is
    allowed.

    Args:
        height: of the picture, in pixels.
        width: of the picture.
        size: the new height and width.
        rng: the randomness.
        min_area: least share of the picture's area.
        method: how pixels are resized.
    """
    for _ in range(_TRIES):
        area = height * width * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(math.log(_NARROWEST), math.log(_WIDEST)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h, endpoint=True)), int(rng.integers(width - w, endpoint=True))
            return Window(top, left, h, w, size, method)
    w, h = min(width, round(height * _WIDEST)), min(height, round(width / _NARROWEST))
    return Window((height - h) // 2, (width - w) // 2, h, w, size, method)


def resize_nearest(frame: UInt8[np.ndarray, "y x 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Each new pixel is an old one, as torch's "nearest" chooses it."""
    rows, columns = (_nearest(length, size) for length in frame.shape[:2])
    return frame[rows[:, None], columns]


def _nearest(length: int, size: int) -> Int[np.ndarray, " size"]:
    """The source of each new pixel as torch computes it, in float32: floor(i * length / size)."""
    scale = np.float32(length) / np.float32(size)
    source: Int[np.ndarray, " size"] = np.floor(np.arange(size, dtype=np.float32) * scale).astype(np.int64)
    return source.clip(max=length - 1)


def resize_bicubic(frame: UInt8[np.ndarray, "y x 3"], size: int) -> Int16[np.ndarray, "size size 3"]:
    """Resizes as torch's "bicubic" does without antialiasing, and cuts the fractions off towards zero.

    What overshoots is kept, below 0 and above 255. The arithmetic is that of torch's plain kernel, bit for bit, in
    float32 and columns first. Its vectorised kernels round otherwise, and differ by one where a result is nearly whole.
    """
    rows, row_weights = _cubic_taps(frame.shape[0], size)
    columns, column_weights = _cubic_taps(frame.shape[1], size)
    used, rows = np.unique(rows, return_inverse=True)  # enlarging uses all rows, shrinking leaves some out
    frame = frame[used]
    across = sum(frame[:, columns[tap]] * column_weights[tap][:, None] for tap in range(4))
    resized = sum(across[rows[tap]] * row_weights[tap][:, None, None] for tap in range(4))
    return resized.astype(np.int16)


def _cubic_taps(length: int, size: int) -> tuple[Int[np.ndarray, "4 size"], Float[np.ndarray, "4 size"]]:
    """The four old pixels around each new one, and their float32 weights: Keys' cubic with a = -0.75."""
    scale, half, a = np.float32(length) / np.float32(size), np.float32(0.5), np.float32(-0.75)
    source = (np.arange(size, dtype=np.float32) + half) * scale - half
    first = np.floor(source)
    past = source - first

    def near(x: Float[np.ndarray, " size"]) -> Float[np.ndarray, " size"]:  # at most 1 away
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Float[np.ndarray, " size"]) -> Float[np.ndarray, " size"]:  # 1 to 2 away
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = np.stack([far(past + 1), near(past), near(1 - past), far((1 - past) + 1)])
    return (first.astype(np.int64) + np.arange(-1, 3)[:, None]).clip(0, length - 1), weights
