"""Individual files as records, and one record per text."""

import json
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from data_pipelines.config import Kind, SourceConfig, VisualConfig
from data_pipelines.errors import DataError
from data_pipelines.sources.file_source import FileSource, list_files
from data_pipelines.sources.formats import open_source

from ..worlds import encode_media, records

VISUAL = VisualConfig(image_size=16, num_frames=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b" / ".cache").mkdir(parents=True)
    image = encode_media(records("image", 1)[0])
    for name in ("z.png", "b/a.JPG", "b/.cache/a.png", ".z.png"):
        (tmp_path / name).write_bytes(image)
    (tmp_path / "a.mp4").write_bytes(encode_media(records("video", 1)[0]))
    (tmp_path / "b" / "a.txt").write_text(" a red four\n")
    (tmp_path / "b" / "b.txt").write_text("\n")
    (tmp_path / "b" / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "notes.md").write_text("no record")
    return tmp_path


def test_files_of_a_folder_are_sorted_without_hidden_ones(folder: Path) -> None:
    assert list_files(str(folder)) == ["a.mp4", "b/a.JPG", "b/a.txt", "b/b.txt", "b/c.txt", "z.png"]


@pytest.mark.parametrize(
    ("kind", "keys"), [("image", ["b/a.JPG", "z.png"]), ("video", ["a.mp4"]), ("text", ["b/a.txt", None, None])]
)
def test_files_of_a_kind_are_records_keyed_by_path(kind: Kind, keys: list[str | None], folder: Path) -> None:
    source = open_source(SourceConfig(format="files", path=str(folder), kind=kind), VISUAL)
    assert len(source) == len(keys)
    for index, key in enumerate(keys):
        if key is not None:
            record = source[index]
            assert record.key == key
            assert (record.texts == ("a red four",)) == (kind == "text")
            assert kind == "text" or record.media.data == f"{folder}/{key}"


def test_empty_texts_are_an_error(folder: Path) -> None:
    source = open_source(SourceConfig(format="files", path=str(folder), kind="text"), VISUAL)
    with pytest.raises(DataError, match=r"b\.txt has no visible text, expected some"):
        source[1]
    with pytest.raises(DataError, match=r"c\.txt is not UTF-8 text"):
        source[2]


def test_a_single_file_has_its_path_as_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    source = open_source(SourceConfig(format="files", path="b/a.JPG"), VISUAL)
    assert [source[0].key, source[0].media.data] == ["b/a.JPG"] * 2


def test_missing_files_of_a_kind(folder: Path) -> None:
    (folder / "empty").mkdir()
    for path, message in (
        (folder / "missing", "does not exist or is not a folder"), (folder / "empty", "holds no image, video or .txt"),
        (folder / "a.mp4", "contains no image files: 1 of kind 'video'; set another kind"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            open_source(SourceConfig(format="files", path=str(path)), VISUAL)


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_animations_are_videos_and_images(remote: bool, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")]
    for suffix in ("gif", "png", "webp"):
        frames[0].save(tmp_path / f"moves.{suffix}", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / f"still.{suffix}")
    root = str(tmp_path)
    if remote:
        root = f"memory://{tmp_path.name}"
        for path in tmp_path.iterdir():
            fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    names = {kind: FileSource(root, kind) for kind in ("image", "video")}
    sources = {kind: [source[i].key for i in range(len(source))] for kind, source in names.items()}
    assert sources["video"] == ["moves.gif", "moves.png", "moves.webp", "still.gif"]
    assert sources["image"] == ["moves.gif", "moves.png", "moves.webp", "still.gif", "still.png", "still.webp"]
    assert FileSource(f"{root}/moves.webp", "video")[0].media.kind == "video"
    with pytest.raises(DataError, match=r"still\.webp contains no video files: 1 of kind 'image'"):
        FileSource(f"{root}/still.webp", "video")


def test_one_record_per_text(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": "three"}, {"image": "c.jpg"}]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    source = open_source(SourceConfig(format="annotations", kind="text", path=str(path), expand="text"), VISUAL)
    assert len(source) == 5
    sources = [(source[i].key, source[i].texts) for i in range(3)]
    assert sources == [("c/1#0", ("one",)), ("c/1#1", ("two",)), ("c/2", ("three",))]
    for index in (3, 4):
        with pytest.raises(DataError, match=rf"c\.jsonl row {index}"):
            source[index]
    with pytest.raises(IndexError):
        source[5]
