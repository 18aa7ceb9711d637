"""Examples built ahead of their use: by threads of this process, or of worker processes.

The items and their order do not depend on the number of processes and threads. A worker process sends the arrays of an
example through shared memory, imports no JAX, and ends with the process that started it.
"""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import pickle
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, TypeVar

from absl import flags, logging

if __name__ == "__mp_main__":  # in a worker, before anything else: Grain would import JAX, and warns that it cannot
    sys.modules["jax"] = None  # type: ignore[assignment]
    logging.set_verbosity(logging.ERROR)

import grain
import numpy as np
from grain._src.python.dataset.transformations import process_prefetch
from numpy.typing import NDArray

from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError, DataWorkerError
from data_pipelines.examples import Example
from data_pipelines.storage.retry import retry_limit, set_retry_limit

Item = TypeVar("Item")
Arrays = Mapping[str, NDArray[Any]]

MAX_GROUP_SIZE, MAX_GROUP_BYTES = 64, 2**22
"""Limits of what a worker sends at a time. Sending costs half a millisecond: much for an image, little for a clip."""
MIN_SHARED_BYTES = 2**16
"""Size from which an array goes through shared memory; copying smaller ones is cheaper than a block of their own."""
SHARED_MEMORY = Path("/dev/shm")
"""Where Linux has blocks of shared memory."""
_START_SECONDS, _GRACE_SECONDS = 60.0, 2.0
_WORKER = "grain-process-prefetch"  # the beginning of the names of Grain's processes
_FAILED = "terminated unexpectedly with exit code "  # in the error that Grain raises then


def prefetch(items: grain.MapDataset[Item], config: DataConfig, multiple: int = 1) -> Generator[Item, None, None]:
    """Yield the items of a data set in order, built ahead by ``config.num_workers`` processes of ``num_threads`` each.

    Closing the iterator ends the workers.

    Args:
        items: examples, or named tuples with a field ``example``; others are sent as they are.
        config: of the stream.
        multiple: number of items that are used together. A worker sends as many at a time, or a part of them.

    Raises:
        DataWorkerError: a worker was killed or crashed. What an item raises is raised here, with its traceback.
    """
    threads = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch)
    if not config.num_workers:
        yield from items.to_iter_dataset(threads)
        return
    if not flags.FLAGS.is_parsed():  # Grain reads a flag of its own; this program does not use such flags
        flags.FLAGS.mark_as_parsed()
    threads = dataclasses.replace(threads, prefetch_buffer_size=max(1, config.num_threads))
    size, num_buffered = _buffer_sizes(config, multiple)
    groups = grain.experimental.WithOptionsIterDataset(
        _ExampleGroups(items, size).to_iter_dataset(threads),
        grain.experimental.DatasetOptions(min_shm_size=MIN_SHARED_BYTES),
    )
    processes = grain.MultiprocessingOptions(num_workers=config.num_workers, per_worker_buffer_size=num_buffered)
    iterator = iter(groups.mp_prefetch(processes, functools.partial(_initialize_worker, retry_limit())))
    for arrays, group in _receive_all(iterator, config.num_workers):
        row = itertools.count()
        for has_arrays, item in group:
            yield _merge_arrays(_arrays_of_row(arrays, next(row)), item) if has_arrays else item


def check_workers(configs: Mapping[str, DataConfig], num_hosts: int = 1, num_batches: int = 1) -> None:
    """Check that this machine can run the workers of all streams; log a warning if they are more than its cores.

    Args:
        configs: of the streams, by field.
        num_hosts: number of hosts that share each batch.
        num_batches: batches whose examples are in use at a time.

    Raises:
        DataError: there is no shared memory, or less than the examples that workers keep ready need.
    """
    num_workers = sum(config.num_workers for config in configs.values())
    if not num_workers:
        return
    fields = ", ".join(f"{field}.num_workers={config.num_workers}" for field, config in configs.items())
    try:
        block = SharedMemory(create=True, size=1)
        block.close()
        block.unlink()
    except OSError as error:
        raise DataError(
            f"{fields} need shared memory, which is not available on this machine ({error.strerror or error}); mount "
            f"{SHARED_MEMORY}, or set num_workers to 0"
        ) from error
    needed = sum(
        _max_shared(each, num_hosts, num_batches) * example_bytes(each) for each in configs.values() if each.num_workers
    )
    if SHARED_MEMORY.is_dir() and needed > (free := shutil.disk_usage(SHARED_MEMORY).free):
        raise DataError(
            f"{SHARED_MEMORY} has {free / 2**20:,.0f} MiB free, and examples that workers keep ready need "
            f"{needed / 2**20:,.0f} MiB; enlarge it (docker run --shm-size), reduce prefetch or set num_workers to 0"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers > cores:
        logging.warning("%s: %d workers on %d cores; extra workers only use memory", fields, num_workers, cores)


def fit_prefetch(configs: Mapping[str, DataConfig], num_bytes: int) -> dict[str, DataConfig]:
    """Return the streams of a host with a ``prefetch`` that is reduced, in proportion, to what this memory holds."""
    needed = max(1, sum(config.prefetch * example_bytes(config) for config in configs.values()))
    return {
        name: dataclasses.replace(config, prefetch=min(config.prefetch, max(1, config.prefetch * num_bytes // needed)))
        for name, config in configs.items()
    }


def example_bytes(config: DataConfig) -> int:
    """Return the size of the arrays of one example."""
    return sum(
        int(np.prod(shape)) * np.dtype(dtype).itemsize // config.batch_size for shape, dtype in config.shapes().values()
    )


class _ExampleGroups(grain.MapDataset[Any]):
    """Items as workers send them: some at a time, their arrays stacked apart, and errors that can be pickled."""

    def __init__(self, items: grain.MapDataset[Any], size: int) -> None:
        super().__init__(items)
        self._size = size

    def __len__(self) -> int:
        return -(-len(self._parent) // self._size)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        start = index * self._size
        try:
            rows = [_split_arrays(self._parent[i]) for i in range(start, min(start + self._size, len(self._parent)))]
        except Exception as error:
            raise _make_picklable(error) from error
        arrays = [row for row, _ in rows if row]
        stacked = {name: np.stack([row[name] for row in arrays]) for name in arrays[0]} if arrays else {}
        return stacked, [(bool(row), item) for row, item in rows]


def _buffer_sizes(config: DataConfig, multiple: int) -> tuple[int, int]:
    """Return how many items a worker sends at a time, a divisor of ``multiple``, and the size of each of its buffers.

    Grain has two buffers per worker, one in each process, and beside each a group that waits for room in it. Together
    they hold ``config.prefetch`` items, or one item each where that is more.
    """
    fitting = MAX_GROUP_BYTES // max(1, example_bytes(config))
    limit = min(multiple, MAX_GROUP_SIZE, fitting, config.prefetch // (4 * config.num_workers))
    size = max(size for size in range(1, max(1, limit) + 1) if multiple % size == 0)
    return size, max(1, config.prefetch // (2 * config.num_workers * size) - 1)


def _max_shared(config: DataConfig, num_hosts: int = 1, num_batches: int = 1) -> int:
    """Return the largest number of a stream's examples in the shared memory of a host.

    They are in the buffers, in the three groups that ``prefetch`` and ``_receive_all`` hold, and in batches.
    """
    size, _ = _buffer_sizes(config, config.batch_size)
    rows = -(-config.batch_size // num_hosts)
    return max(config.prefetch, 4 * config.num_workers) + 3 * size + num_batches * rows


def _split_arrays(item: Any) -> tuple[Arrays, Any]:
    """Return the arrays of an item's example, and the item without them."""
    example = getattr(item, "example", item)
    if not isinstance(example, Example):
        return {}, item
    without_arrays = dataclasses.replace(example, arrays={})
    return example.arrays, without_arrays if example is item else item._replace(example=without_arrays)


def _arrays_of_row(arrays: Arrays, row: int) -> Arrays:
    """Return the arrays of one item; small ones are copied, so that who keeps them does not keep those of others."""
    rows = {name: array[row, ...] for name, array in arrays.items()}
    return {name: array if array.nbytes >= MIN_SHARED_BYTES else array.copy() for name, array in rows.items()}


def _merge_arrays(arrays: Arrays, item: Any) -> Any:
    """Return the item that ``_split_arrays`` was given."""
    example = getattr(item, "example", item)
    if not isinstance(example, Example):
        return item
    merged = dataclasses.replace(example, arrays=arrays)
    return merged if example is item else item._replace(example=merged)


def _make_picklable(error: Exception) -> Exception:
    """Return an error that can be pickled: Grain would wait forever for one that cannot."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  its own bytes
        return error
    except Exception:
        replacement = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            replacement.add_note(note)
        replacement.add_note("".join(traceback.format_exception(error)))
        return replacement


def _receive_all(iterator: Any, num_workers: int) -> Generator[tuple[Arrays, list[Any]], None, None]:
    """Yield what workers send; a thread waits for it, since Grain would wait forever for some that were killed.

    A worker may have held a lock that Grain takes to end it.

    Raises:
        DataWorkerError: a worker was killed or crashed. What an item raises is raised here.
    """
    received, stop = queue.Queue[Any](1), threading.Event()

    def receive() -> None:
        try:
            while not stop.is_set() and (sent := next(iterator, None)) is not None:
                received.put(sent)
            received.put(None)
        except BaseException as error:
            received.put(error)
        finally:
            iterator.close()

    thread = threading.Thread(target=receive, daemon=True)
    workers: list[BaseProcess] = []
    try:
        with _replace_main(__name__):
            before = set(_find_workers())
            thread.start()
            deadline = time.monotonic() + _START_SECONDS
            while len(workers) < num_workers and thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
                workers = [worker for worker in _find_workers() if worker not in before]
        while (sent := _wait_for(received, workers)) is not None:
            if isinstance(sent, BaseException):
                raise _translate(sent)
            yield sent
    finally:
        stop.set()
        deadline = time.monotonic() + _GRACE_SECONDS  # a worker may wait for storage much longer
        while thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                received.get(timeout=0.05)  # let the thread end
        if thread.is_alive():
            _kill_workers(workers)


def _wait_for(received: "queue.Queue[Any]", workers: "Sequence[BaseProcess]") -> Any:
    """Return what is received next. Raises DataWorkerError if nothing comes and a worker was killed."""
    deadline = float("inf")
    while True:
        try:
            return received.get(timeout=_GRACE_SECONDS / 4)
        except queue.Empty:
            killed = next((worker for worker in workers if worker.exitcode), None)
            if killed is not None:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if killed is not None and time.monotonic() >= deadline:
                raise DataWorkerError(_reason(int(killed.exitcode or 0))) from None


def _kill_workers(workers: "Sequence[BaseProcess]") -> None:
    """Kill workers, and let the end of the program not wait for the locks that they held."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(_GRACE_SECONDS)
    for finalizer in list(multiprocessing.util._finalizer_registry.values()):  # type: ignore[attr-defined]
        iterator = finalizer._args[0]() if finalizer._callback is process_prefetch._close_if_alive else None
        if iterator is not None and iterator._prefetch_process in workers:
            finalizer.cancel()


def _translate(error: BaseException) -> BaseException:
    """Return an error of Grain, or one that says how a worker ended."""
    _, failed, status = str(error).partition(_FAILED)
    if not (isinstance(error, RuntimeError) and failed):
        return error
    translated = DataWorkerError(_reason(int(status.partition(".")[0])))
    translated.__suppress_context__ = True
    return translated


def _reason(status: int) -> str:
    """Return why a worker with this exit status ended, and what helps."""
    if status >= 0:
        return f"a data worker ended with status {status}; the log has its reason above"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = {
        "SIGKILL": ", as the kernel does when memory runs out: reduce num_workers or prefetch of the streams",
        "SIGBUS": f": {SHARED_MEMORY} is full; enlarge it (docker run --shm-size), or reduce prefetch of the streams",
    }.get(name, "")
    return f"a data worker was killed by {name}{hint}"


def _initialize_worker(retry_seconds: float, index: int, count: int) -> None:
    """Prepare a worker process: Grain calls this in it."""
    del index, count
    logging.set_verbosity(logging.WARNING)
    set_retry_limit(retry_seconds)
    for number in (signal.SIGINT, signal.SIGTERM):  # of a whole process group; the training process decides
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # of Linux: where memory runs out, end a worker before the training process
        Path("/proc/self/oom_score_adj").write_text("500")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _replace_main(module: str) -> Iterator[None]:
    """Let processes that are started here import a module first, in place of the program, which may import JAX."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = sys.modules[module]
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def _find_workers() -> "list[BaseProcess]":
    return [process for process in multiprocessing.active_children() if process.name.startswith(_WORKER)]
