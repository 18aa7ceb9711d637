"""Images of every format and mode become upright RGB, or an error."""

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import media as media_module
from data_pipelines.config import Color
from data_pipelines.errors import DataError
from data_pipelines.image import open_image
from data_pipelines.media import Media, available_image_formats
from tests.data_pipelines.clips import error_message

FORMATS: dict[str, Mapping[str, Any]] = {
    "JPEG": {"quality": 90}, "JPEG progressive": {"quality": 90, "progressive": True}, "PNG": {},
    "WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}, "BMP": {}, "GIF": {}, "PPM": {},
    "AVIF": {"quality": 95}, "JPEG2000": {},
}  # fmt: skip


def photograph() -> np.ndarray:
    return sklearn.datasets.load_sample_image("flower.jpg")


@functools.cache
def read_golden(name: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photograph()[100:196, 200:328]).save(file, format=name.split()[0], **FORMATS[name])
    return file.getvalue()


def decode(data: bytes | str, min_scale: float = 1.0) -> np.ndarray:
    with open_image(Media("image", data, "picture")) as lazy_image:
        return np.asarray(lazy_image.decode(min_scale)[0])


def save_bytes(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    pixels = decode(read_golden(name))
    assert (pixels.shape, pixels.dtype) == ((96, 128, 3), np.uint8)
    lossy = name.split()[0] in ("JPEG", "GIF", "AVIF")
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
            pixels = decode(save_bytes(image, format))
            assert pixels.shape == (5, 4, 3)
            assert (pixels == grey).all()


@pytest.mark.parametrize("min_scale", [1.0, 0.5])
def test_cmyk_jpegs(min_scale: float) -> None:
    pixels = decode(save_bytes(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), min_scale)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 6


HALVES = np.repeat([0, 1], 4)[None].repeat(8, 0)


@pytest.mark.parametrize(
    ("white", "scale"),
    [
        (200, 255), (0, 255), (32768, 65_535), (2**30, 2**31 - 1), (0.5, 1.0), (1.0, 1.0), (128.0, 255),
        (32768.0, 65_535), (4095, None), (-5, None), (3.0, None), (1e9, None), (np.nan, None), (np.inf, None),
    ],
)  # fmt: skip
def test_wide_integers_and_floats_are_scaled_or_an_error(white: float, scale: float | None) -> None:
    values = (HALVES * white).astype(np.float32 if isinstance(white, float) else np.int32)
    if scale is None:
        with pytest.raises(DataError, match=r"its values are .*, which fits no known scale .*; save it in 8 bits"):
            decode(save_bytes(Image.fromarray(values), "TIFF"))
    else:
        pixels = decode(save_bytes(Image.fromarray(values), "TIFF"))
        assert np.abs(pixels[0, :, 0] - HALVES[0] * white / scale * 255).max() <= 1


@pytest.mark.parametrize("most", [255, 1023, 4095, 65_535])
@pytest.mark.parametrize("kind", [b"P2", b"P3", b"P5", b"P6"])
def test_portable_maps_of_any_depth(kind: bytes, most: int) -> None:
    values = (HALVES[..., None] * (most // 2)).repeat(1 + 2 * (kind in (b"P3", b"P6")), -1)
    data = b" ".join(b"%d" % value for value in values.ravel())
    if kind in (b"P5", b"P6"):
        data = values.astype(">u1" if most < 256 else ">u2").tobytes()
    pixels = decode(b"%s\n8 8\n%d\n" % (kind, most) + data)
    assert np.abs(pixels.astype(int) - 127 * HALVES[..., None]).max() <= 1


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(bits: int, color_type: int, values: np.ndarray, before: bytes = b"", behind: bytes = b"") -> bytes:
    """Return a PNG of 8 x 8 pixels with the given bit depth."""
    rows = [
        b"\0" + int("".join(format(v, f"0{bits}b") for v in row.ravel()), 2).to_bytes(row.size * bits // 8)
        for row in values
    ]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, color_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + behind + chunk(b"IEND", b"")


RED = (200, 30, 30)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 40, 80)])
@pytest.mark.parametrize(
    "form", ["PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "PNG LA", "TIFF PA", "PNG P", "GIF P", "PNG I;16"]
)
def test_transparent_pixels_show_the_background(form: str, background: Color) -> None:
    """Composite them whatever color they have."""
    format, _, mode = form.partition(" ")
    image = Image.new("RGBA", (8, 8), (*RED, 255))
    image.paste((*RED, 0), (4, 0, 8, 8))
    if mode == "I;16":
        image, options = Image.fromarray((HALVES * 40_000).astype(np.uint16)), {"transparency": 40_000}
    elif mode == "P":
        image, options = Image.fromarray(HALVES.astype(np.uint8), "P"), {"transparency": 1}
        image.putpalette([*RED, *RED])
    else:
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        image = image.convert(mode or "RGBA")
    with open_image(Media("image", save_bytes(image, format, **options), "picture")) as lazy_image:
        pixels = np.asarray(lazy_image.decode(background=background)[0]).astype(int)
    assert np.abs(pixels[:, 4:] - background).max() <= 2
    visible = {"LA": 81, "I;16": 0}.get(mode, RED)
    assert np.abs(pixels[:, :4] - visible).max() <= 2


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparent_gray_at_any_bit_depth(bits: int) -> None:
    gray = (1 << bits) // 2
    for transparent in (0, gray):
        pixels = decode(png(bits, 0, HALVES * gray, chunk(b"tRNS", struct.pack(">H", transparent))))
        visible = round(gray / ((1 << bits) - 1) * 255)
        expected = np.where(HALVES[0] * gray == transparent, 255, HALVES[0] * visible)
        assert np.abs(pixels[0, :, 0] - expected).max() <= 1


LARGE = zlib.compress(bytes(2 << 20))
METADATA = {
    "text": chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + LARGE),
    "profile": chunk(b"iCCP", b"profile\0\0" + LARGE),
    "many texts": b"".join(chunk(b"tEXt", b"C\0" + bytes(b"a" * 1_000_000)) for _ in range(70)),
}


@pytest.mark.parametrize("name", METADATA)
def test_large_texts_and_profiles_do_not_matter(name: str, tmp_path: Path) -> None:
    values = np.broadcast_to(np.array(RED), (8, 8, 3))
    before, behind = png(8, 2, values, METADATA[name]), png(8, 2, values, behind=METADATA[name])
    (tmp_path / "a.png").write_bytes(before)
    for data in (before, behind, str(tmp_path / "a.png")):
        assert (decode(data) == RED).all()


def test_errors_explain_why_a_file_is_not_an_image() -> None:
    heic = b"\0\0\0\x18ftypheic" + bytes(200)
    for data, message in (
        (b"\0\0\0\x18ftypisom" + bytes(200), "it is a video; set the source's kind to 'video'"),
        (png(8, 0, HALVES).replace(b"IHDR", b"IHDX"), "its header is damaged"),
        (b"", "it is empty, expected JPEG, PNG, "),
        (b"<html>gone</html>", "it begins with b'<html>gone</', expected JPEG, "),
        (heic, r"needs the package pillow-heif" if "HEIF" not in Image.OPEN else "cannot be read as an image"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            decode(data)


def test_images_of_phones() -> None:
    """Read HEIC with the plugin, which is an extra."""
    pytest.importorskip("pillow_heif")
    available_image_formats()
    assert np.abs(decode(save_bytes(Image.new("RGB", (64, 64), RED), "HEIF", quality=95)).astype(int) - RED).max() <= 4


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
    data = save_bytes(Image.fromarray(np.ascontiguousarray(held)), format, exif=exif, **options)
    with open_image(Media("image", data, "picture")) as lazy_image:
        assert (lazy_image.height, lazy_image.width) == (128, 256)
    assert np.abs(decode(data).astype(int) - upright).mean() < (4 if format == "JPEG" else 0.01)
    if format == "JPEG":
        assert np.abs(decode(data, 0.5).astype(int) - upright[::2, ::2]).mean() < 6


def test_an_invalid_orientation_is_ignored() -> None:
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        data = save_bytes(Image.fromarray(photograph()), "JPEG", exif=exif)
        assert decode(data).shape == (427, 640, 3)


@pytest.mark.parametrize(
    ("min_scale", "scale"),
    [(1.0, 1), (0.51, 1), (0.5, 1 / 2), (0.3, 1 / 2), (0.25, 1 / 4), (0.126, 1 / 4), (0.01, 1 / 8)],
)
def test_jpegs_are_decoded_at_the_smallest_sufficient_scale(min_scale: float, scale: float) -> None:
    with open_image(Media("image", save_bytes(Image.fromarray(photograph()[:400]), "JPEG"), "picture")) as lazy_image:
        image, decoded = lazy_image.decode(min_scale)
    assert decoded == scale
    assert image.size == (640 * scale, 400 * scale)
    assert image.size >= (640 * min_scale, 400 * min_scale) or scale == 1 / 8


def test_a_jpeg_decoded_small_equals_the_resized_large_one() -> None:
    data = save_bytes(Image.fromarray(photograph()), "JPEG", quality=95)
    small = decode(data, 0.25)
    shrunk = np.asarray(Image.fromarray(decode(data)).resize(small.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(small.astype(int) - shrunk).mean() < 3


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(FORMATS)), share=st.floats(0, 1))
def test_truncated_files_are_complete_or_an_error(name: str, share: float) -> None:
    data = read_golden(name)[: int(share * len(read_golden(name)))]
    message = error_message(lambda: np.testing.assert_array_equal(decode(data), decode(read_golden(name))))
    assert message is None or message.startswith("picture cannot be read as an image: ")


@settings(max_examples=150)
@given(data=st.data(), name=st.sampled_from(sorted(FORMATS)), min_scale=st.sampled_from([1.0, 0.2]))
def test_damaged_files_give_pixels_or_one_error(data: st.DataObject, name: str, min_scale: float) -> None:
    file = bytearray(read_golden(name))
    for _ in range(data.draw(st.integers(1, 8))):
        # Headers are where damage is worst.
        place = st.integers(0, min(len(file), 700) - 1) | st.integers(0, len(file) - 1)
        file[data.draw(place)] ^= data.draw(st.integers(1, 255))
    message = error_message(lambda: decode(bytes(file), min_scale))
    assert message is None or (message.startswith("picture ") and "\n" not in message)


def test_files_that_are_not_images() -> None:
    for content in (b"", b"some text that is no picture at all", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(DataError, match=r"picture cannot be read as an image: .*; replace or remove the file"):
            decode(content)


def test_images_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "MAX_PIXELS", 96 * 128 - 1)
    for name in FORMATS:
        with pytest.raises(DataError, match=r"picture is 128 x 96 pixels, expected 1 to MAX_PIXELS = 12,287; scale it"):
            decode(read_golden(name))


def test_a_decompression_bomb_is_not_decoded() -> None:
    bomb = save_bytes(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(bomb) < 200_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(DataError, match=r"picture .*(pixels|decompression bomb)"):
            decode(bomb)
