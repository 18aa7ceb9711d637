"""Image decoding with Pillow: only as large as needed, upright, and in RGB whatever the mode."""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, features

from data_pipelines.config import WHITE, Color
from data_pipelines.media import (
    MAX_FETCHED_BYTES,
    PNG,
    Media,
    available_image_formats,
    check_size,
    is_image_file,
    open_media,
    read_head,
)

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# The chunks of a PNG that its pixels depend on.
_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND"})


class LazyImage:
    """An image whose size is known and whose pixels are decoded on demand.

    Attributes:
        width: in pixels, when upright.
        height: in pixels, when upright.
    """

    def __init__(self, image: Image.Image) -> None:
        orientation = _orientation(image)
        self._image, self._transpose = image, _TRANSPOSES.get(orientation)
        self.width, self.height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size

    def decode(self, min_scale: float = 1.0, background: Color = WHITE) -> tuple[Image.Image, float]:
        """Decode as upright RGB; return the image and its scale: 1, or for a JPEG 1/2, 1/4 or 1/8 if allowed.

        16-bit values keep the upper 8 bits; for 32-bit and float values see :func:`_white_value`.

        Args:
            min_scale: smallest scale that may be decoded, at most 1. Decoding a JPEG at a reduced scale saves most of
                the work.
            background: shown through transparent pixels.
        """
        image, scale = self._image, 1.0
        if min_scale < 1 and image.format in ("JPEG", "MPO"):
            width, height = image.size
            drafted = image.draft(None, (math.ceil(width * min_scale), math.ceil(height * min_scale)))
            scale = drafted[1][2] / width if drafted else 1.0
        image.load()
        pixels = to_rgb(image, background)
        return pixels if self._transpose is None else pixels.transpose(self._transpose), scale


@contextmanager
def open_image(media: Media) -> Iterator[LazyImage]:
    """Open an image, or the first frame of an animation; close the file at the end.

    Raises:
        DataError: the file is missing, not an image, damaged, truncated, or larger than ``MAX_PIXELS``.
    """
    with open_media(media) as data, open_pillow(media, data) as image:
        yield LazyImage(image)


@contextmanager
def open_pillow(media: Media, data: bytes | str) -> Iterator[Image.Image]:
    """Open an image with Pillow, from bytes or a local path, and decode its first frame, except for a JPEG.

    Raises:
        DataError: it is larger than ``MAX_PIXELS``.
        OSError, ValueError: it is not an image, or damaged.
    """
    try:
        image = _load(media, data)
    except UnidentifiedImageError as error:
        raise ValueError(_explain_unidentified(read_head(data))) from error
    except ValueError:  # Pillow rejects large texts and profiles in a PNG, and the pixels need neither
        stripped = _strip_png(data)
        if stripped is None:
            raise
        image = _load(media, stripped)
    with image:
        yield image


def _load(media: Media, data: bytes | str) -> ImageFile.ImageFile:
    image = Image.open(BytesIO(data) if isinstance(data, bytes) else data, formats=available_image_formats())
    try:
        check_size(media, *image.size)
        if image.format == "PNG" and "transparency" in image.info:
            _scale_transparency(image)
        if image.format not in ("JPEG", "MPO"):
            image.load()  # this rotates a TIFF; a PNG may store its orientation after the pixels
    except BaseException:
        image.close()
        raise
    return image


def _scale_transparency(image: ImageFile.ImageFile) -> None:
    """Scale the transparent color of a PNG like its pixels, which Pillow does not do."""
    color, stored = image.info["transparency"], image.tile[0][3]
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = color * (85 if stored == "L;2" else 17)
    elif stored == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _explain_unidentified(head: bytes) -> str:
    """Explain from a file's first bytes why Pillow cannot identify it."""
    if head[4:11] == b"ftypavi" and not features.check("avif"):
        return "it is an AVIF, which needs Pillow 11.3 or newer"
    if head[4:10] in (b"ftyphe", b"ftypmi") and "HEIF" not in available_image_formats():
        return "it is a HEIC, which needs the package pillow-heif (mplug2-jax[heif])"
    if is_image_file(head):
        return "its header is damaged"
    if head[4:8] == b"ftyp" or head.startswith(b"\x1aE\xdf\xa3") or (head[:4] == b"RIFF" and head[8:11] == b"AVI"):
        return "it is a video; set the source's kind to 'video'"
    found = f"it begins with {head[:12]!r}" if head else "it is empty"
    return f"{found}, expected {', '.join(available_image_formats())}"


def _strip_png(data: bytes | str) -> bytes | None:
    """Return a PNG without its texts and profiles; None if it is not a PNG, or too large."""
    parts, size = [PNG], 0
    with BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
        if file.read(len(PNG)) != PNG:
            return None
        while len(header := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", header)
            if name not in _PIXEL_CHUNKS:
                file.seek(length + 4, 1)
                continue
            size += length
            if size > MAX_FETCHED_BYTES:
                return None
            parts += [header, file.read(length + 4)]
    return b"".join(parts)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if it cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises anything, and the pixels do not need it
        return 1


def to_rgb(image: Image.Image, background: Color) -> Image.Image:
    """Convert a decoded image of any mode to RGB, composited over a background.

    Raises:
        ValueError: values of an unknown scale.
    """
    if image.mode[0] in "IF":
        image = _to_gray(image)
    if image.has_transparency_data:
        return flatten(image.convert("RGBA"), background)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy it


def flatten(image: Image.Image, background: Color) -> Image.Image:
    """Composite RGBA over a background."""
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _to_gray(image: Image.Image) -> Image.Image:
    """Scale grayscale of 16 or 32 bits or floats to 8 bits; Pillow would clip it at 255."""
    values = np.asarray(image)
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    white = 65_535 if is_16_bit else _white_value(values)
    levels = values * np.float32(255 / white) + 0.5 if image.mode == "F" else values // ((white + 1) // 256)
    gray = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # the transparent gray value
        gray.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return gray


def _white_value(values: np.ndarray) -> int:
    """Infer the value of white from the pixels: 1 (floats only), 255, 65,535, or 2**31 - 1 (integers only).

    It is the smallest of these that no pixel exceeds; above 1, the largest pixel must be at least an eighth of it.

    Raises:
        ValueError: no such value, or pixels that are negative or not finite.
    """
    low, high = values.min().item(), values.max().item()
    scales = (1, 255, 65_535) if values.dtype.kind == "f" else (255, 65_535, 2**31 - 1)
    white = next((scale for scale in scales if 0 <= low <= high <= scale), None)
    if white is None or (white > 1 and 0 < high < white / 8):
        raise ValueError(
            f"its values are {low:,g} to {high:,g}, which fits no known scale (0 to {' or '.join(map(str, scales))}); "
            "save it in 8 bits"
        )
    return white
