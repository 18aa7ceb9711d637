"""TFDS folders, prepared and read without TensorFlow."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import video
from data_pipelines.config import SourceConfig, VisualConfig
from data_pipelines.errors import DataError
from data_pipelines.media import mux_frames
from data_pipelines.record import Entailment, Question, Record
from data_pipelines.sources.formats import open_source
from data_pipelines.visual import load_visual

from . import tfds_builders as builders

VISUAL = VisualConfig(image_size=8, num_frames=1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (
        builders.Digits,
        builders.CocoCaptions,
        builders.Mnli,
        builders.Sst2,
        builders.Ucf101,
        builders.Xsum,
    ):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    builders.name_as_video(folder / "ucf101" / "1.0.0")
    return folder


def open_tfds(folder: Path, kind: str = "image", split: str = "train"):
    return open_source(SourceConfig(format="tfds", path=str(folder / "1.0.0"), split=split, kind=kind), VISUAL)


def test_images_with_classes(prepared: Path) -> None:
    source = open_tfds(prepared / "digits")
    assert len(source) == 12
    for i in range(12):
        record = source[i]
        assert record.key == f"digits/1.0.0/train/{i}"
        assert record.media is not None
        level = load_visual(record.media, VISUAL, np.random.default_rng(0)).frames[0, 0, 0, 0]
        assert record.label == ("dark" if level < 120 else "light")
    assert len(open_tfds(prepared / "digits", split="train[:4]")) == 4
    assert "tensorflow" not in sys.modules


def test_videos_by_random_access(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_tfds(prepared / "ucf101", "video")
    assert len(source) == 4
    decoded: list[Any] = []
    check_limits = video._check_limits

    def count(media: Any, frames: Any) -> Iterator[Any]:
        for frame in check_limits(media, frames):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video, "_check_limits", count)
    for i in range(4):
        record = source[i]
        assert record.media is not None
        assert record.label in ("darker", "lighter")
        visual = load_visual(record.media, VisualConfig(image_size=8, num_frames=3), np.random.default_rng(0))
        levels = visual.frames[:, 0, 0, 0].tolist()  # PNG loses nothing
        assert levels == ([20, 80, 140] if record.label == "lighter" else [160, 100, 40])
        assert visual.times.tolist() == [1 / 25, 4 / 25, 7 / 25]
    assert len(decoded) == 4 * 3  # of 4 * 10
    image = open_tfds(prepared / "ucf101", "image")[0]
    assert image.media is not None
    assert image.media.kind == "video"
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("frames", [[], [b"GIF89a"], [b""]])
def test_videos_without_readable_frames(frames: list[bytes]) -> None:
    with pytest.raises(DataError, match=r"x has no frame in PNG or JPEG \(.*\); replace or remove it"):
        mux_frames(frames, "x")


def test_captions_pairs_sentences_and_summaries(prepared: Path) -> None:
    assert open_tfds(prepared / "coco_captions")[0].captions == ("one", "two")
    pair: Record = open_tfds(prepared / "mnli", "text")[0]
    assert pair.entailments == (Entailment("é a", "b", "maybe"),)
    sentence = open_tfds(prepared / "sst2", "text")[0]
    assert (sentence.texts, sentence.label) == (("fine",), "positive")
    summary = open_tfds(prepared / "xsum", "text")[0]
    assert summary.questions == (Question("a long story", "story", "summary"),)


def test_missing_data_sets_and_splits(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a TFDS data set \(Could not .*; expected a folder with dataset_i"):
        open_tfds(tmp_path)
    with pytest.raises(DataError, match="has no split 'val'; valid: train"):
        open_tfds(prepared / "digits", split="val")


def test_a_damaged_example(prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared / "digits", tmp_path / "digits")
    (file,) = (folder / "1.0.0").glob("*.array_record*")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=r"digits-train\.array_record\S+ has no records: it is empty, truncated"):
        open_tfds(folder)


def test_without_tfds(monkeypatch: pytest.MonkeyPatch, prepared: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"needs tensorflow-datasets \(.*\): pip install tensorflow-datasets"):
        open_tfds(prepared / "digits")
