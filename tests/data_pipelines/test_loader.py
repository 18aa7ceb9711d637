"""Streams and evaluations on files: batches by number, mixtures, and bad records."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from data_pipelines.bad_records import BadRecord, BadRecordLog, read_bad_records
from data_pipelines.config import (
    BatchStage,
    DataConfig,
    ExampleConfig,
    Format,
    InstructionConfig,
    MixtureStage,
    SourceConfig,
    VisualConfig,
)
from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.errors import DataError
from data_pipelines.loader import EvaluationSet, Stream
from data_pipelines.order import SINGLE_HOST, HostShards
from data_pipelines.sources.formats import FORMATS, open_source
from data_pipelines.tokenizers import train_wordpiece

from .worlds import SIZE, encode_media, img2dataset, records, write_tar

TOKENIZER = train_wordpiece(vocabulary_texts(60), 160)
VISUAL = VisualConfig(image_size=SIZE, num_frames=4)
TEXTS = ExampleConfig(text_length=12)


def data(sources: dict[str, SourceConfig], batch_size: int = 4, **fields: object) -> DataConfig:
    return DataConfig(sources=sources, visual=VISUAL, examples=TEXTS, batch_size=batch_size, **fields)


def stream(config: DataConfig, seed: int = 0) -> Stream:
    return Stream(config, TOKENIZER, name="s", seed=seed)


@pytest.fixture
def tar(tmp_path: Path) -> SourceConfig:
    """Write twelve samples; the third's image is truncated, the seventh's text is not UTF-8."""
    members: dict[str, bytes | str] = {}
    for i, record in enumerate(records("image", 12)):
        image = encode_media(record)
        members[f"{i:02}.png"] = image[: len(image) // 2] if i == 2 else image
        members[f"{i:02}.txt"] = b"\xff" if i == 6 else record.captions[0]
    return SourceConfig(format="webdataset", path=str(write_tar(tmp_path / "a.tar", members)))


DIGITS = {"digits": SourceConfig(max_records=30)}


def test_a_batch_depends_on_its_number_only_for_any_number_of_processes() -> None:
    config = data(DIGITS, 8)
    host_rows = stream(config).batches()
    for step in range(6):
        batch = next(host_rows)
        again = stream(config).batch(step)
        shards = [next(stream(config).batches(step, HostShards((i,), 4))) for i in range(4)]
        for key, value in batch.arrays.items():
            np.testing.assert_array_equal(value, again.arrays[key])
            np.testing.assert_array_equal(value, np.concatenate([shard.arrays[key] for shard in shards]))
    assert not np.array_equal(stream(config, seed=1).batch(0).arrays["text"], stream(config).batch(0).arrays["text"])


def test_captions_are_redrawn_in_every_epoch(tmp_path: Path) -> None:
    members = {"1.png": encode_media(records("image", 1)[0]), "1.json": json.dumps({"captions": list("abcdefgh")})}
    path = str(write_tar(tmp_path / "a.tar", members))
    one = stream(data({"a": SourceConfig(format="webdataset", path=path)}, 1))
    message = [one.batch(step).rows[0].example.text for step in range(12)]
    assert len(set(message)) > 3
    assert message == [one.batch(step).rows[0].example.text for step in range(12)]


def test_mixtures_by_weight_and_by_temperature(tmp_path: Path) -> None:
    img2dataset(tmp_path / "a.tar", 8)
    tars = SourceConfig(format="webdataset", path=str(tmp_path / "a.tar"))
    digits = SourceConfig(max_records=72, weight=3.0)
    mixed = stream(data({"tars": tars, "digits": digits}, 8))
    assert mixed.mixture_weights() == {"tars": 0.25, "digits": 0.75}
    for step in (0, 5, 10_000):
        assert sum(row.ref.source == "tars" for row in mixed.batch(step).rows) == 2
    warm = stream(data({"tars": tars, "digits": dataclasses.replace(digits, weight=1.0)}, mixture_temperature=2.0))
    assert warm.mixture_weights()["digits"] == pytest.approx(72**0.5 / (72**0.5 + 8**0.5))


def test_the_weights_of_a_mixture_change_at_a_step(tmp_path: Path) -> None:
    img2dataset(tmp_path / "a.tar", 8)
    sources = {
        "tars": SourceConfig(format="webdataset", path=str(tmp_path / "a.tar"), weight=3.0),
        "digits": SourceConfig(max_records=72),
    }
    stages = (
        MixtureStage(start_step=1, weights={"digits": 0.0}), MixtureStage(start_step=3, weights={"tars": 7.0}),
        MixtureStage(start_step=5, weights={}),
    )  # fmt: skip
    staged = stream(data(sources, 8, mixture_stages=stages))
    rows = [staged.batch(step).rows for step in range(6)]
    assert [sum(row.ref.source == "tars" for row in each) for each in rows] == [8, 8, 7, 7, 6, 6]
    digits = [row.ref for each in rows for row in each if row.ref.source == "digits"]
    alone = stream(data({"digits": sources["digits"]}, len(digits)))
    assert digits == [row.ref for row in alone.batch(0).rows]
    assert [row.ref for row in next(staged.batches(4, HostShards((1,), 2))).rows] == [row.ref for row in rows[4][4:]]
    warm = stream(data(sources, 8, mixture_stages=stages, mixture_temperature=1.0))
    assert warm.mixture_weights(3)["tars"] == pytest.approx(7 * 8 / (7 * 8 + 72))
    with pytest.raises(DataError, match="mixture_stages is for training: an evaluation reads every record once"):
        EvaluationSet(data(sources, 8, mixture_stages=stages), TOKENIZER, name="s", seed=0)


def test_batches_of_a_ramp_are_consecutive_and_its_steps_change_the_mixture() -> None:
    sources = {"a": SourceConfig(max_records=30), "b": SourceConfig(max_records=30, seed=1)}
    ramp = (BatchStage(last_step=2, batch_size=2), BatchStage(last_step=3, batch_size=4))
    ramped = stream(data(sources, 8, batch_ramp=ramp))
    steady = stream(data(sources, 2))
    rows = [[row.ref for row in ramped.batch(step).rows] for step in range(5)]
    assert [len(each) for each in rows] == [2, 2, 4, 8, 8]
    assert list(itertools.chain(*rows)) == [row.ref for step in range(12) for row in steady.batch(step).rows]
    halves = [itertools.islice(ramped.batches(1, HostShards((i,), 2)), 4) for i in range(2)]
    for step, (first, second) in enumerate(zip(*halves, strict=True), 1):
        assert [row.ref for row in (*first.rows, *second.rows)] == rows[step]
    mixed = stream(data(sources, 8, batch_ramp=ramp, mixture_stages=(MixtureStage(start_step=4, weights={"a": 0.0}),)))
    assert [row.ref for row in mixed.batch(2).rows] == rows[2]
    assert {row.ref.source for row in mixed.batch(3).rows} == {"b"}


def test_bad_records_are_replaced_by_the_next_good_one(tar: SourceConfig) -> None:
    config = data({"tars": tar}, 12, max_bad_fraction=0.5)
    epoch = stream(config).batch(0).rows
    assert sorted(row.example.key for row in epoch) == sorted(
        f"a/{3 if i == 2 else 7 if i == 6 else i:02}" for i in range(12)
    )
    bad_records = {row.ref.index: row.bad_records for row in epoch if row.bad_records}
    assert {index: [record.key for record in each] for index, each in bad_records.items()} == {
        2: ["a/02"],
        6: ["record 6"],
    }
    assert "a.tar:02.png cannot be read as an image" in bad_records[2][0].reason
    assert ".txt of sample a/06 is not UTF-8 text" in bad_records[6][0].reason
    assert [row.example.key for row in next(stream(config).batches()).rows] == [row.example.key for row in epoch]


def test_bad_records_are_counted_logged_once_and_too_many_are_an_error(tar: SourceConfig, tmp_path: Path) -> None:
    path = tmp_path / "data-errors.jsonl"
    log = BadRecordLog(path)
    for row in itertools.chain(*(stream(data({"tars": tar}, 12)).batch(step).rows for step in range(3))):
        log.record(row.ref.source, row.bad_records, max_fraction=0.5)
    assert log.drain_skipped() == {"tars": 6}
    assert log.drain_skipped() == {}
    assert sorted(record.key for record in read_bad_records(path)) == ["a/02", "record 6"]

    again = BadRecordLog(path)
    again.record("tars", read_bad_records(path), max_fraction=0.7)
    assert len(read_bad_records(path)) == 2, "a run that resumes writes nothing twice"
    again.check([again.counts()])
    again.record(
        "tars", read_bad_records(path) + [BadRecord("tars", f"z{i}", "gone") for i in range(90)], max_fraction=0.7
    )
    with pytest.raises(
        DataError, match=r"94 of 96 records of source 'tars' cannot be used, more than max_bad_fraction=0\.7"
    ) as message:
        again.check([again.counts()])
    assert "a/02: a.tar:02.png cannot be read" in str(message.value)
    assert f"all in {path}" in str(message.value)


def test_an_early_bad_record_is_tolerated_unless_the_fraction_is_0(tmp_path: Path) -> None:
    record = [BadRecord("a", "1", "gone")]
    log = BadRecordLog(tmp_path / "x")
    log.record("a", record, max_fraction=0.01)
    log.check([log.counts()])
    log.record("a", [], max_fraction=0.0)
    with pytest.raises(DataError, match="1 of 3 records of source 'a' cannot be used"):
        log.check([log.counts()])


@pytest.mark.parametrize(("fraction", "stops"), [(0.005, False), (0.01, False), (0.015, True), (1.0, True)])
def test_a_limit_judges_the_data_and_not_the_luck_of_a_host(fraction: float, stops: bool, tmp_path: Path) -> None:
    """64 hosts, each of which alone would stop at its first two bad records of a hundred."""
    rng, logs = np.random.default_rng(0), [BadRecordLog(tmp_path / str(host)) for host in range(64)]
    stopped = False
    for _ in range(50):
        for log in logs:
            for bad in rng.random(32) < fraction:
                log.record("a", [BadRecord("a", "x", "gone")] * bool(bad), max_fraction=0.01)
        try:
            logs[0].check([log.counts() for log in logs])
        except DataError:
            stopped = True
            break
    assert stopped == stops


def test_hosts_without_bad_records_stop_too(tmp_path: Path) -> None:
    logs = [BadRecordLog(tmp_path / name) for name in "ab"]
    logs[0].record("a", [BadRecord("a", str(i), "gone") for i in range(9)], max_fraction=0.01)
    logs[1].record("b", [], max_fraction=0.01)
    for log in logs:
        with pytest.raises(DataError, match="9 of 10 records of source 'a' cannot be used"):
            log.check(json.loads(json.dumps([log.counts() for log in logs])))


def test_the_log_of_bad_records_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.bad_records.MAX_LINES", 3)
    log = BadRecordLog(tmp_path / "x")
    log.record("a", [BadRecord("a", str(i), "gone") for i in range(9)], max_fraction=1.0)
    assert [record.key for record in read_bad_records(tmp_path / "x")] == ["0", "1", "2"]
    assert log.drain_skipped() == {"a": 9}


def test_a_source_without_good_records_is_an_error(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "a.tar", {f"{i}.png": b"no picture" for i in range(50)}))
    broken = stream(data({"tars": SourceConfig(format="webdataset", path=path)}))
    with pytest.raises(DataError, match=r"cannot be read as an image.*\(31 replacements failed too"):
        next(broken.batches())


def test_records_of_a_broken_archive_are_replaced_by_those_of_others(tmp_path: Path) -> None:
    image = encode_media(records("image", 1)[0])
    write_tar(tmp_path / "a.tar", {f"{i:03}.png": b"no picture" for i in range(100)})
    write_tar(tmp_path / "b.tar", {f"{i:03}.png": image for i in range(300)})
    tars = SourceConfig(format="webdataset", path=str(tmp_path))
    config = DataConfig(sources={"tars": tars}, visual=VISUAL, examples=ExampleConfig(), batch_size=400)
    rows = stream(config).batch(0).rows
    assert all(row.example.key.startswith("b/") for row in rows)
    assert sum(bool(row.bad_records) for row in rows) == 100


def test_other_exceptions_get_a_note_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("data_pipelines.loader.load_visual", crash)
    with pytest.raises(ZeroDivisionError) as caught:
        next(stream(data(DIGITS)).batches())
    assert any("while building the example of digitworld/image/train/0/" in note for note in caught.value.__notes__)


def test_evaluations_skip_bad_records(tar: SourceConfig) -> None:
    evaluation = EvaluationSet(
        data({"digits": SourceConfig(max_records=3), "tars": tar}, 4), TOKENIZER, name="e", seed=0
    )
    assert len(evaluation) == 15
    batches = list(evaluation.batches())
    assert [batch.arrays["frames"].shape for batch in batches] == [(4, 1, SIZE, SIZE, 3)] * 4
    masks = np.concatenate([batch.arrays["example_mask"] for batch in batches])
    assert np.flatnonzero(~masks).tolist() == [3 + 2, 3 + 6, 15]
    keys = [example.key for batch in batches for example in batch.examples.values()]
    assert keys[:4] == [*(f"digitworld/image/train/0/{i}" for i in range(3)), "a/00"]
    assert len(keys) == 13
    assert [i for batch in batches for i in batch.examples] == np.flatnonzero(masks).tolist()
    bad_records = {i: record.key for batch in batches for i, record in batch.bad_records.items()}
    assert bad_records == {3 + 2: "a/02", 3 + 6: "record 6"}
    shards = [list(evaluation.batches(HostShards((i,), 2))) for i in range(2)]
    for both, whole in zip(zip(*shards, strict=True), batches, strict=True):
        for key, value in whole.arrays.items():
            np.testing.assert_array_equal(np.concatenate([each.arrays[key] for each in both]), value)


def test_an_evaluation_starts_at_any_row() -> None:
    evaluation = EvaluationSet(data({"digits": SourceConfig(max_records=7)}, 2), TOKENIZER, name="e", seed=0)
    whole = [example.key for batch in evaluation.batches() for example in batch.examples.values()]
    for start in range(8):
        batches = list(evaluation.batches(start=start))
        assert [key.key for batch in batches for key in batch.examples.values()] == whole[start:]
        assert [place for batch in batches for place in batch.examples] == list(range(start, 7))
        assert len(batches) == -(-(7 - start) // 2)


def test_an_evaluation_has_all_views_of_an_example_in_adjacent_rows() -> None:
    def evaluation(**views: int) -> EvaluationSet:
        config = data({"digits": SourceConfig(kind="video", max_records=3)}, 4)
        visual = dataclasses.replace(VISUAL, num_frames=4 // views.get("num_clips", 1), **views)
        return EvaluationSet(dataclasses.replace(config, visual=visual), TOKENIZER, name="e", seed=0)

    def rows(evaluation: EvaluationSet, shard: HostShards = SINGLE_HOST) -> list[np.ndarray]:
        return [frames for batch in evaluation.batches(shard) for frames in batch.arrays["frames"]]

    whole, views = evaluation(), evaluation(num_clips=2, num_crops=3)
    assert (len(views), views.views, len(list(views.batches()))) == (3, 6, 5)
    for example, frames in enumerate(rows(whole)[:3]):
        for view in range(6):  # all squares of a square are alike
            np.testing.assert_array_equal(rows(views)[6 * example + view], frames[view // 3 :: 2])
    keys = {row: example.key for batch in views.batches() for row, example in batch.examples.items()}
    assert keys == {row: f"digitworld/video/train/0/{row // 6}" for row in range(18)}
    halves = [rows(views, HostShards((part,), 2)) for part in range(2)]
    for row, frames in enumerate(rows(views)):
        np.testing.assert_array_equal(halves[row % 4 // 2][row // 4 * 2 + row % 2], frames)


def test_views_need_videos_and_evaluations() -> None:
    visual = dataclasses.replace(VISUAL, num_clips=2)
    for kind in ("image", "text"):
        with pytest.raises(DataError, match=f"visual.num_clips=2 needs videos, found sources of kind {kind}"):
            dataclasses.replace(data({"a": SourceConfig(kind=kind)}), visual=visual)
    with pytest.raises(DataError, match=r"visual\.num_crops=3 needs images or videos, found texts; set it to 1"):
        dataclasses.replace(data({"a": SourceConfig(kind="text")}), visual=dataclasses.replace(VISUAL, num_crops=3))
    clips = dataclasses.replace(data({"a": SourceConfig(kind="video")}), visual=visual)
    with pytest.raises(
        DataError, match=r"visual\.num_clips=2 is for evaluations: training sees one view of each example"
    ):
        stream(clips)


IMAGE, TEXT = SourceConfig(), SourceConfig(kind="text")


def stages(*steps: int, **weights: float) -> dict[str, object]:
    return {"mixture_stages": tuple(MixtureStage(start_step=step, weights=weights) for step in steps)}


def ramp(*steps: int) -> dict[str, object]:
    return {"batch_ramp": tuple(BatchStage(last_step=step, batch_size=2) for step in steps)}


REFUSED = {
    "no source": ({}, {}, "needs sources of one kind, found none"),
    "kinds": ({"a": IMAGE, "b": TEXT}, {}, r"found a \(image\), b \(text\); give each kind a stream of its own"),
    "weight": ({"a": SourceConfig(weight=0.0)}, {}, r"sources\.a\.weight=0\.0 must be above 0"),
    "temperature": ({"a": IMAGE}, {"mixture_temperature": 0.0}, r"mixture_temperature=0\.0 must be above 0"),
    "share": ({"a": IMAGE}, {"max_bad_fraction": 2.0}, r"max_bad_fraction=2\.0 is a fraction, expected 0 to 1"),
    "first step": ({"a": IMAGE}, stages(0), r"mixture_stages\[0\]\.start_step=0 must be above 0"),
    "same step": ({"a": IMAGE}, stages(7, 7), r"mixture_stages\[1\]\.start_step=7 must be above 7"),
    "no source of a stage": ({"a": IMAGE}, stages(1, b=1.0), r"mixture_stages\[0\]\.weights\.b is not a source: exp"),
    "weight of a stage": ({"a": IMAGE}, stages(1, a=-1.0), r"mixture_stages\[0\]\.weights\.a=-1\.0 must be at least 0"),
    "no weight": ({"a": IMAGE}, stages(2, a=0.0), r"mixture_stages\[0\]\.weights are 0 for all sources"),
    "ramp": ({"a": IMAGE}, ramp(0), r"batch_ramp\[0\]\.last_step=0 must be above 0"),
    "end of a ramp": ({"a": IMAGE}, ramp(5, 4), r"batch_ramp\[1\]\.last_step=4 must be above 5"),
    "remainder of a ramp": ({"a": IMAGE}, {**ramp(5), "drop_remainder": True}, "drop_remainder with batch_ramp"),
    "remainder": ({"a": IMAGE, "b": IMAGE}, {"drop_remainder": True}, "drop_remainder needs a single source"),
}


@pytest.mark.parametrize(("sources", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_streams_are_an_error(
    sources: dict[str, SourceConfig], fields: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        data(sources, **fields)


def test_a_batch_larger_than_an_epoch_without_remainder() -> None:
    with pytest.raises(DataError, match=r"sources\.a has 3 records, fewer than batch_size=4, with drop_remainder"):
        stream(data({"a": SourceConfig(max_records=3)}, 4, drop_remainder=True))


def test_fields_that_a_format_does_not_read_are_an_error() -> None:
    with pytest.raises(
        DataError, match=r"source\.path='x' is not read by format 'digitworld', which reads label, seed, split"
    ):
        open_source(SourceConfig(path="x"), VISUAL)
    with pytest.raises(DataError, match=r"source\.path is empty; format 'webdataset' needs the path of its files"):
        open_source(SourceConfig(format="webdataset"), VISUAL)
    assert set(FORMATS) == set(get_args(Format))


def test_boxes_with_crops_or_flips_are_an_error() -> None:
    boxes = ExampleConfig(
        instructions={"box": InstructionConfig(templates=("where is {expression}?",))}, target_length=8
    )
    files = {"a": SourceConfig(format="annotations", path="refs.json")}

    def box_stream(sources: dict[str, SourceConfig], **visual: object) -> DataConfig:
        return DataConfig(sources=sources, visual=VisualConfig(**visual), examples=boxes, batch_size=2)

    for transform in ("test", "train", "released_train"):
        with pytest.raises(DataError, match="boxes are not transformed with crops and flips; use 'resize'"):
            box_stream(files, transform=transform)
    box_stream(files, transform="resize")
    box_stream(DIGITS)  # DigitWorld draws squares, of which nothing is cropped


def test_references_are_read_evenly_and_without_decoding(tar: SourceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = ExampleConfig(
        instructions={"caption": InstructionConfig(templates=("",))}, target_length=12, max_references=1
    )
    loaded = stream(dataclasses.replace(data({"tars": tar, "digits": SourceConfig(max_records=24)}), examples=examples))
    monkeypatch.setattr("data_pipelines.loader.load_visual", lambda *_: pytest.fail("a picture was decoded"))
    every = list(loaded.references(1000))
    assert len(every) == 12 + 24 - 1  # one caption is no UTF-8
    assert {ids.shape for ids in every} == {(1, 12)}
    assert len(list(loaded.references(12))) == 4 + 8 - 1  # every third, the seventh among them
    np.testing.assert_array_equal(list(loaded.references(12)), list(loaded.references(12)))
