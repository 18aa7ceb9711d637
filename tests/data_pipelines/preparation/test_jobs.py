"""Work shared by workers: files do not depend on their number, and a folder belongs to one job."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig, VisualConfig
from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.digitworld.source import DigitWorld
from data_pipelines.errors import DataError
from data_pipelines.loader import ExampleBuilder
from data_pipelines.preparation import validate as validation
from data_pipelines.preparation.convert import convert
from data_pipelines.preparation.corpus import write_corpus_shards
from data_pipelines.preparation.jobs import JOB_FILE, Job, Worker, join_job, parse_worker, read_job
from data_pipelines.preparation.shards import summarize_shards
from data_pipelines.preparation.validate import SourceChecks, read_reports, validate, validate_share
from data_pipelines.sources.array_record import ArrayRecordSource
from data_pipelines.sources.files import read_lines
from data_pipelines.tokenizers import train_wordpiece

TOKENIZER = train_wordpiece(vocabulary_texts(60), 160)
SETTINGS = SourceConfig().identity()
COUNTS = (1, 2, 3, 8, 32)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_workers(run: Callable[[Worker], object], count: int) -> None:
    """Run all workers, the last one first, and one of them twice."""
    for index in (*range(count - 1, -1, -1), count // 2):
        run(Worker(index, count))


def consume(results: Iterable[Any]) -> None:
    for _ in results:
        pass


@given(count=st.integers(1, 64), items=st.integers(0, 200))
def test_every_item_belongs_to_one_worker(count: int, items: int) -> None:
    shares = [Worker(index, count).select_share(range(items)) for index in range(count)]
    assert sorted(item for share in shares for item in share) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [parse_worker(f"{index}/{count}") for index in (0, count - 1)] == [
        Worker(0, count),
        Worker(count - 1, count),
    ]


@pytest.mark.parametrize("text", ["", "3", "3/", "3/3", "-1/3", "1/0", "a/b", "0/3x", "9999999999/99999999999"])
def test_wrong_workers_are_an_error(text: str) -> None:
    with pytest.raises(DataError, match=r"expected INDEX/COUNT with an index from 0 to COUNT - 1, as in 0/64"):
        parse_worker(text)


@pytest.mark.parametrize("count", COUNTS)
def test_converted_shards_do_not_depend_on_the_number_of_workers(count: int, tmp_path: Path) -> None:
    world = DigitWorld("image", size=23)
    consume(convert(world, SETTINGS, tmp_path / "one", shards=5))
    run_workers(lambda worker: consume(convert(world, SETTINGS, tmp_path / "many", shards=5, worker=worker)), count)
    assert files_in(tmp_path / "many") == files_in(tmp_path / "one")
    summary = summarize_shards(tmp_path / "many")
    assert (summary.records, summary.missing, summary.bad_records) == (23, [], [])
    assert len(ArrayRecordSource(str(tmp_path / "many"))) == 23


@given(texts=st.lists(st.text("a b\n\N{SNOWMAN}", max_size=40), min_size=1, max_size=4), shards=st.integers(1, 9))
def test_lines_belong_to_one_range_of_bytes(texts: list[str], shards: int, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("texts")
    files = [folder / f"{i}.txt" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    total = sum(file.stat().st_size for file in files)
    bounds = [total * i // shards for i in range(shards + 1)]
    parts = [read_lines(files, start=bounds[i], stop=bounds[i + 1]) for i in range(shards)]
    assert list(itertools.chain(*parts)) == list(read_lines(files))


@pytest.mark.parametrize("count", COUNTS)
def test_chunks_do_not_depend_on_the_number_of_workers(count: int, tmp_path: Path) -> None:
    lines = [f"a red {'four ' * (i % 5)}moves left" for i in range(400)]
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("\n".join(lines[i::3]))
    texts = sorted(tmp_path.glob("*.txt"))

    def write(name: str, worker: Worker) -> None:
        consume(write_corpus_shards(texts, TOKENIZER, 16, tmp_path / name, shards=7, worker=worker))

    write("one", Worker())
    run_workers(lambda worker: write("many", worker), count)
    assert files_in(tmp_path / "many") == files_in(tmp_path / "one")
    source = ArrayRecordSource(str(tmp_path / "many"))
    records = [source[i] for i in range(len(source))]
    assert len({record.key for record in records}) == len(records) == summarize_shards(tmp_path / "many").records
    tokens = [token for record in records for token in record.tokens[1:-1]]
    assert tokens == [token for line in read_lines(texts) for token in TOKENIZER.encode(line)[1:-1]]


def checks_of(path: Path) -> list[SourceChecks]:
    """Return the checks of a source with a bad line and duplicate keys, and of another."""
    rows = [json.dumps({"text": f"line {i}", "id": i % 17}) for i in range(20)]
    path.write_text("\n".join([*rows[:7], "{", *rows[7:]]))
    sources = {
        "rows": SourceConfig(format="annotations", path=str(path), kind="text"),
        "world": SourceConfig(kind="text", max_records=11),
    }
    examples = ExampleConfig(text="sentence", text_length=8)
    data = DataConfig(sources=sources, visual=VisualConfig(), examples=examples, batch_size=2)
    builder = ExampleBuilder(data, TOKENIZER, "stream", 3)
    return [SourceChecks(builder, name, source, f"s/{name}", 1, (f"about {name}",)) for name, source in sources.items()]


@pytest.mark.parametrize("count", COUNTS)
def test_reports_do_not_depend_on_the_number_of_workers(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = checks_of(tmp_path / "rows.jsonl")
    alone = {checks.title: validate(checks) for checks in sources}
    assert alone["s/rows"].duplicate_keys == ("rows/0", "rows/1", "rows/2")
    assert alone["s/rows"].errors == {"unreadable records": 1}
    monkeypatch.setattr(validation, "MIN_PART_RECORDS", 4)
    assert {checks.title: validate(checks) for checks in sources} == alone
    run_workers(lambda worker: validate_share(sources, {"spec": "x"}, tmp_path / "out", worker), count)
    assert read_reports(tmp_path / "out") == alone
    assert len(files_in(tmp_path / "out")) == 1 + 6 + 3
    (tmp_path / "out" / "part-00004-of-00009.msgpack").unlink()
    with pytest.raises(DataError, match=r"1 of 9 parts are missing, the first is part-00004-of-00009.msgpack; start"):
        read_reports(tmp_path / "out")
    (tmp_path / "out" / "part-00004-of-00009.msgpack").write_bytes(b"\x81")
    with pytest.raises(DataError, match=r"part-00004-of-00009.msgpack is damaged; remove it, and start the workers"):
        read_reports(tmp_path / "out")
    validate_share(sources, {"spec": "x"}, tmp_path / "out", Worker())
    assert read_reports(tmp_path / "out") == alone


def test_a_folder_belongs_to_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start ten jobs at once: one has the folder, and the others name what they would do otherwise."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None if seconds > 0.1 else threading.Event().wait(seconds))
    jobs = [Job("convert", {"path": f"path {i}"}, 4) for i in range(10)]

    def join(job: Job) -> str:
        try:
            join_job(tmp_path, job)
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(10) as pool:
        errors = list(pool.map(join, jobs))
    (winner,) = (job for job, error in zip(jobs, errors, strict=True) if not error)
    assert read_job(tmp_path) == winner
    path = winner.settings["path"]
    assert set(filter(None, errors)) == {
        f"{tmp_path} is the output of data convert with path={path!r}, and this one has {job.settings['path']!r}; "
        "choose another folder" for job in jobs if job != winner
    }  # fmt: skip
    assert join(winner) == ""
    for job, message in (
        (Job("chunk", {}, 4), "is the output of data convert; choose another folder for data chunk"),
        (Job("convert", winner.settings, 5), "with files=4, and this one has 5"),
    ):
        assert message in join(job)
    (tmp_path / JOB_FILE).write_text('{"command": 3}')
    assert "job.json is damaged" in join(winner)
    (tmp_path / JOB_FILE).write_text('{"command": "convert", "settings": {}, "files": 1, "format_version": 9}')
    assert "job.json has format version 9, expected 1; update mplug2" in join(winner)


def test_a_killed_worker_continues(tmp_path: Path) -> None:
    """Kill a process while it writes its shards, several times; the files are those of an undisturbed one."""
    command = [
        sys.executable, "-m", "mplug2_jax.cli.main", "data", "convert", "digitworld:", "--max-records", "300",
        "--shards", "30", "--num-threads", "1", "--out", str(tmp_path / "out"), "--worker", "0/2",
    ]  # fmt: skip
    for stop_after in (1, 6):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "out").glob("*.json"))) < 1 + stop_after:
            assert process.poll() is None or stop_after > 1, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    summary = summarize_shards(tmp_path / "out")
    assert 15 <= len(summary.missing) < 30
    config = SourceConfig(max_records=300)
    for name in ("out", "again"):
        for index in (0, 1):
            worker = Worker(index, 2)
            world = DigitWorld("image", size=300)
            consume(convert(world, config.identity(), tmp_path / name, shards=30, worker=worker))
    assert summarize_shards(tmp_path / "out").missing == []
    expected = files_in(tmp_path / "again")
    assert {name: data for name, data in files_in(tmp_path / "out").items() if not name.endswith(".tmp")} == expected
