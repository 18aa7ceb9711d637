"""Conversion to ArrayRecord: nothing is lost, finished shards stay, damaged ones are written again."""

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.config import VisualConfig
from data_pipelines.convert import check_shard, convert, encode_frames
from data_pipelines.digitworld.source import DigitWorld
from data_pipelines.errors import DataError
from data_pipelines.record import Record
from data_pipelines.sources.array_record import ArrayRecordSource
from data_pipelines.visual import load_visual

SETTINGS = {"format": "digitworld", "kind": "image", "path": ""}


class Holey:
    """DigitWorld, but some records cannot be read."""

    def __init__(self, *bad: int, size: int = 10) -> None:
        self._world, self._bad = DigitWorld("image", size=size), bad

    def __len__(self) -> int:
        return len(self._world)

    def __getitem__(self, index: int) -> Record:
        if index in self._bad:
            raise DataError(f"record {index} is gone")
        return self._world[index]


def run(source: object, out: Path, shards: int = 3) -> list[Path]:
    return [path for path, _ in convert(source, SETTINGS, out, shards=shards, workers=2)]


@pytest.mark.parametrize("kind", ["image", "video", "text"])
def test_all_records_arrive(kind: str, tmp_path: Path) -> None:
    world = DigitWorld(kind, size=7)
    paths = run(world, tmp_path / "out")
    assert [path.name for path in paths] == [f"data-0000{i}-of-00003.array_record" for i in range(3)]
    assert all(check_shard(path) for path in paths)
    source = ArrayRecordSource(str(tmp_path / "out"))
    assert len(source) == 7
    for i in range(7):
        ours, theirs = source[i], world[i]
        for field in ("key", "captions", "questions", "expressions", "label", "texts", "entailments"):
            assert getattr(ours, field) == getattr(theirs, field)
        if kind == "image":
            assert ours.media is not None
            visual = load_visual(ours.media, VisualConfig(num_frames=1), np.random.default_rng(0))
            np.testing.assert_array_equal(visual.frames, theirs.frames)


def test_a_clip_keeps_its_frames() -> None:
    frames = DigitWorld("video")[0].frames
    assert frames is not None
    media = encode_frames(frames, "x")
    again = load_visual(media, VisualConfig(num_frames=4), np.random.default_rng(0))
    assert np.abs(again.frames.astype(int) - frames).mean() < 12  # video stores colour at half resolution
    assert again.times.tolist() == [0.0, 0.25, 0.5, 0.75]


def test_finished_shards_stay_and_damaged_ones_are_written_again(tmp_path: Path) -> None:
    source = Holey()
    first, second, third = run(source, tmp_path)
    whole, written = [path.read_bytes() for path in (first, second, third)], first.stat().st_mtime_ns
    second.write_bytes(whole[1][:-1000])
    third.unlink()
    assert check_shard(second) is False
    run(source, tmp_path)
    assert [path.read_bytes() for path in (first, second, third)] == whole
    assert first.stat().st_mtime_ns == written


def test_records_that_cannot_be_read_are_left_out_and_named(tmp_path: Path) -> None:
    cards = [card for _, card in convert(Holey(1, 5), SETTINGS, tmp_path, shards=3, workers=1)]
    assert [card.records for card in cards] == [2, 2, 4]
    assert [fault.reason for card in cards for fault in card.bad_records] == ["record 1 is gone", "record 5 is gone"]
    assert len(ArrayRecordSource(str(tmp_path))) == 8


def test_what_is_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    run(Holey(), tmp_path / "a")
    with pytest.raises(DataError, match="made from another source or part of it; choose another folder"):
        list(convert(Holey(), SETTINGS | {"path": "b"}, tmp_path / "a", shards=3, workers=1))
    with pytest.raises(DataError, match=r"holds data-00000-of-00003\.array_record, which is none of the 4 files"):
        run(Holey(), tmp_path / "a", shards=4)
    with pytest.raises(DataError, match="11 shards of 10 records; expected 1 to 10 shards"):
        run(Holey(), tmp_path / "b", shards=11)
