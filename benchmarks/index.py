"""Open indexes of tars with very many samples in fresh processes: seconds, requests, memory, and the first batches.

    python benchmarks/index.py                                  # a billion samples, and a small real data set
    python benchmarks/index.py --samples 1000000 --tars 20      # quick

The large index is made out of thin air: a sparse file that holds the samples of two batches, for sparse tars. The real
one is of tars in an object store on this machine, scanned by the code of ``mplug2 data index``.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the emulator belongs to the tests

import numpy as np

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig
from data_pipelines.loader import Stream
from data_pipelines.order import infinite_shuffled_mixture
from data_pipelines.sources.files import find_files
from data_pipelines.sources.indexed_tars import MERGED, TarSet
from data_pipelines.sources.tar_index import IndexedTar, Layout, make_header
from data_pipelines.storage import gcs
from data_pipelines.storage.paths import to_path
from data_pipelines.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer
from tests import emulator

BATCH, STEPS = 256, (0, 1_000_000)
EXTENSIONS, KEY = [".jpg", ".json", ".txt"], 10
TEXT = b"a picture"
MAX_SECONDS, MAX_GIB = 60, 4


def write_sparse_index(folder: Path, samples: int, per_tar: int) -> None:
    """Write sparse tars that hold one text, and an index in which the samples of ``STEPS`` have this text."""
    entries = []
    for number in range(-(-samples // per_tar)):
        tar = folder / f"{number:06}.tar"
        with tar.open("wb") as file:
            file.seek(512)
            file.write(TEXT)
            file.truncate(per_tar * 20_000)
        count = min(per_tar, samples - number * per_tar)
        entries.append(IndexedTar(tar.name, tar.stat().st_size, str(tar.stat().st_mtime), count))
    layout = Layout(samples, len(EXTENSIONS), samples * KEY)
    header = make_header(entries, EXTENSIONS, layout)
    order = infinite_shuffled_mixture({"tars": samples}, {"tars": 1.0}, stream="benchmark", seed=0)
    with (folder / MERGED).open("wb") as file:
        file.write(header)
        file.truncate(len(header) + layout.num_bytes)
        key_ends, extents, keys = (len(header) + bound for bound in layout.bounds[:3])
        for row in (order[step * BATCH + i].index for step in STEPS for i in range(BATCH)):
            for at, data in (
                (key_ends + 8 * max(0, row - 1), np.arange(max(1, row), row + 2, dtype="<i8") * KEY),
                (extents + 16 * len(EXTENSIONS) * row, np.array([[0, -1], [0, -1], [512, len(TEXT)]], "<i8")),
                (keys + KEY * row, f"{row:0{KEY}}".encode()),
            ):
                os.pwrite(file.fileno(), data if isinstance(data, bytes) else data.tobytes(), at)


def write_tars(folder: str, tars: int, per_tar: int) -> None:
    """Write tars of texts."""
    for number in range(tars):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for i in range(per_tar):
                info = tarfile.TarInfo(f"{number * per_tar + i:0{KEY}}.txt")
                info.size = len(TEXT)
                tar.addfile(info, io.BytesIO(TEXT))
        (to_path(folder) / f"{number:06}.tar").write_bytes(file.getvalue())


def open_stream(path: str) -> None:
    """Open a stream of tars, read batches, and print what it took."""
    before = read_memory("VmRSS")
    source = SourceConfig(format="webdataset", path=path, kind="text")
    examples = ExampleConfig(text="sentence", text_length=8)
    tokenizer = WordPieceTokenizer([*SPECIAL_TOKENS, "a", "picture"])
    config = DataConfig(sources={"tars": source}, examples=examples, batch_size=BATCH, num_threads=16)
    with measure() as opened:
        stream = Stream(config, tokenizer, name="benchmark", seed=0)
    print_row(f"{sum(stream.records.values()):,} samples: opened in", opened)
    for step in STEPS:
        with measure() as read:
            rows = stream.batch(step).rows
        print_row(f"    batch of {BATCH} of step {step:,}", read)
        print_row("        records and keys", "; ".join(f"{row.ref.index:,} = {row.example.key}" for row in rows[:2]))
    with measure() as fingerprinted:
        stream.fingerprint()
    print_row("    fingerprint of the files", fingerprinted)
    peak = read_memory("VmHWM")
    print_row("    memory: peak of the process, and growth", f"{peak:.2f} GiB, {read_memory('VmRSS') - before:.2f} GiB")
    within = opened.seconds < MAX_SECONDS and peak < MAX_GIB
    print_row(f"    within {MAX_SECONDS} s and {MAX_GIB} GiB", "yes" if within else "NO")


@dataclasses.dataclass
class Cost:
    """Seconds, and requests to an object store."""

    seconds: float = 0.0
    requests: int = 0

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s" + (f", {self.requests:,} requests" if self.requests else "")


@contextlib.contextmanager
def measure() -> Iterator[Cost]:
    """Measure a block."""
    cost, start, send = Cost(), time.perf_counter(), gcs._request_once

    async def count(*args: Any, **kwargs: Any) -> Any:
        cost.requests += 1
        return await send(*args, **kwargs)

    gcs._request_once = count
    yield cost
    gcs._request_once, cost.seconds = send, time.perf_counter() - start


def print_row(name: str, value: object) -> None:
    """Print a line of the table."""
    print(f"{name:<52} {value}", flush=True)


def read_memory(field: str) -> float:
    """Return a memory counter of this process in GiB, from Linux."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 2**20


def open_in_fresh_process(path: str) -> None:
    """Open a stream in a fresh process, which prints."""
    subprocess.run([sys.executable, __file__, "--open", path], check=True)


def main() -> None:
    """Measure both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**9, help="of the large index (default: %(default)s)")
    parser.add_argument("--per-tar", type=int, default=10_000, help="its samples per tar (default: %(default)s)")
    parser.add_argument("--tars", type=int, default=1000, help="of the real data set (default: %(default)s)")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        open_stream(args.open)
        return
    with tempfile.TemporaryDirectory() as name:
        write_sparse_index(Path(name), args.samples, args.per_tar)
        size = (Path(name) / MERGED).stat()
        print_row(
            "made-up index: size, and on disk", f"{size.st_size / 1e9:.1f} GB, {size.st_blocks * 512 / 1e9:.3f} GB"
        )
        open_in_fresh_process(name)
    with emulator.serve() as url:
        emulator.use(url)
        folder = f"{emulator.make_bucket(url, 'benchmark')}/tars"
        write_tars(folder, args.tars, 100)
        with measure() as scanned:
            tars = TarSet(find_files(folder, ".tar"), "")
            tars.build(must_write=True)
        print_row(f"{args.tars:,} tars in an object store: scanned in", scanned)
        open_in_fresh_process(folder)
        with measure() as merged:
            tars.merge()
        print_row("their indexes: merged in", merged)
        open_in_fresh_process(folder)


if __name__ == "__main__":
    main()
