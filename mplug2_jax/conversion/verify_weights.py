"""Checking an output against its report: has any tensor changed since?"""

from collections.abc import Iterator
from pathlib import Path

from mplug2_jax.conversion.files.sources import open_source
from mplug2_jax.conversion.layouts.official_state import REST
from mplug2_jax.conversion.report import REPORT, Place, Report, digest, read_report
from mplug2_jax.errors import UserError
from mplug2_jax.training.checkpoint.checkpoints import open_checkpoint


def check_report(path: Path) -> Iterator[tuple[str, bool]]:
    """Every tensor of an output with whether it is what the report says, in the output's order.

    Raises:
        UserError: a report or an output that is missing or damaged.
    """
    report = read_report(path)
    folder = path if path.is_dir() else path.parent
    if report.direction == "import":
        yield from _imported(report, folder)
    else:
        yield from _exported(report, folder)


def _imported(report: Report, folder: Path) -> Iterator[tuple[str, bool]]:
    checkpoints, step = open_checkpoint(folder / report.output)
    places: dict[str, list[Place]] = {}
    for row in report.rows:
        for place in row.places:
            places.setdefault(place.path, []).append(place)
    try:
        stored = {"/".join(leaf): leaf for leaf in checkpoints.array_specs(step)}
        for path, its_places in places.items():
            if path not in stored:
                yield path, False
                continue
            array = checkpoints.read_arrays([stored[path]], step)[stored[path]]
            for place in its_places:
                yield str(place), digest(array if place.layer is None else array[place.layer]) == place.sha256
    finally:
        checkpoints.close()
    kept = [row for row in report.rows if row.fate == "kept"]
    if kept:
        source = open_source(folder / REST)
        names = set(source.names())
        for row in kept:
            yield row.name, row.name in names and digest(source.read(row.name)) == row.sha256


def _exported(report: Report, folder: Path) -> Iterator[tuple[str, bool]]:
    file = folder / report.output
    index = file.with_name(f"{file.name}.index.json")
    if not file.exists() and not index.exists():
        raise UserError(f"{file} is missing, which {folder / REPORT} describes")
    source = open_source(file if file.exists() else index)
    names = set(source.names())
    for row in report.rows:
        if row.sha256:
            yield row.name, row.name in names and digest(source.read(row.name)) == row.sha256
