"""A folder of images and videos, and where their captions come from."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.config import Kind, SourceConfig, VisualConfig
from data_pipelines.errors import DataError
from data_pipelines.record import Source
from data_pipelines.sources import folder as module
from data_pipelines.sources.folder import caption_from_filename
from data_pipelines.sources.formats import open_source


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def open_folder(folder: Path, kind: Kind = "image") -> Source:
    return open_source(SourceConfig(format="captioned_folder", path=str(folder), kind=kind), VisualConfig())


def captions(folder: Path, kind: Kind = "image") -> dict[str, tuple[str, ...]]:
    source = open_folder(folder, kind)
    records = [source[i] for i in range(len(source))]
    return {record.key: record.captions + record.texts for record in records}


MEDIA = {"a.jpg": "", "b/c_d.png": "", "b/e.mp4": "", ".hidden.jpg": "", "README.md": ""}


@pytest.mark.parametrize(
    "table",
    [
        {"captions.csv": "image,caption\na.jpg,one\n./b/c_d.png,two\nb\\e.mp4,three\na.jpg,uno\n"},
        {"captions.tsv": "file_name\tcaption\na\tone\nb/c_d\ttwo\nb/e\tthree\na\tuno\n"},
        {"metadata.jsonl": '{"file_name": "a.jpg", "text": ["one", "uno"]}\n{"image": "b/c_d.png", "caption": "two"}\n'
                           '{"video": "b/e.mp4", "caption": "three"}\n'},
        {"captions.json": '{"a.jpg": ["one", "uno"], "b/c_d.png": "two", "b/e.mp4": "three"}'},
    ],
)  # fmt: skip
def test_captions_of_a_table(table: dict[str, str], tmp_path: Path) -> None:
    folder = write(tmp_path, {**MEDIA, **table, "a.txt": "is not read"})
    assert captions(folder) == {"a.jpg": ("one", "uno"), "b/c_d.png": ("two",)}
    assert captions(folder, "video") == {"b/e.mp4": ("three",)}
    assert captions(folder, "text") == {"a.jpg": ("one", "uno"), "b/c_d.png": ("two",), "b/e.mp4": ("three",)}


def test_captions_next_to_the_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sidecars = {"a.txt": " one\n", "b/e.json": '{"caption": "three", "url": "x"}', "b/other.txt": "of no image"}
    folder = write(tmp_path, {**MEDIA, **sidecars})
    assert captions(folder) == {"a.jpg": ("one",)}
    assert captions(folder, "video") == {"b/e.mp4": ("three",)}
    assert "skipped 1 images without a caption; the first is 'b/c_d.png'" in caplog.text


def test_file_names_are_the_captions_of_a_folder_without_any(tmp_path: Path) -> None:
    folder = write(tmp_path, {**MEDIA, "7.jpg": ""})
    assert captions(folder) == {"a.jpg": ("a",), "b/c_d.png": ("c d",)}
    assert captions(folder, "video") == {"b/e.mp4": ("e",)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("red_car-on-the_road.jpg", "red car on the road"), ("x/y/Blue.Sky (2).PNG", "Blue Sky (2)"),
        ("été_à_Paris.jpg", "été à Paris"), ("हिन्दी_शब्द.jpg", "हिन्दी शब्द"), ("__.jpg", ""),
    ],
)  # fmt: skip
def test_words_of_names(name: str, words: str) -> None:
    assert caption_from_filename(name) == words


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"notes.md": ""}, "holds no image or video; found 1 other files"),
        ({"IMG_1.jpg": "", "IMG_2.jpg": ""}, "has no captions: write captions.csv"),
        ({"1.jpg": ""}, "has no captions: write captions.csv"),
        ({"a.jpg": "", "captions.csv": "picture of,words\n"}, "expected a header with the names of the columns"),
        ({"a.jpg": "", "captions.json": '[{"broken": '}, "is not valid JSON"),
        ({"a.mp4": "", "a.txt": "one"}, "holds no image with a caption; found 1 of kind 'video'"),
    ],
)  # fmt: skip
def test_folders_without_captions_are_one_sentence(files: dict[str, str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_folder(write(tmp_path, files))
    assert sentence in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a.jpg": "", "a.txt": " \n"}, "a.txt is empty, expected a caption"),
        ({"a.jpg": "", "a.json": "[1]"}, "a.json row 1 holds a list, expected named fields"),
        ({"a.jpg": "", "a.json": '{"title": "x"}'}, "a.json row 1 has no golden_captions or"),
        ({"a.jpg": "", "a.txt": "long" * 10}, "a.txt has more than 30 bytes"),
        ({"a.jpg": "", "captions.csv": "image,caption\na.jpg,\n"}, "captions.csv row 2: caption is empty"),
        ({"a.jpg": "", "captions.csv": "image,caption\n,one\n"}, "captions.csv row 2: image is empty"),
        ({"a.jpg": "", "captions.jsonl": '{"image": "a.jpg"\n'}, "captions.jsonl row 1 is not valid JSON"),
        ({"a.jpg": "", "captions.csv": "image,caption\n../a.jpg,one\n"}, "leads out of"),
        ({"a.jpg": "", "captions.csv": "image,caption\n/etc/a.jpg,one\n"}, "leads out of"),
    ],
)  # fmt: skip
def test_an_unusable_caption_fails_one_record(
    files: dict[str, str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CAPTION_BYTES", 30)
    source = open_folder(write(tmp_path, files))
    assert len(source) == 1
    with pytest.raises(DataError) as caught:
        source[0]
    assert sentence in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["a.jpg", "one"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["image", "caption", "captions", "text", "video", "raw"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(content=VALUES, name=st.sampled_from(["a.json", "captions.json", "captions.jsonl"]))
def test_any_json_gives_captions_or_a_data_error(
    content: Any, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write(tmp_path_factory.mktemp("any"), {"a.jpg": "", name: json.dumps(content)})
    with contextlib.suppress(DataError):
        source = open_folder(folder)
        for index in range(len(source)):
            with contextlib.suppress(DataError):
                assert source[index].captions


@pytest.mark.parametrize("name", ["a.txt", "captions.csv"])
def test_captions_are_not_read_from_outside(name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("image,caption\na.jpg,password\n")
    folder = write(tmp_path / "folder", {"a.jpg": ""})
    (folder / name).symlink_to(secret)
    with pytest.raises(DataError, match=rf"{name} is a link out of {folder}"):
        open_folder(folder)[0]
    (folder / name).unlink()
    module.read_folder.cache_clear()
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match=rf"{name} is no regular file"):
        open_folder(folder)[0]


def test_a_table_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TABLE_BYTES", 20)
    with pytest.raises(DataError, match=r"captions\.csv has more than 20 bytes"):
        open_folder(write(tmp_path, {"a.jpg": "", "captions.csv": "image,caption\na.jpg,one\n"}))


def test_a_folder_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 1)
    with pytest.raises(DataError, match="holds 2 images and videos, expected at most 1"):
        open_folder(write(tmp_path, {"a.jpg": "", "b.jpg": ""}))
