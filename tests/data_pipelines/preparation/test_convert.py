"""Conversion to ArrayRecord: all records are written, complete shards kept, damaged ones rewritten."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.config import SourceConfig, VisualConfig
from data_pipelines.digitworld.source import DigitWorld
from data_pipelines.errors import DataError
from data_pipelines.preparation.convert import convert, encode_frames
from data_pipelines.preparation.shards import check_shard
from data_pipelines.record import Record
from data_pipelines.sources.array_record import ArrayRecordSource
from data_pipelines.visual import load_visual

SETTINGS = SourceConfig().identity()


class FaultySource:
    """DigitWorld with some unreadable records."""

    def __init__(self, *bad: int, size: int = 10) -> None:
        self._world, self._bad = DigitWorld("image", size=size), bad

    def __len__(self) -> int:
        return len(self._world)

    def __getitem__(self, index: int) -> Record:
        if index in self._bad:
            raise DataError(f"record {index} is gone")
        return self._world[index]


def run(source: object, out: Path, shards: int = 3) -> list[Path]:
    return [path for path, _ in convert(source, SETTINGS, out, shards=shards, num_threads=2)]


@pytest.mark.parametrize("kind", ["image", "video", "text"])
def test_all_records_are_converted(kind: str, tmp_path: Path) -> None:
    world = DigitWorld(kind, size=7)
    paths = run(world, tmp_path / "out")
    assert [path.name for path in paths] == [f"data-0000{i}-of-00003.array_record" for i in range(3)]
    assert all(check_shard(path) for path in paths)
    source = ArrayRecordSource(str(tmp_path / "out"))
    assert len(source) == 7
    for i in range(7):
        converted, original = source[i], world[i]
        for field in ("key", "captions", "questions", "expressions", "label", "texts", "entailments"):
            assert getattr(converted, field) == getattr(original, field)
        if kind == "image":
            assert converted.media is not None
            visual = load_visual(converted.media, VisualConfig(num_frames=1), np.random.default_rng(0))
            np.testing.assert_array_equal(visual.frames, original.frames)


def test_a_converted_video_keeps_its_frames() -> None:
    frames = DigitWorld("video")[0].frames
    assert frames is not None
    media = encode_frames(frames, "x")
    again = load_visual(media, VisualConfig(num_frames=4), np.random.default_rng(0))
    assert np.abs(again.frames.astype(int) - frames).mean() < 12  # video stores colour at half resolution
    assert again.times.tolist() == [0.0, 0.25, 0.5, 0.75]


def test_complete_shards_are_kept_and_damaged_ones_rewritten(tmp_path: Path) -> None:
    source = FaultySource()
    first, second, third = run(source, tmp_path)
    whole, written = [path.read_bytes() for path in (first, second, third)], first.stat().st_mtime_ns
    second.write_bytes(whole[1][:-1000])
    third.unlink()
    assert check_shard(second) is False
    run(source, tmp_path)
    assert [path.read_bytes() for path in (first, second, third)] == whole
    assert first.stat().st_mtime_ns == written


def test_shards_of_an_older_version_are_kept(tmp_path: Path) -> None:
    """Read manifests without ``format_version``, with "faults" and the old names of the source's fields."""
    paths = run(FaultySource(1), tmp_path)
    for path in paths:
        manifest = json.loads(path.with_suffix(".json").read_text())
        assert manifest.pop("format_version") == 2
        manifest["faults"] = manifest.pop("bad_records")
        old_names = {new: old for old, new in SourceConfig.OLD_NAMES.items()}
        manifest["source"] = {old_names.get(name, name): value for name, value in manifest["source"].items()}
        path.with_suffix(".json").write_text(json.dumps(manifest))
    (tmp_path / "job.json").unlink()
    written = [path.stat().st_mtime_ns for path in paths]
    assert run(FaultySource(1), tmp_path) == paths
    assert [path.stat().st_mtime_ns for path in paths] == written
    assert all(map(check_shard, paths))


def test_unreadable_records_are_skipped_and_listed(tmp_path: Path) -> None:
    manifests = [manifest for _, manifest in convert(FaultySource(1, 5), SETTINGS, tmp_path, shards=3, num_threads=1)]
    assert [manifest.records for manifest in manifests] == [2, 2, 4]
    reasons = [record.reason for manifest in manifests for record in manifest.bad_records]
    assert reasons == ["record 1 is gone", "record 5 is gone"]
    assert len(ArrayRecordSource(str(tmp_path))) == 8


def test_conversion_does_not_overwrite_other_files(tmp_path: Path) -> None:
    run(FaultySource(), tmp_path / "a")
    with pytest.raises(
        DataError, match="the output of data convert with path='', and this one has 'b'; choose another"
    ):
        list(convert(FaultySource(), SETTINGS | {"path": "b"}, tmp_path / "a", shards=3, num_threads=1))
    with pytest.raises(DataError, match=r"holds data-00000-of-00003\.array_record, which is none of the 4 files"):
        run(FaultySource(), tmp_path / "a", shards=4)
    with pytest.raises(DataError, match="11 shards of 10 records; expected 1 to 10 shards"):
        run(FaultySource(), tmp_path / "b", shards=11)
