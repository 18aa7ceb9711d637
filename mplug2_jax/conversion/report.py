"""What a conversion did, tensor by tensor, as a file that can be checked again and a page that can be read."""

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
FORMAT = 1

Fate = Literal["used", "resized", "tied", "dead", "kept", "filled", "fresh", "aside", "left out"]
FATES: Mapping[Fate, str] = {
    "used": "carried over, every bit (rounded only where the type says so)",
    "resized": "carried over onto another grid",
    "tied": "repeats another tensor",
    "dead": "nothing reads it",
    "kept": "nothing reads it; copied from the file that the weights came from",
    "filled": "nothing reads it; the release's own initialisation",
    "fresh": "not in the sources; initialised as the model does",
    "aside": "not asked for",
    "left out": "the other layout has no place for it",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A place in our parameter tree, and the SHA-256 of what stands there (float32, C order)."""

    path: str
    layer: int | None
    sha256: str

    def __str__(self) -> str:
        return self.path if self.layer is None else f"{self.path}[{self.layer}]"


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of the other world: what became of it, its SHA-256 there, and its places here."""

    name: str
    fate: Fate
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    places: tuple[Place, ...] = ()
    max_difference: float = 0.0  # between both sides, after conversion of the type
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tap of both frameworks on the same input; ``relative`` is a share of the tap's largest value.

    Of a generated text it is that of the scores, and 0 where both say the same.
    """

    path: str
    tap: str
    shape: tuple[int, ...]
    max_difference: float
    relative: float
    passed: bool
    text: str = ""  # of a generated one: what PyTorch's model says


@dataclasses.dataclass
class Report:
    """A whole conversion. ``output`` is beside the report; ``sources`` are names and sizes of what was read."""

    direction: Literal["import", "export"]
    kind: str  # "official videoqa", "CLIP (OpenAI) + BERT", ...
    sources: Sequence[Mapping[str, Any]]
    output: str
    rows: list[Row]
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    comparisons: list[Comparison] | None = None  # None: not asked for
    notes: Sequence[str] = ()  # sentences about what was assumed, and about what others would compute otherwise

    @property
    def status(self) -> int:
        """Exit status: 1 if the frameworks were compared and differ."""
        return int(any(not comparison.passed for comparison in self.comparisons or ()))

    def totals(self) -> dict[str, dict[str, int]]:
        """Tensors and elements by fate."""
        totals: dict[str, dict[str, int]] = {}
        for row in self.rows:
            total = totals.setdefault(row.fate, {"tensors": 0, "elements": 0})
            total["tensors"] += 1
            total["elements"] += int(np.prod(row.shape, dtype=np.int64))
        return totals

    def write(self, folder: Path) -> None:
        """Writes both files."""
        content = dataclasses.asdict(self) | {
            "format": FORMAT, "tools": tool_versions(), "totals": self.totals(),
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        (folder / REPORT).write_text(json.dumps(content, indent=1), encoding="utf-8")
        page = _PAGE.render(report=self, content=content, fates=FATES)
        (folder / PAGE).write_text(page, encoding="utf-8")

    def summary(self) -> str:
        """The totals in a few lines."""
        lines = [f"{self.direction}: {self.kind}"]
        for fate, total in self.totals().items():
            lines.append(f"  {total['tensors']:>5} {fate:<8} {total['elements']:>13,} elements  {FATES[fate]}")  # type: ignore[index]
        rate = (self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9) / 1e6
        moved = f"{self.bytes_read / 1e6:,.0f} MB read, {self.bytes_written / 1e6:,.0f} MB written"
        lines += [f"  note: {note}" for note in self.notes]
        lines.append(f"  {moved} in {self.seconds:.1f} s ({rate:,.0f} MB/s)")
        if self.comparisons is not None:
            worst = max(self.comparisons, key=lambda c: c.relative)
            failed = sum(not c.passed for c in self.comparisons)
            lines.append(
                f"  {len(self.comparisons)} taps compared with PyTorch, {failed} differ; largest difference "
                f"{worst.relative:.1e} of a tap's largest value ({worst.path}: {worst.tap})"
            )
            lines += [f"  {c.path}: PyTorch says {c.text!r}" for c in self.comparisons if c.text]
        return "\n".join(lines)


def read_report(path: Path) -> Report:
    """A report from its file or folder.

    Raises:
        UserError: it is missing, damaged, or of a newer format.
    """
    path = path / REPORT if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise UserError(f"{path} has format {content['format']}, but this version reads up to {FORMAT}")
        rows = [
            Row(**{**row, "shape": tuple(row["shape"]), "places": tuple(Place(**place) for place in row["places"])})
            for row in content["rows"]
        ]
        known = {field.name for field in dataclasses.fields(Report)} - {"rows", "comparisons"}
        return Report(rows=rows, **{name: content[name] for name in known if name in content or name != "notes"})
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a {REPORT}, or the folder that holds one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no conversion report, or a damaged one ({error!r})") from error


def digest(value: HostArray) -> str:
    """SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data).hexdigest()


def largest_difference(one: HostArray, other: HostArray) -> float:
    """The largest absolute difference, in float64; 0 for equal bits of the same type."""
    if one.dtype == other.dtype or not one.size:
        return 0.0
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())


def tool_versions() -> dict[str, str]:
    """Versions of everything that could matter."""
    found = {"python": platform.python_version()}
    for name in ("mplug2-jax", "jax", "flax", "orbax-checkpoint", "numpy", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


_PAGE = jinja2.Environment(autoescape=True).from_string(
    (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
)
