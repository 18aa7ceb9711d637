"""Encoded images and videos: supported formats, access to their bytes, errors, and writing files.

``image.py`` and ``video.py`` decode them; ``visual.py`` turns them into the frames of a batch.
"""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image

from data_pipelines.arrays import UInt8
from data_pipelines.errors import DataError, StorageUnavailableError
from data_pipelines.storage.file_system import file_system, is_local_file
from data_pipelines.storage.retry import is_refused, is_remote, is_url

MAX_PIXELS = 64_000_000
"""Of one image or frame: 192 MB as RGB. A larger one is treated as a decompression bomb."""

MAX_FETCHED_BYTES = 1 << 30
"""Of one file behind a URL, which is downloaded as a whole."""

IMAGE_FORMATS: Mapping[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "PNG": (".png",), "WEBP": (".webp",), "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"), "BMP": (".bmp",), "TIFF": (".tif", ".tiff"), "JPEG2000": (".jp2",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"), "GIF": (),
}  # fmt: skip
"""Pillow's formats that are opened, with their suffixes. Other formats are obscure, or run a program (EPS). HEIF needs
a plugin. A GIF is a video by its name."""

VIDEO_FORMATS: Mapping[str, tuple[str, ...]] = {
    "mov": (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mj2"), "matroska": (".webm", ".mkv"),
    "avi": (".avi", ".divx"), "asf": (".wmv", ".asf"), "flv": (".flv",), "mpeg": (".mpg", ".mpeg", ".mpe", ".vob"),
    "mpegts": (".ts", ".mts", ".m2ts", ".m2t"), "ogg": (".ogv", ".ogm"), "gif": (".gif",),
    "mpegvideo": (".m1v", ".m2v"), "rm": (".rm", ".rmvb"),
    "mxf": (".mxf",), "dv": (".dv",), "ivf": (".ivf",), "h264": (".h264", ".264"),
    "hevc": (".hevc", ".h265", ".265"), "m4v": (), "aiff": (), "mp3": (), "wav": (),
}  # fmt: skip
"""Containers that are opened, with their suffixes. Playlists are excluded: they would open other files and URLs. Audio
containers are opened only to report them. An .ogg is mostly audio, and read only where it is named."""

IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
VIDEO_SUFFIXES = (*(suffix for suffixes in VIDEO_FORMATS.values() for suffix in suffixes), ".apng")
"""The most common first."""

KIND_NOUNS: Mapping[str, str] = {"image": "an image", "video": "a video"}
"""Kinds of media with their article, for messages."""

HEAD_BYTES = 4096
"""Number of bytes at the beginning of a file that identify its format."""

_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heim", b"heis", b"heix", b"mif1", b"msf1"})
PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Media:
    """An encoded image or video."""

    kind: Literal["image", "video"]
    data: bytes | str  # the encoded bytes, or a local path or URL ("gs://...") opened through fsspec
    name: str  # for messages: a path, or "archive.tar:member.jpg"


def file_media(path: Path) -> Media:
    """Return a file as media, an image or a video by its content, else by its suffix. An animation is a video.

    Raises:
        DataError: no such file.
    """
    media = Media("image", str(path), str(path))
    with contextlib.suppress(OSError, Image.DecompressionBombError):
        if is_animation(read_head(media.data)):
            return dataclasses.replace(media, kind="video")
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            with path.open("rb") as file:
                Image.open(file, formats=available_image_formats()).close()
        return media
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return media
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file; expected an image or a video")
    return dataclasses.replace(media, kind="video")


@functools.cache
def available_image_formats() -> tuple[str, ...]:
    """Return the formats of ``IMAGE_FORMATS`` that the installed packages decode; HEIF needs a plugin."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(format for format in IMAGE_FORMATS if format in Image.OPEN)


def read_head(data: bytes | str) -> bytes:
    """Return the first ``HEAD_BYTES`` bytes of data in memory or of a file."""
    if isinstance(data, bytes):
        return data[:HEAD_BYTES]
    if is_url(data):
        fs, fs_path = file_system(data)
        return fs.cat_file(fs_path, 0, HEAD_BYTES)
    with open(data, "rb") as file:
        return file.read(HEAD_BYTES)


def is_animation(head: bytes) -> bool:
    """Return whether a file's first bytes are those of a GIF, or of an animated WebP, PNG or AVIF."""
    webp = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20:21] and head[20] & 2)
    png = head.startswith(PNG) and b"acTL" in head.partition(b"IDAT")[0]
    return webp or png or head[4:12] == b"ftypavis" or head[:6] in (b"GIF87a", b"GIF89a")


def is_image_file(head: bytes) -> bool:
    """Return whether a file's first bytes are those of a JPEG, PNG, WebP, AVIF or HEIC, which Pillow decodes."""
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return webp or head.startswith((PNG, b"\xff\xd8\xff")) or (head[4:8] == b"ftyp" and head[8:12] in _BRANDS)


def is_missing(media: Media) -> bool:
    """Return whether media are a local path without a file. Raises StorageUnavailableError."""
    return isinstance(media.data, str) and not is_url(media.data) and not is_local_file(media.data)


def _check_exists(media: Media) -> None:
    if is_missing(media):
        raise DataError(f"{media.name} does not exist or is not a file; expected an image or a video")


@contextlib.contextmanager
def open_media(media: Media) -> Iterator[bytes | str]:
    """Provide the media's bytes or local path. Any exception inside becomes a DataError with the media's name.

    Raises:
        DataError: no such file, it is too large to download, or an exception inside.
        StorageUnavailableError: storage does not answer.
        PermissionError: a URL that this account may not read, which says nothing about the media.
    """
    _check_exists(media)
    try:
        yield _fetch(media)
    except (DataError, StorageUnavailableError):
        raise
    # Decoders raise nearly anything on damaged bytes: OSError, ValueError, SyntaxError, struct.error, EOFError, ...
    except Exception as error:
        if isinstance(media.data, str) and is_refused(media.data, error):
            raise
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        reason = reason.split(" <_io.")[0]  # a memory address would make each error unique
        raise DataError(
            f"{media.name} cannot be read as {KIND_NOUNS[media.kind]}: {reason}; replace or remove the file"
        ) from error


def _fetch(media: Media) -> bytes | str:
    """Read a remote file, since decoders take a failed read for damage; return anything else as it is."""
    if isinstance(media.data, bytes) or not is_remote(media.data):
        return media.data
    fs, fs_path = file_system(media.data)
    if fs.is_local and int(fs.info(fs_path)["size"]) > MAX_FETCHED_BYTES:
        return media.data
    data = fs.cat_file(fs_path, 0, MAX_FETCHED_BYTES + 1)
    if len(data) > MAX_FETCHED_BYTES:
        raise DataError(
            f"{media.name} is larger than MAX_FETCHED_BYTES = {MAX_FETCHED_BYTES:,}; cut it into shorter videos"
        )
    return data


def check_size(media: Media, width: int, height: int) -> None:
    """Reject empty images and decompression bombs.

    Raises:
        DataError: not between 1 and ``MAX_PIXELS`` pixels.
    """
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise DataError(
            f"{media.name} is {width} x {height} pixels, expected 1 to MAX_PIXELS = {MAX_PIXELS:,}; scale it down"
        )


def _upscale(frames: UInt8[np.ndarray, "*t y x 3"], scale: int) -> UInt8[np.ndarray, "*t Y X 3"]:
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def write_image(path: Path, frame: UInt8[np.ndarray, "y x 3"], scale: int = 1) -> None:
    """Write an image, upscaled ``scale`` times; the suffix determines the format."""
    with path.open("wb") as file:
        Image.fromarray(_upscale(frame, scale)).save(file, Image.registered_extensions()[path.suffix.lower()])


def write_video(path: Path, frames: UInt8[np.ndarray, "t y x 3"], fps: float = 4.0, scale: int = 1) -> None:
    """Write an H.264 mp4, see :func:`encode_video`."""
    path.write_bytes(encode_video(frames, fps, scale))


def encode_video(frames: UInt8[np.ndarray, "t y x 3"], fps: float = 4.0, scale: int = 1) -> bytes:
    """Return an H.264 mp4 that browsers play, upscaled ``scale`` times.

    The format needs even sides: an odd one is padded by repeating its last row or column.
    """
    file = io.BytesIO()
    frames = _upscale(frames, scale)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def mux_frames(frames: Sequence[bytes], name: str, fps: int = 25) -> bytes:
    """Return a QuickTime video of encoded frames, PNG or JPEG, which are copied as they are.

    Args:
        frames: at least one; their sizes are checked when they are decoded.
        name: for messages.
        fps: frames per second.

    Raises:
        DataError: there are no frames, or the first is neither PNG nor JPEG.
    """
    file = io.BytesIO()
    codec = "png" if frames and frames[0].startswith(PNG) else "mjpeg"
    try:
        with Image.open(io.BytesIO(frames[0]), formats=("PNG", "JPEG")) as image:
            width, height = image.size
    except (IndexError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} has no frame in PNG or JPEG ({error}); replace or remove it") from error
    with av.open(file, "w", format="mov") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24" if codec == "png" else "yuvj420p"
        for index, frame in enumerate(frames):
            packet = av.Packet(frame)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, fps), True
            packet.pts = packet.dts = index
            packet.duration = 1
            container.mux_one(packet)
    return file.getvalue()
