"""Show what a checkpoint holds without reading an array: a tree of names with shapes, dtypes and counts."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

from mplug2_jax.conversion.files.sources import TensorInfo
from mplug2_jax.conversion.layouts import official
from mplug2_jax.conversion.layouts.identify import DetectedCheckpoint, identify
from mplug2_jax.errors import UserError
from mplug2_jax.training.checkpoint.checkpoints import open_checkpoint


@dataclasses.dataclass(frozen=True)
class CheckpointContents:
    """A checkpoint's title, its parts, and its tensors by the components of their names."""

    title: str
    parts: Sequence[str]
    tensors: Mapping[tuple[str, ...], TensorInfo]
    source: DetectedCheckpoint | None = None  # another project's weights; None: one of our checkpoints


def read_contents(path: Path) -> CheckpointContents:
    """Read names and shapes of a checkpoint in any known layout.

    Raises:
        UserError: there is none.
    """
    if path.is_dir() and ((path / "checkpoints").is_dir() or (path / "state").is_dir() or _has_steps(path)):
        return _read_own_checkpoint(path)
    checkpoint = identify(path)
    parts: Sequence[str] = ("vision",)
    title = checkpoint.title
    if checkpoint.kind == "official":
        parts = official.TASK_PARTS[checkpoint.task or "videoqa"]
        title += f" {checkpoint.task or 'caption or videoqa'}" + (" with its teacher" if checkpoint.has_teacher else "")
    elif checkpoint.kind == "bert":
        parts = ("text", "universal", *(("mlm",) if checkpoint.has_mlm_head else ()))
    tensors = checkpoint.tensors
    infos = {tuple(name.split(".")): tensors.info(name) for name in tensors.names()}
    return CheckpointContents(title, parts, infos, checkpoint)


def _has_steps(path: Path) -> bool:
    return any(child.name.isdigit() for child in path.iterdir())


def _read_own_checkpoint(path: Path) -> CheckpointContents:
    checkpoints, step = open_checkpoint(path)
    parts: Sequence[str] = ()
    with contextlib.closing(checkpoints):
        tensors = {leaf: TensorInfo(*spec) for leaf, spec in checkpoints.array_specs(step).items()}
        with contextlib.suppress(UserError):
            parts = checkpoints.model_metadata(step).parts
    return CheckpointContents(f"checkpoint of step {step}", parts, tensors)


def tree_lines(contents: CheckpointContents, depth: int) -> Iterator[str]:
    """Yield the lines of the tree, down to ``depth`` levels; equal layers are shown once."""
    infos = list(contents.tensors.values())
    yield f"{contents.title}: {_summarize(infos)}"
    if contents.parts:
        yield f"parts: {', '.join(contents.parts)}"
    yield from _branch_lines(unflatten_dict(contents.tensors), "", depth)


def _branch_lines(node: Mapping[str, Any], indent: str, depth: int) -> Iterator[str]:
    children = _merge_equal(node)
    for i, (name, child) in enumerate(children):
        is_last = i == len(children) - 1
        line = f"{indent}{'└─' if is_last else '├─'} {name}"
        if isinstance(child, TensorInfo):
            yield f"{line}  {'x'.join(map(str, child.shape)) or 'scalar'} {child.dtype.name}"
            continue
        yield f"{line}  {_summarize(jax.tree.leaves(child, is_leaf=lambda node: isinstance(node, TensorInfo)))}"
        if depth > 1:
            yield from _branch_lines(child, indent + ("   " if is_last else "│  "), depth - 1)


def _merge_equal(node: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the children of a node, with runs of equal numbered ones merged into one."""
    merged: list[tuple[str, Any]] = []
    run: list[str] = []
    for name, child in node.items():
        is_equal = bool(run) and name.isdigit() and child == node[run[-1]]
        if not is_equal:
            run = []
        run.append(name)
        if is_equal:
            merged[-1] = (f"{run[0]} ... {name} ({len(run)}, each)", child)
        else:
            merged.append((name, child))
    return merged


def _summarize(infos: Sequence[TensorInfo]) -> str:
    elements = sum(math.prod(info.shape) for info in infos)
    dtypes = ", ".join(sorted({info.dtype.name for info in infos}))
    size = sum(info.nbytes for info in infos)
    scale, unit = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")
    return f"{len(infos):,} tensors, {elements:,} elements, {size / scale:,.1f} {unit}, {dtypes}"
