"""Tars read in place: the index is built once and again when the tar changes; nothing in a tar leaves it."""

import gzip
import io
import json
import os
import tarfile
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.config import VisualConfig
from data_pipelines.errors import DataError
from data_pipelines.sources import tar_index
from data_pipelines.sources.tar_index import TarIndex
from data_pipelines.sources.webdataset import WebDatasetSource
from data_pipelines.visual import load_visual

from ..worlds import SIZE, encoded, img2dataset, records, write_tar


def test_pictures_with_texts(tmp_path: Path) -> None:
    made = img2dataset(tmp_path / "00000.tar", 6) + img2dataset(tmp_path / "00001.tar", 3, start=6)
    source = WebDatasetSource(str(tmp_path), "image")
    assert len(source) == 9
    for i in (8, 0, 5, 6):
        record = source[i]
        assert record.key == f"0000{i // 6}/{i:09}"
        assert record.captions == made[i].captions[:1]
        assert record.media is not None
        assert record.media.name == f"0000{i // 6}.tar:{i:09}.png"
        visual = load_visual(record.media, VisualConfig(image_size=SIZE, num_frames=1), np.random.default_rng(0))
        np.testing.assert_array_equal(visual.frames, made[i].frames)
    with pytest.raises(IndexError):
        source[9]
    assert len(WebDatasetSource(str(tmp_path / "{00000..00001}.tar"), "image")) == 9


def test_clips_labels_and_several_captions(tmp_path: Path) -> None:
    clip, picture = encoded(records("video", 1)[0]), encoded(records("image", 1)[0])
    members = {
        "a/1.MP4": clip, "a/1.json": json.dumps({"captions": [" one ", "", "two"], "label": 3}), "a/1.jpg": picture,
        "a/2.frames.png": picture, "a/2.cls": "7\n", "a/2.txt": "",
    }  # fmt: skip
    path = str(write_tar(tmp_path / "x.tar", members))
    first, second = (WebDatasetSource(path, "video")[i] for i in range(2))
    assert first.media is not None
    assert (first.media.kind, first.captions, first.label) == ("video", ("one", "two"), "3")
    assert second.media is not None
    assert (second.key, second.media.kind, second.captions, second.label) == ("x/a/2", "image", (), "7")
    picture_of_first = WebDatasetSource(path, "image")[0].media
    assert picture_of_first is not None
    assert picture_of_first.kind == "image"
    text = WebDatasetSource(path, "text")[0]
    assert (text.media, text.texts) == (None, ("one", "two"))


def test_the_index_is_built_once_and_again_when_the_tar_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    img2dataset(path, 2)
    assert len(TarIndex(str(path))) == 2
    with monkeypatch.context() as patched:
        patched.setattr(tar_index, "members_of", lambda path: pytest.fail("built again"))
        assert TarIndex(str(path))[1][0] == "000000001"
    img2dataset(path, 3)
    assert TarIndex(str(path))[2][0] == "000000002"
    beside = tmp_path / "a.tar.index"
    for damaged in (b"", b"junk", beside.read_bytes()[:40]):
        beside.write_bytes(damaged)
        assert TarIndex(str(path))[0][0] == "000000000"
    beside.write_bytes(beside.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a\.tar\.index is damaged .*; remove it, and it is built again"):
        TarIndex(str(path))[0]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.tar", "a.tar.index"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    img2dataset(tmp_path / "a.tar", 2)
    tmp_path.chmod(0o500)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert len(TarIndex(str(tmp_path / "a.tar"))) == 2
    tmp_path.chmod(0o700)


def test_tars_behind_urls() -> None:
    memory = fsspec.filesystem("memory")
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w") as tar:
        info = tarfile.TarInfo("1.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    memory.pipe_file("/bucket/a.tar", packed.getvalue())
    source = WebDatasetSource("memory://bucket/*.tar", "text")
    assert source[0].texts == ("hello",)
    assert memory.exists("/bucket/a.tar.index")
    assert WebDatasetSource("memory://bucket", "text")[0].key == "a/1"


@pytest.mark.parametrize("length", [2560 * 5, 2560 * 5 + 100, 2560 * 5 + 1000, 2560 * 20])
def test_a_tar_that_is_cut_off(length: int, tmp_path: Path) -> None:
    """Between two members, in a header, in a member, before the end mark."""
    path = tmp_path / "a.tar"
    write_tar(path, {f"{i}.txt": "x" * 2000 for i in range(20)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"a\.tar cannot be read as a tar: .*; it is cut off, compressed"):
        WebDatasetSource(str(path), "text")
    assert not (tmp_path / "a.tar.index").exists()


@pytest.mark.parametrize("data", [b"junk" * 300, gzip.compress(b"x" * 1000)], ids=["junk", "compressed"])
def test_what_is_no_tar(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar cannot be read as a tar: .*; it is cut off, compressed"):
        WebDatasetSource(str(tmp_path / "a.tar"), "text")


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.txt": "x" * 2000 for i in range(20)})
    data = bytearray(path.read_bytes())
    data[2560 * 5 + 50] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="neither a member nor the end of the tar at byte 12,800"):
        WebDatasetSource(str(path), "text")


def test_names_and_links_do_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("1.txt", tarfile.SYMTYPE), ("2.txt", tarfile.LNKTYPE), ("3.txt", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.txt")
            tar.addfile(info)
        info = tarfile.TarInfo("../../etc/4.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    source = WebDatasetSource(str(tmp_path / "a.tar"), "text")
    assert [(source[i].key, source[i].texts) for i in range(len(source))] == [("a/../../etc/4", ("hi",))]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.tar", "a.tar.index", "secret.txt"]


BAD = {
    "latin": ({"1.txt": b"caf\xe9"}, r"\.txt of sample a/1 is not UTF-8 text: unexpected end of data in line 1"),
    "json": ({"1.json": "{"}, r"\.json of sample a/1 is not valid JSON"),
    "list": ({"1.json": "[]"}, r"\.json of sample a/1 holds a list, expected named fields"),
    "object": ({"1.json": '{"caption": [[]]}'}, r"a\.tar:1\.json row 1: \w+ holds "),
}


@pytest.mark.parametrize(("members", "said"), BAD.values(), ids=BAD)
def test_texts_that_cannot_be_read(members: dict[str, bytes | str], said: str, tmp_path: Path) -> None:
    source = WebDatasetSource(str(write_tar(tmp_path / "a.tar", members)), "text")
    with pytest.raises(DataError, match=said):
        source[0]


@settings(max_examples=80)
@given(cut=st.integers(0, 6000), flip=st.integers(0, 6000), bit=st.integers(0, 7))
def test_damaged_tars_give_samples_or_a_data_error(cut: int, flip: int, bit: int, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("tar")
    path = write_tar(folder / "a.tar", {"1.txt": "one", "1.json": '{"label": "x"}', "2.txt": "two"})
    data = bytearray(path.read_bytes())
    data[flip % len(data)] ^= 1 << bit
    path.write_bytes(bytes(data[: len(data) - cut % len(data)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            source = WebDatasetSource(str(path), "text")
            for i in range(len(source)):
                assert source[i].key
        except DataError:
            pass
