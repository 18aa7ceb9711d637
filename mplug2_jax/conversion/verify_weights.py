"""Verify an output against its report: has any tensor changed since?"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

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
        stored = {"/".join(path): path for path in checkpoints.array_specs(step)}
        for path, params in by_path.items():
            if path not in stored:
                yield path, False
                continue
            array = checkpoints.read_arrays([stored[path]], step)[stored[path]]
            for param in params:
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
