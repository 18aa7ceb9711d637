"""From an encoded picture or video, or frames that are pixels already, to the frames of a batch."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipelines import augment, transforms
from data_pipelines.errors import DataError
from data_pipelines.frames import fps_indices, middle_indices, random_indices
from data_pipelines.image import open_image
from data_pipelines.media import Media
from data_pipelines.transforms import Window
from data_pipelines.video import read_video

Transform = Literal["test", "resize", "train", "released_test", "released_train", "released_pretrain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualConfig:
    """Which frames of a clip are taken, and how they become squares of ``image_size`` pixels.

    Ours, antialiased:

    - ``test``: the square in the middle.
    - ``resize``: all of the picture, whatever its aspect.
    - ``train``: a random part; perhaps flipped, by even chance as everywhere; RandAugment. The last four fields are
      its own.

    The release's, exactly:

    - ``released_test``: all of the picture, by the nearest pixel.
    - ``released_train``: of fine-tuning. A random part of 50 to 100 %, bicubic without antialiasing, what overshoots
      wrapped round; perhaps flipped; two operations.
    - ``released_pretrain``: of pretraining. Pictures: a random part of 20 to 100 %, antialiased; perhaps flipped;
      up to two operations. Videos: all of the picture by the nearest pixel, 1.14 times as large; two operations, of
      which a flip may be one; a random square.

    An evaluation may look at each example several times: at ``clips`` choices of a video's frames, evenly spread, and
    at ``crops`` squares of each, left to right or top to bottom.
    """

    image_size: int = 32
    num_frames: int = 4
    sampling: Literal["middle", "random", "fps"] = "middle"
    fps: float = 2.0  # frames per second for sampling="fps", from the middle of the clip
    clips: int = 1
    crops: int = 1  # 1: as the transform has it; 3: of transform="test"
    transform: Transform = "test"
    min_area: float = 0.5  # least share of a picture that training sees
    flip: bool = True  # False where left and right matter: text, digits, "moves to the left"
    num_ops: int = 2  # operations of RandAugment, 0 for none
    magnitude: float = 5.0  # how strong they are, 0 to 10

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            DataError: a field is out of its range.
        """
        most = len(augment.OPERATIONS)
        for field, valid, expected in (
            ("image_size", self.image_size >= 1, "at least 1"),
            ("num_frames", self.num_frames >= 1, "at least 1"),
            ("fps", 0 < self.fps < float("inf"), "above 0"),
            ("clips", self.clips >= 1, "at least 1"),
            ("crops", self.crops in (1, 3), "1 or 3"),
            ("min_area", 0 < self.min_area <= 1, "above 0 and at most 1"),
            ("num_ops", 0 <= self.num_ops <= most, f"0 to {most}"),
            ("magnitude", 0 <= self.magnitude <= augment.MAX_MAGNITUDE, f"0 to {augment.MAX_MAGNITUDE}"),
        ):
            if not valid:
                raise DataError(f"visual.{field} is {getattr(self, field)}, expected {expected}")
        if self.clips > 1 and self.sampling == "random":
            raise DataError(f"visual.clips={self.clips} needs frames that are not drawn: sampling 'middle' or 'fps'")
        if self.crops > 1 and self.transform != "test":
            raise DataError(
                f"visual.crops={self.crops} with visual.transform={self.transform!r}: several squares are cut by 'test'"
            )

    @property
    def views(self) -> int:
        """How often an evaluation looks at each example."""
        return self.clips * self.crops


@dataclasses.dataclass(frozen=True)
class Visual:
    """Frames as a batch holds them, and when each is seen."""

    frames: UInt8[np.ndarray, "t size size 3"]
    times: Float[np.ndarray, " t"]  # seconds from the start of the clip; zeros for images and pixels


def load_visual(
    media: Media | UInt8[np.ndarray, "t y x 3"], config: VisualConfig, rng: np.random.Generator, view: int = 0
) -> Visual:
    """Decodes, chooses frames and transforms them.

    Args:
        media: what is encoded; or pixels, of which one frame is an image. Pixels have no clock: ``sampling="fps"``
            takes their middle frames.
        config: what to make of it.
        rng: everything random, in the same order on every call.
        view: which of ``config.views``; the crops of a clip follow each other.

    Returns:
        ``config.num_frames`` frames of a video, one of an image.

    Raises:
        DataError: the media is missing, damaged, cut off, not what it says it is, or absurdly large.
    """
    if not isinstance(media, Media):
        return _of_pixels(media, config, rng, view)
    if media.kind == "image":
        with open_image(media) as picture:
            window = _window(config, picture.height, picture.width, rng, view, is_clip=False)
            frames = window.of_picture(*picture.decode(window.shrink))[None]
        return Visual(_augment(frames, config, rng, is_clip=False), np.zeros(1))
    windows: list[Window] = []  # one, drawn when the first frame tells its size

    def take(frame: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "size size 3"]:
        if not windows:
            windows.append(_window(config, frame.shape[0], frame.shape[1], rng, view, is_clip=True))
        return windows[0].of_frame(frame)

    frames, times = read_video(media, lambda times: _choose(config, times, rng, view), take)
    return Visual(_augment(frames, config, rng, is_clip=True), times)


def _of_pixels(
    pixels: UInt8[np.ndarray, "t y x 3"], config: VisualConfig, rng: np.random.Generator, view: int
) -> Visual:
    is_clip = len(pixels) > 1
    if is_clip:
        random = config.sampling == "random"
        count, length = config.num_frames, len(pixels)
        clip = view // config.crops
        chosen = random_indices(length, count, rng) if random else middle_indices(length, count, clip, config.clips)
        pixels = pixels[chosen]
    window = _window(config, pixels.shape[1], pixels.shape[2], rng, view, is_clip=is_clip)
    frames = np.stack([window.of_frame(frame) for frame in pixels])
    return Visual(_augment(frames, config, rng, is_clip=is_clip), np.zeros(len(frames)))


def _choose(
    config: VisualConfig, times: Float[np.ndarray, " n"], rng: np.random.Generator, view: int
) -> Int[np.ndarray, " t"]:
    clip = view // config.crops
    if config.sampling == "fps":
        return fps_indices(times, config.num_frames, config.fps, clip, config.clips)
    if config.sampling == "random":
        return random_indices(len(times), config.num_frames, rng)
    return middle_indices(len(times), config.num_frames, clip, config.clips)


def _window(
    config: VisualConfig, height: int, width: int, rng: np.random.Generator, view: int, *, is_clip: bool
) -> Window:
    """The first half of a transform: what is seen of a picture of this size."""
    size = config.image_size
    match config.transform:
        case "test":
            return transforms.square(height, width, size, view % 3 if config.crops == 3 else 1)
        case "resize":
            return transforms.whole(height, width, size)
        case "train":
            return transforms.random_window(height, width, size, rng, min_area=config.min_area)
        case "released_test":
            return transforms.whole(height, width, size, "nearest")
        case "released_train":
            return transforms.random_window(height, width, size, rng, min_area=0.5, method="bicubic")
        case "released_pretrain" if is_clip:
            return transforms.whole(height, width, int(1.14 * size), "nearest")
        case "released_pretrain":
            return transforms.random_window(height, width, size, rng, min_area=0.2, method="cropped")


def _augment(
    frames: UInt8[np.ndarray, "t y x 3"], config: VisualConfig, rng: np.random.Generator, *, is_clip: bool
) -> UInt8[np.ndarray, "t size size 3"]:
    """The second half: what is done to the small pictures."""
    match config.transform:
        case "train":
            flipped = augment.random_flip(frames, rng) if config.flip else frames
            return augment.rand_augment(flipped, rng, num_ops=config.num_ops, magnitude=config.magnitude)
        case "released_train":
            return augment.release_augment_clip(augment.random_flip(frames, rng), rng, flips=False)
        case "released_pretrain" if is_clip:
            changed = augment.release_augment_clip(frames, rng, flips=True)
            top, left = rng.integers(changed.shape[1] - config.image_size, endpoint=True, size=2)
            return changed[:, top : top + config.image_size, left : left + config.image_size]
        case "released_pretrain":
            return augment.release_augment_image(augment.random_flip(frames, rng), rng)
        case _:
            return frames
