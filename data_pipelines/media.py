"""Image and video files to uint8 frames and back. Whatever is wrong with a file becomes one DataError."""

import dataclasses
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import fsspec
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps

from data_pipelines.errors import DataError
from data_pipelines.frames import middle_indices

MAX_PIXELS = 64_000_000
"""Of one picture: 192 MB as RGB. A file that claims more is taken for a decompression bomb."""

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclasses.dataclass(frozen=True)
class Media:
    """An encoded picture or video that nobody has decoded yet."""

    kind: Literal["image", "video"]
    data: bytes | str  # the encoded bytes, or a local path or URL opened through fsspec
    name: str  # where it is from, for messages: a path, or "archive.tar:member.jpg"


def _open(media: Media) -> Any:
    """What Pillow and PyAV open: a path, or a file in memory."""
    if isinstance(media.data, bytes):
        return io.BytesIO(media.data)
    if "://" in media.data:
        with fsspec.open(media.data, "rb") as file:
            return io.BytesIO(file.read())
    return media.data


def _media(path: Path, kind: Literal["image", "video"]) -> Media:
    return Media(kind, str(path), str(path))


@contextmanager
def _reading(media: Media, what: str) -> Iterator[None]:
    """Turns whatever goes wrong inside into a DataError that names the file."""
    path = media.name
    if isinstance(media.data, str) and "://" not in media.data and not Path(media.data).is_file():
        raise DataError(f"{path} does not exist or is no file; expected {what}")
    try:
        yield
    except DataError:
        raise
    # Decoders raise nearly anything on damaged bytes: OSError, ValueError, SyntaxError, struct.error, EOFError, ...
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        raise DataError(f"{path} cannot be read as {what}: {reason}; replace or remove the file") from error


def _check_size(path: str, width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise DataError(f"{path} is {width} x {height} pixels, expected 1 to {MAX_PIXELS:,} in all; scale it down")


def read_image(path: Path | Media) -> UInt8[np.ndarray, "1 y x 3"]:
    """Reads an image upright (EXIF orientation applied) as RGB; of an animation, the first frame.

    Raises:
        DataError: the file is missing, no image, damaged, or larger than ``MAX_PIXELS``.
    """
    media = path if isinstance(path, Media) else _media(path, "image")
    with _reading(media, "an image"), Image.open(_open(media)) as image:
        _check_size(media.name, *image.size)
        return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))[None]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255 instead of scaling it
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def read_video(path: Path, num_frames: int) -> UInt8[np.ndarray, "t y x 3"]:
    """Reads ``num_frames`` evenly spread frames of a video or GIF as upright RGB.

    The frames are those of ``frames.middle_indices``; a shorter video repeats its last frame. Only the frames taken
    are ever held in memory.

    Raises:
        DataError: the file is missing, no video, damaged or cut off, has no frame, or is larger than ``MAX_PIXELS``.
    """
    return read_clip(_media(path, "video"), lambda length, rate: middle_indices(length, num_frames))[0]


Choose = Callable[[int, float], Int[np.ndarray, " t"]]


def read_clip(media: Media, choose: Choose) -> tuple[UInt8[np.ndarray, "t y x 3"], Float[np.ndarray, " t"]]:
    """Reads the frames that ``choose(length, frames per second)`` names, and their times in seconds.

    Raises:
        DataError: as ``read_video``.
    """
    with _reading(media, "a video"):
        length, rate = _count_packets(media), _frames_per_second(media)
        indices = choose(length, rate) if length else np.zeros(0, np.int64)
        frames, seen = _decode(media, indices) if length else ([], 0)
        if seen and len(frames) < len(indices):  # some packets held no frame: spread over those that did
            indices = choose(seen, rate)
            frames, seen = _decode(media, indices)
        if not seen:
            raise DataError(f"{media.name} holds no video frame, expected at least 1; replace or remove the file")
        return np.stack(frames), indices / rate


def _video_stream(path: str, container: Any) -> Any:
    """The first video stream that is not the cover picture of a piece of music."""
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise DataError(f"{path} has no video stream, only sound or other data; replace or remove the file")
    _check_size(path, streams[0].width, streams[0].height)
    return streams[0]


def _count_packets(media: Media) -> int:
    """Number of frames, told without decoding: one packet is one frame in nearly all videos."""
    count = 0
    with av.open(_open(media)) as container:
        stream = _video_stream(media.name, container)
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise DataError(f"{media.name} is damaged or cut off at frame {count}; replace or remove the file")
            count += packet.size > 0
        return count


def _frames_per_second(media: Media) -> float:
    with av.open(_open(media)) as container:
        return float(_video_stream(media.name, container).average_rate or 1)


def _decode(media: Media, indices: Int[np.ndarray, " t"]) -> tuple[list[UInt8[np.ndarray, "y x 3"]], int]:
    """The frames at ascending indices as far as the video has them, and how many frames were decoded for it."""
    frames: list[UInt8[np.ndarray, "y x 3"]] = []
    seen = 0
    with av.open(_open(media)) as container:
        stream = _video_stream(media.name, container)
        stream.thread_type = "AUTO"
        for seen, frame in enumerate(container.decode(stream), start=1):
            repeats = int((indices == seen - 1).sum())
            if repeats:
                frames += [np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)] * repeats
            if len(frames) == len(indices):
                break
    return frames, seen


def read_media(path: Path, num_frames: int) -> UInt8[np.ndarray, "t y x 3"]:
    """Reads an image (one frame) or a video or GIF (``num_frames`` frames), whichever the file is.

    Raises:
        DataError: as ``read_image`` and ``read_video``.
    """
    return read_image(path) if _is_image(path) else read_video(path, num_frames)


def _is_image(path: Path) -> bool:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with Image.open(path) as image:
            return image.format != "GIF"
    except (OSError, Image.DecompressionBombError):
        return False


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
