"""Frame sampling equals the release's golden values and has its properties."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.frames import fps_indices, random_indices, uniform_indices

lengths, counts = st.integers(1, 3000), st.integers(1, 64)


@pytest.fixture(scope="module")
def golden_indices(reference: Path) -> list[dict[str, Any]]:
    return json.loads((reference / "goldens" / "recipe.json").read_text())["frame_indices"]


def test_uniform_indices_equal_the_release(golden_indices) -> None:
    for case in golden_indices:
        assert uniform_indices(case["vlen"], case["num_frames"]).tolist() == case["middle"]


def test_random_indices_have_the_range_of_the_release(golden_indices) -> None:
    """Compare the extremes of 300 draws: exact if an interval has few frames, close otherwise."""
    rng = np.random.default_rng(0)
    for case in golden_indices:
        length, count = case["vlen"], case["num_frames"]
        low, high = np.array(case["rand_min_seen"]), np.array(case["rand_max_seen"])
        draws = np.stack([random_indices(length, count, rng) for _ in range(300)])
        in_intervals = 2 * count <= length
        slack = np.where(in_intervals & (high - low <= 15), 0, np.maximum(4, 0.15 * (high - low)))
        slack[low == high] = 0
        assert (abs(draws.min(0) - low) <= slack).all(), case
        assert (abs(draws.max(0) - high) <= slack).all(), case


@given(length=lengths, count=counts)
def test_uniform_frames_ascend_and_pad(length: int, count: int) -> None:
    check(uniform_indices(length, count), length, count)


@given(length=lengths, count=counts, seed=st.integers(0, 99))
def test_random_frames_ascend_and_pad(length: int, count: int, seed: int) -> None:
    indices = random_indices(length, count, np.random.default_rng(seed))
    check(indices, length, count)
    np.testing.assert_array_equal(indices, random_indices(length, count, np.random.default_rng(seed)))


def check(indices: np.ndarray, length: int, count: int) -> None:
    distinct = min(length, count)
    assert indices.shape == (count,)
    assert (np.diff(indices[:distinct]) > 0).all()
    assert (indices[distinct:] == indices[distinct - 1]).all()
    assert indices[0] >= 0
    assert indices[-1] < length


@given(length=lengths, count=counts, clips=st.integers(1, 6))
def test_clips_divide_the_frames_of_a_video(length: int, count: int, clips: int) -> None:
    chosen = [uniform_indices(length, count, clip, clips) for clip in range(clips)]
    for indices, later in zip(chosen, (*chosen[1:], chosen[-1]), strict=True):
        check(indices, length, count)
        assert (indices <= later).all()
    if length >= count * clips:
        assert len(np.unique(chosen)) == count * clips
    if length == count * clips:
        np.testing.assert_array_equal(np.stack(chosen, 1).ravel(), np.arange(length))


def test_clips_at_a_frame_rate_are_spread_over_the_video() -> None:
    times = np.arange(100) / 10
    starts = [fps_indices(times, 4, 2.0, clip, 4)[0] for clip in range(4)]
    # Two seconds long, they can begin in the first eight; the first frame is seen a quarter of a second later.
    assert starts == [12, 32, 52, 72]
    np.testing.assert_array_equal(fps_indices(times, 4, 2.0, 1, 3), fps_indices(times, 4, 2.0))
    assert len({tuple(fps_indices(times[:10], 4, 2.0, clip, 4)) for clip in range(4)}) == 1  # too short for several


@pytest.mark.parametrize(("length", "count"), [(0, 4), (4, 0)])
def test_no_frames(length: int, count: int) -> None:
    with pytest.raises(DataError, match=f"found {length} frames in the video and num_frames={count}"):
        uniform_indices(length, count)
    with pytest.raises(DataError, match="at least 1"):
        random_indices(length, count, np.random.default_rng(0))


@given(gaps=st.lists(st.floats(0.01, 2), min_size=1, max_size=50), count=st.integers(1, 20), fps=st.floats(0.1, 60))
def test_frames_at_a_frame_rate_are_those_shown_at_that_time(gaps: list[float], count: int, fps: float) -> None:
    times = np.cumsum(gaps) - gaps[0]
    indices = fps_indices(times, count, fps)
    assert indices.shape == (count,)
    assert (np.diff(indices) >= 0).all()
    assert indices[0] >= 0
    assert indices[-1] < len(times)
    shown_at = times[indices]  # a frame is seen until the next one: moments are evenly apart, up to where frames begin
    moments = shown_at[0] + np.arange(count) / fps
    if moments[-1] + 1 / fps < times[-1]:
        longest = np.append(np.diff(times), 0)[indices].max() + max(gaps)
        assert (abs(shown_at - moments) <= longest).all()


@pytest.mark.parametrize(
    ("length", "count", "fps", "expected"),
    [
        (100, 4, 10.0, [48, 49, 50, 51]),
        (100, 4, 5.0, [47, 49, 51, 53]),
        (100, 4, 1.0, [35, 45, 55, 65]),
        (100, 1, 1.0, [50]),
        (10, 4, 2.0, [2, 7, 9, 9]),  # too short: from the start, and the last one again
        (1, 3, 2.0, [0, 0, 0]),
    ],
)
def test_frames_at_a_frame_rate_are_centered(length: int, count: int, fps: float, expected: list[int]) -> None:
    assert fps_indices(np.arange(length) / 10 + 7, count, fps).tolist() == expected


def test_frames_at_an_invalid_rate() -> None:
    for fps in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match=f"fps is {fps}, expected a rate above 0"):
            fps_indices(np.zeros(3), 2, fps)
    with pytest.raises(DataError, match="found 0 frames"):
        fps_indices(np.zeros(0), 2, 1.0)
