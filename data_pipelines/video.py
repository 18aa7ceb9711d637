"""Frames of a video by random access: decoded is only what the wanted frames need.

A first pass reads the packets without decoding them and learns when each frame is shown and where key frames are. Then,
for every group of wanted frames, decoding enters at the last key frame before them and leaves after the last of them.
Where a container or codec does not tell enough for this, or something else comes out than its packets promised,
everything is decoded from the start. Either way the frames are those of decoding all, in the order they are shown.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import av
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from data_pipelines.config import WHITE, Color
from data_pipelines.errors import DataError
from data_pipelines.image import flatten, open_pillow, to_rgb
from data_pipelines.media import MAX_PIXELS, VIDEOS, Media, check_size, head_of, is_animation, is_image_file, reading

MAX_FRAMES = 500_000
"""Of one video: four and a half hours at 30 frames per second."""

MAX_DECODED_PIXELS = 100_000_000_000
"""Of all frames that are decoded for one clip, taken or not: 25 minutes of full HD at 30 frames per second."""

# Tags in an unknown encoding spoil no clip. From version 19 on, PyAV sees to that itself.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
# Where packets tell when their frames are shown. Elsewhere it is known only if frames are shown as they are stored.
_TIMED_FORMATS = frozenset({"flv", "matroska", "mov", "mpegts"})
# Whose packets hold one frame each, and whose key frames need nothing that is before them.
_KEYED_CODECS = frozenset({"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"})
# Whose decoders can be told for every packet to leave out a frame that no other needs.
_SKIPPING_CODECS = frozenset({"h264", "hevc", "mpeg4"})

Frame = UInt8[np.ndarray, "y x 3"]
Kept = UInt8[np.ndarray, "Y X 3"]
Choose = Callable[[Float[np.ndarray, " n"]], Int[np.ndarray, " t"]]
Take = Callable[[Frame], Kept]


def read_video(
    media: Media, choose: Choose, take: Take, background: Color = WHITE
) -> tuple[UInt8[np.ndarray, "t Y X 3"], Float[np.ndarray, " t"]]:
    """Reads some frames of a video, GIF, or animated WebP or PNG as upright RGB.

    Only what ``take`` returns is kept, one frame at a time is decoded.

    Args:
        media: the video.
        choose: from the times of all frames, in seconds since the first, to the ascending indices of those wanted.
        take: from a wanted frame to what is kept of it, of the same size for all of them.
        background: what is seen through transparent pixels.

    Returns:
        What was kept, [t, Y, X, 3], and the times of those frames.

    Raises:
        DataError: the file is missing, no video or a still picture, damaged or cut off, has no frame, or is larger
            than ``MAX_PIXELS``, ``MAX_FRAMES`` or ``MAX_DECODED_PIXELS`` allow.
    """
    first: tuple[int, ...] = ()

    def keep(frame: Frame) -> Kept:
        nonlocal first
        first = first or frame.shape
        if frame.shape != first:
            sizes = " to ".join(f"{width} x {height}" for height, width, _ in (first, frame.shape))
            raise DataError(f"{media.name} changes from {sizes} pixels, expected frames of one size; encode it anew")
        return take(frame)

    with reading(media) as data:
        if is_image_file(head := head_of(data)):
            if not is_animation(head):
                raise DataError(f"{media.name} is a still picture, expected a clip; read it with kind 'image'")
            with open_pillow(media, data) as image:
                return _read_animation(media, image, choose, keep, background)
        try:
            return _read_some(media, data, choose, keep, background)
        except _LostError:
            return _read_all(media, data, choose, keep, background)


def read_seconds(media: Media) -> float | None:
    """The length of a video in seconds as its container tells it; None where it does not. Raises as ``read_video``."""
    with reading(media) as data, _open(media, data) as (container, _):
        return None if container.duration is None else container.duration / av.time_base


class _LostError(Exception):
    """Random access cannot be had, or did not find what the packets promised."""


@dataclasses.dataclass(frozen=True)
class _Packets:
    """What packets tell without being decoded, in the order in which they are stored: that of decoding."""

    pts: Int[np.ndarray, " n"]  # when the frame is shown, in units of the stream's time base
    dts: Int[np.ndarray, " n"]  # when it is decoded
    size: Int[np.ndarray, " n"]  # bytes
    key: Bool[np.ndarray, " n"]  # whether decoding can begin here
    discard: Bool[np.ndarray, " n"]  # whether the frame is needed by others only, and not shown

    @functools.cached_property
    def numbers(self) -> dict[int, int]:
        """Which packet it is that is shown at a time."""
        return {pts: number for number, pts in enumerate(self.pts.tolist())}

    def runs(self, wanted: Int[np.ndarray, " t"]) -> list[tuple[int, int]]:
        """The ranges of packets, each from a key frame on, that give the frames of the wanted packets.

        A frame that is stored after a key frame but shown before it may need what is before the key frame. So decoding
        enters at the last key frame that is neither stored nor shown after the wanted frame.
        """
        keys = np.flatnonzero(self.key)
        wanted = np.sort(wanted)
        stored = np.searchsorted(keys, wanted, side="right")
        shown = np.searchsorted(self.pts[keys], self.pts[wanted], side="right")
        runs: list[tuple[int, int]] = []
        for start, number in sorted(zip(keys[np.minimum(stored, shown) - 1].tolist(), wanted.tolist(), strict=True)):
            if runs and start <= runs[-1][1]:
                runs[-1] = (runs[-1][0], max(runs[-1][1], number + 1))
            else:
                runs.append((start, number + 1))
        return runs


def _read_some(
    media: Media, data: bytes | str, choose: Choose, take: Take, background: Color
) -> tuple[UInt8[np.ndarray, "t Y X 3"], Float[np.ndarray, " t"]]:
    """Decodes what the wanted frames need."""
    with _open(media, data) as (container, stream):
        packets = _read_packets(media, container, stream)
        shown = np.flatnonzero(~packets.discard)
        shown = shown[np.argsort(packets.pts[shown])]
        times = (packets.pts[shown] - packets.pts[shown[0]]) * float(stream.time_base)
        indices = choose(times)
        wanted = set(packets.pts[shown[indices]].tolist())
        runs = packets.runs(shown[np.unique(indices)])
        frames = (frame for run in runs for frame in _decode_run(container, stream, packets, wanted, *run))
        wanted_frames = (frame for frame in _bounded(media, frames) if frame.pts in wanted)
        kept = {frame.pts: take(_upright(frame, background)) for frame in wanted_frames}
    if len(kept) < len(wanted):
        raise _LostError
    return np.stack([kept[pts] for pts in packets.pts[shown[indices]].tolist()]), times[indices]


def _read_all(
    media: Media, data: bytes | str, choose: Choose, take: Take, background: Color
) -> tuple[UInt8[np.ndarray, "t Y X 3"], Float[np.ndarray, " t"]]:
    """Decodes everything twice: to learn the times of the frames, and to take the wanted ones."""
    with _open(media, data) as (container, stream):
        times = _regular([frame.time for frame in _bounded(media, container.decode(stream))], stream)
    if not times.size:
        raise DataError(f"{media.name} holds no video frame, expected at least 1; replace or remove the file")
    indices = choose(times)
    kept: dict[int, Kept] = {}
    with _open(media, data) as (container, stream):
        for index, frame in enumerate(_bounded(media, container.decode(stream))):
            if index in indices:
                kept[index] = take(_upright(frame, background))
            if index == indices[-1]:
                break
    return np.stack([kept[index] for index in indices.tolist()]), times[indices]


def _regular(times: Sequence[float | None], stream: Any) -> Float[np.ndarray, " n"]:
    """Seconds since the first frame; by the frame rate, where the container does not tell or contradicts the order."""
    if None not in times:
        seconds = np.asarray(times, np.float64)
        if (np.diff(seconds) >= 0).all():
            return seconds - seconds[:1]
    return np.arange(len(times)) / float(stream.guessed_rate or 25)


@contextmanager
def _open(media: Media, data: bytes | str) -> Iterator[tuple[Any, Any]]:
    """The container, and its first video stream that is not the cover picture of a piece of music."""
    # As "file:...", a name that looks like an address is no address.
    file = BytesIO(data) if isinstance(data, bytes) else f"file:{data}"
    with av.open(file, options={"format_whitelist": ",".join(VIDEOS)}, **_LENIENT) as container:
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise DataError(f"{media.name} has no video stream, only sound or other data; replace or remove the file")
        codec = streams[0].codec_context
        if codec is None:
            raise DataError(f"{media.name} is of an unknown video codec; encode it anew, for example as H.264")
        check_size(media, codec.width, codec.height)
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        codec.thread_count = 1  # a loader's threads decode a video each
        yield container, streams[0]


def _read_packets(media: Media, container: Any, stream: Any) -> _Packets:
    """Reads all packets, and makes sure that random access can be built on them."""
    rows: list[tuple[int, int, int, bool, bool]] = []
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DataError(f"{media.name} is damaged or cut off at frame {len(rows)}; replace or remove the file")
        if len(rows) == MAX_FRAMES:
            raise DataError(f"{media.name} has more than MAX_FRAMES = {MAX_FRAMES:,} frames; cut it into clips")
        if packet.size:  # the last one is empty
            if packet.pts is None:
                raise _LostError
            dts = packet.pts if packet.dts is None else packet.dts
            rows.append((packet.pts, dts, packet.size, packet.is_keyframe, packet.is_discard))
    if not rows:
        raise _LostError
    pts, dts, size, key, discard = (np.asarray(column) for column in zip(*rows, strict=True))
    known = bool(_TIMED_FORMATS & set(container.format.name.split(","))) or bool((pts == dts).all())
    if not (
        known
        and stream.codec_context.codec.canonical_name in _KEYED_CODECS
        and key[0]
        and not discard.all()
        and pts[0] <= pts[~discard].min()
        and (np.diff(pts[key]) > 0).all()
        and len(np.unique(pts)) == len(pts)
    ):
        raise _LostError
    return _Packets(pts, dts, size, key, discard)


def _decode_run(
    container: Any, stream: Any, packets: _Packets, wanted: Set[int], start: int, stop: int
) -> Iterator[Any]:
    """Decodes the packets ``start`` to ``stop - 1``, of which the first holds a key frame.

    Frames that are neither wanted nor needed by others are left out.
    """
    entry, entered = packets.pts[start], packets.discard[start]
    run = itertools.islice(_packets_from(container, stream, packets, start), stop - start)
    for packet in itertools.chain(run, [None]):  # None: what the decoder still holds back
        if packet is not None and stream.codec_context.name in _SKIPPING_CODECS:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        for frame in stream.codec_context.decode(packet):
            entered |= frame.pts == entry and frame.key_frame
            yield frame
    if not entered:  # some encoders spread key frames over several, and only the packet is marked
        raise _LostError
    stream.codec_context.flush_buffers()


def _packets_from(container: Any, stream: Any, packets: _Packets, start: int) -> Iterator[Any]:
    """The packets from number ``start`` on. Containers seek to about there, and may give others than at first."""
    try:
        container.seek(int(packets.dts[start]), stream=stream)
    except av.FFmpegError as error:
        raise _LostError from error
    previous: int | None = None
    for packet in container.demux(stream):
        number = packets.numbers.get(packet.pts, -1)
        if number < 0 or previous not in (None, number - 1) or packet.size != packets.size[number]:
            raise _LostError
        previous = number
        if number >= start:
            yield packet


def _bounded(media: Media, frames: Iterable[Any]) -> Iterator[Any]:
    """Decoded frames, as long as there are not absurdly many or large ones."""
    pixels = 0
    for count, frame in enumerate(frames, start=1):
        check_size(media, frame.width, frame.height)
        pixels += frame.width * frame.height
        _check_work(media, count, pixels)
        yield frame


def _check_work(media: Media, frames: int, pixels: int) -> None:
    if frames > MAX_FRAMES or pixels > MAX_DECODED_PIXELS:
        raise DataError(
            f"{media.name} needs more decoding than MAX_FRAMES = {MAX_FRAMES:,} or MAX_DECODED_PIXELS = "
            f"{MAX_DECODED_PIXELS:,} allow; cut it into clips"
        )


def _upright(frame: Any, background: Color) -> Frame:
    """A decoded frame as it is to be shown: laid over the background, turned and mirrored.

    Raises:
        ValueError: a display matrix that turns by something else than quarters.
    """
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        pixels = np.asarray(flatten(Image.fromarray(frame.to_ndarray(format="rgba")), background))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # A point is shown at x' = a x + c y, y' = b x + d y.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(abs(a), abs(d)) < crossed / 50:
        pixels, across, down = pixels.swapaxes(0, 1), c, b
    elif max(abs(b), abs(c)) <= straight / 50:  # all zeros mean nothing
        across, down = a, d
    else:
        raise ValueError(f"it is shown by the matrix {a}, {b}, {c}, {d}, which is no quarter turn; encode it anew")
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def _read_animation(
    media: Media, image: Image.Image, choose: Choose, take: Take, background: Color
) -> tuple[UInt8[np.ndarray, "t Y X 3"], Float[np.ndarray, " t"]]:
    """Decodes what Pillow opened twice, as ``_read_all``."""
    # The first picture of a PNG may be for those alone who know no animations.
    numbers = range(bool(image.info.get("default_image")), getattr(image, "n_frames", 1))
    _check_work(media, len(numbers), len(numbers) * image.width * image.height)
    milliseconds = [0.0]
    for number in numbers:
        image.seek(number)
        image.load()
        milliseconds.append(milliseconds[-1] + (image.info.get("duration") or 100))
    times = np.asarray(milliseconds[:-1]) / 1000
    indices = choose(times)
    kept: dict[int, Kept] = {}
    for index in sorted(set(indices.tolist())):
        image.seek(numbers[index])
        kept[index] = take(np.asarray(to_rgb(image, background)))
    return np.stack([kept[index] for index in indices.tolist()]), times[indices]
