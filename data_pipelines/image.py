"""Pictures by Pillow: decoded only as large as they are needed, upright, and in RGB whatever their mode."""

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
    check_size,
    head_of,
    image_formats,
    is_image_file,
    reading,
)

_ORIENTATION = 0x0112  # the EXIF tag that tells how the camera was held
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of PNG, what pixels are made of.
_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND"})


class Picture:
    """A picture whose size is known and whose pixels may not be decoded yet.

    Attributes:
        width: pixels across, once upright.
        height: pixels down, once upright.
    """

    def __init__(self, image: Image.Image) -> None:
        orientation = _orientation(image)
        self._image, self._turn, self._sideways = image, _TURNS.get(orientation), orientation in (5, 6, 7, 8)
        self.width, self.height = image.size[::-1] if self._sideways else image.size

    def decode(self, shrink: float = 1.0, background: Color = WHITE) -> tuple[Image.Image, float]:
        """The picture as upright RGB, and its scale: 1, or of a JPEG 1/2, 1/4 or 1/8 if ``shrink`` allows.

        Of 16 bits the upper half is kept; of 32 bits and floats see :func:`_full_scale`.

        Args:
            shrink: how much smaller than the file's picture its sides may be at the smallest, at most 1. The decoder
                of a JPEG saves most of its work at the scales it knows.
            background: what is seen through transparent pixels.
        """
        image, scale = self._image, 1.0
        if shrink < 1 and image.format in ("JPEG", "MPO"):
            width, height = image.size
            drafted = image.draft(None, (math.ceil(width * shrink), math.ceil(height * shrink)))
            scale = drafted[1][2] / width if drafted else 1.0
        image.load()
        pixels = to_rgb(image, background)
        return pixels if self._turn is None else pixels.transpose(self._turn), scale


@contextmanager
def open_image(media: Media) -> Iterator[Picture]:
    """Opens a picture, of an animation the first frame; closes the file at the end.

    Raises:
        DataError: the file is missing, no image, damaged or cut off, or larger than ``MAX_PIXELS``.
    """
    with reading(media) as data, open_pillow(media, data) as image:
        yield Picture(image)


@contextmanager
def open_pillow(media: Media, data: bytes | str) -> Iterator[Image.Image]:
    """Open an image with Pillow, from bytes or a local path; its first frame is decoded, except for a JPEG.

    Raises:
        DataError: it is larger than ``MAX_PIXELS``.
        OSError, ValueError: it is no picture, or damaged.
    """
    try:
        image = _load(media, data)
    except UnidentifiedImageError as error:
        raise ValueError(_explain_unidentified(head_of(data))) from error
    except ValueError:  # Pillow refuses large texts and profiles of PNG, and the pixels need neither
        pixels = _pixels_of_png(data)
        if pixels is None:
            raise
        image = _load(media, pixels)
    with image:
        yield image


def _load(media: Media, data: bytes | str) -> ImageFile.ImageFile:
    image = Image.open(BytesIO(data) if isinstance(data, bytes) else data, formats=image_formats())
    try:
        check_size(media, *image.size)
        if image.format == "PNG" and "transparency" in image.info:
            _scale_transparency(image)
        if image.format not in ("JPEG", "MPO"):
            image.load()  # TIFF turns itself then, and PNG may tell its orientation after the pixels
    except BaseException:
        image.close()
        raise
    return image


def _scale_transparency(image: ImageFile.ImageFile) -> None:
    """Brings the colour that is transparent in a PNG to the scale of the pixels; Pillow leaves it at the file's."""
    colour, stored = image.info["transparency"], image.tile[0][3]
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = colour * (85 if stored == "L;2" else 17)
    elif stored == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _explain_unidentified(head: bytes) -> str:
    """Explain by a file's first bytes why Pillow cannot identify it."""
    if head[4:11] == b"ftypavi" and not features.check("avif"):
        return "it is an AVIF, which needs Pillow 11.3 or newer"
    if head[4:10] in (b"ftyphe", b"ftypmi") and "HEIF" not in image_formats():
        return "it is a HEIC, which needs the package pillow-heif (mplug2-jax[heif])"
    if is_image_file(head):
        return "its header is damaged"
    if head[4:8] == b"ftyp" or head.startswith(b"\x1aE\xdf\xa3") or (head[:4] == b"RIFF" and head[8:11] == b"AVI"):
        return "it is a clip, for sources of kind 'video'"
    return f"{'it begins with ' + repr(head[:12]) if head else 'it is empty'}, expected {', '.join(image_formats())}"


def _pixels_of_png(data: bytes | str) -> bytes | None:
    """A PNG without its texts and profiles; None of what is no PNG, or absurdly large."""
    parts, size = [PNG], 0
    with BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
        if file.read(len(PNG)) != PNG:
            return None
        while len(header := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", header)
            if name not in _CHUNKS:
                file.seek(length + 4, 1)
                continue
            size += length
            if size > MAX_FETCHED_BYTES:
                return None
            parts += [header, file.read(length + 4)]
    return b"".join(parts)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none to read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # what can be wrong with EXIF is without end, and none of it harms the pixels
        return 1


def to_rgb(image: Image.Image, background: Color) -> Image.Image:
    """A decoded image of any mode as RGB, its transparent pixels laid over a background.

    Raises:
        ValueError: values of an unknown scale.
    """
    if image.mode[0] in "IF":
        image = _to_grey(image)
    if image.has_transparency_data:
        return flatten(image.convert("RGBA"), background)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy it


def flatten(image: Image.Image, background: Color) -> Image.Image:
    """RGBA laid over a background."""
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _to_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or floats in 8 bits, which Pillow would clip at 255 instead of scaling it."""
    values = np.asarray(image)
    scaled = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    full = 65_535 if scaled else _full_scale(values)
    levels = values * np.float32(255 / full) + 0.5 if image.mode == "F" else values // ((full + 1) // 256)
    grey = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # the grey of what is transparent
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _full_scale(values: np.ndarray) -> int:
    """Infer the value of white from the pixels: 1 (floats only), 255, 65,535, or 2**31 - 1 (integers only).

    It is the smallest of these that no pixel exceeds. Above 1, the largest pixel must be at least an eighth of it.

    Raises:
        ValueError: there is none, or values below 0 or not finite.
    """
    low, high = values.min().item(), values.max().item()
    scales = (1, 255, 65_535) if values.dtype.kind == "f" else (255, 65_535, 2**31 - 1)
    full = next((scale for scale in scales if 0 <= low <= high <= scale), None)
    if full is None or (full > 1 and 0 < high < full / 8):
        raise ValueError(
            f"its values are {low:,g} to {high:,g}, which tells no scale (0 to {' or '.join(map(str, scales))}); "
            "save it in 8 bits"
        )
    return full
