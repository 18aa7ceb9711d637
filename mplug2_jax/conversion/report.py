"""The report of a conversion, tensor by tensor: a JSON file that can be verified again and an HTML page."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np

from mplug2_jax.conversion.files.sources import HostArray
from mplug2_jax.errors import UserError

REPORT, PAGE = "conversion-report.json", "conversion-report.html"
PAGES = jinja2.Environment(autoescape=True, loader=jinja2.PackageLoader("mplug2_jax", "conversion"))
"""Templates of HTML pages."""
FORMAT_VERSION = 2

Disposition = Literal[
    "converted", "resized", "tied", "ignored", "preserved", "filled", "initialized", "unused", "skipped"
]  # fmt: skip
DISPOSITIONS: Mapping[Disposition, str] = {
    "converted": "the same values on both sides (rounded only if the dtype is shorter)",
    "resized": "interpolated to another grid",
    "tied": "repeats another tensor",
    "ignored": "not used by the model",
    "preserved": "not used by the model; copied from the original file",
    "filled": "not used by the model; initialized as in the release",
    "initialized": "not in the sources; initialized by the model",
    "unused": "not requested",
    "skipped": "has no counterpart in the official layout",
}

# Names of format 1.
_OLD_KEYS = {"fate": "disposition", "places": "params", "why": "reason"}
_OLD_DISPOSITIONS = {
    "used": "converted", "dead": "ignored", "kept": "preserved", "fresh": "initialized", "aside": "unused",
    "left out": "skipped",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ParamDigest:
    """A parameter of ours, or one layer of a stack, and the SHA-256 of its values (float32, C order)."""

    path: str
    layer: int | None
    sha256: str

    def __str__(self) -> str:
        return self.path if self.layer is None else f"{self.path}[{self.layer}]"


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of the other layout: its disposition, its SHA-256 there, and its parameters here."""

    name: str
    disposition: Disposition
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    params: tuple[ParamDigest, ...] = ()
    max_difference: float = 0.0  # between both sides, after conversion of the dtype
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tap in both frameworks on the same input; ``relative`` is a fraction of the tap's largest magnitude.

    For a generated text it compares the scores, and is 0 if both texts are equal.
    """

    path: str
    tap: str
    shape: tuple[int, ...]
    max_difference: float
    relative: float
    passed: bool
    text: str = ""  # what PyTorch's model generated


@dataclasses.dataclass
class Report:
    """A whole conversion. ``output`` is relative to the report's folder; ``sources`` describes the input."""

    direction: Literal["import", "export"]
    kind: str  # "official videoqa", "CLIP (OpenAI) + BERT", ...
    sources: Sequence[Mapping[str, Any]]
    output: str
    rows: list[Row]
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    comparisons: list[Comparison] | None = None  # None: not requested
    notes: Sequence[str] = ()  # assumptions, and where other code would compute something else

    @property
    def status(self) -> int:
        """Return the exit status: 1 if the frameworks were compared and differ."""
        return int(any(not comparison.passed for comparison in self.comparisons or ()))

    def totals(self) -> dict[str, dict[str, int]]:
        """Count tensors and elements by disposition."""
        totals: dict[str, dict[str, int]] = {}
        for row in self.rows:
            total = totals.setdefault(row.disposition, {"tensors": 0, "elements": 0})
            total["tensors"] += 1
            total["elements"] += int(np.prod(row.shape, dtype=np.int64))
        return totals

    def write(self, folder: Path) -> None:
        """Write the HTML page, then the JSON file."""
        content = dataclasses.asdict(self) | {
            "format_version": FORMAT_VERSION, "tools": tool_versions(), "totals": self.totals(),
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        page = PAGES.get_template("report.html").render(report=self, content=content, dispositions=DISPOSITIONS)
        (folder / PAGE).write_text(page, encoding="utf-8")
        (folder / REPORT).write_text(json.dumps(content, indent=1), encoding="utf-8")

    def summary(self) -> str:
        """Return the totals in a few lines."""
        lines = [f"{self.direction}: {self.kind}"]
        for disposition, total in self.totals().items():
            meaning = DISPOSITIONS[disposition]  # type: ignore[index]
            lines.append(f"  {total['tensors']:>5} {disposition:<11} {total['elements']:>13,} elements  {meaning}")
        rate = (self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9) / 1e6
        lines += [f"  note: {note}" for note in self.notes]
        lines.append(
            f"  {self.bytes_read / 1e6:,.0f} MB read, {self.bytes_written / 1e6:,.0f} MB written in "
            f"{self.seconds:.1f} s ({rate:,.0f} MB/s)"
        )
        if self.comparisons is not None:
            lines.append(f"  compared with PyTorch: {summarize_comparisons(self.comparisons)}")
            lines += [f"  {c.path}: PyTorch generates {c.text!r}" for c in self.comparisons if c.text]
        return "\n".join(lines)


def summarize_comparisons(comparisons: Sequence[Comparison]) -> str:
    """Return how many taps differ, and the largest difference."""
    worst = max(comparisons, key=lambda c: c.relative)
    failed = sum(not c.passed for c in comparisons)
    return (
        f"{failed} of {len(comparisons)} taps differ; max relative difference {worst.relative:.1e} "
        f"({worst.path}: {worst.tap})"
    )


def read_report(path: Path) -> Report:
    """Read a report from its file or folder.

    Raises:
        UserError: it is missing, damaged, or of a newer format.
    """
    path = path / REPORT if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"] if "format_version" in content else content["format"]
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path} has format_version={version}, but this version of mplug2_jax reads up to {FORMAT_VERSION}; "
                "upgrade mplug2_jax"
            )
        fields = {field.name for field in dataclasses.fields(Report)} - {"rows", "comparisons"}
        values = {name: content[name] for name in fields if name in content or name != "notes"}
        return Report(rows=[_read_row(row) for row in content["rows"]], **values)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a {REPORT}, or the folder that holds one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a conversion report, or is damaged ({error!r}); convert again") from error


def _read_row(row: Mapping[str, Any]) -> Row:
    values = {_OLD_KEYS.get(key, key): value for key, value in row.items()}
    disposition = _OLD_DISPOSITIONS.get(values["disposition"], values["disposition"])
    params = tuple(ParamDigest(**param) for param in values["params"])
    return Row(**{**values, "disposition": disposition, "shape": tuple(values["shape"]), "params": params})


def digest(value: HostArray) -> str:
    """Return the SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data).hexdigest()


def max_difference(a: HostArray, b: HostArray) -> float:
    """Return the largest absolute difference, computed in float64; arrays of one dtype are taken as equal."""
    if a.dtype == b.dtype or not a.size:
        return 0.0
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def tool_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a conversion depends on."""
    versions = {"python": platform.python_version()}
    for name in ("mplug2-jax", "jax", "flax", "orbax-checkpoint", "numpy", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
