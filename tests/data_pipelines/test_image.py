"""Pictures of every kind become upright RGB, whole or not at all."""

import functools
import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import media as media_module
from data_pipelines.errors import DataError
from data_pipelines.image import open_image
from data_pipelines.media import Media
from tests.data_pipelines.clips import failure

FORMATS: dict[str, Mapping[str, Any]] = {
    "JPEG": {"quality": 90},
    "JPEG progressive": {"quality": 90, "progressive": True},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
    "BMP": {},
    "GIF": {},
    "PPM": {},
}


def photograph() -> np.ndarray:
    return sklearn.datasets.load_sample_image("flower.jpg")


@functools.cache
def encoded(name: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photograph()[100:196, 200:328]).save(file, format=name.split()[0], **FORMATS[name])
    return file.getvalue()


def decode(data: bytes, shrink: float = 1.0) -> np.ndarray:
    with open_image(Media("image", data, "picture")) as picture:
        return np.asarray(picture.decode(shrink)[0])


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    pixels = decode(encoded(name))
    assert (pixels.shape, pixels.dtype) == ((96, 128, 3), np.uint8)
    lossy = name.startswith(("JPEG", "GIF"))
    assert np.abs(pixels.astype(int) - photograph()[100:196, 200:328]).mean() <= (8 if lossy else 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = 255 if mode == "1" else 200
    if mode == "I;16":
        image = Image.fromarray(np.full((5, 4), 200 << 8 | 77, np.uint16))
    else:
        image = Image.new("L", (4, 5), grey).convert(mode)
    for format in ("TIFF", "PNG"):
        if format == "TIFF" or mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            pixels = decode(saved(image, format))
            assert pixels.shape == (5, 4, 3)
            assert (pixels == grey).all()


@pytest.mark.parametrize("shrink", [1.0, 0.5])
def test_cmyk_jpegs(shrink: float) -> None:
    pixels = decode(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), shrink)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 6


def test_palettes_with_transparency() -> None:
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), mode="P")
    image.putpalette(np.arange(16, dtype=np.uint8).repeat(3) * 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for transparency in (3, bytes(range(0, 256, 16))):
            pixels = decode(saved(image, "PNG", transparency=transparency))
            np.testing.assert_array_equal(pixels[..., 0], np.arange(16).reshape(4, 4) * 16)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(orientation: int, format: str) -> None:
    upright = photograph()[96:160, 200:328].repeat(2, 0).repeat(2, 1)
    turns = [0, 0, 2, 2, 1, 1, 3, 3]  # by 90 degrees, as the camera was turned; each second one is mirrored as well
    held = np.rot90(upright, turns[orientation - 1])
    if orientation in (2, 4, 5, 7):
        held = held[:, ::-1] if orientation in (2, 4) else held[::-1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    data = saved(Image.fromarray(np.ascontiguousarray(held)), format, exif=exif, **options)
    with open_image(Media("image", data, "picture")) as picture:
        assert (picture.height, picture.width) == (128, 256)
    assert np.abs(decode(data).astype(int) - upright).mean() < (4 if format == "JPEG" else 0.01)
    if format == "JPEG":
        assert np.abs(decode(data, 0.5).astype(int) - upright[::2, ::2]).mean() < 6


def test_nonsense_for_an_orientation() -> None:
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        data = saved(Image.fromarray(photograph()), "JPEG", exif=exif)
        assert decode(data).shape == (427, 640, 3)


@pytest.mark.parametrize(
    ("shrink", "scale"), [(1.0, 1), (0.51, 1), (0.5, 1 / 2), (0.3, 1 / 2), (0.25, 1 / 4), (0.126, 1 / 4), (0.01, 1 / 8)]
)
def test_jpegs_are_decoded_no_larger_than_needed(shrink: float, scale: float) -> None:
    with open_image(Media("image", saved(Image.fromarray(photograph()[:400]), "JPEG"), "picture")) as picture:
        image, found = picture.decode(shrink)
    assert found == scale
    assert image.size == (640 * scale, 400 * scale)
    assert image.size >= (640 * shrink, 400 * shrink) or scale == 1 / 8


def test_a_small_decoding_is_the_large_one_shrunk() -> None:
    data = saved(Image.fromarray(photograph()), "JPEG", quality=95)
    small = decode(data, 0.25)
    shrunk = np.asarray(Image.fromarray(decode(data)).resize(small.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(small.astype(int) - shrunk).mean() < 3


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(FORMATS)), share=st.floats(0, 1))
def test_cut_off_files_are_whole_or_errors(name: str, share: float) -> None:
    data = encoded(name)[: int(share * len(encoded(name)))]
    said = failure(lambda: np.testing.assert_array_equal(decode(data), decode(encoded(name))))
    assert said is None or said.startswith("picture cannot be read as an image: ")


@settings(max_examples=150)
@given(data=st.data(), name=st.sampled_from(sorted(FORMATS)), shrink=st.sampled_from([1.0, 0.2]))
def test_damaged_files_give_pixels_or_one_error(data: st.DataObject, name: str, shrink: float) -> None:
    file = bytearray(encoded(name))
    for _ in range(data.draw(st.integers(1, 8))):
        # Headers are where damage is worst.
        place = st.integers(0, min(len(file), 700) - 1) | st.integers(0, len(file) - 1)
        file[data.draw(place)] ^= data.draw(st.integers(1, 255))
    said = failure(lambda: decode(bytes(file), shrink))
    assert said is None or (said.startswith("picture ") and "\n" not in said)


def test_files_that_are_no_picture() -> None:
    for content in (b"", b"some text that is no picture at all", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(DataError, match=r"picture cannot be read as an image: .*; replace or remove the file"):
            decode(content)


def test_pictures_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "MAX_PIXELS", 96 * 128 - 1)
    for name in FORMATS:
        with pytest.raises(DataError, match=r"picture is 128 x 96 pixels, expected 1 to MAX_PIXELS = 12,287; scale it"):
            decode(encoded(name))


def test_a_bomb_is_not_decoded() -> None:
    bomb = saved(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(bomb) < 200_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(DataError, match=r"picture .*(pixels|decompression bomb)"):
            decode(bomb)
