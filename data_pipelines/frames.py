"""Which frames of a video a clip takes, and how frames are resized."""

from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from data_pipelines.errors import DataError


def _boundaries(length: int, num_frames: int) -> Int[np.ndarray, " bounds"]:
    """Where n = min(length, num_frames) nearly equal intervals of a video begin and end."""
    if length < 1 or num_frames < 1:
        raise DataError(f"found a video of {length} frames and num_frames {num_frames}, expected at least 1 of both")
    return np.linspace(0, length, min(length, num_frames) + 1).astype(np.int64)


def _pad(indices: Int[np.ndarray, " n"], num_frames: int) -> Int[np.ndarray, " t"]:
    return np.pad(indices, (0, num_frames - len(indices)), mode="edge")


def middle_indices(length: int, num_frames: int) -> Int[np.ndarray, " t"]:
    """The middle frame of each of ``num_frames`` equal intervals: the release's choice for evaluation.

    Args:
        length: frames of the video.
        num_frames: frames wanted; a shorter video repeats its last frame.

    Returns:
        Ascending frame indices, int64 [num_frames].

    Raises:
        DataError: ``length`` or ``num_frames`` is below 1.
    """
    bounds = _boundaries(length, num_frames)
    return _pad((bounds[:-1] + bounds[1:] - 1) // 2, num_frames)


def random_indices(length: int, num_frames: int, rng: np.random.Generator) -> Int[np.ndarray, " t"]:
    """A random frame of each of ``num_frames`` equal intervals: the release's choice for training.

    As in the release, an interval's last frame is never drawn; and where intervals are a single frame long, distinct
    frames of the whole video are drawn instead.

    Args:
        length: frames of the video.
        num_frames: frames wanted; a shorter video repeats its last frame.
        rng: the randomness.

    Returns:
        Ascending frame indices, int64 [num_frames].

    Raises:
        DataError: ``length`` or ``num_frames`` is below 1.
    """
    bounds = _boundaries(length, num_frames)
    first, stop = bounds[:-1], bounds[1:] - 1
    if (first < stop).all():
        return _pad(rng.integers(first, stop), num_frames)
    return _pad(np.sort(rng.choice(length, len(first), replace=False)), num_frames)


def resize_frames(
    frames: UInt8[np.ndarray, "t y x 3"], size: int, method: Literal["nearest", "bicubic"] = "bicubic"
) -> UInt8[np.ndarray, "t size size 3"]:
    """Resizes frames straight to size x size, without cropping and whatever their aspect.

    Args:
        frames: pixels.
        size: the new height and width.
        method: "nearest" is what the release evaluates with; "bicubic" is antialiased and keeps small things visible.
    """
    if frames.shape[1:3] == (size, size):
        return frames
    if method == "nearest":
        rows, columns = (_nearest(length, size) for length in frames.shape[1:3])
        return frames[:, rows[:, None], columns]
    resized = [Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(image) for image in resized])


def _nearest(length: int, size: int) -> Int[np.ndarray, " size"]:
    """The source of each new pixel as torch computes it, in float32: floor(i * length / size)."""
    scale = np.float32(length) / np.float32(size)
    source: Int[np.ndarray, " size"] = np.floor(np.arange(size, dtype=np.float32) * scale).astype(np.int64)
    return source.clip(max=length - 1)
