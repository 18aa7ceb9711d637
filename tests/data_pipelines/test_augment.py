"""Augmentation operations, the same for all frames."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from data_pipelines import augment
from data_pipelines.augment import OPERATIONS, flip, rand_augment, release_augment_image, release_augment_video, warp
from data_pipelines.config import NUM_OPERATIONS


def smooth(t: int = 2, side: int = 40) -> np.ndarray:
    """Return frames without hard edges, each brighter than the last, and none of the fill color."""
    small = np.random.default_rng(0).integers(140, 240, (5, 5, 3), np.uint8)
    frame = np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))
    return np.stack([np.clip(frame.astype(int) + 10 * i, 0, 250).astype(np.uint8) for i in range(t)])


def test_the_config_has_the_number_of_operations() -> None:
    assert len(OPERATIONS) == NUM_OPERATIONS


def to_gray(clip: np.ndarray) -> np.ndarray:
    return (clip == 128).all(-1)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [-1.0, -0.5, 0.5, 1.0])
def test_operations_keep_the_shape_and_change_something(name: str, level: float) -> None:
    clip = smooth()
    changed = OPERATIONS[name](clip, level)
    assert (changed.shape, changed.dtype) == (clip.shape, np.uint8)
    assert (name == "identity") == np.array_equal(changed, clip)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"auto_contrast", "equalize"}))
def test_level_zero_changes_nothing(name: str) -> None:
    np.testing.assert_array_equal(OPERATIONS[name](smooth(), 0.0), smooth())


@pytest.mark.parametrize("name", OPERATIONS)
def test_equal_frames_stay_equal(name: str) -> None:
    changed = OPERATIONS[name](smooth(1).repeat(3, 0), 0.7)
    np.testing.assert_array_equal(changed, changed[:1].repeat(3, 0))


@pytest.mark.parametrize("name", ["auto_contrast", "equalize", "contrast"])
def test_colors_are_balanced_over_the_video(name: str) -> None:
    clip = smooth(3)
    changed = OPERATIONS[name](clip, 0.6).astype(int)
    assert (np.diff(changed.mean((1, 2, 3))) > 0).all()
    values = {}
    for before, after in zip(clip[..., 0].ravel(), changed[..., 0].ravel(), strict=True):
        assert values.setdefault(before, after) == after


def test_directions() -> None:
    clip = smooth(1)
    for name, edge in (("translate_x", np.s_[:, :, :8]), ("translate_y", np.s_[:, :8])):
        there, back = OPERATIONS[name](clip, 0.5), OPERATIONS[name](clip, -0.5)
        assert to_gray(there[edge]).all()
        assert not to_gray(back[edge]).any()
    turned = OPERATIONS["rotate"](clip, 1.0)[0]
    expected = np.asarray(Image.fromarray(clip[0]).rotate(30, Image.Resampling.BILINEAR, fillcolor=(128,) * 3))
    assert np.abs(turned.astype(int) - expected).max() <= 2


@given(seed=st.integers(0, 999), num_ops=st.integers(0, len(OPERATIONS)), magnitude=st.floats(0, 10))
@settings(max_examples=40)
def test_rand_augment_is_a_function_of_the_generator(seed: int, num_ops: int, magnitude: float) -> None:
    def run() -> np.ndarray:
        return rand_augment(smooth(), np.random.default_rng(seed), num_ops=num_ops, magnitude=magnitude)

    np.testing.assert_array_equal(run(), run())
    assert num_ops or np.array_equal(run(), smooth())


def test_rand_augment_draws_different_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[str] = []
    for name in OPERATIONS:
        monkeypatch.setitem(augment.OPERATIONS, name, lambda clip, s, name=name: draws.append((name, s)) or clip)
    rng = np.random.default_rng(0)
    for _ in range(200):
        draws.clear()
        rand_augment(smooth(), rng, num_ops=3, magnitude=4.0)
        assert len({name for name, _ in draws}) == 3
        assert {abs(level) for _, level in draws} == {0.4}


def test_flip() -> None:
    np.testing.assert_array_equal(flip(smooth())[:, :, 0], smooth()[:, :, -1])
    np.testing.assert_array_equal(flip(flip(smooth())), smooth())


def test_warping_by_whole_pixels_shifts() -> None:
    clip = smooth()
    moved = warp(clip, np.array([[1.0, 0, -5], [0, 1, 3]]))
    np.testing.assert_array_equal(moved[:, 3:, :-5], clip[:, :-3, 5:])
    assert to_gray(moved[:, :3]).all()
    assert to_gray(moved[:, :, -5:]).all()


def test_warping_interpolates_between_four() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (2, 6, 7, 3), np.uint8)
    affine = np.array([[0.9, 0.2, 0.3], [-0.1, 1.1, 0.4]])
    back = np.linalg.inv(np.vstack([affine, [0, 0, 1]]))
    rimmed = np.pad(clip, ((0, 0), (9, 9), (9, 9), (0, 0)), constant_values=128).astype(float)
    expected = np.empty(clip.shape)
    for y in range(6):
        for x in range(7):
            sx, sy, _ = back @ (x, y, 1)
            i, j = math.floor(sy), math.floor(sx)
            v, u = sy - i, sx - j
            four = rimmed[:, i + 9 : i + 11, j + 9 : j + 11]
            expected[:, y, x] = np.einsum("tijc,i,j->tc", four, (1 - v, v), (1 - u, u))
    assert np.abs(warp(clip, affine) - expected).max() <= 0.5 + 1e-3


def drawn_operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    draws: list[tuple[str, float]] = []
    for name, operation in augment._RELEASED.items():

        def record_level(clip, s, name=name, operation=operation):
            draws.append((name, s))
            return operation(clip, s)

        monkeypatch.setitem(augment._RELEASED, name, record_level)
    return draws


@pytest.mark.parametrize("flips", [False, True])
def test_the_release_draws_two_different_operations_for_videos(flips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draws, rng, pairs = drawn_operations(monkeypatch), np.random.default_rng(0), set()
    for _ in range(150):
        draws.clear()
        release_augment_video(smooth(), rng, flips=flips)
        assert len({name for name, _ in draws}) == 2
        assert {level for _, level in draws} == {0.5}
        pairs |= {name for name, _ in draws}
    photometric = {"identity", "contrast", "brightness", "sharpness"}
    assert pairs == photometric | {"shear_x", "shear_y", "translate_x", "translate_y", "rotate"} | (
        {"flip"} if flips else set()
    )


def test_the_release_draws_up_to_two_operations_for_images(monkeypatch: pytest.MonkeyPatch) -> None:
    draws, rng, counts, pairs = drawn_operations(monkeypatch), np.random.default_rng(0), [], set()
    for _ in range(300):
        draws.clear()
        release_augment_image(smooth(1), rng)
        counts.append(len(draws))
        pairs |= set(draws)
    shares = np.bincount(counts) / 300
    assert np.abs(shares - (0.25, 0.5, 0.25)).max() < 0.1
    assert len({name for name, _ in pairs}) == 10
    assert {level for _, level in pairs} == {-0.7, 0.7}


def test_the_release_geometric_operations() -> None:
    """Check magnitude 5: shears of 0.15, 5 pixels to the left or up, 15 degrees counter-clockwise; colors unchanged."""
    clip = smooth(2, 60)
    apply = {name: lambda name=name: augment._RELEASED[name](clip, 0.5) for name in augment._RELEASED}
    for name in ("identity", "contrast", "brightness", "sharpness"):
        np.testing.assert_array_equal(apply[name](), clip)
    np.testing.assert_array_equal(apply["translate_x"]()[:, :, :-5], clip[:, :, 5:])
    np.testing.assert_array_equal(apply["translate_y"]()[:, :-5], clip[:, 5:])
    assert to_gray(apply["translate_x"]()[:, :, -5:]).all()
    np.testing.assert_array_equal(apply["shear_x"]()[:, 40, 6:], clip[:, 40, :-6])  # 0.15 x 40 rows is 6 pixels
    np.testing.assert_array_equal(apply["shear_y"]()[:, 6:, 40], clip[:, :-6, 40])
    turned = apply["rotate"]()[0]
    expected = np.asarray(Image.fromarray(clip[0]).rotate(15, Image.Resampling.BILINEAR, fillcolor=(128,) * 3))
    assert np.abs(turned[15:-15, 15:-15].astype(int) - expected[15:-15, 15:-15]).max() <= 8  # half a pixel apart


def test_the_release_brightness_of_images() -> None:
    clip = smooth(1)
    np.testing.assert_array_equal(
        augment._RELEASED["brightness"](clip, -0.7), np.minimum(clip * 1.36, 255).astype(np.uint8)
    )
    equalized = np.asarray(ImageOps.equalize(Image.fromarray(clip[0])))
    np.testing.assert_array_equal(augment._RELEASED["equalize"](clip, 0.7)[0], equalized)


@pytest.mark.parametrize("name", ["posterize", "solarize", "brightness", "contrast"])
@given(seed=st.integers(0, 2**32 - 1), level=st.floats(-1, 1))
def test_operations_on_single_values_are_pillow_s(name: str, seed: int, level: float) -> None:
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.integers(0, 256, 2))
    frames = rng.integers(low, high + 1, (3, 5, 7, 3), np.uint8)[:, :, :: rng.choice((-1, 1))]
    image = Image.fromarray(np.ascontiguousarray(frames).reshape(15, 7, 3))
    expected = {
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * abs(level))),
        "solarize": lambda: ImageOps.solarize(image, 256 - round(128 * abs(level))),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(1 + 0.9 * level),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(1 + 0.9 * level),
    }[name]()
    result = augment.OPERATIONS[name](frames, level)
    np.testing.assert_array_equal(result, np.asarray(expected).reshape(frames.shape))


def test_a_flip_reverses_columns() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), np.uint8)
    np.testing.assert_array_equal(augment.flip(frames), frames[:, :, ::-1])
    np.testing.assert_array_equal(augment.flip(frames[:, :, ::-1]), frames)
