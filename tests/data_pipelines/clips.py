"""Videos for tests: in all relevant encodings, and decoded frame by frame for reference."""

import functools
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence

import av
import numpy as np
from jaxtyping import TypeCheckError

from data_pipelines.errors import DataError

os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder talks much

ENCODINGS: dict[str, tuple[str, str, Mapping[str, str]]] = {
    "h264": ("libx264", "mp4", {}), "h264 mkv": ("libx264", "matroska", {}), "h264 ts": ("libx264", "mpegts", {}),
    "h264 avi": ("libx264", "avi", {}), "h264 raw": ("libx264", "h264", {}),
    "h264 open": ("libx264", "mp4", {"x264-params": "open-gop=1:bframes=3:scenecut=0"}),
    "h264 refresh": ("libx264", "mp4", {"x264-params": "intra-refresh=1:bframes=0"}),
    "mpeg4 avi": ("mpeg4", "avi", {}), "mpeg4 b": ("mpeg4", "avi", {"bf": "2"}), "mpeg4": ("mpeg4", "mp4", {"bf": "2"}),
    "av1": ("libsvtav1", "mp4", {"preset": "12"}), "gif": ("gif", "gif", {}),
    "vp9": ("libvpx-vp9", "webm", {"cpu-used": "8", "deadline": "realtime"}),
}  # fmt: skip
"""Codec, container and options by name."""

SPARSE = ("h264", "h264 open", "h264 mkv", "h264 ts", "mpeg4 avi", "mpeg4", "av1", "vp9")
"""Encodings with random access."""


def moving(count: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Return frames that differ everywhere: a window that moves over a textured plane."""
    rng = np.random.default_rng(0)
    plane = rng.integers(0, 256, (height + count, width + count, 3), np.uint8)
    plane = (plane // 4 + np.linspace(0, 190, plane.shape[1])[:, None]).astype(np.uint8)
    return np.stack([plane[i : i + height, i // 2 : i // 2 + width] for i in range(count)])


def encode(
    frames: np.ndarray, encoding: str = "h264", gop: int = 12, times: Sequence[int] | None = None,
    options: Mapping[str, str] = {}, metadata: Mapping[str, str] = {},
) -> bytes:  # fmt: skip
    """Encode frames, shown at ``times`` (in tenths of a second)."""
    codec, container_format, encoder_options = ENCODINGS[encoding]
    with tempfile.NamedTemporaryFile() as file:  # some options of containers need a name
        with av.open(file.name, "w", format=container_format, options=dict(options)) as container:
            container.metadata.update(metadata)
            stream = container.add_stream(codec, rate=10, options=dict(encoder_options))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            stream.codec_context.gop_size = gop
            stream.codec_context.thread_count = 1
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                if times is not None:
                    frame.pts, frame.time_base = times[index], 1 / stream.codec_context.framerate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return file.read()


@functools.cache
def moving_clip(encoding: str, gop: int, count: int = 30) -> tuple[bytes, np.ndarray]:
    """Return a file, and all of its frames, decoded in sequence."""
    data = encode(moving(count), encoding, gop)
    return data, decode_all(data)


def cut(data: bytes, start: int) -> bytes:
    """Cut the first ``start`` frames off an mp4, as cutting tools do.

    Packets are copied, from the key frame on that is needed; those that are only needed are marked as not shown.
    """
    with (
        tempfile.NamedTemporaryFile(suffix=".mp4") as file,
        av.open(io.BytesIO(data)) as source,
        av.open(file.name, "w") as target,
    ):
        stream = source.streams.video[0]
        offset = round(start / 10 / stream.time_base)
        packets = [packet for packet in source.demux(stream) if packet.size]
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= offset]
        copy = target.add_stream_from_template(stream)
        for packet in packets[keys[-1] :]:
            packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, copy
            target.mux(packet)
        target.close()
        return file.read()


def decode_all(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def error_message(load: Callable[[], object]) -> str | None:
    """Return the message of the DataError that ``load`` raises, if any. Re-raise a bug that caused it."""
    try:
        load()
    except DataError as error:
        if isinstance(error.__cause__, TypeCheckError | NameError):
            raise error.__cause__ from None
        return str(error)
    return None
