"""Export a checkpoint as a whole official state dict, an array at a time, with a report of every tensor.

Arrays that share a tensor (query, key and value of the vision tower) are read together; nothing else is in memory.
"""

import concurrent.futures
import contextlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mplug2_jax.conversion.batches import batch_by_size
from mplug2_jax.conversion.compare_torch import check_torch, compare_frameworks
from mplug2_jax.conversion.export_plan import ExportPlan, original_name, plan_export
from mplug2_jax.conversion.exported import CONFIG_NAME
from mplug2_jax.conversion.files.atomic import atomic_files, atomic_folder, check_free_space, check_not_existing
from mplug2_jax.conversion.files.open import open_source
from mplug2_jax.conversion.files.safetensors_writer import SafetensorsWriter
from mplug2_jax.conversion.files.sources import HostArray, TensorInfo
from mplug2_jax.conversion.files.torch_files import TorchWriter
from mplug2_jax.conversion.hub import WEIGHTS, check_base_models, write_companions
from mplug2_jax.conversion.import_plan import StatePath, activation_notes
from mplug2_jax.conversion.import_weights import check_finite
from mplug2_jax.conversion.layouts import official
from mplug2_jax.conversion.layouts.official_state import StateInfo, init_tensor, tied_to
from mplug2_jax.conversion.layouts.tensor_mapping import TensorMapping, copy_into, group_by_name
from mplug2_jax.conversion.progress import ByteProgress
from mplug2_jax.conversion.report import (
    REPORT,
    Comparison,
    Disposition,
    ParamDigest,
    Report,
    Row,
    digest,
    max_difference,
)
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.training.optim.lora import merge_adapter

TORCH_SUFFIXES = (".pth", ".pt", ".bin")


class _ShardedWriter:
    """Several safetensors files and an index, by Hugging Face's convention; a single file needs no index."""

    def __init__(self, path: Path, state: StateInfo, shard_bytes: int) -> None:
        shards: list[StateInfo] = [{}]
        size = 0
        for name, info in state.items():
            if size + info.nbytes > shard_bytes and shards[-1]:
                shards.append({})
                size = 0
            shards[-1][name] = info
            size += info.nbytes
        self._writers: dict[str, SafetensorsWriter] = {}
        self._index: dict[str, str] = {}
        self._path = path
        for i, shard in enumerate(shards, start=1):
            file = f"{path.stem}-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else path.name
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


Writer = TorchWriter | _ShardedWriter


def export(
    checkpoint: Path, to: Path, *, dtype: str = "float32", ema: bool | None = None, teacher: bool | None = None,
    leftover: Path | None = None, shard_bytes: int = 5_000_000_000, overwrite: bool = False, verify: bool = False,
    base_models: Sequence[str] = (),
) -> Report:  # fmt: skip
    """Write a checkpoint as an official state dict, and its report: a file, or a folder by Hugging Face's conventions.

    Args:
        checkpoint: see :func:`~mplug2_jax.conversion.export_plan.plan_export`.
        dtype: see there.
        ema: see there.
        teacher: see there.
        leftover: see there.
        to: a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file, or else a folder, which appears when it is complete.
        shard_bytes: split safetensors above this size into several files and an index.
        overwrite: replace what exists.
        verify: compare both frameworks on the same inputs.
        base_models: models on the Hugging Face hub that training started from, for the model card.

    Raises:
        UserError: as :func:`~mplug2_jax.conversion.export_plan.plan_export`; an output exists, an array is not finite,
            the disk is full, or a base model is no name on the hub.
    """
    is_file = to.suffix in (".safetensors", *TORCH_SUFFIXES)
    outputs = (to, to.with_name(f"{to.name}.index.json"), to.parent / REPORT) if is_file else (to,)
    for path in outputs:
        check_not_existing(path, overwrite=overwrite)
    check_base_models(base_models)
    if verify:
        check_torch()
    plan = plan_export(checkpoint, dtype=dtype, ema=ema, teacher=teacher, leftover=leftover)
    check_free_space(to, plan.nbytes)
    output = atomic_files(to.parent, overwrite=overwrite) if is_file else atomic_folder(to, overwrite=overwrite)
    with output as folder:
        file = folder / (to.name if is_file else WEIGHTS)
        report = write_state(plan, file, shard_bytes)
        if not is_file:
            write_companions(plan, folder, base_models)
        if verify:
            report.comparisons = _compare(plan, file, None if is_file else folder / CONFIG_NAME)
        report.write(folder)
    return report


def _compare(plan: ExportPlan, file: Path, settings: Path | None) -> list[Comparison]:
    """Compare PyTorch's model from the new file with ours from the checkpoint (or from the file, if it is rounded)."""
    source = open_source(file if file.exists() else file.with_name(f"{file.name}.index.json"))
    config, parts = plan.model.config, official.TASK_PARTS[plan.task]
    model_def = define_model(config, parts)
    if plan.rounded:
        params, _ = official.load_official(source, model_def, plan.fusion_start)
    else:
        params, _ = plan.checkpoints.restore_params(model_def.shapes, plan.step, tree=plan.tree)
    return compare_frameworks(
        params, config, parts, plan.fusion_start, source, tokenizer=plan.tokenizer, settings=settings
    )


def write_state(plan: ExportPlan, file: Path, shard_bytes: int) -> Report:
    """Write the tensors, and return the report."""
    arrays = plan.checkpoints.array_specs(plan.step)
    total = sum(4 * math.prod(arrays[path][0]) for path in {mapping.path for mapping in plan.mappings})
    is_torch = file.suffix in TORCH_SUFFIXES
    writer: Writer = TorchWriter(file, plan.state) if is_torch else _ShardedWriter(file, plan.state, shard_bytes)
    progress = ByteProgress(f"exporting {plan.title}", total)
    exporter = _Exporter(plan, writer, progress)
    with contextlib.closing(writer), contextlib.closing(progress):
        exporter.run()
    source = {"name": plan.workdir.path.name, "kind": f"checkpoint of step {plan.step}", "tensors": len(arrays)}
    return Report(
        "export", plan.title, [source], file.name, exporter.rows(), progress.seconds, progress.bytes_read,
        progress.bytes_written, notes=activation_notes(plan.model.config, plan.model.parts),
    )  # fmt: skip


Group = tuple[Sequence[StatePath], Sequence[str]]  # arrays of the checkpoint, and the tensors that they fill


def group_arrays(mappings: Sequence[TensorMapping]) -> list[Group]:
    """Group arrays that share tensors: these must be in memory together."""
    by_name = group_by_name(mappings)
    group_of: dict[StatePath, list[StatePath]] = {}
    for tensor_mappings in by_name.values():
        group: list[StatePath] = []
        for path in dict.fromkeys(mapping.path for mapping in tensor_mappings):
            group += [p for p in group_of.get(path, [path]) if p not in group]
        for path in group:
            group_of[path] = group
    groups: dict[int, tuple[Sequence[StatePath], list[str]]] = {}
    for name, tensor_mappings in by_name.items():
        paths = group_of[tensor_mappings[0].path]
        groups.setdefault(id(paths), (paths, []))[1].append(name)
    return list(groups.values())


def batch_groups(mappings: Sequence[TensorMapping], sizes: Mapping[StatePath, int]) -> list[Group]:
    """Merge small groups into batches that are read together."""
    batches = batch_by_size(group_arrays(mappings), lambda group: sum(sizes[path] for path in group[0]))
    return [
        ([path for paths, _ in batch for path in paths], [name for _, names in batch for name in names])
        for batch in batches
    ]


def _batches(plan: ExportPlan) -> list[Group]:
    specs = plan.checkpoints.array_specs(plan.step)
    return batch_groups(plan.mappings, {path: TensorInfo(*spec).nbytes for path, spec in specs.items()})


def _group_ties(state: StateInfo, converted: Collection[str]) -> dict[str, list[str]]:
    """Return the tensors that repeat a converted one, by its name."""
    ties: dict[str, list[str]] = {}
    for name in state:
        tied = tied_to(name)
        if tied is not None and tied in converted:
            ties.setdefault(tied, []).append(name)
    return ties


def read_stored(plan: ExportPlan, paths: Sequence[StatePath]) -> dict[StatePath, HostArray]:
    """Read arrays of the checkpoint, and the adapters of those that have one."""
    factors = [factor for path in paths for factor in plan.adapters.get(path, {}).values()]
    return plan.checkpoints.read_arrays([*paths, *factors], plan.step)


def merge_adapters(
    plan: ExportPlan, paths: Sequence[StatePath], stored: Mapping[StatePath, HostArray]
) -> dict[StatePath, HostArray]:
    """Return the arrays at ``paths`` of those that :func:`read_stored` returned, with their adapters merged."""
    arrays = {path: stored[path] for path in paths}
    for path in paths:
        if adapter := plan.adapters.get(path):
            factors = {name: stored[factor_path] for name, factor_path in adapter.items()}
            arrays[path] = np.asarray(merge_adapter(arrays[path], factors, plan.model.lora_scale))
    return arrays


def layer_of(arrays: Mapping[StatePath, HostArray], mapping: TensorMapping) -> HostArray:
    """Return the array of a mapping, or its layer of a stack."""
    return arrays[mapping.path] if mapping.layer is None else arrays[mapping.path][mapping.layer]


def to_tensor(
    shape: tuple[int, ...], mappings: Sequence[TensorMapping], arrays: Mapping[StatePath, HostArray]
) -> HostArray:
    """Return the official tensor that these mappings fill, in float32."""
    tensor = np.empty(shape, np.float32)
    targets = [tensor] if mappings[0].qkv_index is None else np.split(tensor, 3)
    for mapping, target in zip(mappings, targets, strict=True):
        copy_into(target, mapping.to_tensor(layer_of(arrays, mapping), target.shape))
    return tensor


def ignored_tensor(plan: ExportPlan, name: str, leftover: Collection[str]) -> HostArray:
    """Return a tensor that the model ignores: from the leftover file, if it is in there, or as the release's."""
    original = original_name(name, leftover)
    if plan.leftover is None or original is None:
        return init_tensor(name, plan.state[name])
    return plan.leftover.read(original)


def exported_tensors(plan: ExportPlan, names: Collection[str]) -> Iterator[tuple[str, HostArray]]:
    """Yield these tensors of an export's state dict, a batch of arrays in memory at a time, without writing them.

    Their order is that in which the checkpoint is read.
    """
    mappings = group_by_name(plan.mappings)
    ties = _group_ties(plan.state, mappings)
    leftover = frozenset(plan.leftover.names() if plan.leftover else ())

    def every_tensor() -> Iterator[tuple[str, HostArray]]:
        for paths, batch in _batches(plan):
            arrays = merge_adapters(plan, paths, read_stored(plan, paths))
            for name in batch:
                tensor = to_tensor(plan.state[name].shape, mappings[name], arrays)
                yield from ((repeated, tensor) for repeated in (name, *ties.get(name, ())))
            del arrays
        for name in plan.state:
            if name in names and name not in mappings and tied_to(name) not in mappings:
                yield name, ignored_tensor(plan, name, leftover)

    for name, tensor in every_tensor():
        if name in names:
            yield name, tensor.astype(plan.state[name].dtype, copy=False)


class _Exporter:
    """Writes the tensors of a plan, and records them."""

    def __init__(self, plan: ExportPlan, writer: Writer, progress: ByteProgress) -> None:
        self._plan, self._writer, self._progress = plan, writer, progress
        self._mappings = group_by_name(plan.mappings)
        self._leftover = frozenset(plan.leftover.names() if plan.leftover else ())
        self._rows: dict[str, Row] = {}
        self._ties = _group_ties(plan.state, self._mappings)

    def run(self) -> None:
        """Write everything, batch by batch; the next one is read while one is written."""
        batches = _batches(self._plan)
        with concurrent.futures.ThreadPoolExecutor(1) as reader, concurrent.futures.ThreadPoolExecutor(2) as pool:
            pending = reader.submit(self._read, batches[0][0])
            for i, (_, names) in enumerate(batches):
                arrays = pending.result()
                if i + 1 < len(batches):
                    pending = reader.submit(self._read, batches[i + 1][0])
                list(pool.map(lambda name, arrays=arrays: self._convert(name, arrays), names))
                del arrays
            list(pool.map(self._write_ignored, [name for name in self._plan.state if name not in self._rows]))

    def _read(self, paths: Sequence[StatePath]) -> dict[StatePath, HostArray]:
        stored = read_stored(self._plan, paths)
        for path, array in stored.items():
            check_finite("/".join(path), array)
        arrays = merge_adapters(self._plan, paths, stored)
        self._progress.add_read(sum(array.nbytes for array in arrays.values()))
        return arrays

    def _convert(self, name: str, arrays: Mapping[StatePath, HostArray]) -> None:
        """Write a tensor that parameters fill, and those that are tied to it."""
        info, mappings = self._plan.state[name], self._mappings[name]
        params = tuple(ParamDigest("/".join(m.path), m.layer, digest(layer_of(arrays, m))) for m in mappings)
        tensor = to_tensor(info.shape, mappings, arrays)
        stored = tensor.astype(info.dtype, copy=False)
        sha, rounding = digest(stored), max_difference(stored, tensor)
        self._write(name, stored, Row(name, "converted", info.shape, info.dtype.name, sha, params, rounding))
        for tied in self._ties.get(name, ()):
            row = Row(tied, "tied", info.shape, info.dtype.name, sha, reason=f"repeats {name}")
            self._write(tied, stored, row)

    def _write_ignored(self, name: str) -> None:
        """Write a tensor that the model ignores."""
        info = self._plan.state[name]
        is_preserved = original_name(name, self._leftover) is not None
        disposition: Disposition = "preserved" if is_preserved else "filled"
        value = ignored_tensor(self._plan, name, self._leftover)
        stored = value.astype(info.dtype, copy=False)
        row = Row(
            name, disposition, info.shape, info.dtype.name, digest(stored), max_difference=max_difference(stored, value)
        )
        self._write(name, stored, row)

    def _write(self, name: str, stored: HostArray, row: Row) -> None:
        self._writer.write(name, stored)
        self._progress.add_written(stored.nbytes)
        self._rows[name] = row

    def rows(self) -> list[Row]:
        """Return a row for every tensor, in the state dict's order, and for every parameter without a tensor."""
        rows = [self._rows[name] for name in self._plan.state]
        for path, (shape, dtype) in self._plan.checkpoints.array_specs(self._plan.step).items():
            if path[0] == "params" and path[1] in self._plan.skipped_parts:
                rows.append(Row("/".join(path), "skipped", shape, dtype.name, ""))
        return rows
