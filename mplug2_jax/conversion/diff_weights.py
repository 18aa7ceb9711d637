"""Compare two checkpoints: which tensors only one has, and by how much the others differ, tower by tower.

A tensor of each is in memory at a time; of our own checkpoints a batch of arrays, as stored.
"""

import collections
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mplug2_jax.console import align_columns
from mplug2_jax.conversion.batches import batch_by_size
from mplug2_jax.conversion.export_plan import plan_export
from mplug2_jax.conversion.export_weights import exported_tensors
from mplug2_jax.conversion.files.sources import HostArray, TensorInfo, TensorSource
from mplug2_jax.conversion.inspect_weights import CheckpointContents, read_contents
from mplug2_jax.conversion.layouts import official
from mplug2_jax.conversion.layouts.identify import DetectedCheckpoint
from mplug2_jax.conversion.layouts.name_mapping import first_few
from mplug2_jax.conversion.progress import ByteProgress
from mplug2_jax.conversion.report import PAGES
from mplug2_jax.conversion.tolerance import relative_error
from mplug2_jax.errors import UserError
from mplug2_jax.training.checkpoint.checkpoints import open_checkpoint

_CHUNK = 2**22  # elements that are in float64 at a time
_WEIGHT_TREES = ("params", "ema", "teacher")  # of a checkpoint; the others are the optimizer's and the run's
_NUM_NAMED = 3  # tensors of a tower in the summary


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two checkpoints.

    ``read`` yields the requested tensors: in their order, except that an export's are in that of its checkpoint.
    """

    path: Path
    title: str
    layout: str
    parts: Sequence[str]
    infos: Mapping[str, TensorInfo]
    read: Callable[[Sequence[str]], Iterator[tuple[str, HostArray]]]
    source: TensorSource | None = None  # the file, if it is not one of ours


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """A tensor that both sides have; the differences are None if its shapes differ."""

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    absolute: float | None
    relative: float | None  # to the largest magnitude on both sides

    @property
    def is_equal(self) -> bool:
        """Return whether shapes, dtypes and values are equal."""
        return self.absolute == 0 and self.dtypes[0] == self.dtypes[1]

    def __str__(self) -> str:
        """Return what differs, in a few words."""
        if self.absolute is None:
            return " and ".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        dtypes = f"{' and '.join(self.dtypes)}, " if self.dtypes[0] != self.dtypes[1] else ""
        return f"{dtypes}by {self.absolute:.1e}, {self.relative:.1e} of its largest value"


@dataclasses.dataclass
class TowerDifference:
    """The tensors of one tower."""

    num_equal: int = 0
    differing: list[TensorDifference] = dataclasses.field(default_factory=list)  # other shapes first, then the largest
    only: tuple[list[str], list[str]] = dataclasses.field(default_factory=lambda: ([], []))

    @property
    def num_other_shapes(self) -> int:
        """Return how many tensors have two shapes."""
        return sum(tensor.absolute is None for tensor in self.differing)

    @property
    def num_other_dtypes(self) -> int:
        """Return how many tensors have two dtypes."""
        return sum(tensor.dtypes[0] != tensor.dtypes[1] for tensor in self.differing)

    @property
    def largest(self) -> tuple[float, float]:
        """Return the largest absolute and the largest relative difference."""
        absolute = max((tensor.absolute or 0.0 for tensor in self.differing), default=0.0)
        return absolute, max((tensor.relative or 0.0 for tensor in self.differing), default=0.0)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A whole comparison of two checkpoints, A and B."""

    sides: tuple[Side, Side]
    towers: Mapping[str, TowerDifference]

    @property
    def only_parts(self) -> tuple[list[str], list[str]]:
        """Return the parts of the model that only A and only B have."""
        a, b = (side.parts for side in self.sides)
        _, _, only_a, only_b = self.counts  # the parts of an official file may be unknown, but none is without tensors
        return [p for p in a if only_a and p not in b], [p for p in b if only_b and p not in a]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Return how many tensors are equal, differ, are only in A, and only in B."""
        towers = self.towers.values()
        only_a, only_b = (sum(len(tower.only[i]) for tower in towers) for i in (0, 1))
        return sum(t.num_equal for t in towers), sum(len(t.differing) for t in towers), only_a, only_b

    @property
    def status(self) -> int:
        """Return the exit status: 0 if all tensors are equal, else 1."""
        return int(any(self.counts[1:]))

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row of text for every tower, below a header."""
        header = (
            "tower", "equal", "differ", "only in A", "only in B", "other shape", "other dtype", "largest difference",
            "relative",
        )  # fmt: skip
        rows: list[tuple[str, ...]] = [header]
        for name, tower in self.towers.items():
            counts = (
                tower.num_equal, len(tower.differing), *map(len, tower.only), tower.num_other_shapes,
                tower.num_other_dtypes,
            )  # fmt: skip
            largest = (f"{value:.1e}" if value else "0" for value in tower.largest)
            rows.append((name, *(f"{count:,}" for count in counts), *largest))
        return rows

    def summary(self) -> str:
        """Return both titles, a table of towers, the tensors that differ most, and the result, in lines."""
        lines = [f"{letter}: {side.path}: {side.title}" for letter, side in zip("AB", self.sides, strict=True)]
        for letter, parts in zip("AB", self.only_parts, strict=True):
            lines += [f"only {letter} has the parts {', '.join(parts)}"] if parts else []
        lines += align_columns(self.rows(), right=range(1, 9))
        for tower in self.towers.values():
            lines += [f"{tensor.name} differs: {tensor}" for tensor in tower.differing[:_NUM_NAMED]]
            for letter, names in zip("AB", tower.only, strict=True):
                lines += [f"only in {letter}: {first_few(names, _NUM_NAMED)}"] if names else []
        equal, differ, only_a, only_b = self.counts
        if not self.status:
            return "\n".join([*lines, f"all {equal:,} tensors are equal"])
        return "\n".join([*lines, f"{equal:,} equal, {differ:,} differ, {only_a:,} only in A, {only_b:,} only in B"])

    def to_json(self) -> str:
        """Return everything but the equal tensors' names; differences from NaN or infinity are "inf"."""
        sides = {
            letter: {"path": str(side.path), "title": side.title, "parts": side.parts}
            for letter, side in zip("AB", self.sides, strict=True)
        }
        towers = {
            name: {
                "equal": tower.num_equal,
                "differing": [_finite(dataclasses.asdict(tensor)) for tensor in tower.differing],
                "only_in_A": tower.only[0],
                "only_in_B": tower.only[1],
            }
            for name, tower in self.towers.items()
        }
        return json.dumps({**sides, "equal": not self.status, "towers": towers}, indent=1)

    def to_html(self) -> str:
        """Return a page with everything that differs."""
        return PAGES.get_template("diff.html").render(diff=self)


def _finite(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "inf" if value == math.inf else value for name, value in fields.items()}


def diff_checkpoints(a: Path, b: Path) -> Difference:
    """Compare the weights of two checkpoints that ``convert inspect`` opens.

    One of ours is compared with an official one as its export. Optimizer states are not compared.

    Raises:
        UserError: there is no checkpoint, or the two have no tensor in common.
    """
    with contextlib.ExitStack() as stack:
        contents = [read_contents(path) for path in (a, b)]
        layouts = {each.source.layout if each.source else "ours" for each in contents}
        open_own = _open_exported if layouts == {"ours", "official"} else _open_own
        sides = tuple(
            _open_source(path, each, each.source) if each.source else open_own(path, each, stack)
            for path, each in zip((a, b), contents, strict=True)
        )
        return _compare(sides[0], sides[1])


def _open_source(path: Path, contents: CheckpointContents, source: DetectedCheckpoint) -> Side:
    infos = {name: source.tensors.info(name) for name in source.tensors.names()}
    return Side(
        path, contents.title, source.layout, contents.parts, infos,
        lambda names: ((name, source.tensors.read(name)) for name in names), source.tensors,
    )  # fmt: skip


def _open_own(path: Path, contents: CheckpointContents, stack: contextlib.ExitStack) -> Side:
    checkpoints, step = open_checkpoint(path)
    stack.enter_context(contextlib.closing(checkpoints))
    infos = {"/".join(leaf): info for leaf, info in contents.tensors.items() if leaf[0] in _WEIGHT_TREES}

    def read(names: Sequence[str]) -> Iterator[tuple[str, HostArray]]:
        for batch in batch_by_size(names, lambda name: infos[name].nbytes):
            arrays = checkpoints.read_arrays([tuple(name.split("/")) for name in batch], step)
            yield from (("/".join(leaf), array) for leaf, array in arrays.items())

    return Side(path, contents.title, "ours", contents.parts, infos, read)


def _open_exported(path: Path, contents: CheckpointContents, stack: contextlib.ExitStack) -> Side:
    plan = plan_export(path)
    stack.enter_context(contextlib.closing(plan.checkpoints))
    without = f", which has no {' and no '.join(plan.skipped_parts)}" if plan.skipped_parts else ""
    title, parts = f"{contents.title}, as {plan.title}{without}", official.TASK_PARTS[plan.task]
    return Side(path, title, "official", parts, plan.state, lambda names: exported_tensors(plan, set(names)))


def _compare(a: Side, b: Side) -> Difference:
    common = [name for name in a.infos if name in b.infos]
    if a.layout != b.layout or not common:
        raise UserError(
            f"{a.path} ({a.title}) and {b.path} ({b.title}) have no tensor in common: compare checkpoints with the "
            "same names, or import both and compare the imports"
        )
    towers: dict[str, TowerDifference] = collections.defaultdict(TowerDifference)
    for i, (side, other) in enumerate(((a, b), (b, a))):
        for name in side.infos:
            tower = towers[_tower(name)]
            if name not in other.infos:
                tower.only[i].append(name)
    comparable = [name for name in common if a.infos[name].shape == b.infos[name].shape]
    progress = ByteProgress("comparing", sum(a.infos[name].nbytes for name in comparable))
    with contextlib.closing(progress):
        for name, x, y in _read_pairs(a, b, comparable):
            _add(towers, name, a, b, *compare_values(x, y))
            progress.add_read(x.nbytes)
    for name in common:
        if a.infos[name].shape != b.infos[name].shape:
            _add(towers, name, a, b, None, None)
    for tower in towers.values():
        tower.differing.sort(key=lambda tensor: (tensor.absolute is None, tensor.relative or 0.0), reverse=True)
    return Difference((a, b), dict(towers))


def _add(
    towers: Mapping[str, TowerDifference], name: str, a: Side, b: Side, absolute: float | None, relative: float | None
) -> None:
    (shape_a, dtype_a), (shape_b, dtype_b) = a.infos[name], b.infos[name]
    tensor = TensorDifference(name, (shape_a, shape_b), (dtype_a.name, dtype_b.name), absolute, relative)
    if tensor.is_equal:
        towers[_tower(name)].num_equal += 1
    else:
        towers[_tower(name)].differing.append(tensor)


def _read_pairs(a: Side, b: Side, names: Sequence[str]) -> Iterator[tuple[str, HostArray, HostArray]]:
    """Yield tensors of both sides in the order of one of our checkpoints, if there is one: a file has any order."""
    if a.source:
        yield from ((name, a.source.read(name), y) for name, y in b.read(names))
    elif b.source:
        yield from ((name, x, b.source.read(name)) for name, x in a.read(names))
    else:
        yield from ((name, x, y) for (name, x), (_, y) in zip(a.read(names), b.read(names), strict=True))


def _tower(name: str) -> str:
    """Return the part of our model or the module of another that a tensor belongs to."""
    tree, *path = name.split("/")
    if not path:
        return name.partition(".")[0]
    return path[0] if tree == "params" else f"{path[0]} ({tree})"


def compare_values(a: HostArray, b: HostArray) -> tuple[float, float]:
    """Return the largest absolute difference, and the same relative to the largest finite magnitude of both.

    NaN equals NaN. Where only one is NaN or infinite, the difference is infinite.
    """
    x, y = a.reshape(-1), b.reshape(-1)
    if x.dtype == y.dtype and np.array_equal(x, y):
        return 0.0, 0.0
    absolute = scale = 0.0
    for start in range(0, x.size, _CHUNK):
        p, q = (array[start : start + _CHUNK].astype(np.float64) for array in (x, y))
        finite = np.isfinite(p) & np.isfinite(q)
        if not (finite | (p == q) | (np.isnan(p) & np.isnan(q))).all():
            absolute = math.inf
        p, q = np.where(finite, p, 0), np.where(finite, q, 0)
        absolute = max(absolute, float(np.abs(p - q).max(initial=0.0)))
        scale = max(scale, float(np.abs(p).max(initial=0.0)), float(np.abs(q).max(initial=0.0)))
    return absolute, relative_error(absolute, scale)
