"""Every format gives the same records from a bucket as from a disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.config import Format, Kind, SourceConfig, VisualConfig
from data_pipelines.errors import DataError
from data_pipelines.media import Media
from data_pipelines.record import Record
from data_pipelines.sources.array_record import encode_record
from data_pipelines.sources.fingerprint import source_fingerprint
from data_pipelines.sources.formats import FORMATS, open_source
from data_pipelines.storage.paths import to_path, upload_folder
from data_pipelines.visual import load_visual
from mplug2_jax.recipes.base import file_source, read_class_names

from ..worlds import SIZE, encode_media, img2dataset, records
from . import tfds_builders

VISUAL = VisualConfig(image_size=SIZE, num_frames=2)

CASES: dict[str, tuple[Format, Kind, dict[str, Any]]] = {
    "captions.csv": ("annotations", "image", {"media": "images"}),
    "clips.jsonl": ("annotations", "video", {"media": "clips"}),
    "coco.json": ("coco_captions", "image", {"media": "images"}),
    "karpathy.json": ("karpathy", "image", {"media": "", "split": "test"}),
    "questions*.json": ("vqa_v2", "image", {"media": "images"}),
    "val.csv": ("kinetics", "video", {"media": "clips"}),
    "ssv2.json": ("ssv2", "video", {"media": "clips"}),
    "classes": ("image_folder", "image", {}),
    "images": ("files", "image", {}),
    "captioned": ("captioned_folder", "image", {}),
    "with_table": ("captioned_folder", "video", {}),
    "dev.tsv": ("glue", "text", {}),
    "tars/{0..1}.tar": ("webdataset", "image", {}),
    "a.array_record": ("array_record", "image", {}),
    "tfds/digits/1.0.0": ("tfds", "image", {"split": "train[:3]"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small data set of each format."""
    folder = tmp_path_factory.mktemp("data")
    image, clip = (encode_media(records(kind, 1)[0]) for kind in ("image", "video"))

    def write(name: str, content: Any) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes | str) else json.dumps(content)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    for name in (
        "images/1.png",
        "images/000000000009.jpg",
        "classes/cat/1.png",
        "classes/dog/2.png",
        "captioned/1.png",
        "captioned/2.png",
    ):
        write(name, image)
    write("captioned/1.txt", "one")
    write("captioned/2.json", {"caption": "two"})
    write("with_table/clips/1.mp4", clip)
    write("with_table/captions.csv", "video,caption\nclips/1.mp4,one\n")
    for name in ("clips/1.mp4", "clips/abc_000003_000013.mkv", "clips/78.webm"):
        write(name, clip)
    write("captions.csv", "image,caption\n1.png,one\n")
    write("clips.jsonl", '{"video": "1", "caption": "one"}\n')
    write("coco.json", {"images": [{"id": 4, "file_name": "1.png"}], "annotations": [{"image_id": 4, "caption": "x"}]})
    write("karpathy.json", {"images": [
        {"filepath": "images", "filename": "1.png", "imgid": 0, "split": "test", "sentences": [{"raw": "A cat."}]}
    ]})  # fmt: skip
    write("questions.json", {"questions": [{"image_id": 9, "question": "what?", "question_id": 1}]})
    write("questions_answers.json", {"annotations": [{"question_id": 1, "answers": [{"answer": "two"}] * 10}]})
    write("val.csv", "label,youtube_id,time_start,time_end,split\nwaving,abc,3,13,val\n")
    write("ssv2.json", [{"id": "78", "label": "holding a pen", "template": "Holding [something]"}])
    write("dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    write("names.json", ["cat", "dog"])
    (folder / "tars").mkdir()
    for i in range(2):
        img2dataset(folder / "tars" / f"{i}.tar", 2)
    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1,zstd")
    writer.write(encode_record(Record("1", media=Media("image", image, "1"), captions=("one",))))
    writer.close()
    tfds_builders.Digits(data_dir=folder / "tfds", file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize("path", CASES)
def test_records_of_a_bucket_are_those_of_a_disk(path: str, folder: Path, bucket: str) -> None:
    format, kind, fields = CASES[path]
    upload_folder(str(folder), to_path(f"{bucket}/data"))

    def config(root: str) -> SourceConfig:
        place = {name: f"{root}/{value}" if name == "media" else value for name, value in fields.items()}
        return SourceConfig(format=format, kind=kind, path=f"{root}/{path}", **place)

    def plain(record: Record) -> Any:
        """Return a record without the place of its media, and its frames."""
        if record.media is None:
            return record
        frames = load_visual(record.media, VISUAL, np.random.default_rng(0)).frames.tolist()
        return dataclasses.replace(record, media=Media(record.media.kind, b"", "")), frames

    local, remote = (open_source(config(root), VISUAL) for root in (str(folder), f"{bucket}/data"))
    assert len(local) == len(remote) >= 1
    assert [plain(remote[i]) for i in range(len(remote))] == [plain(local[i]) for i in range(len(local))]
    assert source_fingerprint(config(f"{bucket}/data")) == source_fingerprint(config(str(folder)))


def test_all_formats_are_read_from_buckets() -> None:
    assert {format for format, _, _ in CASES.values()} == set(FORMATS) - {"digitworld"}


def test_missing_data_are_one_sentence(bucket: str) -> None:
    for format in sorted(set(FORMATS) - {"digitworld"}):
        with pytest.raises(DataError, match=rf"^{bucket}/none.* (does not exist|is not a TFDS data set)"):
            open_source(SourceConfig(format=format, path=f"{bucket}/none"), VISUAL)


def test_the_data_folder_may_be_in_a_bucket(bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (to_path(bucket) / "names.json").write_bytes((folder / "names.json").read_bytes())
    monkeypatch.setenv("MPLUG2_DATA", bucket)
    source = file_source("image", "a.json", "images")
    assert (source.path, source.media) == (f"{bucket}/a.json", f"{bucket}/images")
    assert read_class_names("names.json", 2).names == ("cat", "dog")
    assert read_class_names("none.json", 2).names[0].startswith("class 0 of")
