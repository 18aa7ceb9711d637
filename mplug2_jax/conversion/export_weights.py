"""A checkpoint of ours as a whole official state dict, an array at a time, with an account of every tensor.

Arrays that share a tensor (query, key and value of the vision tower) are read together; nothing else is in memory.
"""

import concurrent.futures
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from mplug2_jax.conversion.compare_torch import check_torch, compare_frameworks
from mplug2_jax.conversion.export_plan import ExportPlan, kept_as, plan_export
from mplug2_jax.conversion.files.atomic import check_space, refuse_existing, staged, staged_files
from mplug2_jax.conversion.files.safetensors_writer import SafetensorsWriter
from mplug2_jax.conversion.files.sources import HostArray, open_source
from mplug2_jax.conversion.files.torch_files import TorchWriter
from mplug2_jax.conversion.hub import SETTINGS, WEIGHTS, write_companions
from mplug2_jax.conversion.import_plan import StatePath, activation_notes
from mplug2_jax.conversion.import_weights import check_finite
from mplug2_jax.conversion.layouts import official
from mplug2_jax.conversion.layouts.official_state import State, fresh, tie_of
from mplug2_jax.conversion.layouts.slots import Slot, by_name, copy_into
from mplug2_jax.conversion.progress import Transfer
from mplug2_jax.conversion.report import REPORT, Comparison, Fate, Place, Report, Row, digest, largest_difference
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.training.optim.lora import merge_adapter

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_BATCH_BYTES = 2**27


@runtime_checkable
class Writer(Protocol):
    """A file of tensors that is written a tensor at a time."""

    def write(self, name: str, value: HostArray) -> None:
        """Writes one tensor."""

    def close(self) -> None:
        """Finishes the file."""


class _Sharded:
    """Several safetensors files with an index, by Hugging Face's convention; one without an index if it is enough."""

    def __init__(self, path: Path, state: State, shard_bytes: int) -> None:
        shards: list[State] = [{}]
        size = 0
        for name, info in state.items():
            if size + info.nbytes > shard_bytes and shards[-1]:
                shards.append({})
                size = 0
            shards[-1][name] = info
            size += info.nbytes
        many = len(shards) > 1
        self._writers: dict[str, SafetensorsWriter] = {}
        self._index: dict[str, str] = {}
        self._path = path
        for i, shard in enumerate(shards, start=1):
            file = f"{path.stem}-{i:05d}-of-{len(shards):05d}.safetensors" if many else path.name
            writer = SafetensorsWriter(path.with_name(file), shard)
            self._writers |= dict.fromkeys(shard, writer)
            self._index |= dict.fromkeys(shard, file)
        self._total = sum(info.nbytes for info in state.values())

    def write(self, name: str, value: HostArray) -> None:
        self._writers[name].write(name, value)

    def close(self) -> None:
        for writer in set(self._writers.values()):
            writer.close()
        if len(set(self._index.values())) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._index}
            self._path.with_name(f"{self._path.name}.index.json").write_text(json.dumps(index, indent=1))


def open_writer(path: Path, state: State, shard_bytes: int) -> Writer:
    """The writer for a file name: PyTorch's for ``.pth``, ``.pt`` and ``.bin``, else safetensors."""
    if path.suffix in TORCH_SUFFIXES:
        return TorchWriter(path, state)
    return _Sharded(path, state, shard_bytes)


def export(
    checkpoint: Path,
    to: Path,
    *,
    dtype: str = "float32",
    ema: bool | None = None,
    teacher: bool | None = None,
    rest: Path | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    verify: bool = False,
) -> Report:
    """Writes a checkpoint as an official state dict and its report: a file, or a folder by Hugging Face's conventions.

    Args:
        checkpoint: as for :func:`plan_export`.
        dtype: as there.
        ema: as there.
        teacher: as there.
        rest: as there.
        to: a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file, or else a folder, which appears when it is complete.
        shard_bytes: safetensors above this size become several files and an index.
        overwrite: whether what is there is replaced.
        verify: whether both frameworks are compared on the same inputs.

    Raises:
        UserError: as :func:`plan_export`; an output that exists; an array that is not finite; a full disk.
    """
    is_file = to.suffix in (".safetensors", *TORCH_SUFFIXES)
    places = (to, to.with_name(f"{to.name}.index.json"), to.parent / REPORT) if is_file else (to,)
    for place in places:
        refuse_existing(place, overwrite=overwrite)
    if verify:
        check_torch()
    plan = plan_export(checkpoint, dtype=dtype, ema=ema, teacher=teacher, rest=rest)
    check_space(to.parent, plan.nbytes)
    staging = staged_files(to.parent, overwrite=overwrite) if is_file else staged(to, overwrite=overwrite)
    with staging as folder:
        file = folder / (to.name if is_file else WEIGHTS)
        report = write_state(plan, file, shard_bytes)
        if not is_file:
            write_companions(plan, folder)
        if verify:
            report.comparisons = _compared(plan, file, None if is_file else folder / SETTINGS)
        report.write(folder)
    return report


def _compared(plan: ExportPlan, file: Path, settings: Path | None) -> list[Comparison]:
    """PyTorch's model from what was just written, beside ours from the checkpoint (or from the file, if rounded)."""
    source = open_source(file if file.exists() else file.with_name(f"{file.name}.index.json"))
    config, parts = plan.identity.config, official.TASK_PARTS[plan.task]
    definition = define_model(config, parts)
    if plan.rounded:
        params, _ = official.load_official(source, definition, plan.fusion_start)
    else:
        params, _ = plan.checkpoints.restore_params(definition.shapes, plan.step, tree=plan.tree)
    return compare_frameworks(
        params, config, parts, plan.fusion_start, source, tokenizer=plan.tokenizer, settings=settings
    )


def write_state(plan: ExportPlan, file: Path, shard_bytes: int) -> Report:
    """Writes the tensors, and returns what was done."""
    leaves = plan.checkpoints.array_specs(plan.step)
    total = sum(4 * math.prod(leaves[path][0]) for path in {slot.path for slot in plan.slots})
    transfer = Transfer(f"exporting {plan.title}", total)
    writer = open_writer(file, plan.state, shard_bytes)
    work = _Export(plan, writer, transfer)
    try:
        work.run()
    finally:
        writer.close()
    transfer.done()
    source = {"name": plan.workdir.path.name, "kind": f"checkpoint of step {plan.step}", "tensors": len(leaves)}
    return Report(
        "export", plan.title, [source], file.name, work.rows(), transfer.seconds, transfer.bytes_read,
        transfer.bytes_written, notes=activation_notes(plan.identity.config, plan.identity.parts),
    )  # fmt: skip


def groups(slots: Sequence[Slot]) -> list[tuple[Sequence[StatePath], Sequence[str]]]:
    """Arrays that share tensors, with those tensors: what must be in memory together."""
    wanted = by_name(slots)
    group_of: dict[StatePath, list[StatePath]] = {}
    for its_slots in wanted.values():
        joined: list[StatePath] = []
        for path in dict.fromkeys(slot.path for slot in its_slots):
            joined += [p for p in group_of.get(path, [path]) if p not in joined]
        for path in joined:
            group_of[path] = joined
    found: dict[int, tuple[Sequence[StatePath], list[str]]] = {}
    for name, its_slots in wanted.items():
        paths = group_of[its_slots[0].path]
        found.setdefault(id(paths), (paths, []))[1].append(name)
    return list(found.values())


def batches(slots: Sequence[Slot], sizes: Mapping[StatePath, int]) -> list[tuple[Sequence[StatePath], Sequence[str]]]:
    """Small groups read together, because every reading of a checkpoint takes its time."""
    found: list[tuple[list[StatePath], list[str]]] = []
    room = 0
    for paths, names in groups(slots):
        size = sum(sizes[path] for path in paths)
        if size > room:
            found.append(([], []))
            room = _BATCH_BYTES
        found[-1][0].extend(paths)
        found[-1][1].extend(names)
        room -= size
    return [*found]


class _Export:
    """Writes the tensors of a plan, and keeps account of them."""

    def __init__(self, plan: ExportPlan, writer: Writer, transfer: Transfer) -> None:
        self._plan, self._writer, self._transfer = plan, writer, transfer
        self._wanted = by_name(plan.slots)
        self._kept = frozenset(plan.rest.names() if plan.rest else ())
        self._rows: dict[str, Row] = {}
        self._ties: dict[str, list[str]] = {}
        for name in plan.state:
            tie = tie_of(name)
            if tie in self._wanted:
                self._ties.setdefault(tie, []).append(name)

    def run(self) -> None:
        """Everything, group by group; the next is read while one is written."""
        leaves = self._plan.checkpoints.array_specs(self._plan.step)
        sizes = {path: math.prod(shape) * dtype.itemsize for path, (shape, dtype) in leaves.items()}
        found = batches(self._plan.slots, sizes)
        with concurrent.futures.ThreadPoolExecutor(1) as reader, concurrent.futures.ThreadPoolExecutor(2) as pool:
            following = reader.submit(self._read, found[0][0])
            for i, (_, names) in enumerate(found):
                arrays = following.result()
                if i + 1 < len(found):
                    following = reader.submit(self._read, found[i + 1][0])
                list(pool.map(lambda name, arrays=arrays: self._put(name, arrays), names))
                del arrays
            others = [name for name in self._plan.state if name not in self._rows]
            list(pool.map(self._fill, others))

    def _read(self, paths: Sequence[StatePath]) -> dict[StatePath, HostArray]:
        pairs = {path: self._plan.pairs[path] for path in paths if path in self._plan.pairs}
        places = [*paths, *(place for pair in pairs.values() for place in pair.values())]
        found = self._plan.checkpoints.read_arrays(places, self._plan.step)
        for path, array in found.items():
            check_finite("/".join(path), array)
        arrays = {path: found[path] for path in paths}
        for path, pair in pairs.items():
            factors = {name: found[place] for name, place in pair.items()}
            arrays[path] = np.asarray(merge_adapter(arrays[path], factors, self._plan.identity.lora_scale))
        self._transfer.read(sum(array.nbytes for array in arrays.values()))
        return arrays

    def _put(self, name: str, arrays: Mapping[StatePath, HostArray]) -> None:
        """Writes one tensor that comes from our arrays, and those that repeat it."""
        info, its_slots = self._plan.state[name], self._wanted[name]
        whole = np.empty(info.shape, np.float32)
        cuts = [whole] if its_slots[0].third is None else np.split(whole, 3)
        places = []
        for slot, cut in zip(its_slots, cuts, strict=True):
            ours = arrays[slot.path] if slot.layer is None else arrays[slot.path][slot.layer]
            places.append(Place("/".join(slot.path), slot.layer, digest(ours)))
            copy_into(cut, slot.to_theirs(ours, cut.shape))
        stored = whole.astype(info.dtype, copy=False)
        sha, difference = digest(stored), largest_difference(stored, whole)
        self._write(name, stored, Row(name, "used", info.shape, info.dtype.name, sha, tuple(places), difference))
        for tied in self._ties.get(name, ()):
            row = Row(tied, "tied", info.shape, info.dtype.name, sha, why=f"repeats {name}")
            self._write(tied, stored, row)

    def _fill(self, name: str) -> None:
        """Writes one tensor that nothing of ours reads."""
        info, rest = self._plan.state[name], self._plan.rest
        own = kept_as(name, self._kept)
        fate: Fate = "filled" if own is None else "kept"
        value = fresh(name, info) if rest is None or own is None else rest.read(own)
        stored = value.astype(info.dtype, copy=False)
        difference = largest_difference(stored, value)
        self._write(
            name, stored, Row(name, fate, info.shape, info.dtype.name, digest(stored), max_difference=difference)
        )

    def _write(self, name: str, stored: HostArray, row: Row) -> None:
        self._writer.write(name, stored)
        self._transfer.wrote(stored.nbytes)
        self._rows[name] = row

    def rows(self) -> list[Row]:
        """A row for every tensor, in the state dict's order, and for every part that has no place in it."""
        rows = [self._rows[name] for name in self._plan.state]
        for path, (shape, dtype) in self._plan.checkpoints.array_specs(self._plan.step).items():
            if path[0] == "params" and path[1] in self._plan.left_out:
                rows.append(Row("/".join(path), "left out", shape, dtype.name, ""))
        return rows
