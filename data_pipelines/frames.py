"""Sampling of frame indices from a video."""

import numpy as np

from data_pipelines.arrays import Float, Int
from data_pipelines.errors import DataError


def _check(length: int, num_frames: int) -> None:
    if length < 1 or num_frames < 1:
        raise DataError(f"found {length} frames in the video and num_frames={num_frames}, expected at least 1 of each")


def _boundaries(length: int, num_frames: int) -> Int[np.ndarray, " bounds"]:
    """Return the bounds of n = min(length, num_frames) nearly equal intervals of a video."""
    _check(length, num_frames)
    return np.linspace(0, length, min(length, num_frames) + 1).astype(np.int64)


def _pad(indices: Int[np.ndarray, " n"], num_frames: int) -> Int[np.ndarray, " t"]:
    return np.pad(indices, (0, num_frames - len(indices)), mode="edge")


def uniform_indices(length: int, num_frames: int, clip: int = 0, num_clips: int = 1) -> Int[np.ndarray, " t"]:
    """Return the middle frame of each of ``num_frames`` equal intervals, as the release does for evaluation.

    Each interval is divided among the clips, and each clip takes the middle frame of its part. So all clips span the
    video, as those of training do.

    Args:
        length: number of frames of the video.
        num_frames: number of frames to return; a shorter video repeats its last frame.
        clip: index of the clip, from 0.
        num_clips: number of clips.

    Returns:
        Ascending frame indices, int64 [num_frames].

    Raises:
        DataError: ``length`` or ``num_frames`` is below 1.
    """
    bounds = _boundaries(length, num_frames)
    within = (np.diff(bounds) * (2 * clip + 1) - num_clips) // (2 * num_clips)
    return _pad(bounds[:-1] + within.clip(min=0), num_frames)


def random_indices(length: int, num_frames: int, rng: np.random.Generator) -> Int[np.ndarray, " t"]:
    """Return a random frame of each of ``num_frames`` equal intervals, as the release does for training.

    As in the release, the last frame of an interval is never drawn; if an interval is a single frame long, distinct
    frames of the whole video are drawn instead.

    Args:
        length: number of frames of the video.
        num_frames: number of frames to return; a shorter video repeats its last frame.
        rng: the random generator.

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


def fps_indices(
    times: Float[np.ndarray, " n"], num_frames: int, fps: float, clip: int = 0, num_clips: int = 1
) -> Int[np.ndarray, " t"]:
    """Return the frames that are shown at ``fps`` times per second, centered in the video.

    The range of possible starts is divided among the clips, and each clip starts in the middle of its part.

    Args:
        times: presentation time of each frame in seconds, ascending.
        num_frames: number of frames to return; a video that is too short repeats its last frame.
        fps: sampling rate.
        clip: index of the clip, from 0.
        num_clips: number of clips.

    Returns:
        Ascending frame indices, int64 [num_frames].

    Raises:
        DataError: there are no frames, ``num_frames`` is below 1, or ``fps`` is not above 0.
    """
    _check(len(times), num_frames)
    if not 0 < fps < np.inf:
        raise DataError(f"fps is {fps}, expected a rate above 0")
    seconds = (times[-1] - times[0]) * len(times) / max(1, len(times) - 1)  # the last frame lasts as long as the mean
    start = max(0.0, seconds - num_frames / fps) * (2 * clip + 1) / (2 * num_clips)
    sample_times = times[0] + start + (np.arange(num_frames) + 0.5) / fps
    return np.searchsorted(times, sample_times + 1e-6, side="right") - 1  # a frame that begins just then counts
