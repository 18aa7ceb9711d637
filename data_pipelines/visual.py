"""From an encoded picture or video to the frames of a batch: which frames, what becomes of their pixels."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from data_pipelines.frames import middle_indices, random_indices, resize_frames
from data_pipelines.media import Media, read_clip, read_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualConfig:
    """Which frames of a clip are taken, and how they become squares."""

    image_size: int = 32
    num_frames: int = 4
    sampling: Literal["middle", "random", "fps"] = "middle"
    fps: float = 2.0  # frames per second that sampling="fps" takes, from the middle of the clip
    transform: Literal["test", "train", "released_test"] = "test"


@dataclasses.dataclass(frozen=True)
class Visual:
    """Frames as a batch holds them, and when each was in its clip."""

    frames: UInt8[np.ndarray, "t size size 3"]
    times: Float[np.ndarray, " t"]  # seconds from the start of the clip; zeros for images


def load_visual(media: Media | UInt8[np.ndarray, "t y x 3"], config: VisualConfig, rng: np.random.Generator) -> Visual:
    """Decodes, samples and resizes.

    Raises:
        DataError: bytes that are missing, damaged, or not what they say they are.
    """

    def choose(length: int, rate: float) -> Int[np.ndarray, " t"]:
        if config.sampling == "random":
            return random_indices(length, config.num_frames, rng)
        if config.sampling == "middle":
            return middle_indices(length, config.num_frames)
        offsets = np.arange(config.num_frames) - (config.num_frames - 1) / 2
        return np.clip((length - 1) / 2 + offsets * rate / config.fps, 0, length - 1).astype(np.int64)

    if not isinstance(media, Media):
        indices = choose(len(media), 1.0)
        frames, times = media[indices], indices.astype(np.float64)
    elif media.kind == "image":
        frames, times = read_image(media), np.zeros(1)
    else:
        frames, times = read_clip(media, choose)
    return Visual(_square(frames, config, rng), times)


def _square(
    frames: UInt8[np.ndarray, "t y x 3"], config: VisualConfig, rng: np.random.Generator
) -> UInt8[np.ndarray, "t size size 3"]:
    size = config.image_size
    if config.transform != "train":
        return resize_frames(frames, size, "nearest" if config.transform == "released_test" else "bicubic")
    height, width = frames.shape[1:3]
    side = np.sqrt(rng.uniform(0.5, 1.0)) * min(height, width)
    x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
    box = (x, y, x + side, y + side)
    resized = [Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC, box) for frame in frames]
    return np.stack([np.asarray(image) for image in resized])
