"""Which frames of a video a clip takes."""

import numpy as np
from jaxtyping import Float, Int

from data_pipelines.errors import DataError


def _check(length: int, num_frames: int) -> None:
    if length < 1 or num_frames < 1:
        raise DataError(f"found a video of {length} frames and num_frames {num_frames}, expected at least 1 of both")


def _boundaries(length: int, num_frames: int) -> Int[np.ndarray, " bounds"]:
    """Where n = min(length, num_frames) nearly equal intervals of a video begin and end."""
    _check(length, num_frames)
    return np.linspace(0, length, min(length, num_frames) + 1).astype(np.int64)


def _pad(indices: Int[np.ndarray, " n"], num_frames: int) -> Int[np.ndarray, " t"]:
    return np.pad(indices, (0, num_frames - len(indices)), mode="edge")


def middle_indices(length: int, num_frames: int, clip: int = 0, clips: int = 1) -> Int[np.ndarray, " t"]:
    """The middle frame of each of ``num_frames`` equal intervals: the release's choice for evaluation.

    Of several clips each takes the middle of its own part of every interval. So all of them span the video, as the
    clips of training do.

    Args:
        length: frames of the video.
        num_frames: frames wanted; a shorter video repeats its last frame.
        clip: which one, from 0.
        clips: how many parts an interval has.

    Returns:
        Ascending frame indices, int64 [num_frames].

    Raises:
        DataError: ``length`` or ``num_frames`` is below 1.
    """
    bounds = _boundaries(length, num_frames)
    within = (np.diff(bounds) * (2 * clip + 1) - clips) // (2 * clips)
    return _pad(bounds[:-1] + within.clip(min=0), num_frames)


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


def fps_indices(
    times: Float[np.ndarray, " n"], num_frames: int, fps: float, clip: int = 0, clips: int = 1
) -> Int[np.ndarray, " t"]:
    """The frames that are seen at ``fps`` moments per second, in the middle of the video.

    Of several clips each is in the middle of where it can begin, cut into so many equal parts.

    Args:
        times: when each frame is shown, ascending, in seconds.
        num_frames: frames wanted; where a video ends too early its last frame is repeated.
        fps: moments per second.
        clip: which one, from 0.
        clips: how many there are.

    Returns:
        Ascending frame indices, int64 [num_frames].

    Raises:
        DataError: there are no frames, ``num_frames`` is below 1, or ``fps`` is not above 0.
    """
    _check(len(times), num_frames)
    if not 0 < fps < np.inf:
        raise DataError(f"fps is {fps}, expected frames per second above 0")
    seconds = (times[-1] - times[0]) * len(times) / max(1, len(times) - 1)  # the last frame is shown as long as others
    start = max(0.0, seconds - num_frames / fps) * (2 * clip + 1) / (2 * clips)
    moments = times[0] + start + (np.arange(num_frames) + 0.5) / fps
    return np.searchsorted(times, moments + 1e-6, side="right") - 1  # a frame that begins just then is seen
