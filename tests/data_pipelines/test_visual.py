"""From media to the frames of a batch: every transform of images, videos and pixels."""

import io
from typing import get_args

import numpy as np
import pytest
import sklearn.datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.config import Color, Transform, VisualConfig
from data_pipelines.errors import DataError
from data_pipelines.frames import random_indices, uniform_indices
from data_pipelines.image import LazyImage
from data_pipelines.media import Media
from data_pipelines.transforms import random_resized_crop, square_crop
from data_pipelines.visual import Visual, load_visual
from tests.data_pipelines.clips import encode, moving, moving_clip

TRANSFORMS = get_args(Transform)


def photograph() -> Media:
    file = io.BytesIO()
    Image.fromarray(sklearn.datasets.load_sample_image("china.jpg")).save(file, format="JPEG", quality=95)
    return Media("image", file.getvalue(), "china.jpg")


PHOTOGRAPH = photograph()


def load(source: Media | np.ndarray, seed: int = 0, **fields) -> Visual:
    return load_visual(source, VisualConfig(**fields), np.random.default_rng(seed))


def clip(encoding: str = "h264", gop: int = 12) -> Media:
    return Media("video", moving_clip(encoding, gop)[0], "clip")


@settings(max_examples=60)
@given(transform=st.sampled_from(TRANSFORMS), size=st.integers(1, 80), seed=st.integers(0, 99))
def test_every_transform_of_everything(transform: Transform, size: int, seed: int) -> None:
    for source, count in ((PHOTOGRAPH, 1), (clip(), 3), (moving(1), 1), (moving(7), 3)):
        first, again = (load(source, seed, image_size=size, num_frames=3, transform=transform) for _ in range(2))
        assert first.frames.shape == (count, size, size, 3)
        assert first.times.shape == (count,)
        np.testing.assert_array_equal(first.frames, again.frames)


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t.endswith("train")])
def test_training_transforms_are_random(transform: Transform) -> None:
    for source in (PHOTOGRAPH, clip(), moving(4)):
        distinct = {load(source, seed, transform=transform).frames.tobytes() for seed in range(5)}
        assert len(distinct) == 5


@pytest.mark.parametrize("transform", ["test", "resize", "released_test"])
def test_evaluation_transforms_are_deterministic(transform: Transform) -> None:
    for source in (PHOTOGRAPH, clip(), moving(4)):
        assert len({load(source, seed, transform=transform).frames.tobytes() for seed in range(3)}) == 1


@pytest.mark.parametrize("sampling", ["uniform", "random", "fps"])
def test_frames_match_their_times(sampling: str) -> None:
    _, frames = moving_clip("h264", 12)
    visual = load(clip(), image_size=64, num_frames=5, sampling=sampling, fps=4.0, transform="released_test")
    indices = np.rint(visual.times * 10).astype(int)
    np.testing.assert_array_equal(visual.frames, frames[indices])
    if sampling == "uniform":
        assert indices.tolist() == uniform_indices(30, 5).tolist()
    elif sampling == "random":
        assert indices.tolist() == random_indices(30, 5, np.random.default_rng(0)).tolist()
    else:
        assert indices.tolist() == [10, 12, 15, 17, 20]


def test_pixels_are_sampled_and_have_no_times() -> None:
    pixels = moving(9, 16, 16)
    for sampling, expected in (("uniform", uniform_indices(9, 3)), ("fps", uniform_indices(9, 3))):
        visual = load(pixels, image_size=16, num_frames=3, sampling=sampling)
        np.testing.assert_array_equal(visual.frames, pixels[expected])
        assert (visual.times == 0).all()
    for sampling in ("uniform", "random", "fps"):
        np.testing.assert_array_equal(load(pixels[:4], image_size=16, sampling=sampling).frames, pixels[:4])
        np.testing.assert_array_equal(load(pixels[:1], image_size=16, sampling=sampling).frames, pixels[:1])


def test_views_are_the_crops_of_each_clip() -> None:
    _, frames = moving_clip("h264", 12)
    size = min(frames.shape[1:3])
    config = VisualConfig(image_size=size, num_frames=5, num_clips=2, num_crops=3)
    assert config.views == 6
    for source in (clip(), frames):
        for view in range(6):
            rows = load_visual(source, config, np.random.default_rng(0), view).frames
            chosen = frames[uniform_indices(30, 5, view // 3, 2)]
            expected = [square_crop(*frame.shape[:2], size, view % 3).apply_array(frame) for frame in chosen]
            np.testing.assert_array_equal(rows, np.stack(expected))
    config = VisualConfig(num_crops=3)
    squares = [load_visual(PHOTOGRAPH, config, np.random.default_rng(0), view).frames for view in range(3)]
    assert len({view.tobytes() for view in squares}) == 3
    np.testing.assert_array_equal(squares[1], load(PHOTOGRAPH).frames)


def test_views_of_random_frames_or_full_frames_are_an_error() -> None:
    with pytest.raises(
        DataError, match=r"visual\.num_clips=2 needs deterministic frames: set visual\.sampling to 'uniform'"
    ):
        VisualConfig(num_clips=2, sampling="random")
    with pytest.raises(DataError, match=r"visual\.num_crops=3 with visual\.transform='resize': several crops need"):
        VisualConfig(num_crops=3, transform="resize")


def test_all_frames_of_a_video_are_augmented_alike() -> None:
    """Check that the frames of a still video stay equal under every transform."""
    pixels = moving(1, 40, 60).repeat(4, 0)
    for transform in TRANSFORMS:
        for seed in range(8):
            frames = load(pixels, seed, transform=transform).frames
            np.testing.assert_array_equal(frames, frames[:1].repeat(4, 0))


def test_without_flips_left_stays_left() -> None:
    pixels = np.zeros((1, 40, 40, 3), np.uint8)
    pixels[:, :, 20:] = 255

    def flips(**fields) -> set[bool]:
        loaded = (load(pixels, seed, transform="train", num_ops=0, **fields).frames for seed in range(20))
        return {bool(frames[0, :, :4].mean() > frames[0, :, -4:].mean()) for frames in loaded}

    assert flips() == {False, True}
    assert flips(flip=False) == {False}


def test_training_without_augmentation_is_resizing() -> None:
    fields = {"min_crop_area": 1.0, "num_ops": 0, "flip": False, "transform": "train"}
    pixels = moving(1, 40, 40)
    np.testing.assert_array_equal(load(pixels, **fields).frames, load(pixels, transform="resize").frames)


def test_large_jpegs_are_decoded_at_a_reduced_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float] = []
    decode = LazyImage.decode

    def record_decode(self, min_scale: float, background: Color):
        image, scale = decode(self, min_scale, background)
        scales.append(scale)
        return image, scale

    monkeypatch.setattr(LazyImage, "decode", record_decode)
    small = load(PHOTOGRAPH, image_size=48, transform="resize").frames
    load(PHOTOGRAPH, image_size=48, transform="released_pretrain")  # the release decodes all
    assert scales == [1 / 8, 1.0]
    pixels = np.asarray(Image.open(io.BytesIO(PHOTOGRAPH.data)))[None]
    assert np.abs(small.astype(int) - load(pixels, image_size=48, transform="resize").frames).mean() < 4


def test_the_release_pretraining_crop_of_images_equals_pillow() -> None:
    """Without a drawn operation the pixels are those of a resized crop."""
    image = Image.open(io.BytesIO(PHOTOGRAPH.data))
    pixels = 0
    for seed in range(12):
        frame = load(PHOTOGRAPH, seed, transform="released_pretrain").frames[0]
        window = random_resized_crop(427, 640, 32, np.random.default_rng(seed), min_area=0.2)
        box = (window.left, window.top, window.left + window.width, window.top + window.height)
        crop = np.asarray(image.crop(box).resize((32, 32), Image.Resampling.BICUBIC))
        pixels += np.array_equal(frame, crop) or np.array_equal(frame, crop[:, ::-1])
    assert pixels >= 1


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("image_size", 0, "at least 1"), ("num_frames", 0, "at least 1"), ("fps", 0.0, "above 0"),
        ("num_clips", 0, "at least 1"), ("num_crops", 2, "1 or 3"), ("min_crop_area", 1.5, "above 0 and at most 1"),
        ("num_ops", 99, "0 to 14"), ("magnitude", 11.0, "0 to 10"),
    ],
)  # fmt: skip
def test_fields_out_of_range(field: str, value: float, expected: str) -> None:
    with pytest.raises(DataError, match=rf"visual\.{field} is {value}, expected {expected}"):
        VisualConfig(**{field: value})


@pytest.mark.parametrize("encoding", ["h264", "mpeg4 b", "av1", "gif"])
@pytest.mark.parametrize("size", [24, 100])
def test_libswscale_shows_what_pillow_does(encoding: str, size: int) -> None:
    """Compare smooth frames: the two filter chroma in different places. A GIF, which has a palette, is Pillow's."""
    smooth = np.stack([
        np.asarray(Image.fromarray(frame[::16, ::16]).resize((96, 60), Image.Resampling.BICUBIC))
        for frame in moving(12)
    ])  # fmt: skip
    media = Media("video", encode(smooth, encoding), "clip")
    for seed in range(4):
        results = [
            load_visual(media, VisualConfig(
                image_size=size, num_frames=3, sampling="random", transform="train", min_crop_area=0.3,
                scaler=scaler,
            ), np.random.default_rng(seed))
            for scaler in ("pillow", "swscale")
        ]  # fmt: skip
        expected, actual = (each.frames.astype(int) for each in results)
        assert results[0].times.tolist() == results[1].times.tolist()
        assert actual.shape == expected.shape
        difference = np.abs(actual - expected)
        assert difference.mean() < (1e-9 if encoding == "gif" else 4.0)
        assert (encoding == "gif") == (difference.max() == 0)


@pytest.mark.parametrize("size", [24, 64, 300])
@pytest.mark.parametrize("transform", ["test", "train", "resize"])
def test_libswscale_shows_what_pillow_does_of_images(transform: str, size: int) -> None:
    for seed in range(3):
        expected, actual = (
            load(PHOTOGRAPH, seed, image_size=size, transform=transform, num_ops=0, scaler=scaler).frames.astype(int)
            for scaler in ("pillow", "swscale")
        )
        assert actual.shape == expected.shape == (1, size, size, 3)
        # Decoded at a reduced scale, corners are rounded to its pixels.
        assert np.abs(actual - expected).mean() < (1.0 if size == 300 else 8.0)


def test_libswscale_is_refused_for_the_release_s_transforms() -> None:
    with pytest.raises(DataError, match="the release's transforms are bit for bit; set scaler to 'pillow'"):
        VisualConfig(scaler="swscale", transform="released_train")
