"""From encoded images and videos, or rendered frames, to the frames of a batch."""

import dataclasses

import numpy as np

from data_pipelines import augment, transforms
from data_pipelines.arrays import Float, Int, UInt8
from data_pipelines.config import VisualConfig
from data_pipelines.frames import fps_indices, random_indices, uniform_indices
from data_pipelines.image import open_image
from data_pipelines.media import Media
from data_pipelines.transforms import CropWindow
from data_pipelines.video import read_video


@dataclasses.dataclass(frozen=True)
class Visual:
    """Frames as in a batch, and their times in the video."""

    frames: UInt8[np.ndarray, "t size size 3"]
    times: Float[np.ndarray, " t"]  # seconds from the start of the video; zeros for images and rendered frames
    color_operations: augment.ColorOperations | None = None  # that the device has to apply to the frames


def load_visual(
    media: Media | UInt8[np.ndarray, "t y x 3"], config: VisualConfig, rng: np.random.Generator, view: int = 0
) -> Visual:
    """Decode, sample frames and transform them.

    Args:
        media: encoded media; or pixels, where a single frame is an image. Pixels have no times: ``sampling="fps"``
            samples them uniformly.
        config: sampling and transforms.
        rng: the random generator; draws come in the same order on every call.
        view: index below ``config.views``; the crops of a clip are adjacent.

    Returns:
        ``config.num_frames`` frames of a video, one of an image.

    Raises:
        DataError: the media is missing, damaged, truncated, of another kind, or too large.
    """
    if not isinstance(media, Media):
        return _load_pixels(media, config, rng, view)
    if media.kind == "image":
        with open_image(media) as image:
            window = _crop_window(config, image.height, image.width, rng, view, is_video=False)
            apply = window.apply_swscale if config.scaler == "swscale" else window.apply_pil
            frames = apply(*image.decode(window.min_decode_scale, config.background))[None]
        return _augment(frames, np.zeros(1), config, rng, is_video=False)
    windows: list[CropWindow] = []  # one, drawn when the first frame gives the size

    def window_of_size(height: int, width: int) -> CropWindow:
        if not windows:
            windows.append(_crop_window(config, height, width, rng, view, is_video=True))
        return windows[0]

    frames, times = read_video(
        media, lambda times: _frame_indices(config, times, rng, view),
        lambda frame: window_of_size(*frame.shape[:2]).apply_array(frame), config.background,
        window_of_size if config.scaler == "swscale" else None,
    )  # fmt: skip
    return _augment(frames, times, config, rng, is_video=True)


def _load_pixels(
    pixels: UInt8[np.ndarray, "t y x 3"], config: VisualConfig, rng: np.random.Generator, view: int
) -> Visual:
    is_video = len(pixels) > 1
    if is_video:
        without_times = dataclasses.replace(config, sampling="uniform") if config.sampling == "fps" else config
        pixels = pixels[_frame_indices(without_times, np.zeros(len(pixels)), rng, view)]
    window = _crop_window(config, pixels.shape[1], pixels.shape[2], rng, view, is_video=is_video)
    frames = np.stack([window.apply_array(frame) for frame in pixels])
    return _augment(frames, np.zeros(len(frames)), config, rng, is_video=is_video)


def _frame_indices(
    config: VisualConfig, times: Float[np.ndarray, " n"], rng: np.random.Generator, view: int
) -> Int[np.ndarray, " t"]:
    clip = view // config.num_crops
    if config.sampling == "fps":
        return fps_indices(times, config.num_frames, config.fps, clip, config.num_clips)
    if config.sampling == "random":
        return random_indices(len(times), config.num_frames, rng)
    return uniform_indices(len(times), config.num_frames, clip, config.num_clips)


def _crop_window(
    config: VisualConfig, height: int, width: int, rng: np.random.Generator, view: int, *, is_video: bool
) -> CropWindow:
    """Return the window of a transform, its first half, for an image of this size."""
    size = config.image_size
    match config.transform:
        case "test":
            return transforms.square_crop(height, width, size, view % 3 if config.num_crops == 3 else 1)
        case "resize":
            return transforms.full_frame(height, width, size)
        case "train":
            return transforms.random_resized_crop(height, width, size, rng, min_area=config.min_crop_area)
        case "released_test":
            return transforms.full_frame(height, width, size, "nearest")
        case "released_train":
            return transforms.random_resized_crop(height, width, size, rng, min_area=0.5, method="bicubic")
        case "released_pretrain" if is_video:
            return transforms.full_frame(height, width, int(1.14 * size), "nearest")
        case "released_pretrain":
            return transforms.random_resized_crop(height, width, size, rng, min_area=0.2, method="cropped")


def _augment(
    frames: UInt8[np.ndarray, "t y x 3"],
    times: Float[np.ndarray, " t"],
    config: VisualConfig,
    rng: np.random.Generator,
    *,
    is_video: bool,
) -> Visual:
    """Apply the second half of a transform, to resized frames."""
    match config.transform:
        case "train":
            flipped = augment.random_flip(frames, rng) if config.flip else frames
            num_ops, magnitude = config.num_ops, config.magnitude
            if config.color_on_device:
                frames, operations = augment.rand_augment_for_device(flipped, rng, num_ops=num_ops, magnitude=magnitude)
                return Visual(frames, times, operations)
            frames = augment.rand_augment(flipped, rng, num_ops=num_ops, magnitude=magnitude)
        case "released_train":
            frames = augment.release_augment_video(augment.random_flip(frames, rng), rng, flips=False)
        case "released_pretrain" if is_video:
            augmented = augment.release_augment_video(frames, rng, flips=True)
            top, left = rng.integers(augmented.shape[1] - config.image_size, endpoint=True, size=2)
            frames = augmented[:, top : top + config.image_size, left : left + config.image_size]
        case "released_pretrain":
            frames = augment.release_augment_image(augment.random_flip(frames, rng), rng)
    return Visual(frames, times)
