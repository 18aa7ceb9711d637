"""ArrayRecord files behind URLs: the bytes and the errors of the library, by one request for each record."""

import contextlib
import itertools
import uuid
from pathlib import Path

import fsspec
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.sources.array_record_chunks import _chunk, decode_chunk
from data_pipelines.sources.array_record_files import RemoteFile, open_files
from data_pipelines.sources.files import find_files
from data_pipelines.storage.file_system import file_system
from tests import fault_proxy

OPTIONS = st.builds(
    "group_size:{},{},{}".format, st.integers(1, 5),
    st.sampled_from(["uncompressed", "zstd:1", "brotli:1", "snappy", "transpose,zstd:1"]),
    st.sampled_from(["pad_to_block_boundary:false", "pad_to_block_boundary:true"]),
)  # fmt: skip
SIZES = st.lists(st.integers(0, 99) | st.integers(65_400, 65_600) | st.just(200_000), min_size=1, max_size=12)


def write(path: Path, options: str, *records: bytes) -> bytes:
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path.read_bytes()


def noise(sizes: list[int]) -> list[bytes]:
    return [
        bytes((7 * i + j * j) % 251 for j in range(min(size, 999))).ljust(size, b"x") for i, size in enumerate(sizes)
    ]


def open_bytes(data: bytes) -> RemoteFile:
    """Open a file with some contents behind a URL."""
    name = uuid.uuid4().hex
    fsspec.filesystem("memory").pipe_file(f"/{name}/a.array_record", data)
    (file,) = open_files(find_files(f"memory://{name}/a.array_record"))
    assert isinstance(file, RemoteFile)
    return file


@settings(max_examples=60)
@given(options=OPTIONS, sizes=SIZES)
def test_records_are_those_of_the_library(options: str, sizes: list[int], tmp_path_factory) -> None:
    path, records = tmp_path_factory.mktemp("a") / "a", noise(sizes)
    file = open_bytes(write(path, options, *records))
    assert [file[row] for row in range(len(file))] == records == ArrayRecordReader(str(path)).read_all()


@settings(max_examples=40)
@given(st.binary(max_size=70), st.integers(0, 10))
def test_hashes_are_those_of_the_library(record: bytes, blocks: int) -> None:
    assert decode_chunk(_chunk(b"", record), 2**16 * blocks, [1, 0]) == [record, b""]


@settings(max_examples=60)
@given(options=OPTIONS, place=st.floats(0, 1), bit=st.integers(0, 7), cut=st.booleans())
def test_damage_is_an_error(options: str, place: float, bit: int, cut: bool, tmp_path_factory) -> None:
    records = noise([10, 70_000, 3000, 0, 65_500])
    data = bytearray(write(tmp_path_factory.mktemp("a") / "a", options, *records))
    at = int(place * (len(data) - 1))
    if cut:
        del data[at:]
    data[at : at + 1] = bytes(byte ^ 1 << bit for byte in data[at : at + 1])
    with contextlib.suppress(DataError):
        file = open_bytes(bytes(data))
        assert len(file) == len(records)
        for row, record in enumerate(records):
            with contextlib.suppress(DataError):
                assert file[row] == record


def test_a_flipped_byte_fails_one_record(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "a", "group_size:1,uncompressed", *noise([70_000] * 9)))
    data[300_000] ^= 1
    file, failed = open_bytes(bytes(data)), []
    for row in range(9):
        try:
            file[row]
        except DataError as error:
            failed.append(str(error))
    (message,) = failed
    assert "record 4 of memory://" in message
    assert "a.array_record is damaged (Corrupted Riegeli/records file: chunk data hash mismatch" in message


@pytest.mark.parametrize("data", [b"", b"junk" * 100, b"junk" * 2**15, bytes(2**18)], ids=len)
def test_other_files(data: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.array_record (has no records: it is empty, truncated|is damaged)"):
        open_bytes(data)


def test_a_record_is_one_request(bucket: str, tmp_path: Path, proxy: fault_proxy.FaultProxy) -> None:
    fs, fs_path = file_system(bucket)
    for i, options in enumerate(["uncompressed", "zstd", "brotli"]):
        write(tmp_path / "a", f"group_size:1,{options}", *noise([100_000 + i] * 30))
        fs.upload(str(tmp_path / "a"), f"{fs_path}/{i}.array_record")
    proxy.requests.clear()
    files = open_files(find_files(f"{bucket}/*.array_record"))
    assert len(proxy.requests) == 1 + len(files)  # the listing, and the ends of the files
    for (i, file), row in itertools.product(enumerate(files), (29, 0, 7)):
        proxy.requests.clear()
        assert len(file[row]) == 100_000 + i
        assert len(proxy.requests) == 1


def test_a_long_footer_takes_another_request(
    bucket: str, tmp_path: Path, proxy: fault_proxy.FaultProxy
) -> None:  # fmt: skip
    fs, fs_path = file_system(bucket)
    write(tmp_path / "a", "group_size:1,uncompressed", *(b"%d" % i for i in range(30_000)))
    fs.upload(str(tmp_path / "a"), f"{fs_path}/a.array_record")
    found = find_files(f"{bucket}/a.array_record")
    proxy.requests.clear()
    (file,) = open_files(found)
    assert len(proxy.find("read")) == 2
    assert [file[row] for row in (0, 12_345, 29_999)] == [b"0", b"12345", b"29999"]
