"""Random access to the frames of a video: only what the selected frames need is decoded.

A first pass reads the packets without decoding, for each frame's presentation time and the key frames. Then, for each
group of selected frames, decoding starts at the last key frame before them and stops after the last of them. If a
container or codec lacks the information for this, or decoding yields other frames than the packets announced, the video
is decoded from the start. Both ways give the same frames, in presentation order.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import VideoReformatter
from PIL import Image

from data_pipelines.arrays import Bool, Float, Int, UInt8
from data_pipelines.config import WHITE, Color
from data_pipelines.errors import DataError
from data_pipelines.image import flatten, open_pillow, to_rgb
from data_pipelines.media import (
    MAX_PIXELS,
    VIDEO_FORMATS,
    Media,
    check_size,
    is_animation,
    is_image_file,
    open_media,
    read_head,
)
from data_pipelines.transforms import CropWindow

MAX_FRAMES = 500_000
"""Of one video: four and a half hours at 30 frames per second."""

MAX_DECODED_PIXELS = 100_000_000_000
"""Of all frames decoded for one example, selected or not: 25 minutes of full HD at 30 frames per second."""

# Metadata in an unknown encoding must not fail a video. PyAV 19 and later handle that themselves.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
# Containers with presentation times. In others they are known only if frames are stored in presentation order.
_TIMED_FORMATS = frozenset({"flv", "matroska", "mov", "mpegts"})
# Codecs with one frame per packet, and whose key frames need nothing before them.
_RANDOM_ACCESS_CODECS = frozenset({"av1", "h264", "hevc", "mjpeg", "mpeg4", "png", "vp9"})
# Codecs whose decoders can skip, packet by packet, frames that no other frame needs.
_SKIPPING_CODECS = frozenset({"h264", "hevc", "mpeg4"})
# Formats of frames that libswscale crops at any position. Of others its crop is wrong where a position is odd.
_SCALED_FORMATS = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"})
# Equal results on all processors, and chroma that is interpolated.
_SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int+bitexact"
# Opening a container decodes its first frames, to know what random access does not need; this skips them.
_NO_PROBE_OPTIONS = {"skip_frame": "all"}

Frame = UInt8[np.ndarray, "y x 3"]
TransformedFrame = UInt8[np.ndarray, "Y X 3"]
FrameSelector = Callable[[Float[np.ndarray, " n"]], Int[np.ndarray, " t"]]
FrameTransform = Callable[[Frame], TransformedFrame]
WindowOfSize = Callable[[int, int], CropWindow]


def read_video(
    media: Media,
    select: FrameSelector,
    transform: FrameTransform,
    background: Color = WHITE,
    window: WindowOfSize | None = None,
) -> tuple[UInt8[np.ndarray, "t Y X 3"], Float[np.ndarray, " t"]]:
    """Read selected frames of a video, GIF, or animated WebP or PNG as upright RGB.

    One frame is decoded at a time, and only the results of ``transform`` are held.

    Args:
        media: the video.
        select: from the times of all frames, in seconds since the first, to the ascending indices of those to read.
        transform: applied to each selected frame; its results must have one size.
        background: shown through transparent pixels.
        window: from the height and width of a frame to its crop, which libswscale resizes while it converts the frame
            to RGB, in place of ``transform``. Frames in rare formats, and upright ones of rotated videos, are
            transformed.

    Returns:
        The transformed frames, [t, Y, X, 3], and their times.

    Raises:
        DataError: the file is missing, not a video or a still image, damaged, truncated, has no frame, or is larger
            than ``MAX_PIXELS``, ``MAX_FRAMES`` or ``MAX_DECODED_PIXELS`` allow.
    """
    shape: tuple[int, ...] = ()

    def transform_checked(frame: Frame) -> TransformedFrame:
        nonlocal shape
        shape = shape or frame.shape
        _check_one_size(media, shape, frame.shape)
        return transform(frame)

    with open_media(media) as data:
        if is_image_file(head := read_head(data)):
            if not is_animation(head):
                raise DataError(f"{media.name} is a still image, expected a video; set the source's kind to 'image'")
            with open_pillow(media, data) as image:
                return _read_animation(media, image, select, transform_checked, background)
        convert = _FrameConverter(media, transform_checked, background, window)
        try:
            return _read_selected(media, data, select, convert)
        except _RandomAccessUnavailableError:
            return _read_all(media, data, select, convert)


def _check_one_size(media: Media, shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    if other != shape:
        sizes = " to ".join(f"{each[1]} x {each[0]}" for each in (shape, other))
        raise DataError(f"{media.name} changes from {sizes} pixels, expected frames of one size; re-encode it")


def read_seconds(media: Media) -> float | None:
    """Return the duration of a video in seconds from its container, None if unknown. Raises as ``read_video``."""
    with open_media(media) as data, _open(media, data) as (container, _):
        return None if container.duration is None else container.duration / av.time_base


class _RandomAccessUnavailableError(Exception):
    """The video has no random access, or decoding yields other frames than its packets announced."""


@dataclasses.dataclass(frozen=True)
class _Packets:
    """The metadata of all packets, in the order in which they are stored, which is that of decoding."""

    pts: Int[np.ndarray, " n"]  # presentation time, in units of the stream's time base
    dts: Int[np.ndarray, " n"]  # decoding time
    size: Int[np.ndarray, " n"]  # bytes
    key: Bool[np.ndarray, " n"]  # whether decoding can start here
    discard: Bool[np.ndarray, " n"]  # whether the frame is only a reference for others, and not shown

    @functools.cached_property
    def index_of_pts(self) -> dict[int, int]:
        """Return the index of the packet with each presentation time."""
        return {pts: index for index, pts in enumerate(self.pts.tolist())}

    def decode_ranges(self, selected: Int[np.ndarray, " t"]) -> list[tuple[int, int]]:
        """Return the ranges of packets, each from a key frame on, to decode for the frames of the selected packets.

        A frame that is stored after a key frame but shown before it may depend on frames before the key frame. So
        decoding starts at the last key frame that is neither stored nor shown after the selected frame.
        """
        keys = np.flatnonzero(self.key)
        selected = np.sort(selected)
        stored = np.searchsorted(keys, selected, side="right")
        shown = np.searchsorted(self.pts[keys], self.pts[selected], side="right")
        ranges: list[tuple[int, int]] = []
        for start, index in sorted(zip(keys[np.minimum(stored, shown) - 1].tolist(), selected.tolist(), strict=True)):
            if ranges and start <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(ranges[-1][1], index + 1))
            else:
                ranges.append((start, index + 1))
        return ranges


def _read_selected(
    media: Media, data: bytes | str, select: FrameSelector, convert: "_FrameConverter"
) -> tuple[UInt8[np.ndarray, "t Y X 3"], Float[np.ndarray, " t"]]:
    """Decode only what the selected frames need."""
    with _open_unprobed(media, data) as (container, stream):
        packets = _read_packets(media, container, stream)
        shown = np.flatnonzero(~packets.discard)
        shown = shown[np.argsort(packets.pts[shown])]
        times = (packets.pts[shown] - packets.pts[shown[0]]) * float(stream.time_base)
        indices = select(times)
        selected = set(packets.pts[shown[indices]].tolist())
        ranges = packets.decode_ranges(shown[np.unique(indices)])
        decoded = (frame for bounds in ranges for frame in _decode_range(container, stream, packets, selected, *bounds))
        frames = (frame for frame in _check_limits(media, decoded) if frame.pts in selected)
        transformed = {frame.pts: convert(frame) for frame in frames}
    if len(transformed) < len(selected):
        raise _RandomAccessUnavailableError
    return np.stack([transformed[pts] for pts in packets.pts[shown[indices]].tolist()]), times[indices]


def _read_all(
    media: Media, data: bytes | str, select: FrameSelector, convert: "_FrameConverter"
) -> tuple[UInt8[np.ndarray, "t Y X 3"], Float[np.ndarray, " t"]]:
    """Decode everything twice: for the times of the frames, then for the selected frames."""
    with _open(media, data) as (container, stream):
        times = _seconds([frame.time for frame in _check_limits(media, container.decode(stream))], stream)
    if not times.size:
        raise DataError(f"{media.name} has no video frame, expected at least 1; replace or remove the file")
    indices = select(times)
    transformed: dict[int, TransformedFrame] = {}
    with _open(media, data) as (container, stream):
        for index, frame in enumerate(_check_limits(media, container.decode(stream))):
            if index in indices:
                transformed[index] = convert(frame)
            if index == indices[-1]:
                break
    return np.stack([transformed[index] for index in indices.tolist()]), times[indices]


def _seconds(times: Sequence[float | None], stream: Any) -> Float[np.ndarray, " n"]:
    """Return seconds since the first frame, from the frame rate if times are missing or contradict the order."""
    if None not in times:
        seconds = np.asarray(times, np.float64)
        if (np.diff(seconds) >= 0).all():
            return seconds - seconds[:1]
    return np.arange(len(times)) / float(stream.guessed_rate or 25)


@contextmanager
def _open_unprobed(media: Media, data: bytes | str) -> Iterator[tuple[Any, Any]]:
    """Open a container without decoding its first frames, if its header has what is needed."""
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(_open(media, data, is_probed=False))
        except (DataError, av.FFmpegError):
            opened = stack.enter_context(_open(media, data))
        yield opened


@contextmanager
def _open(media: Media, data: bytes | str, *, is_probed: bool = True) -> Iterator[tuple[Any, Any]]:
    """Open the container and its first video stream, except cover art."""
    # The "file:" prefix keeps a name that looks like a URL from being opened as one.
    file = BytesIO(data) if isinstance(data, bytes) else f"file:{data}"
    options = {"format_whitelist": ",".join(VIDEO_FORMATS)} | ({} if is_probed else _NO_PROBE_OPTIONS)
    with av.open(file, options=options, **_LENIENT) as container:
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise DataError(f"{media.name} has no video stream, only audio or other data; replace or remove the file")
        codec = streams[0].codec_context
        if codec is None:
            raise DataError(f"{media.name} has an unknown video codec; re-encode it, for example as H.264")
        check_size(media, codec.width, codec.height)
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        codec.thread_count = 1  # a loader's threads decode a video each
        yield container, streams[0]


def _read_packets(media: Media, container: Any, stream: Any) -> _Packets:
    """Read the metadata of all packets, and check that it allows random access."""
    rows: list[tuple[int, int, int, bool, bool]] = []
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DataError(f"{media.name} is damaged or truncated at frame {len(rows)}; replace or remove the file")
        if len(rows) == MAX_FRAMES:
            raise DataError(
                f"{media.name} has more than MAX_FRAMES = {MAX_FRAMES:,} frames; cut it into shorter videos"
            )
        if packet.size:  # the last packet is empty
            if packet.pts is None:
                raise _RandomAccessUnavailableError
            dts = packet.pts if packet.dts is None else packet.dts
            rows.append((packet.pts, dts, packet.size, packet.is_keyframe, packet.is_discard))
    if not rows:
        raise _RandomAccessUnavailableError
    pts, dts, size, key, discard = (np.asarray(column) for column in zip(*rows, strict=True))
    has_times = bool(_TIMED_FORMATS & set(container.format.name.split(","))) or bool((pts == dts).all())
    if not (
        has_times
        and stream.codec_context.codec.canonical_name in _RANDOM_ACCESS_CODECS
        and key[0]
        and not discard.all()
        and pts[0] <= pts[~discard].min()
        and (np.diff(pts[key]) > 0).all()
        and len(np.unique(pts)) == len(pts)
    ):
        raise _RandomAccessUnavailableError
    return _Packets(pts, dts, size, key, discard)


def _decode_range(
    container: Any, stream: Any, packets: _Packets, selected: Set[int], start: int, stop: int
) -> Iterator[Any]:
    """Decode the packets ``start`` to ``stop - 1``; the first holds a key frame.

    Frames that are neither selected nor needed by others are skipped.
    """
    key_pts, key_decoded = packets.pts[start], packets.discard[start]
    packets_in_range = itertools.islice(_packets_from(container, stream, packets, start), stop - start)
    for packet in itertools.chain(packets_in_range, [None]):  # None flushes the decoder
        if packet is not None and stream.codec_context.name in _SKIPPING_CODECS:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in selected else "NONREF"
        for frame in stream.codec_context.decode(packet):
            key_decoded |= frame.pts == key_pts and frame.key_frame
            yield frame
    if not key_decoded:  # some encoders spread key frames over several frames, and mark only the packet
        raise _RandomAccessUnavailableError
    stream.codec_context.flush_buffers()


def _packets_from(container: Any, stream: Any, packets: _Packets, start: int) -> Iterator[Any]:
    """Yield the packets from index ``start`` on. Seeking is inexact, and may yield other packets."""
    try:
        container.seek(int(packets.dts[start]), stream=stream)
    except av.FFmpegError as error:
        raise _RandomAccessUnavailableError from error
    previous: int | None = None
    for packet in container.demux(stream):
        index = packets.index_of_pts.get(packet.pts, -1)
        if index < 0 or previous not in (None, index - 1) or packet.size != packets.size[index]:
            raise _RandomAccessUnavailableError
        previous = index
        if index >= start:
            yield packet


def _check_limits(media: Media, frames: Iterable[Any]) -> Iterator[Any]:
    """Yield decoded frames while their number and size are within the limits."""
    pixels = 0
    for count, frame in enumerate(frames, start=1):
        check_size(media, frame.width, frame.height)
        pixels += frame.width * frame.height
        _check_decode_limits(media, count, pixels)
        yield frame


def _check_decode_limits(media: Media, frames: int, pixels: int) -> None:
    if frames > MAX_FRAMES or pixels > MAX_DECODED_PIXELS:
        raise DataError(
            f"{media.name} needs more decoding than MAX_FRAMES = {MAX_FRAMES:,} or MAX_DECODED_PIXELS = "
            f"{MAX_DECODED_PIXELS:,} allow; cut it into shorter videos"
        )


class _FrameConverter:
    """Transform the frames of one video; see :func:`read_video`."""

    def __init__(self, media: Media, transform: FrameTransform, background: Color, window: WindowOfSize | None) -> None:
        self._media, self._transform, self._background, self._window = media, transform, background, window
        self._reformatter = VideoReformatter()  # one for all frames: it keeps its tables
        self._scaler: _Scaler | None = None

    def __call__(self, frame: Any) -> TransformedFrame:
        if self._window is None or frame.format.name not in _SCALED_FORMATS or "DISPLAYMATRIX" in frame.side_data:
            return self._transform(self._to_rgb(frame))
        if self._scaler is None:
            self._scaler = _Scaler(self._window(frame.height, frame.width), frame)
        _check_one_size(self._media, self._scaler.shape, (frame.height, frame.width))
        return self._scaler.scale(frame)

    def _to_rgb(self, frame: Any) -> Frame:
        """Convert a decoded frame to RGB as it is displayed: composited over the background, rotated and mirrored.

        Raises:
            ValueError: a display matrix that is not a multiple of 90 degrees.
        """
        if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
            pixels = np.asarray(flatten(Image.fromarray(frame.to_ndarray(format="rgba")), self._background))
        else:
            pixels = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return pixels
        # A point is displayed at x' = a x + c y, y' = b x + d y.
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
        if max(abs(a), abs(d)) < crossed / 50:
            pixels, across, down = pixels.swapaxes(0, 1), c, b
        elif max(abs(b), abs(c)) <= straight / 50:  # an all-zero matrix has no effect
            across, down = a, d
        else:
            raise ValueError(f"its display matrix {a}, {b}, {c}, {d} is not a multiple of 90 degrees; re-encode it")
        return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


class _Scaler:
    """Crop, resize and convert frames of one size and format to RGB, in one pass of libswscale."""

    def __init__(self, window: CropWindow, frame: Any) -> None:
        self.shape = (frame.height, frame.width)
        self._graph = Graph()
        self._graph.threads = 1
        source = self._graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 25)
        )
        filters = [source, *(self._graph.add(name, options) for name, options in (
            ("crop", f"{window.width}:{window.height}:{window.left}:{window.top}:exact=1"),
            ("scale", f"{window.size}:{window.size}:flags={_SCALE_FLAGS}"), ("format", "rgb24"), ("buffersink", None),
        ))]  # fmt: skip
        for first, second in itertools.pairwise(filters):
            first.link_to(second)
        self._graph.configure()

    def scale(self, frame: Any) -> UInt8[np.ndarray, "Y X 3"]:
        """Return the window of a frame."""
        self._graph.push(frame)
        return self._graph.pull().to_ndarray()


def _read_animation(
    media: Media, image: Image.Image, select: FrameSelector, transform: FrameTransform, background: Color
) -> tuple[UInt8[np.ndarray, "t Y X 3"], Float[np.ndarray, " t"]]:
    """Decode an image that Pillow opened, twice, as ``_read_all``."""
    # The first image of a PNG may be a fallback for programs without support for animations.
    numbers = range(bool(image.info.get("default_image")), getattr(image, "n_frames", 1))
    _check_decode_limits(media, len(numbers), len(numbers) * image.width * image.height)
    milliseconds = [0.0]
    for number in numbers:
        image.seek(number)
        image.load()
        milliseconds.append(milliseconds[-1] + (image.info.get("duration") or 100))
    times = np.asarray(milliseconds[:-1]) / 1000
    indices = select(times)
    transformed: dict[int, TransformedFrame] = {}
    for index in sorted(set(indices.tolist())):
        image.seek(numbers[index])
        transformed[index] = transform(np.asarray(to_rgb(image, background)))
    return np.stack([transformed[index] for index in indices.tolist()]), times[indices]
