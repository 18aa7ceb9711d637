"""What a checkpoint holds, told without reading an array: a tree of names with shapes, types and counts."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mplug2_jax.conversion.files.sources import TensorInfo
from mplug2_jax.conversion.layouts import official
from mplug2_jax.conversion.layouts.identify import identify
from mplug2_jax.errors import UserError
from mplug2_jax.training.checkpoint.checkpoints import open_checkpoint


@dataclasses.dataclass(frozen=True)
class Contents:
    """A checkpoint's title, its parts, and its tensors by the steps of their names."""

    title: str
    parts: Sequence[str]
    tensors: Mapping[tuple[str, ...], TensorInfo]


def contents_of(path: Path) -> Contents:
    """Names and shapes of any checkpoint that we can read.

    Raises:
        UserError: there is none.
    """
    if path.is_dir() and ((path / "checkpoints").is_dir() or (path / "state").is_dir() or _holds_steps(path)):
        return _ours(path)
    found = identify(path)
    parts: Sequence[str] = ("vision",)
    title = found.title
    if found.kind == "official":
        parts = official.CAPTION_PARTS if found.task == "caption" else official.QUESTION_PARTS
        title += f" {found.task or 'caption or videoqa'}" + (" with its teacher" if found.has_teacher else "")
    elif found.kind == "bert":
        parts = ("text", "universal", *(("mlm",) if found.has_head else ()))
    return Contents(title, parts, {tuple(name.split(".")): found.source.info(name) for name in found.source.names()})


def _holds_steps(path: Path) -> bool:
    return any(child.name.isdigit() for child in path.iterdir())


def _ours(path: Path) -> Contents:
    checkpoints, step = open_checkpoint(path)
    try:
        tensors = {leaf: TensorInfo(*described) for leaf, described in checkpoints.array_specs(step).items()}
        try:
            parts: Sequence[str] = checkpoints.model_metadata(step).parts
        except UserError:
            parts = ()
    finally:
        checkpoints.close()
    return Contents(f"checkpoint of step {step}", parts, tensors)


def tree_lines(contents: Contents, depth: int) -> Iterator[str]:
    """The tree, down to ``depth`` levels; layers that are alike are shown once."""
    root: dict[str, Any] = {}
    for path, info in contents.tensors.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = info
    infos = list(contents.tensors.values())
    yield f"{contents.title}: {_amount(infos)}"
    if contents.parts:
        yield f"parts: {', '.join(contents.parts)}"
    yield from _branches(root, "", depth)


def _branches(node: Mapping[str, Any], indent: str, depth: int) -> Iterator[str]:
    merged = _merged(node)
    for i, (name, child) in enumerate(merged):
        last = i == len(merged) - 1
        line = f"{indent}{'└─' if last else '├─'} {name}"
        if isinstance(child, TensorInfo):
            yield f"{line}  {'x'.join(map(str, child.shape)) or 'scalar'} {child.dtype.name}"
            continue
        yield f"{line}  {_amount(list(_leaves(child)))}"
        if depth > 1:
            yield from _branches(child, indent + ("   " if last else "│  "), depth - 1)


def _merged(node: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Children, with runs of numbered ones that are alike as one."""
    found: list[tuple[str, Any]] = []
    run: list[str] = []
    for name, child in node.items():
        alike = bool(run) and name.isdigit() and child == node[run[-1]]
        if not alike:
            run = []
        run.append(name)
        if alike:
            found[-1] = (f"{run[0]} ... {name} ({len(run)}, each)", child)
        else:
            found.append((name, child))
    return found


def _leaves(node: Any) -> Iterator[TensorInfo]:
    if isinstance(node, TensorInfo):
        yield node
    else:
        for child in node.values():
            yield from _leaves(child)


def _amount(infos: Sequence[TensorInfo]) -> str:
    elements = sum(math.prod(info.shape) for info in infos)
    types = ", ".join(sorted({info.dtype.name for info in infos}))
    size = sum(info.nbytes for info in infos)
    scale, unit = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")
    return f"{len(infos):,} tensors, {elements:,} elements, {size / scale:,.1f} {unit}, {types}"
