"""Frame choice and resizing equal the release's golden numbers and keep their properties."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.frames import middle_indices, random_indices, resize_frames

lengths, counts = st.integers(1, 3000), st.integers(1, 64)


@pytest.fixture(scope="module")
def golden_indices(reference: Path) -> list[dict[str, Any]]:
    return json.loads((reference / "goldens" / "recipe.json").read_text())["frame_indices"]


def test_middle_indices_equal_the_release(golden_indices) -> None:
    for case in golden_indices:
        assert middle_indices(case["vlen"], case["num_frames"]).tolist() == case["middle"]


def test_random_indices_have_the_range_of_the_release(golden_indices) -> None:
    """Its extremes are those of 300 draws: exact where an interval has few frames, close elsewhere."""
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
def test_middle_frames_ascend_and_pad(length: int, count: int) -> None:
    check(middle_indices(length, count), length, count)


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


@pytest.mark.parametrize(("length", "count"), [(0, 4), (4, 0)])
def test_no_frames(length: int, count: int) -> None:
    with pytest.raises(DataError, match=f"video of {length} frames and num_frames {count}"):
        middle_indices(length, count)
    with pytest.raises(DataError, match="at least 1"):
        random_indices(length, count, np.random.default_rng(0))


def test_nearest_equals_the_release(reference: Path) -> None:
    golden = np.load(reference / "goldens" / "recipe_pixels.npz")
    for size in (28, 48):
        np.testing.assert_array_equal(
            resize_frames(golden["frames_u8"], size, "nearest"), golden[f"test_resized_{size}"]
        )


def noise(t: int, y: int, x: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (t, y, x, 3), np.uint8)


@given(y=st.integers(1, 40), x=st.integers(1, 40), size=st.integers(1, 50))
def test_nearest_invents_no_pixels(y: int, x: int, size: int) -> None:
    frames = noise(1, y, x)
    resized = resize_frames(frames, size, "nearest")
    assert resized.shape == (1, size, size, 3)
    assert {tuple(p) for p in resized.reshape(-1, 3)} <= {tuple(p) for p in frames.reshape(-1, 3)}


def test_nearest_enlarges_by_repeating() -> None:
    frames = noise(2, 5, 5)
    np.testing.assert_array_equal(resize_frames(frames, 15, "nearest"), frames.repeat(3, 1).repeat(3, 2))


def test_bicubic_is_antialiased_and_treats_frames_alike() -> None:
    checkers = np.indices((64, 96)).sum(0) % 2 * np.uint8(255)
    frames = np.stack([checkers, 255 - checkers])[..., None].repeat(3, -1).astype(np.uint8)
    resized = resize_frames(frames, 16)
    assert resized.shape == (2, 16, 16, 3)
    assert resized.dtype == np.uint8
    assert abs(resized.astype(int) - 128).max() < 12
    np.testing.assert_array_equal(resize_frames(frames[1:], 16)[0], resized[1])


def test_the_right_size_is_left_alone() -> None:
    frames = noise(2, 8, 8)
    assert resize_frames(frames, 8) is frames
