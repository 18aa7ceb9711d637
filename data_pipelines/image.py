"""Pictures by Pillow: decoded only as large as they are needed, upright, and in RGB whatever their mode."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import Image

from data_pipelines.media import IMAGE_FORMATS, Media, check_size, reading

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


class Picture:
    """A picture whose size is known and whose pixels may not be decoded yet.

    Attributes:
        width: pixels across, once upright.
        height: pixels down, once upright.
    """

    def __init__(self, image: Image.Image) -> None:
        if image.format not in ("JPEG", "MPO"):
            image.load()  # TIFF turns itself then, and PNG may tell its orientation after the pixels
        orientation = _orientation(image)
        self._image, self._turn, self._sideways = image, _TURNS.get(orientation), orientation in (5, 6, 7, 8)
        self.width, self.height = image.size[::-1] if self._sideways else image.size

    def decode(self, shrink: float = 1.0) -> tuple[Image.Image, float]:
        """The picture as upright RGB, and its scale: 1, or of a JPEG 1/2, 1/4 or 1/8 if ``shrink`` allows.

        Transparency is dropped, and what a transparent pixel hides is seen. Sixteen-bit grey keeps its upper half.

        Args:
            shrink: how much smaller than the file's picture its sides may be at the smallest, at most 1. The decoder
                of a JPEG saves most of its work at the scales it knows.
        """
        image, scale = self._image, 1.0
        if shrink < 1 and image.format in ("JPEG", "MPO"):
            width, height = image.size
            drafted = image.draft(None, (math.ceil(width * shrink), math.ceil(height * shrink)))
            scale = drafted[1][2] / width if drafted else 1.0
        image.load()
        return _to_rgb(image if self._turn is None else image.transpose(self._turn)), scale


@contextmanager
def open_image(media: Media) -> Iterator[Picture]:
    """Opens a picture, of an animation the first frame; closes the file at the end.

    Raises:
        DataError: the file is missing, no image, damaged or cut off, or larger than ``MAX_PIXELS``.
    """
    with reading(media) as data:
        file = BytesIO(data) if isinstance(data, bytes) else data
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            check_size(media, *image.size)
            yield Picture(image)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none to read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # what can be wrong with EXIF is without end, and none of it harms the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image  # convert() would copy it
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255 instead of scaling it
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the one way that knows a palette with transparency
    return image.convert("RGB")
