"""A folder of features: shards that appear whole, and ``index.json``, which says what they are and how far they go.

=============  ==========================================================================================
safetensors    the arrays by name; ``ids`` in the metadata, as a JSON list
npz            the arrays by name, and ``ids``, an array of text; nothing is pickled
parquet        a row for each example: ``id``, the arrays flat (``index.json`` has their shapes)
=============  ==========================================================================================
"""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from data_pipelines.config import ExampleConfig, SourceConfig, VisualConfig
from data_pipelines.sources.files import write_atomically
from mplug2_jax.errors import UserError
from mplug2_jax.inference.features import FeatureShard
from mplug2_jax.renames import with_current_names

INDEX = "index.json"


def _safetensors(shard: FeatureShard) -> bytes:
    # What is not contiguous would be written wrongly.
    arrays = {name: np.ascontiguousarray(value) for name, value in shard.arrays.items()}
    return safetensors.numpy.save(arrays, {"ids": json.dumps(shard.ids)})


def _npz(shard: FeatureShard) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, ids=np.asarray(shard.ids, np.str_), **shard.arrays)
    return file.getvalue()


def _parquet(shard: FeatureShard) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {"id": pyarrow.array(shard.ids, pyarrow.string())}
    for name, value in shard.arrays.items():
        flat = pyarrow.array(value.reshape(-1))
        width = int(np.prod(value.shape[1:]))
        columns[name] = flat if value.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(flat, width)
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue().to_pybytes()


FORMATS: Mapping[str, Callable[[FeatureShard], bytes]] = {
    "safetensors": _safetensors, "npz": _npz, "parquet": _parquet
}  # fmt: skip


class FeatureWriter:
    """The folder, and what it holds so far.

    Args:
        path: of the folder.
        request: all that decides what stands in it, as JSON can hold it; a folder holds the answer to one request.
        format: of the shards, one of :data:`FORMATS`.
        records: that the request is about.

    Raises:
        UserError: a format that nothing installed here writes, or a folder that holds something else, or shards that
            are not what was written.
    """

    def __init__(self, path: Path, request: Mapping[str, Any], format: str, records: int) -> None:
        if format == "parquet":
            _check_parquet()
        self.path, self._format, self._records = path, format, records
        self._request = json.loads(json.dumps({**request, "format": format, "records": records}))
        self.shards: list[dict[str, Any]] = self._read()

    @property
    def done(self) -> int:
        """How many of the records the shards account for."""
        return self.shards[-1]["stop"] if self.shards else 0

    def begin(self) -> None:
        """Claims the folder, and clears away what a killed process left half written."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left in [*self.path.glob("features-*.tmp"), *self.path.glob(f"{INDEX}.*.tmp")]:
            left.unlink()
        self._write_index()

    def write(self, shard: FeatureShard) -> Path:
        """Writes the next shard, and then that it is there."""
        path = self.path / f"features-{len(self.shards):05}.{self._format}"
        data = FORMATS[self._format](shard)
        write_atomically(str(path), data)
        self.shards.append({
            "file": path.name, "ids": len(shard.ids), "first": shard.first, "stop": shard.stop, "bytes": len(data),
            "faults": [dataclasses.asdict(fault) for fault in shard.faults],
        })  # fmt: skip
        self._write_index()
        return path

    def _write_index(self) -> None:
        content = {
            "request": self._request, "complete": self.done == self._records,
            "ids": sum(shard["ids"] for shard in self.shards), "shards": self.shards,
        }  # fmt: skip
        write_atomically(str(self.path / INDEX), json.dumps(content, indent=1).encode())

    def _read(self) -> list[dict[str, Any]]:
        index = self.path / INDEX
        if not index.exists():
            if self.path.exists() and (not self.path.is_dir() or any(p.suffix != ".tmp" for p in self.path.iterdir())):
                raise UserError(f"--out {self.path} is not empty and holds no features; choose a new folder")
            return []
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            before, shards = _with_current_names(content["request"]), content["shards"]
            changed = _differences(before, self._request)
            sizes = {shard["file"]: shard["bytes"] for shard in shards}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error}); choose a new folder, or remove this one") from error
        if changed:
            more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"--out {self.path} holds other features: {'; '.join(changed[:3])}{more}. Ask for the same to go on, "
                "or choose a new folder"
            )
        for name, size in sizes.items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path} is missing or not what was written; choose a new folder, or remove this one")
        return shards


def _with_current_names(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an index of any version was asked for, by the names of today's config fields."""
    current = {ExampleConfig.OLD_NAMES.get(name, name): value for name, value in request.items()}
    if "visual" in current:
        current["visual"] = with_current_names(VisualConfig, current["visual"], "visual")
    inputs = current.get("inputs", {})
    return current | {"inputs": {name: with_current_names(SourceConfig, inputs[name], name) for name in inputs}}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two requests, by its dotted name."""
    found = []
    for name in sorted({*before, *now}):
        old, new, path = before.get(name), now.get(name), f"{where}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{path}.")
        elif old != new:
            found.append(f"{path} was {_short(old)} and is {_short(new)}")
    return found


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:77]}..."


def _check_parquet() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--format parquet needs pyarrow, which is not installed: pip install pyarrow, or choose safetensors or npz"
        ) from error
