"""Files of tensors: reading returns what was written, and damage is a clear error."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.storage.file_system import FileSystem
from data_pipelines.storage.paths import to_path
from mplug2_jax.conversion.files import sources
from mplug2_jax.conversion.files.open import open_source
from mplug2_jax.conversion.files.safetensors_writer import SafetensorsWriter
from mplug2_jax.conversion.files.sources import DTYPES, SafetensorsSource, TensorInfo
from mplug2_jax.errors import UserError
from tests.weights import assert_same, bert_tensors, write_checkpoint

# Every dtype that the library reads to numpy; it does not read bfloat16.
LIBRARY_DTYPES = [name for name in DTYPES if name != "BF16"]


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.integers(0, 2 if dtype == "BOOL" else 100, shape).astype(DTYPES[dtype])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6),
    types=st.lists(st.sampled_from(LIBRARY_DTYPES), min_size=6, max_size=6),
    seed=st.integers(0, 1000),
)
def test_the_library_reads_our_files_and_we_read_the_library_s(tmp_path: Path, shapes, types, seed) -> None:
    rng = np.random.default_rng(seed)
    tensors = {f"t.{i}": random_array(rng, shape, t) for i, (shape, t) in enumerate(zip(shapes, types, strict=False))}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    writer = SafetensorsWriter(ours, {name: TensorInfo(x.shape, x.dtype) for name, x in tensors.items()})
    for name in rng.permutation(list(tensors)):  # any order
        writer.write(str(name), tensors[str(name)])
    writer.close()
    safetensors.numpy.save_file(tensors, theirs)
    read = safetensors.numpy.load_file(ours)
    for name, value in tensors.items():
        for other in (read[name], SafetensorsSource(theirs).read(name)):
            assert other.dtype == value.dtype
            np.testing.assert_array_equal(other, value)
    assert SafetensorsSource(ours).names() == list(tensors)


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    value = np.arange(6, dtype=DTYPES["BF16"]).reshape(2, 3)
    writer = SafetensorsWriter(tmp_path / "x.safetensors", {"x": TensorInfo((2, 3), DTYPES["BF16"])})
    writer.write("x", value)
    writer.close()
    read = open_source(tmp_path / "x.safetensors").read("x")
    assert read.dtype == DTYPES["BF16"]
    assert read.tobytes() == value.tobytes()


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    safetensors.numpy.save_file({"x": np.arange(100, dtype=np.float32)}, tmp_path / "whole.safetensors")
    return (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("cut", [0, 4, 9, 60, -1])
def test_a_truncated_file_is_an_error(whole: bytes, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"cut\.safetensors is (truncated|not a checkpoint)"):
        open_source(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F8_E4M3"}, "x has dtype F8_E4M3, expected one of F64, F32"),
        ({"shape": [-100]}, "x has shape"),
        ({"shape": [50]}, r"x has shape \[50\] and 400 bytes"),
        ({"data_offsets": [-4, 396]}, "x has shape"),
        ({"data_offsets": [4, 404]}, "x ends at byte"),
    ],
)
def test_an_inconsistent_header_is_an_error(tmp_path: Path, change: dict, message: str) -> None:
    entry = {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]} | change
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "inconsistent.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(400))
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "inconsistent.safetensors")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 70), value=st.integers(0, 255))
def test_a_damaged_header_raises_nothing_but_user_errors(whole: bytes, tmp_path: Path, position, value) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
    try:
        source = open_source(path)
        for name in source.names():
            source.read(name)
    except UserError:  # any other exception fails the test
        return


def write_shards(folder: Path, weight_map: dict[str, str]) -> Path:
    for file in set(weight_map.values()) - {"../a.safetensors"}:
        names = [name for name, where in weight_map.items() if where == file]
        safetensors.numpy.save_file({name: np.full(3, i, np.float32) for i, name in enumerate(names)}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_several_files_are_one_source(tmp_path: Path) -> None:
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}
    source = open_source(write_shards(tmp_path, weight_map))
    assert sorted(source.names()) == ["a", "b", "c"]
    assert source.info("b") == TensorInfo((3,), np.dtype(np.float32))
    assert source.read("c").tolist() == [1, 1, 1]


def test_an_index_may_not_name_files_of_other_folders(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "../a.safetensors"})
    with pytest.raises(UserError, match="expected files in its own folder"):
        open_source(tmp_path)


def test_an_index_with_tensors_that_a_file_lacks_is_an_error(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"a": "one.safetensors"})
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"says that b is in one\.safetensors, which lacks it"):
        open_source(folder)


def test_a_folder_without_weights_and_a_file_of_another_format_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no weights; expected one of model\.safetensors\.index\.json"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("not weights at all")
    with pytest.raises(UserError, match="is not a checkpoint: it begins with b'not weig'"):
        open_source(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    "asked", ["", "bert_model.ckpt", "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"]
)
def test_a_checkpoint_of_tensorflow_is_an_error_with_the_way_to_convert_it(tmp_path: Path, asked: str) -> None:
    for name in ("bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001", "vocab.txt"):
        (tmp_path / name).write_bytes(b"\x00\x00\x01whatever else it holds")
    with pytest.raises(UserError, match=r"is a checkpoint of TensorFlow, which we do not read: write its variables"):
        open_source(tmp_path / asked)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_weights_in_a_bucket_are_read_in_small_ranges(
    name: str, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, remote = write_checkpoint(tmp_path / name, bert_tensors()), to_path(f"{bucket}/{name}")
    data = local.read_bytes()
    remote.write_bytes(data)
    requested, cat_file = [], FileSystem.cat_file

    def record(self: FileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
        requested.append((end or len(data)) - (start or 0))
        return cat_file(self, path, start, end)

    monkeypatch.setattr(FileSystem, "cat_file", record)
    monkeypatch.setattr(sources, "_MAX_REQUEST", 40_000)
    opened = open_source(remote)
    requested.clear()  # the directory of an archive is read by blocks
    for tensor in opened.names():
        opened.read(tensor)
    assert max(requested) <= 40_000
    assert_same(local, remote)
    remote.write_bytes(data[:-1000])
    with pytest.raises(UserError, match=f"{remote} is truncated"):
        open_source(remote)
