"""Folders of features: reading in every format, resuming, and errors for other contents."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from data_pipelines.bad_records import BadRecord
from mplug2_jax.errors import UserError
from mplug2_jax.inference.feature_files import FORMATS, FeatureWriter
from mplug2_jax.inference.features import FeatureShard

REQUEST = {"feature": {"name": "text/out", "pool": "none"}, "step": 3}
FIRST = FeatureShard(
    0, 3, ("a", "é/b.png"),
    {"features": np.arange(12, dtype=np.float32).reshape(2, 3, 2).transpose(0, 2, 1), "lengths": np.int32([3, 1])},
    (BadRecord("pics", "c.png", "is no picture"),),
)  # fmt: skip
NOTHING = FeatureShard(
    3, 4, (), {"features": np.zeros((0, 2, 3), np.float32), "lengths": np.zeros(0, np.int32)},
    (BadRecord("pics", "d.png", "is empty"),),
)  # fmt: skip
Read = Callable[[Path], tuple[list[str], dict[str, np.ndarray]]]


def read_safetensors(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["ids"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_npz(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    with np.load(path, allow_pickle=False) as file:
        assert file["ids"].dtype.kind == "U"
        return file["ids"].tolist(), {name: file[name] for name in file.files if name != "ids"}


def read_parquet(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    table = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed here").read_table(path)
    rows = {name: table[name].combine_chunks() for name in table.column_names if name != "id"}
    assert rows["features"].type.list_size == 6
    flat = rows["features"].flatten().to_numpy().reshape(len(table), 2, 3)
    return table["id"].to_pylist(), {"features": flat, "lengths": rows["lengths"].to_numpy()}


READERS: dict[str, Read] = {"safetensors": read_safetensors, "npz": read_npz, "parquet": read_parquet}


def open_writer(path: Path, format: str = "safetensors", **changes: object) -> FeatureWriter:
    return FeatureWriter(path, REQUEST | changes, format, 4)


def test_every_format_has_a_reader() -> None:
    assert READERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("format", READERS)
def test_written_shards_are_read(format: str, tmp_path: Path) -> None:
    if format == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed here")
    writer = open_writer(tmp_path / "new" / "f", format)
    writer.begin()
    for shard in (FIRST, NOTHING):
        ids, arrays = READERS[format](writer.write(shard))
        assert ids == list(shard.ids)
        for name, value in shard.arrays.items():
            assert arrays[name].dtype == value.dtype
            np.testing.assert_array_equal(arrays[name], value)
    index = json.loads((tmp_path / "new" / "f" / "index.json").read_text())
    assert index["format_version"] == 2
    assert index["request"] == {**REQUEST, "format": format, "records": 4}
    assert (index["complete"], index["ids"]) == (True, 2)
    assert [(s["file"], s["ids"], s["first"], s["stop"]) for s in index["shards"]] == [
        (f"features-00000.{format}", 2, 0, 3), (f"features-00001.{format}", 0, 3, 4)
    ]  # fmt: skip
    assert index["shards"][0]["skipped"] == [dataclasses.asdict(FIRST.bad_records[0])]
    assert {path.name for path in writer.path.iterdir()} == {"index.json", *(s["file"] for s in index["shards"])}


def test_the_same_request_resumes_after_the_last_finished_shard(tmp_path: Path) -> None:
    first = open_writer(tmp_path)
    assert first.done == 0
    first.begin()
    first.write(FIRST)
    # Killed while the second shard was being written, or before the index listed it.
    (tmp_path / "features-00001.safetensors.0.tmp").write_bytes(b"half")
    (tmp_path / "features-00001.safetensors").write_bytes(b"unknown")
    again = open_writer(tmp_path)
    assert again.done == 3
    again.begin()
    again.write(NOTHING)
    assert open_writer(tmp_path).done == 4
    assert read_safetensors(tmp_path / "features-00001.safetensors")[0] == []
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_with_a_half_written_index_is_restarted(tmp_path: Path) -> None:
    (tmp_path / "index.json.0.tmp").write_text("{")
    open_writer(tmp_path).begin()
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"step": 4}, "step was 3 and is 4"),
        ({"feature": {"name": "text/out", "pool": "cls"}}, "feature.pool was 'none' and is 'cls'"),
        ({"kind": "text"}, "kind was None and is 'text'"),
        ({str(i): i for i in range(5)}, "and 2 more"),
    ],
)
def test_a_different_request_is_an_error(changes: dict[str, object], expected: str, tmp_path: Path) -> None:
    open_writer(tmp_path).begin()
    with pytest.raises(UserError, match="has other features") as error:
        open_writer(tmp_path, **changes)
    assert expected in str(error.value)
    with pytest.raises(UserError, match="format was 'safetensors' and is 'npz'"):
        open_writer(tmp_path, "npz")
    with pytest.raises(UserError, match="records was 4 and is 5"):
        FeatureWriter(tmp_path, REQUEST, "safetensors", 5)


def test_a_folder_with_other_contents_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and has no features; choose a new folder"):
        open_writer(tmp_path)
    with pytest.raises(UserError, match=r"thesis\.txt is not empty"):
        open_writer(tmp_path / "thesis.txt")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"request": 1, "shards": 2}', '{"request": {}, "shards": [3]}'])
def test_a_damaged_index_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        open_writer(tmp_path)


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_shard_is_an_error(cut: bool, tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.begin()
    path = writer.write(FIRST)
    if cut:
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"features-00000\.safetensors is missing or damaged"):
        open_writer(tmp_path)


def test_an_index_of_format_1_is_resumed(tmp_path: Path) -> None:
    source = {"path": "pics", "expand": "record", "max_records": None}
    visual = {"sampling": "uniform", "num_clips": 1, "num_crops": 1, "min_crop_area": 0.5, "background": [0, 0, 0]}
    changes = {"inputs": {"pics": source}, "visual": visual, "tokenization": "standard"}
    writer = open_writer(tmp_path, **changes)
    writer.begin()
    writer.write(FIRST)
    index = json.loads((tmp_path / "index.json").read_text())
    del index["format_version"]
    request = index["request"]
    request["inputs"] = {"pics": {"path": "pics", "each": "record", "size": None}}
    request["visual"] = {"sampling": "middle", "clips": 1, "crops": 1, "min_area": 0.5, "background": [0, 0, 0]}
    request["form"] = request.pop("tokenization")
    index["shards"][0]["faults"] = index["shards"][0].pop("skipped")
    (tmp_path / "index.json").write_text(json.dumps(index))
    again = open_writer(tmp_path, **changes)
    assert (again.done, again.shards) == (3, writer.shards)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow, which is not installed: pip install pyarrow, or choose"):
        open_writer(tmp_path, "parquet")
