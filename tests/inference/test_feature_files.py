"""Folders of features: read back in every format, taken up where they end, and never mixed up."""

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


def folder(path: Path, format: str = "safetensors", **changes: object) -> FeatureWriter:
    return FeatureWriter(path, REQUEST | changes, format, 4)


def test_every_format_has_a_reader() -> None:
    assert READERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("format", READERS)
def test_what_was_written_is_read(format: str, tmp_path: Path) -> None:
    if format == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed here")
    into = folder(tmp_path / "new" / "f", format)
    into.begin()
    for shard in (FIRST, NOTHING):
        ids, arrays = READERS[format](into.write(shard))
        assert ids == list(shard.ids)
        for name, value in shard.arrays.items():
            assert arrays[name].dtype == value.dtype
            np.testing.assert_array_equal(arrays[name], value)
    index = json.loads((tmp_path / "new" / "f" / "index.json").read_text())
    assert index["request"] == {**REQUEST, "format": format, "records": 4}
    assert (index["complete"], index["ids"]) == (True, 2)
    assert [(s["file"], s["ids"], s["first"], s["stop"]) for s in index["shards"]] == [
        (f"features-00000.{format}", 2, 0, 3), (f"features-00001.{format}", 0, 3, 4)
    ]  # fmt: skip
    assert index["shards"][0]["faults"] == [dataclasses.asdict(FIRST.faults[0])]
    assert {path.name for path in into.path.iterdir()} == {"index.json", *(s["file"] for s in index["shards"])}


def test_the_same_request_goes_on_behind_the_last_shard_that_is_finished(tmp_path: Path) -> None:
    first = folder(tmp_path)
    assert first.done == 0
    first.begin()
    first.write(FIRST)
    # Killed while the second shard was being written, or when it stood and the index did not say so yet.
    (tmp_path / "features-00001.safetensors.0.tmp").write_bytes(b"half")
    (tmp_path / "features-00001.safetensors").write_bytes(b"unknown")
    again = folder(tmp_path)
    assert again.done == 3
    again.begin()
    again.write(NOTHING)
    assert folder(tmp_path).done == 4
    assert read_safetensors(tmp_path / "features-00001.safetensors")[0] == []
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_was_claimed_by_half_is_claimed_again(tmp_path: Path) -> None:
    (tmp_path / "index.json.0.tmp").write_text("{")
    folder(tmp_path).begin()
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": 4}, "step was 3 and is 4"),
        ({"feature": {"name": "text/out", "pool": "cls"}}, "feature.pool was 'none' and is 'cls'"),
        ({"kind": "text"}, "kind was None and is 'text'"),
        ({str(i): i for i in range(5)}, "and 2 more"),
    ],
)
def test_other_features_are_never_mixed_in(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    folder(tmp_path).begin()
    with pytest.raises(UserError, match="holds other features") as error:
        folder(tmp_path, **changes)
    assert said in str(error.value)
    with pytest.raises(UserError, match="format was 'safetensors' and is 'npz'"):
        folder(tmp_path, "npz")
    with pytest.raises(UserError, match="records was 4 and is 5"):
        FeatureWriter(tmp_path, REQUEST, "safetensors", 5)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no features; choose a new folder"):
        folder(tmp_path)
    with pytest.raises(UserError, match=r"thesis\.txt is not empty"):
        folder(tmp_path / "thesis.txt")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"request": 1, "shards": 2}', '{"request": {}, "shards": [3]}'])
def test_a_damaged_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        folder(tmp_path)


@pytest.mark.parametrize("cut", [True, False])
def test_a_shard_that_is_not_what_was_written_is_refused(cut: bool, tmp_path: Path) -> None:
    into = folder(tmp_path)
    into.begin()
    path = into.write(FIRST)
    if cut:
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"features-00000\.safetensors is missing or not what was written"):
        folder(tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow, which is not installed: pip install pyarrow, or choose"):
        folder(tmp_path, "parquet")
