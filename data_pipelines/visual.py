"""From an encoded picture or video, or frames that are pixels already, to the frames of a batch."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipelines import augment, transforms
from data_pipelines.config import VisualConfig
from data_pipelines.frames import fps_indices, middle_indices, random_indices
from data_pipelines.image import open_image
from data_pipelines.media import Media
from data_pipelines.transforms import Window
from data_pipelines.video import read_video


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
            frames = window.of_picture(*picture.decode(window.shrink, config.background))[None]
        return Visual(_augment(frames, config, rng, is_clip=False), np.zeros(1))
    windows: list[Window] = []  # one, drawn when the first frame tells its size

    def take(frame: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "size size 3"]:
        if not windows:
            windows.append(_window(config, frame.shape[0], frame.shape[1], rng, view, is_clip=True))
        return windows[0].of_frame(frame)

    frames, times = read_video(media, lambda times: _choose(config, times, rng, view), take, config.background)
    return Visual(_augment(frames, config, rng, is_clip=True), times)


def _of_pixels(
    pixels: UInt8[np.ndarray, "t y x 3"], config: VisualConfig, rng: np.random.Generator, view: int
) -> Visual:
    is_clip = len(pixels) > 1
    if is_clip:
        random = config.sampling == "random"
        count, length = config.num_frames, len(pixels)
        clip = view // config.num_crops
        chosen = random_indices(length, count, rng) if random else middle_indices(length, count, clip, config.num_clips)
        pixels = pixels[chosen]
    window = _window(config, pixels.shape[1], pixels.shape[2], rng, view, is_clip=is_clip)
    frames = np.stack([window.of_frame(frame) for frame in pixels])
    return Visual(_augment(frames, config, rng, is_clip=is_clip), np.zeros(len(frames)))


def _choose(
    config: VisualConfig, times: Float[np.ndarray, " n"], rng: np.random.Generator, view: int
) -> Int[np.ndarray, " t"]:
    clip = view // config.num_crops
    if config.sampling == "fps":
        return fps_indices(times, config.num_frames, config.fps, clip, config.num_clips)
    if config.sampling == "random":
        return random_indices(len(times), config.num_frames, rng)
    return middle_indices(len(times), config.num_frames, clip, config.num_clips)


def _window(
    config: VisualConfig, height: int, width: int, rng: np.random.Generator, view: int, *, is_clip: bool
) -> Window:
    """The first half of a transform: what is seen of a picture of this size."""
    size = config.image_size
    match config.transform:
        case "test":
            return transforms.square(height, width, size, view % 3 if config.num_crops == 3 else 1)
        case "resize":
            return transforms.whole(height, width, size)
        case "train":
            return transforms.random_window(height, width, size, rng, min_area=config.min_crop_area)
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
