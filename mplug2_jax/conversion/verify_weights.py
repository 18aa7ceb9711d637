"""Verify an output against its report: has any tensor changed since?"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from mplug2_jax.conversion.batches import batch_by_size
from mplug2_jax.conversion.files.open import open_source
from mplug2_jax.conversion.files.sources import TensorSource
from mplug2_jax.conversion.layouts.official_state import LEFTOVER_FILE
from mplug2_jax.conversion.report import REPORT, ParamDigest, Report, Row, digest, read_report
from mplug2_jax.errors import UserError
from mplug2_jax.training.checkpoint.checkpoints import open_checkpoint


def verify_output(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield every tensor of an output, in its order, and whether its SHA-256 is the report's.

    Raises:
        UserError: the report or the output is missing or damaged.
    """
    report = read_report(path)
    folder = path if path.is_dir() else path.parent
    if report.direction == "import":
        yield from _verify_import(report, folder)
    else:
        yield from _verify_export(report, folder)


def _verify_import(report: Report, folder: Path) -> Iterator[tuple[str, bool]]:
    checkpoints, step = open_checkpoint(folder / report.output)
    by_path: dict[str, list[ParamDigest]] = {}
    for row in report.rows:
        for param in row.params:
            by_path.setdefault(param.path, []).append(param)
    with contextlib.closing(checkpoints):
        specs = checkpoints.array_specs(step)
        stored = {"/".join(path): path for path in specs}
        sizes = {"/".join(path): math.prod(shape) * dtype.itemsize for path, (shape, dtype) in specs.items()}
        for paths in batch_by_size(by_path, lambda path: sizes.get(path, 0)):
            arrays = checkpoints.read_arrays([stored[path] for path in paths if path in stored], step)
            for path in paths:
                if path not in stored:
                    yield path, False
                    continue
                array = arrays[stored[path]]
                for param in by_path[path]:
                    yield str(param), digest(array if param.layer is None else array[param.layer]) == param.sha256
    if preserved := [row for row in report.rows if row.disposition == "preserved"]:
        yield from _verify_tensors(open_source(folder / LEFTOVER_FILE), preserved)


def _verify_export(report: Report, folder: Path) -> Iterator[tuple[str, bool]]:
    file = folder / report.output
    index = file.with_name(f"{file.name}.index.json")
    if not file.exists() and not index.exists():
        raise UserError(f"{file} is missing, but {folder / REPORT} describes it; export again")
    yield from _verify_tensors(
        open_source(file if file.exists() else index), [row for row in report.rows if row.sha256]
    )


def _verify_tensors(source: TensorSource, rows: Sequence[Row]) -> Iterator[tuple[str, bool]]:
    names = set(source.names())
    for row in rows:
        yield row.name, row.name in names and digest(source.read(row.name)) == row.sha256
