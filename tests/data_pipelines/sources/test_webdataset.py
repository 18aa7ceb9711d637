"""Tars as a source: samples of all shapes, names that do not lead out of the tar, damage."""

import gzip
import io
import json
import re
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from data_pipelines.config import Kind, VisualConfig
from data_pipelines.errors import DataError
from data_pipelines.image import open_image
from data_pipelines.record import Question
from data_pipelines.sources import indexed_tars
from data_pipelines.sources.webdataset import WebDatasetSource
from data_pipelines.visual import load_visual

from ..worlds import SIZE, encode_media, img2dataset, keys_of, png, records, tar_of, write_tar


def test_images_with_texts(tmp_path: Path) -> None:
    written = img2dataset(tmp_path / "00000.tar", 6) + img2dataset(tmp_path / "00001.tar", 3, start=6)
    source = WebDatasetSource(str(tmp_path), "image")
    assert len(source) == 9
    for i in (8, 0, 5, 6):
        record = source[i]
        assert record.key == f"0000{i // 6}/{i:09}"
        assert record.captions == written[i].captions[:1]
        assert record.media is not None
        assert record.media.name == f"0000{i // 6}.tar:{i:09}.png"
        visual = load_visual(record.media, VisualConfig(image_size=SIZE, num_frames=1), np.random.default_rng(0))
        np.testing.assert_array_equal(visual.frames, written[i].frames)
    with pytest.raises(IndexError):
        source[9]
    assert len(WebDatasetSource(str(tmp_path / "{00000..00001}.tar"), "image")) == 9


def test_clips_labels_and_several_captions(tmp_path: Path) -> None:
    clip, image = encode_media(records("video", 1)[0]), encode_media(records("image", 1)[0])
    members = {
        "a/1.MP4": clip, "a/1.json": json.dumps({"captions": [" one ", "", "two"], "label": 3}), "a/1.jpg": image,
        "a/2.frames.png": image, "a/2.cls": "7\n", "a/2.txt": "",
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


@pytest.mark.parametrize("length", [2560 * 5, 2560 * 5 + 100, 2560 * 5 + 1000, 2560 * 20])
def test_a_truncated_tar(length: int, tmp_path: Path) -> None:
    """Cut between two members, in a header, in a member, before the end mark."""
    path = tmp_path / "a.tar"
    write_tar(path, {f"{i}.txt": "x" * 2000 for i in range(20)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"a\.tar cannot be read as a tar: .*; it is truncated, compressed"):
        WebDatasetSource(str(path), "text")
    assert not (tmp_path / "a.tar.index").exists()


@pytest.mark.parametrize("data", [b"junk" * 300, gzip.compress(b"x" * 1000)], ids=["junk", "compressed"])
def test_files_that_are_not_tars(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar cannot be read as a tar: .*; it is truncated, compressed"):
        WebDatasetSource(str(tmp_path / "a.tar"), "text")


def test_a_damaged_header_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.txt": "x" * 2000 for i in range(20)})
    data = bytearray(path.read_bytes())
    data[2560 * 5 + 50] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="neither a member nor the end of the tar at byte 12,800"):
        WebDatasetSource(str(path), "text")


def test_names_and_links_do_not_leave_the_tar(tmp_path: Path) -> None:
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
    "object": ({"1.json": '{"caption": [["x"]]}'}, r"a\.tar:1\.json row 1: \w+ holds "),
}


@pytest.mark.parametrize(("members", "message"), BAD.values(), ids=BAD)
def test_unreadable_texts(members: dict[str, bytes | str], message: str, tmp_path: Path) -> None:
    source = WebDatasetSource(str(write_tar(tmp_path / "a.tar", members)), "text")
    with pytest.raises(DataError, match=message):
        source[0]


def sample(name: str, color: str) -> tuple[tuple[str, bytes | str], ...]:
    return (f"{name}.png", png(color)), (f"{name}.txt", color)


def read_all(path: Path, data: bytes, kind: Kind = "image") -> list[tuple[str, str, str] | str]:
    """Return key, color and caption of every record, or its error."""
    path.write_bytes(data)
    source, results = WebDatasetSource(str(path), kind), list[tuple[str, str, str] | str]()
    for index in range(len(source)):
        try:
            record = source[index]
            with open_image(record.media) as image:
                pixel = np.asarray(image.decode()[0])[4, 4].tolist()
        except DataError as error:
            results.append(str(error))
            continue
        names = {tuple(ImageColor.getrgb(name)): name for name in ("red", "lime", "blue", "gray")}
        results.append((record.key.removeprefix("a/"), names[tuple(pixel)], *record.captions))
    return results


RED, LIME, BLUE, GRAY = (sample(f"{number}", name) for number, name in enumerate(("red", "lime", "blue", "gray")))
GOOD = [(f"{number}", name, name) for number, name in enumerate(("red", "lime", "blue", "gray"))]
APPLE = b"\0\5\x16\7\0\2\0\0Mac OS X        "
LONG = "l" * 150
TARS: dict[str, tuple[bytes, list[tuple[str, ...]]]] = {
    "joined": (tar_of(*RED, *LIME) + tar_of(*BLUE) + tar_of(*GRAY), GOOD),
    "a block of zeros": (tar_of(*RED)[:2048] + bytes(512) + tar_of(*LIME), GOOD[:2]),
    "pictures first": (tar_of(*(m for i in (0, 1) for s in (RED, LIME, BLUE, GRAY) for m in s[i : i + 1])), GOOD),
    "resource forks": (tar_of(*(m for name, data in (*RED, *LIME) for m in ((f"._{name}", APPLE), (name, data)))),
                       GOOD[:2]),
    "hidden folders": (tar_of(*RED, ("__MACOSX/._0.png", APPLE), *sample(".thumbnails/0", "gray"),
                              *sample("@eaDir/0", "gray")), GOOD[:1]),
    "dots": (tar_of(*sample("a_1.0", "red"), *sample("a_1.5", "lime"), *sample("v1.2.final", "blue")),
             [("a_1.0", "red", "red"), ("a_1.5", "lime", "lime"), ("v1.2.final", "blue", "blue")]),
    "numbers behind a sample": (tar_of(*sample("a", "red"), *sample("a.1", "lime")),
                                [("a", "red", "red"), ("a.1", "lime", "lime")]),
    "a complete sample with an infix": (tar_of(*sample("a", "red"), *sample("a.edited", "lime")),
                              [("a", "red", "red"), ("a.edited", "lime", "lime")]),
    "a map before": (tar_of(("0.depth.png", png("gray")), *RED, ("1.depth.png", png("gray")), *LIME), GOOD[:2]),
    "words before": (tar_of(("0.alt.txt", "no"), ("0.exif.json", '{"caption": "no"}'),
                            ("0.mask.v2.png", png("gray")), *RED), GOOD[:1]),
    "one picture under a word": (tar_of(("0.input.png", png("red")), ("0.txt", "red")), GOOD[:1]),
    "twice": (tar_of(*RED, *LIME, *sample("0", "blue")), [*GOOD[:2], ("0@2", "blue", "blue")]),
    "three times": (tar_of(*RED, *RED, *RED), [GOOD[0], ("0@2", *GOOD[0][1:]), ("0@3", *GOOD[0][1:])]),
    "other names": (tar_of(("0.PNG", png("red")), ("0.TXT", "red"), ("1.jfif", png("lime")), ("1.txt", "lime"),
                           ("2.jpe", png("blue")), ("2.txt", "blue"), ("3.avif", png("gray")), ("3.txt", "gray")),
                    GOOD),
    "marks": (tar_of(("0.png", png("red")), ("0.txt", b"\xef\xbb\xbfred\r\n"), ("1.png", png("lime")),
                     ("1.json", b'\xef\xbb\xbf{"caption": "lime"}'), ("2.png", png("blue")),
                     ("2.txt", "blue".encode("utf-16"))), GOOD[:3]),
    "long names": (tar_of(*sample(f"{LONG}/ü{LONG}", "red"), format=tarfile.PAX_FORMAT),
                   [(f"{LONG}/ü{LONG}", "red", "red")]),
    "missing in JSON": (tar_of(("0.png", png("red")), ("0.json", '{"caption": NaN, "similarity": Infinity}'), *LIME),
                        [("0", "red"), GOOD[1]]),
}  # fmt: skip


@pytest.mark.parametrize("name", TARS)
def test_custom_tars(name: str, tmp_path: Path) -> None:
    data, expected = TARS[name]
    assert read_all(tmp_path / "a.tar", data) == expected


BROKEN = {
    "a failed download": (
        (*RED, ("1.txt", "lost"), ("1.json", '{"status": "failed_to_download", "error_message": "HTTP 404"}')),
        r"sample a/1 has no image, only \.json, \.txt \(failed_to_download: HTTP 404\); remove it",
    ),
    "maps alone": ((*RED, ("0.mask.png", png("gray")), ("1.mask.png", png("gray")), ("1.txt", "lost")),
                   r"sample a/1 has no image, only \.txt; remove it"),
    "two pictures under words": ((*RED, ("1.a.png", png("lime")), ("1.b.png", png("blue")), ("1.txt", "lime")),
                                 r"sample a/1 has no image, only \.txt; remove it"),
    "twice, in pairs that are not known": ((*RED, ("1.png", b"x"), ("1.png", b"y"), ("1.txt", "x"), ("1.txt", "y")),
                                           "sample a/1 has duplicate members in an ambiguous order; write each"),
    "twice in part": ((*RED, ("1.png", b"x"), ("1.png", b"y"), ("1.txt", "y")), "sample a/1 has duplicate members"),
    "unknown to Pillow": ((*RED, ("1.heic", b"\0\0\0\x18ftyphexx" + bytes(99)), ("1.txt", "x")),
                          r"a\.tar:1\.heic cannot be read as an image"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_incomplete_sample_is_one_error(name: str, tmp_path: Path) -> None:
    members, message = BROKEN[name]
    first, second = read_all(tmp_path / "a.tar", tar_of(*members))
    assert first == GOOD[0]
    assert isinstance(second, str)
    assert re.match(message, second)


def test_data_after_the_end_is_a_tar_or_an_error(tmp_path: Path) -> None:
    for data in (tar_of(*RED) + b"signature", tar_of(*RED) + b"x" * 512, tar_of(*RED) + tar_of(*LIME)[:700]):
        with pytest.raises(DataError, match=r"a\.tar cannot be read as a tar: "):
            read_all(tmp_path / "a.tar", data)


def sparse_member(version: str, content: bytes) -> bytes:
    """Return the member 0.png as tar -S writes it: its first block, followed by zeros that are not stored."""
    header = tarfile.TarInfo("0.png")
    if version == "old":
        header.type, header.size = tarfile.GNUTYPE_SPARSE, 512
        block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
        for place, number in ((386, 0), (398, 512), (410, len(content)), (422, 0), (483, len(content))):
            block[place : place + 12] = f"{number:011o}\0".encode()
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
        return bytes(block) + content[:512]
    stored = f"2\n0\n512\n{len(content)}\n0\n".encode().ljust(512, b"\0") + content[:512]
    header.size = len(stored)
    header.pax_headers = {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0.png",
        "GNU.sparse.realsize": str(len(content)),
    }  # fmt: skip
    return header.tobuf(tarfile.PAX_FORMAT) + stored


@pytest.mark.parametrize("version", ["old", "1.0"])
def test_members_with_holes(version: str, tmp_path: Path) -> None:
    content = png("red") + bytes(100_000)  # what is behind the end of a PNG does not matter
    assert read_all(tmp_path / "a.tar", sparse_member(version, content) + tar_of(("0.txt", "red"), *LIME)) == GOOD[:2]
    media = WebDatasetSource(str(tmp_path / "a.tar"), "image")[0].media
    assert media is not None
    assert media.data == content


def test_a_sparse_member_larger_than_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sparse_member("old", png("red") + bytes(100_000))
    monkeypatch.setattr(indexed_tars, "MAX_FETCHED_BYTES", 99_999)
    (message,) = read_all(tmp_path / "a.tar", data + tar_of())
    assert re.search(r"a\.tar has a sparse member of 100,\d+ bytes, expected at most 99,999", str(message))


def test_fields_of_json_are_those_of_annotation_files(tmp_path: Path) -> None:
    message = {
        "question": "what?", "answers": ["one", "two", "two"], "label": "cat", "image": "../../secret.png", "id": [1],
        "document": "long", "summary": "short",
    }  # fmt: skip
    write_tar(tmp_path / "a.tar", {"0.png": png("red"), "0.json": json.dumps(message), "0.txt": "a caption"})
    for kind in ("image", "text"):
        record = WebDatasetSource(str(tmp_path / "a.tar"), kind)[0]
        assert record.questions == (Question("what?", "two", "", ("two", "one")), Question("long", "short", "summary"))
        assert (record.key, record.label, record.visual_id) == ("a/0", "cat", "")
        assert (record.texts if kind == "text" else record.captions) == ("a caption",)


@pytest.mark.parametrize("suffix", ["webp", "png", "gif", "apng", "jpg"])
def test_animations_are_videos_for_a_video_source(suffix: str, tmp_path: Path) -> None:
    """Read them as images, by their first frame, for an image source. A still image is never a video."""
    frames, file = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")], io.BytesIO()
    format = {"jpg": "JPEG", "apng": "PNG"}.get(suffix, suffix)
    frames[0].save(file, format, **({"save_all": True, "append_images": frames[1:]} if suffix != "jpg" else {}))
    for animated in (True, False):
        data = file.getvalue() if animated else png("red")
        path = write_tar(tmp_path / f"{animated}.tar", {f"0.{suffix}": data})
        kinds = [WebDatasetSource(str(path), kind)[0].media.kind for kind in ("image", "video")]
        assert kinds == ["image", "video" if suffix in ("gif", "apng") or (animated and suffix != "jpg") else "image"]


def test_tars_with_equal_names_have_different_keys(tmp_path: Path) -> None:
    for folder in ("cc3m", "laion"):
        (tmp_path / folder).mkdir()
        img2dataset(tmp_path / folder / "00000.tar", 1)
    img2dataset(tmp_path / "laion" / "00001.tar", 1)
    (tmp_path / "laion" / "._00001.tar").write_bytes(APPLE)
    assert keys_of(tmp_path / "*" / "*.tar") == [
        f"{name}/000000000" for name in ("cc3m/00000", "laion/00000", "laion/00001")
    ]
    assert keys_of(tmp_path / "laion") == ["00000/000000000", "00001/000000000"]


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
