"""A folder of features: shards that are written atomically, and ``index.json``, which describes them.

=============  ==========================================================================================
safetensors    the arrays by name; ``ids`` in the metadata, as a JSON list
npz            the arrays by name, and ``ids``, an array of text; nothing is pickled
parquet        a row per example: ``id``, the arrays flat (``index.json`` has their shapes)
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
from data_pipelines.storage.file_system import write_atomically
from mplug2_jax.errors import UserError
from mplug2_jax.inference.features import FeatureShard
from mplug2_jax.renames import with_current_names

INDEX = "index.json"
FORMAT_VERSION = 2


def _safetensors(shard: FeatureShard) -> bytes:
    # safetensors writes the buffer, which must be contiguous.
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
    """A writer of shards of features to a folder, which resumes after the last finished one.

    Args:
        path: of the folder.
        request: everything that determines the features, as JSON values; a folder has the features of one request.
        format: of the shards, one of :data:`FORMATS`.
        records: number of records of the request.

    Raises:
        UserError: the format needs a package that is not installed, the folder has other contents, or shards are
            missing or damaged.
    """

    def __init__(self, path: Path, request: Mapping[str, Any], format: str, records: int) -> None:
        if format == "parquet":
            _check_parquet()
        self.path, self._format, self._records = path, format, records
        self._request = json.loads(json.dumps({**request, "format": format, "records": records}))
        self.shards: list[dict[str, Any]] = self._read()

    @property
    def done(self) -> int:
        """Return the number of records that the shards account for."""
        return self.shards[-1]["stop"] if self.shards else 0

    def begin(self) -> None:
        """Create the folder and its index, and remove unfinished files of a killed process."""
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in [*self.path.glob("features-*.tmp"), *self.path.glob(f"{INDEX}.*.tmp")]:
            unfinished.unlink()
        self._write_index()

    def write(self, shard: FeatureShard) -> Path:
        """Write the next shard, then list it in the index; return its path."""
        path = self.path / f"features-{len(self.shards):05}.{self._format}"
        data = FORMATS[self._format](shard)
        write_atomically(str(path), data)
        self.shards.append({
            "file": path.name, "ids": len(shard.ids), "first": shard.first, "stop": shard.stop, "bytes": len(data),
            "skipped": [dataclasses.asdict(record) for record in shard.bad_records],
        })  # fmt: skip
        self._write_index()
        return path

    def _write_index(self) -> None:
        content = {
            "format_version": FORMAT_VERSION, "request": self._request, "complete": self.done == self._records,
            "ids": sum(shard["ids"] for shard in self.shards), "shards": self.shards,
        }  # fmt: skip
        write_atomically(str(self.path / INDEX), json.dumps(content, indent=1).encode())

    def _read(self) -> list[dict[str, Any]]:
        index = self.path / INDEX
        if not index.exists():
            if self.path.exists() and (not self.path.is_dir() or any(p.suffix != ".tmp" for p in self.path.iterdir())):
                raise UserError(f"--out {self.path} is not empty and has no features; choose a new folder")
            return []
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            shards = [_upgrade_shard(shard) for shard in content["shards"]]
            changed = _differences(_upgrade_request(content["request"]), self._request)
            sizes = {shard["file"]: shard["bytes"] for shard in shards}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error}); choose a new folder, or remove this one") from error
        if changed:
            more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"--out {self.path} has other features: {'; '.join(changed[:3])}{more}. Repeat the same request to "
                "resume, or choose a new folder"
            )
        for name, size in sizes.items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path} is missing or damaged; choose a new folder, or remove this one")
        return shards


def _upgrade_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request of any format with the current names of config fields."""
    current = {ExampleConfig.OLD_NAMES.get(name, name): value for name, value in request.items()}
    if "visual" in current:
        current["visual"] = with_current_names(VisualConfig, current["visual"], "visual")
    if "inputs" in current:
        inputs = current["inputs"].items()
        current["inputs"] = {name: with_current_names(SourceConfig, source, name) for name, source in inputs}
    return current


def _upgrade_shard(shard: Mapping[str, Any]) -> dict[str, Any]:
    return {"skipped" if name == "faults" else name: value for name, value in shard.items()}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """Return the differences between two requests, by dotted name."""
    differences = []
    for name in sorted({*before, *now}):
        old, new, path = before.get(name), now.get(name), f"{where}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            differences += _differences(old, new, f"{path}.")
        elif old != new:
            differences.append(f"{path} was {_shorten(old)} and is {_shorten(new)}")
    return differences


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_parquet() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--format parquet needs pyarrow, which is not installed: pip install pyarrow, or choose safetensors or npz"
        ) from error
