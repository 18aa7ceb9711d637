"""Worker processes: the items of threads in their order, errors, killed workers, shared memory."""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import grain
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig, VisualConfig
from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.errors import DataError, DataWorkerError
from data_pipelines.loader import EvaluationSet, LoadedBatch, Stream
from data_pipelines.order import BatchSchedule, HostShards, HostSlice
from data_pipelines.tokenizers import train_wordpiece
from data_pipelines.workers import (
    _buffer_sizes,
    _initialize_worker,
    _max_shared,
    check_workers,
    example_bytes,
    fit_prefetch,
    prefetch,
)

from .worlds import encode_media, records, write_tar

TOKENIZER = train_wordpiece(vocabulary_texts(60), 160)
SHARDS = HostShards((1,), 2)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Return a mixture of DigitWorld and a tar with two damaged samples; frames are large enough to be shared."""
    members: dict[str, bytes | str] = {}
    for i, record in enumerate(records("video", 6)):
        clip = encode_media(record)
        members[f"{i}.mp4"] = clip[: len(clip) // 2] if i in (1, 4) else clip
        members[f"{i}.txt"] = record.captions[0]
    path = str(write_tar(tmp_path / "a.tar", members))
    sources = {
        "digits": SourceConfig(kind="video", max_records=9),
        "tar": SourceConfig(format="webdataset", path=path, kind="video"),
    }
    visual = VisualConfig(image_size=96, num_frames=4, transform="train")
    examples = ExampleConfig(text_length=12)
    return DataConfig(sources=sources, visual=visual, examples=examples, batch_size=4, prefetch=8)


def with_workers(config: DataConfig, count: int, **fields: Any) -> DataConfig:
    return dataclasses.replace(config, num_workers=count, **fields)


def read_batches(config: DataConfig, count: int = 5, start: int = 3) -> list[LoadedBatch]:
    batches = Stream(config, TOKENIZER, name="s", seed=0).batches(start, SHARDS)
    read = list(itertools.islice(batches, count))
    batches.close()
    return read


def assert_equal(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value)
        assert actual[name].dtype == value.dtype


@pytest.mark.parametrize(
    ("workers", "threads"),
    [(2, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 2), (8, 1), (32, 2)))],
)
def test_batches_are_those_of_threads_to_the_bit(config: DataConfig, workers: int, threads: int) -> None:
    expected = read_batches(config)
    assert any(row.bad_records for batch in expected for row in batch.rows)
    actual = read_batches(with_workers(config, workers, num_threads=threads))
    for batch, other in zip(actual, expected, strict=True):
        assert_equal(batch.arrays, other.arrays)
        for row, other_row in zip(batch.rows, other.rows, strict=True):
            assert (row.ref, row.bad_records) == (other_row.ref, other_row.bad_records)
            assert_equal(row.example.arrays, other_row.example.arrays)
            bare, other_bare = (dataclasses.replace(each.example, arrays={}) for each in (row, other_row))
            assert bare == other_bare
    assert not has_workers()


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    workers=st.integers(1, 64), shards=st.integers(1, 4), per_shard=st.integers(1, 5), start=st.integers(0, 9)
)
def test_slices_of_any_number_of_workers_interleave_to_the_order(
    workers: int, shards: int, per_shard: int, start: int
) -> None:
    order = grain.MapDataset.range(17).seed(1).shuffle().repeat()
    rows: Any = HostSlice(order, BatchSchedule([shards * per_shard]), HostShards((shards - 1,), shards), start)
    slices = [rows[worker::workers] for worker in range(workers)]
    assert [slices[i % workers][i // workers] for i in range(40)] == [rows[i] for i in range(40)]


def test_evaluations_are_those_of_threads_to_the_bit(config: DataConfig) -> None:
    sets = [
        EvaluationSet(with_workers(config, count, visual=VisualConfig(image_size=160)), TOKENIZER, name="e", seed=0)
        for count in (0, 1)
    ]
    expected, actual = (list(each.batches()) for each in sets)
    assert len(actual) == len(expected) == 4
    for batch, other in zip(actual, expected, strict=True):
        assert_equal(batch.arrays, other.arrays)
        assert batch.bad_records == other.bad_records
        assert batch.examples.keys() == other.examples.keys()
    assert sum(len(batch.bad_records) for batch in actual) == 2
    read = list(sets[1].iter_examples([9, 0, 3]))
    assert [example.key for example in read] == ["a/0", "digitworld/video/train/0/0", "digitworld/video/train/0/3"]


# What a worker is


def has_workers() -> bool:
    return any(process.name.startswith("grain") for process in multiprocessing.active_children())


def is_running(pid: int) -> bool:
    """Return whether a process runs (Linux); one that ended may wait for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def inspect(_: object) -> dict[str, Any]:
    """Return what is known in a worker."""
    from data_pipelines.storage.retry import retry_limit

    return {
        "jax": sys.modules.get("jax"), "modules": [name for name in sys.modules if name.startswith("mplug2_jax")],
        "retry_limit": retry_limit(), "signals": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)],
        "main": sys.modules["__main__"].__spec__.name, "pid": os.getpid(),
        "oom_score": Path("/proc/self/oom_score_adj").read_text().strip(),
    }  # fmt: skip


def test_a_worker_imports_no_jax_ignores_signals_of_its_group_and_retries_like_its_parent(config: DataConfig) -> None:
    items = prefetch(grain.MapDataset.range(3).map(inspect), with_workers(config, 1))
    first = next(items)
    assert first.pop("pid") != os.getpid()
    assert first == {
        "jax": None, "modules": [], "retry_limit": 600.0, "signals": [signal.SIG_IGN, signal.SIG_IGN],
        "main": "data_pipelines.workers", "oom_score": "500",
    }  # fmt: skip
    assert sys.modules["__main__"].__name__ == "__main__"
    items.close()
    assert not has_workers()


def initialize_worker_with_prefix(prefix: str, *args: Any) -> None:
    """Initialize a worker whose blocks of shared memory have names of their own."""
    shared_memory._SHM_NAME_PREFIX = f"/{prefix}"  # type: ignore[attr-defined]
    _initialize_worker(*args)


def test_arrays_are_freed_with_their_batch(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = f"t{os.getpid() % 10**6}_"  # other processes of this machine have blocks too
    initialize = functools.partial(initialize_worker_with_prefix, prefix)
    monkeypatch.setattr("data_pipelines.workers._initialize_worker", initialize)
    config = with_workers(config, 1, prefetch=2)
    stream = Stream(config, TOKENIZER, name="s", seed=0)
    with contextlib.closing(stream.batches()) as batches:
        kept = list(itertools.islice(batches, 12))
        assert sum(len(batch.rows) for batch in kept) > 2 * _max_shared(config)
        wait_for_blocks(prefix, 1, _max_shared(config))
        assert all(type(row.example.arrays["frames"]) is np.ndarray for batch in kept for row in batch.rows)
    wait_for_blocks(prefix, 0, 0)


def wait_for_blocks(prefix: str, least: int, most: int) -> None:
    """Wait for a number of blocks of shared memory: on a busy machine they are made and freed late."""

    def count() -> int:
        return len(list(Path("/dev/shm").glob(f"{prefix}*")))

    deadline = time.monotonic() + 60
    while not least <= count() <= most and time.monotonic() < deadline:
        time.sleep(0.05)
    assert least <= count() <= most


def test_workers_end_with_their_parent(tmp_path: Path, repository: Path) -> None:
    program = (
        "import grain, os, signal, time\n"
        "from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig\n"
        "from data_pipelines.workers import prefetch\n"
        "config = DataConfig(sources={'d': SourceConfig()}, examples=ExampleConfig(), batch_size=1, num_workers=2)\n"
        "items = prefetch(grain.MapDataset.range(10**9).map(lambda i: os.getpid()), config)\n"
        "print(next(items), next(items), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )  # without a guard of __main__: a worker does not import it
    path = tmp_path / "program.py"
    path.write_text(program)
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(set(pids)) == 2
    deadline = time.monotonic() + 30
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


# Errors


class UnpicklableError(Exception):
    """An error with a lock."""

    def __init__(self, lock: Any, text: str) -> None:
        super().__init__(text)
        self.lock = lock


def fail(kind: str) -> int:
    """Raise an error of some kind."""
    if kind == "unpicklable":
        raise UnpicklableError(threading.Lock(), "of record 7")
    error = ZeroDivisionError("of record 7")
    error.add_note("while building the example of record 7")
    raise error


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [("plain", ZeroDivisionError, "of record 7"), ("unpicklable", RuntimeError, "UnpicklableError: of record 7")],
)
def test_what_an_item_raises_is_raised_here_with_its_traceback(
    kind: str, error: type[Exception], message: str, config: DataConfig
) -> None:
    items = prefetch(grain.MapDataset.source([kind]).map(fail), with_workers(config, 1))
    with pytest.raises(error, match=message) as caught:
        next(items)
    notes = "".join(caught.value.__notes__)
    assert "while building the example of record 7" in notes or "in fail" in notes
    assert not has_workers()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            signal.SIGKILL,
            "a data worker was killed by SIGKILL, as the kernel does when memory runs out: reduce num_",
        ),
        (signal.SIGBUS, "a data worker was killed by SIGBUS: /dev/shm is full; enlarge it"),
    ],
)
def test_a_killed_worker_is_an_error(number: int, message: str, config: DataConfig) -> None:
    items = prefetch(grain.MapDataset.range(10**6).map(lambda i: os.getpid()), with_workers(config, 2))
    os.kill(next(items), number)
    with pytest.raises(DataWorkerError, match=re.escape(message)):
        list(items)  # what is ready is still delivered
    assert not has_workers()


def sleep(index: int) -> int:
    time.sleep(60 if index else 0)
    return index


def test_closing_does_not_wait_for_an_item_that_takes_long(config: DataConfig) -> None:
    items = prefetch(grain.MapDataset.range(9).map(sleep), with_workers(config, 1, prefetch=1))
    assert next(items) == 0
    start = time.monotonic()
    items.close()
    assert time.monotonic() - start < 30
    deadline = time.monotonic() + 30
    while has_workers():
        assert time.monotonic() < deadline
        time.sleep(0.05)


LOCKED = """
import gc, grain, multiprocessing.synchronize, os, signal, sys
from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig
from data_pipelines.errors import DataWorkerError
from data_pipelines.workers import prefetch

def die(index):
    if index == 40:  # as a worker that is killed while it looks whether it should stop
        for event in [each for each in gc.get_objects() if isinstance(each, multiprocessing.synchronize.Event)]:
            event._cond.acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    return index

config = DataConfig(sources={"d": SourceConfig()}, examples=ExampleConfig(), batch_size=1, num_workers=2)
items = []
try:
    for item in prefetch(grain.MapDataset.range(10**6).map(die), config):
        items.append(item)
except DataWorkerError as error:
    print(len(items), error)
"""


def test_a_worker_that_is_killed_with_a_lock_is_an_error_and_the_program_ends(repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(LOCKED)
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    count, _, message = done.stdout.partition(" ")
    assert int(count) >= 1
    assert message.startswith("a data worker was killed by SIGKILL")


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """Create a control group of Linux whose processes have 256 MiB."""
    root = next((path for path in map(Path, ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")) if path.is_dir()), Path())
    group = root / f"mplug2-{uuid.uuid4().hex}"
    limit = group / ("memory.limit_in_bytes" if root.name == "memory" else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(2**28))
    except OSError as error:
        pytest.skip(f"no control group for memory: {error}")
    yield group
    with contextlib.suppress(OSError):
        group.rmdir()


def allocate(folder: Path, index: int) -> int:
    """Return this process; from the second item on, wait for a file, and take a gibibyte."""
    if index:
        while not (folder / "go").exists():
            time.sleep(0.01)
        np.ones(2**27)
    return os.getpid()


def test_a_worker_that_the_kernel_kills_for_memory(memory_group: Path, config: DataConfig, tmp_path: Path) -> None:
    items = prefetch(grain.MapDataset.range(9).map(functools.partial(allocate, tmp_path)), with_workers(config, 1))
    try:
        (memory_group / "cgroup.procs").write_text(str(next(items)))
    except OSError as error:
        items.close()
        pytest.skip(f"no process can join a control group: {error}")
    (tmp_path / "go").touch()
    with pytest.raises(DataWorkerError, match="killed by SIGKILL, as the kernel does when memory runs out: reduce num"):
        list(items)
    assert not has_workers()


# Resources


def test_examples_that_are_kept_ready_share_the_memory_of_a_host(config: DataConfig) -> None:
    assert example_bytes(config) == 4 * 96 * 96 * 3 + 12 * 4 + 12 + 8
    text = DataConfig(
        sources={"t": SourceConfig(kind="text")}, examples=ExampleConfig(text_length=12), batch_size=4, prefetch=100
    )
    configs = {"video": config, "text": text}
    assert fit_prefetch(configs, 2**30) == configs
    needed = 8 * example_bytes(config) + 100 * example_bytes(text)
    half = fit_prefetch(configs, needed // 2)
    assert {name: each.prefetch for name, each in half.items()} == {"video": 4, "text": 50}
    assert fit_prefetch(configs, 0)["video"].prefetch == 1


@pytest.mark.parametrize(
    ("multiple", "prefetch", "side", "sizes"),
    [
        (12, 96, 96, (12, 1)),
        (64, 64, 96, (8, 1)),
        (64, 8, 96, (1, 1)),
        (12, 1, 96, (1, 1)),
        (12, 64, 512, (1, 15)),
        (7, 26, 96, (1, 5)),
    ],
    ids=["a batch", "a quarter per worker", "little is kept ready", "nothing to spare", "large frames", "prime"],
)
def test_groups_divide_a_batch_and_fit_what_is_kept_ready(
    multiple: int, prefetch: int, side: int, sizes: tuple[int, int], config: DataConfig
) -> None:
    visual = VisualConfig(image_size=side, num_frames=4)
    config = with_workers(config, 2, prefetch=prefetch, visual=visual)
    size, num_buffered = _buffer_sizes(config, multiple)
    assert (size, num_buffered) == sizes
    assert 2 * 2 * (num_buffered + 1) * size <= max(prefetch, 8)


def test_workers_are_checked_against_the_machine(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    check_workers({"config.streams.a.data": config})
    check_workers({"a": with_workers(config, 2)})
    assert caplog.messages == []
    check_workers({"a": with_workers(config, 2), "b": with_workers(config, 1)})
    assert caplog.messages == ["a.num_workers=2, b.num_workers=1: 3 workers on 2 cores; extra workers only use memory"]

    usage = type(shutil.disk_usage("/"))(2**30, 2**30, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    with pytest.raises(DataError, match=r"/dev/shm has 1 MiB free, and examples .* need 12 MiB; enlarge it"):
        check_workers({"a": with_workers(config, 2, prefetch=98)})
    with pytest.raises(DataError, match=r"need 14 MiB"):
        check_workers({"a": with_workers(config, 2, prefetch=98, batch_size=400)}, num_hosts=100)
    with pytest.raises(DataError, match=r"need 56 MiB"):
        check_workers({"a": with_workers(config, 2, prefetch=98, batch_size=200)}, num_batches=2)

    def refuse(**options: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("data_pipelines.workers.SharedMemory", refuse)
    with pytest.raises(DataError, match=r"a\.num_workers=2 need shared memory, which is not available on this machine"):
        check_workers({"a": with_workers(config, 2)})
