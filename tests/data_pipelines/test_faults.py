"""A stream behind a bad network: the batches of the undisturbed run, or an error that starts the run again."""

import collections
import errno
import http.server
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from aiohttp import ClientPayloadError
from array_record.python.array_record_module import ArrayRecordWriter
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from gcsfs.retry import HttpError

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig, VisualConfig
from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.errors import DataError, StorageUnavailableError
from data_pipelines.loader import EvaluationSet, Stream
from data_pipelines.media import Media
from data_pipelines.record import Record
from data_pipelines.sources import files
from data_pipelines.sources.annotations.media import find_media
from data_pipelines.sources.array_record import encode_record
from data_pipelines.storage import retry
from data_pipelines.tokenizers import train_wordpiece
from data_pipelines.visual import load_visual

from .worlds import SIZE, encode_media, records, write_tar

TOKENIZER = train_wordpiece(vocabulary_texts(60), 160)
STEPS = 4

Read = Callable[..., Any]


class Faults:
    """Reads that fail: one after another in a different way, or all of them."""

    def __init__(self) -> None:
        self.every: int = 0
        self.cut = False  # the next reply with a known size
        self.outage: BaseException | None = None
        self.count, self.raised = 0, collections.Counter[str]()
        self._lock = threading.Lock()

    def wrap(self, read: Read, kinds: list[BaseException | None]) -> Read:
        """Return a read of which every n-th fails; None stands for a reply that is cut off: the next
        one whose size is known."""
        kind = itertools.cycle(kinds)

        def failing(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.count += 1
                fails = self.every and self.count % self.every == 0
                error = self.outage or (next(kind) if fails else None)
                self.cut = self.cut or (bool(fails) and error is None)
            if error is not None:
                self.raised[type(error).__name__] += 1
                raise error
            data = read(*args, **kwargs)
            is_exact = isinstance(data, bytes) and len(args) > 3 and args[3] and len(data) == args[3] - (args[2] or 0)
            if self.cut and is_exact:
                self.cut = False
                self.raised["cut off"] += 1
                return data[: len(data) // 2]
            return data

        return failing


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Make the files of memory:// and of mounts fail, and retry without pauses."""
    faults = Faults()
    remote: list[BaseException | None] = [
        HttpError({"code": 503, "message": "slow down"}), ConnectionResetError(errno.ECONNRESET, "reset"),
        ClientPayloadError("Response payload is not completed"), TimeoutError(), None,
    ]  # fmt: skip
    mount: list[BaseException | None] = [OSError(errno.EIO, "I/O error"), OSError(errno.ESTALE, "stale handle")]
    for cls, names, kinds in (
        (MemoryFileSystem, ("cat_file", "info", "ls", "find"), remote), (LocalFileSystem, ("cat_file", "info"), mount)
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(cls, name, faults.wrap(getattr(cls, name), kinds))
    monkeypatch.setattr(files, "_read_local", faults.wrap(files._read_local, mount))
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 1e-4)
    monkeypatch.setattr(retry, "_retry_seconds", 20.0)
    yield faults
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["url", "mount"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a folder of tars, an ArrayRecord file, and annotations with videos or images, of which one is damaged."""
    (tmp_path / "media").mkdir()
    images, rows = records("image", 8), []
    for number, part in enumerate((images[:4], images[4:])):
        members: dict[str, bytes | str] = {}
        for i, record in enumerate(part):
            members |= {f"{i}.png": encode_media(record), f"{i}.txt": record.captions[0]}
        write_tar(tmp_path / f"{number}.tar", members)
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1,uncompressed")
    for i, record in enumerate(images):
        image = Media("image", encode_media(record), str(i))
        writer.write(encode_record(Record(f"{i}", media=image, captions=record.captions)))
        (tmp_path / "media" / f"{i}.png").write_bytes(image.data if i else b"damaged")
        rows.append({"image": f"{i}.png", "caption": record.captions[0]})
    writer.close()
    clips = [{"video": f"{i}.mp4", "caption": record.captions[0]} for i, record in enumerate(records("video", 4))]
    for row, record in zip(clips, records("video", 4), strict=True):
        (tmp_path / "media" / row["video"]).write_bytes(encode_media(record))
    for name, lines in (("images.jsonl", rows), ("videos.jsonl", clips)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    if request.param == "mount":
        monkeypatch.setattr(retry, "_is_on_network", lambda folder: True)
        return str(tmp_path)
    memory = fsspec.filesystem("memory")
    for file in tmp_path.rglob("*.*"):
        memory.pipe_file(f"/{tmp_path.name}/{file.relative_to(tmp_path)}", file.read_bytes())
    return f"memory://{tmp_path.name}"


def config(place: str, kind: str) -> DataConfig:
    annotations = SourceConfig(format="annotations", kind=kind, path=f"{place}/{kind}s.jsonl", media=f"{place}/media")
    sources = {"rows": annotations}
    if kind == "image":
        sources["tars"] = SourceConfig(format="webdataset", path=f"{place}/{{0..1}}.tar")
        sources["records"] = SourceConfig(format="array_record", path=f"{place}/a.array_record")
    visual = VisualConfig(image_size=SIZE, num_frames=2)
    return DataConfig(sources=sources, visual=visual, examples=ExampleConfig(text_length=12), batch_size=6)


def read(place: str, kind: str) -> list[tuple[list[Any], dict[str, Any]]]:
    stream = Stream(config(place, kind), TOKENIZER, name="s", seed=0)
    assert stream.fingerprint()["sources"].keys() == config(place, kind).sources.keys()
    batches = itertools.islice(stream.batches(), STEPS)
    return [([(row.example.key, row.bad_records) for row in batch.rows], batch.arrays) for batch in batches]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_transient_errors_do_not_change_the_batches(kind: str, place: str, faults: Faults) -> None:
    expected = read(place, kind)
    replaced = {bad.key for rows, _ in expected for _, bad_records in rows for bad in bad_records}
    assert replaced == ({"images/1"} if kind == "image" else set())
    faults.every = 3
    found = read(place, kind)
    assert [rows for rows, _ in found] == [rows for rows, _ in expected]
    for (_, before), (_, after) in zip(expected, found, strict=True):
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array)
    network = {"HttpError", "ConnectionResetError", "ClientPayloadError", "TimeoutError"}
    cut_off = {"cut off"} if kind == "image" else set()  # only the records of files have a known size
    assert set(faults.raised) == (network | cut_off if "://" in place else {"OSError"})


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("place", ["url"], indirect=True)
def test_a_refusal_is_no_bad_record(kind: str, place: str, faults: Faults) -> None:
    stream = Stream(config(place, kind), TOKENIZER, name="s", seed=0)
    faults.outage = HttpError({"code": 403, "message": "Forbidden"})
    with pytest.raises(PermissionError, match="permission denied; grant this account access"):
        stream.batch(0)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_file_that_a_web_server_refuses_is_a_bad_record(status: int) -> None:
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        media = find_media(f"http://127.0.0.1:{server.server_port}", "image", "a.png")
        assert media is not None
        with pytest.raises(DataError, match=r"/a\.png cannot be read as an image: "):
            load_visual(media, VisualConfig(image_size=SIZE), np.random.default_rng(0))
        server.shutdown()


@pytest.mark.parametrize("kind", ["image", "video"])
def test_an_outage_is_no_bad_record(
    kind: str, place: str, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    stream = Stream(config(place, kind), TOKENIZER, name="s", seed=0)
    evaluation = EvaluationSet(config(place, kind), TOKENIZER, name="e", seed=0)
    batches = stream.batches()
    next(batches)
    monkeypatch.setattr(retry, "_retry_seconds", 0.01)
    faults.outage = OSError(errno.ESTALE, "stale handle")
    for read_on in (lambda: [next(batches) for _ in range(30)], lambda: stream.batch(9), lambda: evaluation[0]):
        with pytest.raises(StorageUnavailableError, match=r"has been unavailable for .* start again later"):
            read_on()
    with pytest.raises(StorageUnavailableError):
        read(place, kind)
