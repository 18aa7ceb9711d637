"""Files to frames and back, and one clear sentence for every file that is not what it should be."""

import struct
import tracemalloc
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.frames import middle_indices
from data_pipelines.media import read_image, read_media, read_video, write_image, write_video

LEVELS = 8  # grey levels between one frame of the test video and the next


def brightening(count: int, side: int = 32) -> np.ndarray:
    """Frames whose brightness tells their index."""
    return np.broadcast_to((np.arange(count) * LEVELS).astype(np.uint8)[:, None, None, None], (count, side, side, 3))


def indices_of(frames: np.ndarray) -> list[int]:
    return np.rint(frames.mean((1, 2, 3)) / LEVELS).astype(int).tolist()


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    write_video(path, brightening(30))
    return path


def colour_image() -> np.ndarray:
    image = np.zeros((6, 9, 3), np.uint8)
    image[:3, :4], image[3:, 4:] = (255, 0, 0), (0, 128, 255)
    return image


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_images_survive(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(colour_image()).save(path, **({"lossless": True} if suffix == "webp" else {}))
    for frames in (read_image(path), read_media(path, 4)):
        np.testing.assert_array_equal(frames, colour_image()[None])
        assert frames.dtype == np.uint8


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    if mode == "I;16":
        Image.fromarray(np.full((5, 4), 200 << 8, np.uint16)).save(path)
    else:
        Image.new("L", (4, 5), 200).convert(mode).save(path)
    frames = read_image(path)
    assert frames.shape == (1, 5, 4, 3)
    assert (frames == 200).all()


def test_orientation_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(colour_image()).save(path, exif=exif)
    np.testing.assert_array_equal(read_image(path)[0], np.rot90(colour_image(), -1))


def test_written_pictures_are_enlarged(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", colour_image(), scale=3)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0], colour_image().repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize("num_frames", [1, 4, 30, 33])
def test_video_frames_are_the_middle_ones(video: Path, num_frames: int) -> None:
    frames = read_video(video, num_frames)
    assert frames.shape == (num_frames, 32, 32, 3)
    assert indices_of(frames) == middle_indices(30, num_frames).tolist()
    np.testing.assert_array_equal(read_media(video, num_frames), frames)


def test_colours_survive_the_video(tmp_path: Path) -> None:
    frames = np.tile(colour_image(), (2, 1, 1, 1))
    write_video(tmp_path / "a.mp4", frames, scale=8)
    read = read_video(tmp_path / "a.mp4", 2)[:, 4::8, 4::8]
    assert np.abs(read.astype(int) - frames).max() < 40  # video stores colour at half resolution


def test_odd_sides_grow_by_one(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", brightening(2, side=15))
    assert read_video(tmp_path / "a.mp4", 2).shape == (2, 16, 16, 3)


@pytest.mark.parametrize("name", ["a.gif", "without_suffix"])
def test_gifs_are_videos(name: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in brightening(10)]
    frames[0].save(tmp_path / name, format="GIF", save_all=True, append_images=frames[1:], duration=100)
    assert indices_of(read_media(tmp_path / name, 5)) == middle_indices(10, 5).tolist()


def test_images_are_known_by_content(tmp_path: Path) -> None:
    Image.fromarray(colour_image()).save(tmp_path / "picture", format="PNG")
    assert read_media(tmp_path / "picture", 4).shape == (1, 6, 9, 3)


def test_turned_videos_are_upright(tmp_path: Path) -> None:
    picture = np.zeros((1, 32, 64, 3), np.uint8)
    picture[:, :16, :32] = 255
    write_video(tmp_path / "a.mp4", picture)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # clockwise
    (tmp_path / "a.mp4").write_bytes(data)
    frames = read_video(tmp_path / "a.mp4", 1)
    np.testing.assert_array_equal(frames[0] > 128, np.rot90(picture[0], -1) > 128)


def test_packets_without_frames_do_not_matter(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_count_packets", lambda path: 75)
    assert indices_of(read_video(video, 4)) == middle_indices(30, 4).tolist()


def test_only_the_sampled_frames_are_held(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", brightening(200, side=128))
    tracemalloc.start()
    read_video(tmp_path / "a.mp4", 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 128 * 128 * 3


def test_missing_files(tmp_path: Path) -> None:
    for read in (read_image, lambda p: read_video(p, 4), lambda p: read_media(p, 4)):
        with pytest.raises(DataError, match=r"nothing\.png does not exist"):
            read(tmp_path / "nothing.png")
        with pytest.raises(DataError, match="is no file"):
            read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"some text that is no picture at all"])
@pytest.mark.parametrize("name", ["a.png", "a.mp4", "a"])
def test_files_that_are_neither(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    kind = "an image" if name == "a.png" else "a video"
    with pytest.raises(DataError, match=f"{name} cannot be read as {kind}: .*; replace or remove the file") as caught:
        read_media(tmp_path / name, 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("suffix", ["png", "jpg", "mp4", "avi"])
def test_truncated_files(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    if suffix in ("png", "jpg"):
        write_image(path, pixels[0])
    else:
        # The index first, as on the web: such a file opens although its end is missing.
        with av.open(str(path), "w", options={"movflags": "faststart"} if suffix == "mp4" else {}) as container:
            stream = container.add_stream("mpeg4", rate=8, width=64, height=64, pix_fmt="yuv420p")
            for frame in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    assert read_media(path, 4).shape[1:] == (64, 64, 3)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=f"a.{suffix} .*replace or remove the file"):
        read_media(path, 4)


def test_pictures_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: Path) -> None:
    write_image(tmp_path / "a.png", colour_image())
    monkeypatch.setattr(media, "MAX_PIXELS", 53)
    with pytest.raises(DataError, match=r"a\.png is 9 x 6 pixels, expected 1 to 53"):
        read_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"clip\.mp4 is 32 x 32 pixels"):
        read_video(video, 2)


def test_sound_alone(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with pytest.raises(DataError, match=r"a\.wav has no video stream"):
        read_media(tmp_path / "a.wav", 4)


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    write_image(tmp_path / "cover.png", colour_image())
    picture = b"\0image/png\0\3\0" + (tmp_path / "cover.png").read_bytes()
    frame = b"APIC" + struct.pack(">IH", len(picture), 0) + picture
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    silence = (b"\xff\xfb\x90\xc4" + bytes(413)) * 20  # frames of MPEG-1 layer III, 128 kbit/s, 44.1 kHz
    (tmp_path / "a.mp3").write_bytes(b"ID3\3\0\0" + size + frame + silence)
    with av.open(str(tmp_path / "a.mp3")) as container:
        assert container.streams.video
    with pytest.raises(DataError, match=r"a\.mp3 has no video stream"):
        read_media(tmp_path / "a.mp3", 4)


def test_a_container_without_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        container.add_stream("mpeg4", rate=8, width=32, height=32, pix_fmt="yuv420p")
        container.start_encoding()
    with pytest.raises(DataError, match=r"a\.avi holds no video frame, expected at least 1"):
        read_video(path, 4)
