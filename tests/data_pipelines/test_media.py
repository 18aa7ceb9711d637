"""Access to media, and written files."""

from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from data_pipelines import media as media_module
from data_pipelines.config import VisualConfig
from data_pipelines.errors import DataError
from data_pipelines.media import Media, file_media, open_media, write_image, write_video
from data_pipelines.visual import load_visual


def color_image() -> np.ndarray:
    image = np.zeros((6, 9, 3), np.uint8)
    image[:3, :4], image[3:, 4:] = (255, 0, 0), (0, 128, 255)
    return image


def load(media: Media, size: int = 6, num_frames: int = 2) -> np.ndarray:
    config = VisualConfig(image_size=size, num_frames=num_frames, transform="released_test")
    return load_visual(media, config, np.random.default_rng(0)).frames


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.png", "image"), ("a.JPG", "image"), ("picture", "image"),
        ("a.gif", "video"), ("gif", "video"), ("a.mp4", "video"),
    ],
)  # fmt: skip
def test_the_kind_of_a_file(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("mp4"):
        write_video(path, color_image()[None])
    else:
        Image.fromarray(color_image()).save(path, format="GIF" if "gif" in name else "PNG")
    assert file_media(path) == Media(kind, str(path), str(path))


def test_bytes_paths_and_urls_are_equivalent(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", color_image())
    write_video(tmp_path / "a.mp4", np.tile(color_image(), (3, 1, 1, 1)), scale=4)
    for name, kind in (("a.png", "image"), ("a.mp4", "video")):
        data = (tmp_path / name).read_bytes()
        with fsspec.open(f"memory://folder/{name}", "wb") as file:
            file.write(data)
        sources = [data, str(tmp_path / name), f"memory://folder/{name}", f"file://{tmp_path / name}"]
        loaded = [load(Media(kind, source, name)) for source in sources]
        for frames in loaded[1:]:
            np.testing.assert_array_equal(frames, loaded[0])


@pytest.mark.parametrize("kind", ["image", "video"])
def test_missing_files(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"member\.png does not exist or is not a file"):
        load(Media(kind, str(tmp_path / "nothing.png"), "archive.tar:member.png"))
    with pytest.raises(DataError, match="is not a file"):
        load(Media(kind, str(tmp_path), str(tmp_path)))
    with pytest.raises(DataError, match=f"^memory://nothing.png cannot be read as an? {kind}: "):
        load(Media(kind, "memory://nothing.png", "memory://nothing.png"))
    with pytest.raises(DataError, match=r"^nonsense://bucket/a\.png cannot be opened: Protocol not known: nonsense$"):
        load(Media(kind, "nonsense://bucket/a.png", "nonsense://bucket/a.png"))
    with pytest.raises(DataError, match=r"nothing\.png does not exist"):
        load(file_media(tmp_path / "nothing.png"))
    with pytest.raises(DataError, match="nothing does not exist"):
        file_media(tmp_path / "nothing")


def test_downloads_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with fsspec.open("memory://large.png", "wb") as file:
        file.write(bytes(101))
    monkeypatch.setattr(media_module, "MAX_FETCHED_BYTES", 100)
    with pytest.raises(DataError, match=r"large is larger than MAX_FETCHED_BYTES = 100; cut it into shorter videos"):
        load(Media("video", "memory://large.png", "large"))


def test_an_error_is_one_sentence() -> None:
    with pytest.raises(DataError) as caught, open_media(Media("image", b"", "a.png")):
        raise ValueError("first line\nsecond line")
    assert str(caught.value) == "a.png cannot be read as an image: first line; replace or remove the file"


def test_written_images_are_upscaled(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", color_image(), scale=3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), color_image().repeat(3, 0).repeat(3, 1))


def test_colors_survive_video_encoding(tmp_path: Path) -> None:
    frames = np.tile(color_image()[:, :6], (2, 1, 1, 1))
    write_video(tmp_path / "a.mp4", frames, scale=8)
    read = load(file_media(tmp_path / "a.mp4"), size=48)[:, 4::8, 4::8]
    assert np.abs(read.astype(int) - frames).max() < 40  # video stores colour at half resolution


def test_odd_sides_are_padded_by_one(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((2, 15, 15, 3), np.uint8))
    assert load(file_media(tmp_path / "a.mp4"), size=16).shape == (2, 16, 16, 3)
