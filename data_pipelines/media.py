"""Encoded pictures and videos: where their bytes come from, how failures read, and how files are written.

``image.py`` and ``video.py`` decode them; ``visual.py`` turns them into the frames of a batch.
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import fsspec
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.errors import DataError

MAX_PIXELS = 64_000_000
"""Of one picture or frame: 192 MB as RGB. A file that claims more is taken for a decompression bomb."""

MAX_FETCHED_BYTES = 1 << 30
"""Of one file behind a URL, which is fetched whole."""

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""All that is ever decoded: of Pillow's other formats some are obscure, and one runs a program (EPS)."""


@dataclasses.dataclass(frozen=True)
class Media:
    """An encoded picture or video that nobody has decoded yet."""

    kind: Literal["image", "video"]
    data: bytes | str  # the encoded bytes, or a local path or URL ("gs://...") opened through fsspec
    name: str  # where it is from, for messages: a path, or "archive.tar:member.jpg"


def media_of(path: Path) -> Media:
    """A local file as media; the suffix or else the content tells a picture from a video. A GIF is a video.

    Raises:
        DataError: there is no such file.
    """
    media = Media("image", str(path), str(path))
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return media
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return media if image.format != "GIF" else dataclasses.replace(media, kind="video")
    except (OSError, Image.DecompressionBombError):
        _check_exists(media)
        return dataclasses.replace(media, kind="video")


def _check_exists(media: Media) -> None:
    if isinstance(media.data, str) and "://" not in media.data and not os.path.isfile(media.data):
        raise DataError(f"{media.name} does not exist or is no file; expected an image or a video")


@contextmanager
def reading(media: Media) -> Iterator[bytes | str]:
    """The media's bytes or local path. Whatever goes wrong with them inside becomes one DataError that names them.

    Raises:
        DataError: there is no such file, it is too large to fetch, or what was done with it failed.
    """
    _check_exists(media)
    try:
        yield _fetch(media)
    except DataError:
        raise
    # Decoders raise nearly anything on damaged bytes: OSError, ValueError, SyntaxError, struct.error, EOFError, ...
    except Exception as error:
        what = "an image" if media.kind == "image" else "a video"
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        reason = reason.split(" <_io.")[0]  # an address differs every time, and the same fault would be another
        raise DataError(f"{media.name} cannot be read as {what}: {reason}; replace or remove the file") from error


def _fetch(media: Media) -> bytes | str:
    """What is behind a URL, so that decoders may read it twice; all else as it is."""
    if isinstance(media.data, bytes) or "://" not in media.data:
        return media.data
    with fsspec.open(media.data, "rb") as file:
        data: bytes = file.read(MAX_FETCHED_BYTES + 1)
    if len(data) > MAX_FETCHED_BYTES:
        raise DataError(f"{media.name} is larger than MAX_FETCHED_BYTES = {MAX_FETCHED_BYTES:,}; cut it into clips")
    return data


def check_size(media: Media, width: int, height: int) -> None:
    """Refuses pictures without pixels, and decompression bombs.

    Raises:
        DataError: not between 1 and ``MAX_PIXELS`` pixels.
    """
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise DataError(
            f"{media.name} is {width} x {height} pixels, expected 1 to MAX_PIXELS = {MAX_PIXELS:,}; scale it down"
        )


def _enlarge(frames: UInt8[np.ndarray, "*t y x 3"], scale: int) -> UInt8[np.ndarray, "*t Y X 3"]:
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def write_image(path: Path, frame: UInt8[np.ndarray, "y x 3"], scale: int = 1) -> None:
    """Writes a picture, its pixels enlarged ``scale`` times; the suffix chooses the format."""
    Image.fromarray(_enlarge(frame, scale)).save(path)


def write_video(path: Path, frames: UInt8[np.ndarray, "t y x 3"], fps: float = 4.0, scale: int = 1) -> None:
    """Writes an H.264 mp4 that browsers play, its pixels enlarged ``scale`` times.

    The format needs even sides: an odd one grows by repeating its last row or column.
    """
    frames = _enlarge(frames, scale)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
