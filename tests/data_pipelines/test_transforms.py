"""Crop windows, and their pixels: equal to the release's golden values, or Pillow's."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.transforms import (
    CropWindow,
    full_frame,
    random_resized_crop,
    resize_bicubic,
    resize_nearest,
    square_crop,
)
from tests.close import assert_close

sides, seeds = st.integers(1, 300), st.integers(0, 999)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def golden(reference: Path) -> dict[str, np.ndarray]:
    return dict(np.load(reference / "goldens" / "recipe_pixels.npz"))


def noise(y: int, x: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (y, x, 3), np.uint8)


def normalize(frames: np.ndarray) -> np.ndarray:
    """Normalize frames as for the model, in the release's layout."""
    return ((frames.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)).transpose(3, 0, 1, 2)


@pytest.mark.parametrize("size", [28, 48])
def test_the_release_test_transform(size: int, golden: dict[str, np.ndarray]) -> None:
    window = full_frame(*golden["frames_u8"].shape[1:3], size, "nearest")
    frames = np.stack([window.apply_array(frame) for frame in golden["frames_u8"]])
    np.testing.assert_array_equal(frames, golden[f"test_resized_{size}"])
    assert_close(normalize(frames), golden[f"test_normalised_{size}"])


@pytest.mark.parametrize("size", [28, 48])
def test_the_release_train_transform(size: int, golden: dict[str, np.ndarray]) -> None:
    window = CropWindow(*golden[f"crop_i_j_h_w_{size}"].tolist(), size, "bicubic")
    part = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
    whole_numbers = np.stack([resize_bicubic(frame[part], size) for frame in golden["frames_u8"]])
    assert (whole_numbers.min(), whole_numbers.max()) > (-100, 255)  # the goldens overshoot
    np.testing.assert_array_equal(whole_numbers, golden[f"crop_bicubic_int_{size}"])
    assert_close(normalize(whole_numbers), golden[f"crop_normalised_norandaug_{size}"])
    frames = np.stack([window.apply_array(frame) for frame in golden["frames_u8"]])
    np.testing.assert_array_equal(frames, golden[f"crop_bicubic_wrapped_u8_{size}"])


@given(y=st.integers(1, 40), x=st.integers(1, 40), size=st.integers(1, 50))
def test_bicubic_is_keys_cubic(y: int, x: int, size: int) -> None:
    """Compare with the formula, pixel by pixel, in float64."""

    def weight(distance: float) -> float:
        d, a = abs(distance), -0.75
        if d < 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    def matrix(length: int) -> np.ndarray:
        weights = np.zeros((size, length))
        for new in range(size):
            source = (new + 0.5) * length / size - 0.5
            for old in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):
                weights[new, min(max(old, 0), length - 1)] += weight(source - old)
        return weights

    frame = noise(y, x)
    expected = np.einsum("ay,yxc,bx->abc", matrix(y), frame, matrix(x))
    assert np.abs(resize_bicubic(frame, size) - np.trunc(expected)).max() <= 1
    assert (abs(resize_bicubic(frame, size) - expected) < 1 + 1e-3).all()


@given(y=st.integers(1, 40), x=st.integers(1, 40), size=st.integers(1, 50))
def test_nearest_copies_pixels(y: int, x: int, size: int) -> None:
    frame = noise(y, x)
    resized = resize_nearest(frame, size)
    assert resized.shape == (size, size, 3)
    assert {tuple(p) for p in resized.reshape(-1, 3)} <= {tuple(p) for p in frame.reshape(-1, 3)}


def test_nearest_upscales_by_repeating() -> None:
    frame = noise(5, 5)
    np.testing.assert_array_equal(resize_nearest(frame, 15), frame.repeat(3, 0).repeat(3, 1))


@given(y=sides, x=sides, seed=seeds, min_area=st.floats(0.05, 1))
def test_random_windows_are_inside(y: int, x: int, seed: int, min_area: float) -> None:
    window = random_resized_crop(y, x, 8, np.random.default_rng(seed), min_area=min_area)
    assert 0 <= window.top <= window.top + window.height <= y
    assert 0 <= window.left <= window.left + window.width <= x
    assert min(window.height, window.width) >= 1
    assert window == random_resized_crop(y, x, 8, np.random.default_rng(seed), min_area=min_area)


def test_random_windows_have_area_and_aspect() -> None:
    rng = np.random.default_rng(0)
    windows = [random_resized_crop(300, 400, 8, rng, min_area=0.5) for _ in range(1000)]
    areas = np.array([w.height * w.width for w in windows]) / (300 * 400)
    aspects = np.array([w.width / w.height for w in windows])
    assert 0.5 - 0.01 <= areas.min() < 0.52
    assert 0.9 < areas.max() <= 1
    assert 3 / 4 - 0.02 <= aspects.min() < 0.78
    assert 1.28 < aspects.max() <= 4 / 3 + 0.02
    assert {w.top == 0 for w in windows} == {True, False}


@pytest.mark.parametrize(("height", "width", "expected"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10))])
def test_narrow_images_are_cropped_in_the_center(height: int, width: int, expected: tuple[int, ...]) -> None:
    window = random_resized_crop(height, width, 8, np.random.default_rng(0), min_area=0.9)
    assert (window.top, window.left, window.height, window.width) == expected


def test_a_center_crop_equals_resize_and_crop() -> None:
    frame = np.asarray(Image.fromarray(noise(8, 10)).resize((200, 160), Image.Resampling.BICUBIC))
    resized = Image.fromarray(frame).resize((100, 80), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((10, 0, 90, 80)))
    difference = square_crop(160, 200, 80).apply_array(frame).astype(int) - expected
    assert np.abs(difference).max() <= 2


def test_square_crops_are_at_both_ends_and_in_the_center() -> None:
    wide = [square_crop(10, 31, 8, place) for place in range(3)]
    assert [(w.top, w.left, w.height, w.width) for w in wide] == [(0, left, 10, 10) for left in (0, 10, 21)]
    high = [square_crop(31, 10, 8, place) for place in range(3)]
    assert [(w.top, w.left, w.height, w.width) for w in high] == [(top, 0, 10, 10) for top in (0, 10, 21)]


@given(y=sides, x=sides, seed=seeds, method=st.sampled_from(["antialiased", "cropped", "nearest", "bicubic"]))
def test_images_and_frames_are_cropped_alike(y: int, x: int, seed: int, method: str) -> None:
    frame = noise(y, x)
    window = random_resized_crop(y, x, 16, np.random.default_rng(seed), min_area=0.2, method=method)
    pixels = window.apply_array(frame)
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    np.testing.assert_array_equal(pixels, window.apply_pil(Image.fromarray(frame)))


def test_antialiasing() -> None:
    checkers = (np.indices((64, 96)).sum(0) % 2 * np.uint8(255))[..., None].repeat(3, -1).astype(np.uint8)
    assert abs(full_frame(64, 96, 16).apply_array(checkers).astype(int) - 128).max() < 12
    assert set(np.unique(full_frame(64, 96, 16, "nearest").apply_array(checkers))) <= {0, 255}


@given(y=st.integers(8, 300), x=st.integers(8, 300), seed=seeds, size=st.integers(1, 64))
def test_an_image_decoded_at_the_minimum_scale_suffices(y: int, x: int, seed: int, size: int) -> None:
    window = random_resized_crop(y, x, size, np.random.default_rng(seed), min_area=0.2)
    assert 0 < window.min_decode_scale <= 1
    assert window.min_decode_scale == 1 or min(window.height, window.width) * window.min_decode_scale >= size - 1e-9
    assert full_frame(y, x, size, "nearest").min_decode_scale == 1


def test_frames_of_the_right_size_are_unchanged() -> None:
    frame = noise(8, 8)
    for method in ("antialiased", "cropped", "nearest", "bicubic"):
        assert np.shares_memory(full_frame(8, 8, 8, method).apply_array(frame), frame)
