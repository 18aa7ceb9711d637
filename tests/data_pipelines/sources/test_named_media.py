"""From names to files: videos in any container, lists of videos, folders of classes."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from data_pipelines.sources.annotations.media import find_media

from ..worlds import open_annotations


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return str(folder)


def find(folder: str, kind: Kind, *names: str) -> str:
    media = find_media(folder, kind, *names)
    assert media is not None
    assert media.data == media.name
    return f"{media.kind} {media.name.removeprefix(folder).lstrip('/')}"


@pytest.mark.parametrize(("kind", "suffixes"), [("image", IMAGE_SUFFIXES), ("video", VIDEO_SUFFIXES)])
def test_media_of_every_suffix_are_found_with_and_without_it(
    kind: Kind, suffixes: tuple[str, ...], tmp_path: Path
) -> None:
    for number, suffix in enumerate(suffixes):
        for name in (f"{number}{suffix}", f"v1.{number}{suffix.upper()}"):
            folder = touch(tmp_path, name)
    for number, suffix in enumerate(suffixes):
        assert find(folder, kind, f"{number}{suffix}") == f"{kind} {number}{suffix}"
        assert find(folder, kind, str(number)) == f"{kind} {number}{suffix}"
        assert find(folder, kind, f"v1.{number}") == f"{kind} v1.{number}{suffix.upper()}"
        assert find(folder, kind, f"v1.{number}{suffix}") == f"{kind} v1.{number}{suffix.upper()}"


NAMES: dict[str, tuple[Kind, tuple[str, ...], str, str]] = {
    "itself first": ("video", ("x", "x.mp4"), "x", "video x"),
    "of no known suffix": ("video", ("x.mod", "x.mod.mp4"), "x.mod", "video x.mod"),
    "a suffix behind a suffix": ("video", ("x.avi.mp4", "x.avi.txt"), "x.avi", "video x.avi.mp4"),
    "re-encoded": ("video", ("x.jpg", "x.webm", "x.mp4"), "x.avi", "video x.mp4"),
    "the usual of several": ("video", ("x.flv", "x.mp4", "x.webm", "x.jpg", "x.json"), "x", "video x.mp4"),
    "of the kind that is wanted": ("image", ("x.mp4", "x.webp"), "x", "image x.webp"),
    "of another kind": ("image", ("x.mp4",), "x", "video x.mp4"),
    "a picture is not another": ("image", ("x.jpg",), "x.png", "image x.png"),
    "an animation as a picture": ("image", ("x.gif",), "x", "image x.gif"),
    "in a folder": ("video", ("a/b/x.MOV",), "a/b/x", "video a/b/x.MOV"),
    "nothing": ("video", (), "x", "video x.mp4"),
    "nothing of that name": ("video", ("y.mp4",), "x.3gp", "video x.3gp"),
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_the_file_of_a_name(case: str, remote: bool, tmp_path: Path) -> None:
    kind, names, name, expected = NAMES[case]
    folder = touch(tmp_path, *names)
    if remote:
        folder = f"memory://{tmp_path.name}"
        for each in names:
            fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/{each}", b"")
    assert find(folder, kind, name) == expected


def animate(path: Path) -> None:
    first, *frames = (Image.new("RGB", (8, 8), (grey, 0, 0)) for grey in (0, 100, 200))
    first.save(path, path.suffix[1:], save_all=True, append_images=frames)


@pytest.mark.parametrize("suffix", ["webp", "png", "gif"])
def test_animations_that_annotations_name(suffix: str, tmp_path: Path) -> None:
    animate(tmp_path / f"a.{suffix}")
    Image.new("RGB", (8, 8)).save(tmp_path / f"b.{suffix}")
    still = "video" if suffix == "gif" else "image"
    for kind, kinds in (("video", ("video", still)), ("image", ("image", "image"))):
        assert tuple(find(str(tmp_path), kind, f"{name}.{suffix}").split()[0] for name in "ab") == kinds


LISTS = {
    "table": "label,youtube_id,time_start,time_end,split\nplaying guitar,abc,1,11,val\nwaving,-d,3,13,val\n",
    "table without header": "playing guitar,abc,1,11,val,0\nwaving,-d,3,13,val,1\n",
    "blanks": "playing_guitar/abc_000001_000011.mp4 0\nwaving/-d_000003_000013.mp4 1\n",
    "commas": "playing_guitar/abc_000001_000011.mp4,0\n\nwaving/-d_000003_000013,1\n",
    "tabs": "playing_guitar/abc_000001_000011.mp4\t0\r\nwaving/-d_000003_000013\t1\r\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_kinetics_lists(name: str, tmp_path: Path) -> None:
    touch(tmp_path / "clips", "playing_guitar/abc_000001_000011.mp4", "waving/-d_000003_000013.mkv")
    (tmp_path / "val.csv").write_text(LISTS[name])
    source = open_annotations("kinetics", tmp_path / "val.csv", media=str(tmp_path / "clips"), kind="video")
    assert [source[i].label for i in range(len(source))] == ["playing guitar", "waving"]
    assert all(Path(source[i].media.data).is_file() for i in range(2))
    assert source[0].key.endswith("abc_000001_000011")


def test_invalid_kinetics_lines(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("playing guitar/x y.mp4 17\nx.mp4 17\nnothing\n")
    source = open_annotations("kinetics", tmp_path / "val.txt", kind="video")
    assert [source[i].label for i in range(2)] == ["playing guitar", "17"]
    assert source[0].key == "val/playing guitar/x y"
    with pytest.raises(DataError, match=r"val\.txt row 3 has no youtube_id"):
        source[2]


def labels(folder: Path, *names: str) -> list[tuple[str, str]]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name, "PNG")
    source = open_annotations("image_folder", folder)
    return [(source[i].key, source[i].label) for i in range(len(source))]


def test_classes_are_the_top_level_folders(tmp_path: Path) -> None:
    """Find nested images, and ignore files of systems and tools."""
    expected = ("n01/a.JPEG", "n01/images/b.jpe", "n02/images/c.png", "n03/1/2/d.webp")
    hidden = (
        ".thumbnails/a.png", "@eaDir/a.png", ".ipynb_checkpoints/a-checkpoint.png", "n01/._a.png", "__MACOSX/n01/a.png",
        "n01/@eaDir/a.png", "n01/.cache/a.png",
    )  # fmt: skip
    assert labels(tmp_path / "train", *expected, *hidden) == [(name, name.partition("/")[0]) for name in expected]
    (tmp_path / "train" / "n04").mkdir()
    assert len(open_annotations("image_folder", tmp_path / "train")) == 4


NO_CLASSES = (
    ("images/a.png", "images/b.png"),
    ("train/n01/a.png", "val/n01/b.png"),
    ("train/a.png", "test/images/b.png"),
    ("Data/n01/a.png",),
)


@pytest.mark.parametrize("names", NO_CLASSES)
def test_folders_that_are_not_classes_are_an_error(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has the folders .*, which are not classes by their names; use the"):
        labels(tmp_path, *names)


def test_images_outside_class_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.png is in no class folder; expected .*/CLASS/b\.png"):
        labels(tmp_path / "some", "n01/a.png", "b.png")


def test_videos_in_an_image_folder_are_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "n01/a.mp4", "n01/b.png")
    source = open_annotations("image_folder", tmp_path)
    assert [source[i].media.kind for i in range(2)] == ["video", "image"]
    lines = "".join(json.dumps({"image": name, "caption": "x"}) + "\n" for name in ("n01/a.mp4", "n01/b.png"))
    (tmp_path / "a.jsonl").write_text(lines)
    source = open_annotations("annotations", tmp_path / "a.jsonl")
    assert [source[i].media.kind for i in range(2)] == ["video", "image"]
