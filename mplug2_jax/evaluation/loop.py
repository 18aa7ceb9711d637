"""Evaluating a model on held-out data: predict on the mesh, score on the host, keep samples to look at."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from numpy.typing import NDArray

from data_pipelines.errors import DataError
from data_pipelines.examples import Example, reader_of
from data_pipelines.faults import Fault, check_share
from data_pipelines.loader import EvaluationSet
from data_pipelines.order import Shard
from data_pipelines.sources.files import write_atomically
from data_pipelines.tokenizers import Tokenizer, round_trip
from mplug2_jax.errors import UserError, check_range
from mplug2_jax.evaluation.answers import read_answers, unreachable_answers_warning
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.evaluation.fixed_batch import predict_in_fixed_batches
from mplug2_jax.evaluation.matching import PairScorer
from mplug2_jax.evaluation.prompts import encode_prompts
from mplug2_jax.evaluation.result_format import FORMAT_VERSION
from mplug2_jax.evaluation.samples import Sample, choose_samples, reference_answers, save_samples
from mplug2_jax.metrics.classification import ConfusionSummary, average_views
from mplug2_jax.metrics.metric import bootstrap_ci
from mplug2_jax.metrics.vqa import normalize_answer
from mplug2_jax.model.mplug2 import ModelDef, Params
from mplug2_jax.parallel.placement import (
    check_batch_divisible,
    local_batch_shards,
    num_batch_shards,
    replicated_sharding,
)
from mplug2_jax.parallel.processes import allgather_objects, is_primary_process
from mplug2_jax.tasks.base import HostPredictions, Predictions, TaskContext
from mplug2_jax.tasks.contracts import required_parts
from mplug2_jax.tasks.table import TASKS


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Figures beside their baselines, and samples."""

    name: str
    task: str
    step: int
    num_examples: int
    seconds: float
    metrics: Mapping[str, float]
    baselines: Mapping[str, float]
    samples: tuple[Sample, ...]
    skipped: tuple[Fault, ...] = ()  # records that were left out, because they cannot be used
    confidence_intervals: Mapping[str, tuple[float, float]] = dataclasses.field(
        default_factory=dict
    )  # 95 % of each figure
    predictions: tuple[Mapping[str, Any], ...] = ()  # to every example: key, instruction, prediction, reference, score
    confusion: ConfusionSummary | None = None  # of classes
    recipe: str = ""  # the name of the config that it is an evaluation of
    formats: tuple[str, ...] = ()  # of its data
    absent: tuple[str, ...] = ()  # figures that could not be computed here
    warnings: tuple[str, ...] = ()  # sentences about what makes the figures less than they seem

    def summary(self) -> str:
        """For people who watch."""
        figures = "  ".join(f"{what} {value:.3f}" for what, value in self.metrics.items())
        line = f"step {self.step}  {self.name} ({self.num_examples} examples, {self.seconds:.1f} s)  {figures}"
        return "\n".join([line, *self.warning_lines()])

    def warning_lines(self) -> list[str]:
        """One for each warning, and one for records that were left out."""
        count = len(self.skipped)
        lost = f"{count} record{'s' * (count > 1)} left out, the first"
        faults = [f"{lost}: {fault.reason}" for fault in self.skipped[:1]]
        return [f"warning: evaluation {self.name}: {text}" for text in (*self.warnings, *faults)]

    def tagged_metrics(self) -> dict[str, float]:
        """The figures by their names among a run's metrics."""
        return {f"eval/{self.name}/{what}": value for what, value in self.metrics.items()}


class Evaluation:
    """One evaluation of a run, compiled once and run as often as wanted.

    Raises:
        UserError: a batch size that the mesh cannot split, or batches that lack what the task reads.
    """

    def __init__(
        self,
        name: str,
        config: EvaluationConfig,
        definition: ModelDef,
        context: TaskContext,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        seed: int,
        recipe: str = "",
    ) -> None:
        self.name, self._config, self._mesh, self._tokenizer = name, config, mesh, tokenizer
        self._recipe, self._formats = recipe, tuple(sorted({source.format for source in config.data.sources.values()}))
        where = f"config.evaluations.{name}"
        check_batch_divisible(f"{where}.data.batch_size", config.data.batch_size, mesh)
        rows = config.per_device_batch_size * num_batch_shards(mesh)
        try:
            read = dataclasses.replace(config.data, batch_size=-(-config.data.batch_size // rows) * rows)
            least = TASKS[config.task].min_answers
            self._set = EvaluationSet(read, tokenizer, name=name, seed=seed, least_answers=least)
            first = self._set.first()
        except DataError as error:
            raise UserError(f"{where}.data: {error}") from error
        check_task(where, config.task, {name: array.shape for name, array in first.arrays.items()}, definition)
        task = TASKS[config.task]
        assert task.score is not None
        if self._set.views > 1 and not task.averages_views:
            raise UserError(
                f"{where}.data.visual: num_clips={config.data.visual.num_clips} and "
                f"num_crops={config.data.visual.num_crops} are views "
                f"whose probabilities are averaged, as task 'classify' does; for task '{config.task}' set both to 1"
            )
        if config.java_metrics and task.external_metrics is None:
            raise UserError(f"{where}.java_metrics is for the task 'caption', not for '{config.task}': leave it out")
        self._score, self._by_java = task.score, task.external_metrics if config.java_metrics else None
        context = add_answers(context, config, where, definition, tokenizer)
        context = add_prompts(context, config, where, definition, tokenizer, rows)
        self._prepare = jit_precompute(config.task, definition, context, mesh) if task.precompute else None
        self._predict = jit_predict(config.task, definition, context, mesh)
        self._matching = None
        if task.score_pairs is not None:
            self._matching = PairScorer(task.score_pairs, self._set, rows, definition, context, mesh)
        self._refine, self._context = task.rerank, context
        self._round_trip: Callable[[str], str] = str
        if "decoder" in task.parts and config.data.examples.tokenization == "standard":  # the release compares as it is
            self._round_trip = functools.partial(round_trip, tokenizer)

    def run(self, params: Params, step: int, on_batch: Callable[[str], None] = lambda phase: None) -> EvaluationResult:
        """Predicts all examples and scores them; all processes call it, and come to the same result.

        Samples, of which pictures are read again, are the first process's alone.

        Args:
            params: the model's.
            step: that they are of.
            on_batch: called with what is done next, before every batch.

        Raises:
            DataError: more records that cannot be used than ``data.max_bad_fraction`` allows.
        """
        start = time.perf_counter()
        rows: list[Mapping[str, NDArray[Any]]] = []
        held: dict[int, Example] = {}
        unusable: dict[int, Fault] = {}
        views = self._set.views
        shared: Predictions = {}
        if self._prepare is not None:
            on_batch(f"classes of evaluation {self.name}")
            with jax.set_mesh(self._mesh):
                shared = self._prepare(params)
        predict = lambda batch: self._predict(params, batch | shared)  # noqa: E731
        for batch in self._set.batches(Shard(local_batch_shards(self._mesh), num_batch_shards(self._mesh))):
            on_batch(f"batch {len(rows) + 1} of evaluation {self.name}")
            with jax.set_mesh(self._mesh):
                rows.append(
                    predict_in_fixed_batches(predict, batch.arrays, self._config.per_device_batch_size, self._mesh)
                )
            held |= {row: _without_frames(example) for row, example in batch.examples.items() if row % views == 0}
            unusable |= batch.faults
        examples, faults = _of_all_processes(held, unusable, views)
        check_share(list(faults.values()), len(self._set), self._config.data.max_bad_fraction)
        # A row's place over all batches is its example's in the set; places without an example are left out.
        places = list(examples)
        predictions = _chosen(rows, np.asarray(places, np.int64), views)
        reader = reader_of(self._config.data.examples, self._tokenizer)
        alike = functools.cache(self._round_trip)
        judged = [dataclasses.replace(each, answers=tuple(map(alike, each.answers))) for each in examples.values()]
        with jax.set_mesh(self._mesh):
            if self._refine is not None and self._matching is not None:
                match = functools.partial(self._matching.run, params, examples, on_batch, self.name)
                predictions = self._refine(predictions, judged, self._context, match)
            scored = self._score(predictions, judged, reader)
        if self._by_java is not None:
            on_batch(f"METEOR and SPICE of evaluation {self.name}")
            scored = self._by_java(scored, judged)
        warnings = scored.warnings
        if (listed := self._context.answers) is not None:
            same = normalize_answer if self._config.task == "vqa" else str
            warnings += tuple(filter(None, [unreachable_answers_warning(judged, listed, reader, same)]))
        # Other batch sizes and meshes change the last digits, and shall not change which are the best.
        goodness = [round(float(value), 4) for value in scored.example_scores]
        samples = (
            choose_samples(examples, scored, goodness, self._config.num_samples, self._set.__getitem__)
            if is_primary_process()
            else ()
        )
        figures = {name: figure.value for name, figure in scored.metrics.items()}
        said = tuple(
            {"key": example.key, "instruction": example.instruction, "prediction": words,
             "reference": reference_answers(example)[0],
             "score": score}
            for example, words, score in zip(examples.values(), scored.predictions, goodness, strict=True)
        )  # fmt: skip
        return EvaluationResult(
            self.name, self._config.task, step, len(examples), time.perf_counter() - start, figures, scored.baselines,
            samples, tuple(faults.values()), bootstrap_ci(scored.metrics), said, scored.confusion, self._recipe,
            self._formats, scored.absent, warnings,
        )  # fmt: skip


def check_task(where: str, name: str, example: Mapping[str, tuple[int, ...]], definition: ModelDef) -> None:
    """Checks that a model can do a task with examples of these shapes.

    Raises:
        UserError: arrays that the examples lack, parts that the model lacks, or a head of other classes.
    """
    task, frames = TASKS[name], example.get("frames")
    task.check(set(example), where)
    needed = required_parts([(task, frames is not None, frames is not None and frames[0] > 1)])
    missing = set(needed) - set(definition.parts) - {"universal"}  # which a run may choose to go without
    if missing:
        raise UserError(
            f"{where}: task '{name}' needs the parts {', '.join(sorted(missing))}, which this model lacks "
            f"(it has {', '.join(definition.parts)})"
        )
    if task.num_classes and task.num_classes != definition.config.num_classes:
        raise UserError(
            f"{where}: task '{name}' tells {task.num_classes} classes apart, but config.model.num_classes="
            f"{definition.config.num_classes}; set that to {task.num_classes}"
        )


def jit_predict(task: str, definition: ModelDef, context: TaskContext, mesh: Mesh) -> Any:
    """(parameters, batch) -> predictions of a task, under ``jax.jit``; to be called with the mesh in context."""
    predict = TASKS[task].predict
    assert predict is not None
    # Every process gets all predictions of a batch, whoever's devices made them.
    return jax.jit(
        lambda params, batch: predict(definition.bind(params), batch, context), out_shardings=replicated_sharding(mesh)
    )


def jit_precompute(task: str, definition: ModelDef, context: TaskContext, mesh: Mesh) -> Any:
    """Parameters -> the arrays that a task's batches share, under ``jax.jit``, the same on every device."""
    prepare = TASKS[task].precompute
    assert prepare is not None
    return jax.jit(lambda params: prepare(definition.bind(params), context), out_shardings=replicated_sharding(mesh))


def add_answers(
    context: TaskContext, config: EvaluationConfig, where: str, definition: ModelDef, tokenizer: Tokenizer
) -> TaskContext:
    """The context with an evaluation's list of answers, if it has one. Raises UserError where that does not fit."""
    check_range(f"{where}.num_ranked", config.num_ranked, 0)
    if config.num_ranked and not config.answers_file:
        raise UserError(f"{where}.num_ranked={config.num_ranked} ranks a list: set {where}.answers_file to its file")
    if not config.answers_file:
        return context
    if config.task not in ("answer", "vqa"):
        raise UserError(
            f"{where}.answers_file is for the tasks 'answer' and 'vqa', not for '{config.task}': leave it out"
        )
    examples, positions = config.data.examples, definition.config.max_positions
    search = None if config.num_ranked else context.settings.search
    listed = read_answers(Path(config.answers_file), f"{where}.answers_file", examples, tokenizer, search, positions)
    return dataclasses.replace(
        context,
        answers=listed,
        num_ranked=config.num_ranked,
        double_count_first_token=examples.tokenization == "released",
    )


def add_prompts(
    context: TaskContext,
    config: EvaluationConfig,
    where: str,
    definition: ModelDef,
    tokenizer: Tokenizer,
    rows: int,
) -> TaskContext:
    """The context with an evaluation's prompts, if its task asks by them: ``rows`` are encoded at a time.

    Raises UserError where they do not fit.
    """
    if TASKS[config.task].precompute is None:
        if config.prompts or config.class_names:
            raise UserError(f"{where}.prompts and class_names are for the task 'zero_shot', not for '{config.task}'")
        return context
    classes = config.data.examples.classes
    names = config.class_names or classes
    if len(names) != len(classes):
        raise UserError(f"{where}.class_names are {len(names)}, expected one for each of the {len(classes)} classes")
    prompts = encode_prompts(where, config.prompts, names, tokenizer, definition.config.max_positions, rows)
    return dataclasses.replace(context, prompts=prompts)


def _without_frames(example: Example) -> Example:
    """What scores read of an example; all frames of an evaluation would fill the memory."""
    arrays = {name: array for name, array in example.arrays.items() if name != "frames"}
    return dataclasses.replace(example, arrays=arrays)


def _chosen(
    batches: Sequence[Mapping[str, NDArray[Any]]], places: Int[np.ndarray, " n"], views: int
) -> HostPredictions:  # fmt: skip
    """Those of some examples, each one row: of several views the mean of their probabilities."""
    rows = (places[:, None] * views + np.arange(views)).ravel()
    chosen = {name: np.concatenate([batch[name] for batch in batches])[rows] for name in batches[0]}
    if views == 1:
        return chosen
    return {"probabilities": average_views(chosen["probabilities"], np.repeat(places, views), places)}


def _of_all_processes(
    examples: Mapping[int, Example], faults: Mapping[int, Fault], views: int
) -> tuple[dict[int, Example], dict[int, Fault]]:
    """Everyone's examples and faults, by rows, by their places in the set, in that order, each once."""
    mine = {
        "examples": [(place, _packed(example)) for place, example in examples.items()],
        "faults": [(place, dataclasses.asdict(fault)) for place, fault in faults.items()],
    }
    all_examples: dict[int, Example] = {}
    all_faults: dict[int, Fault] = {}
    for theirs in allgather_objects(mine):
        all_examples |= {place: _unpacked(packed) for place, packed in theirs["examples"]}
        all_faults |= {place: Fault(**fields) for place, fields in theirs["faults"]}
    lost = {row // views: fault for row, fault in sorted(all_faults.items())}
    # Of an example whose first view is good another may be lost.
    kept = {row // views: example for row, example in sorted(all_examples.items()) if row // views not in lost}
    return kept, lost


def _packed(example: Example) -> dict[str, Any]:
    """An example as JSON can hold it."""
    arrays = {name: (array.dtype.str, array.tolist()) for name, array in example.arrays.items()}
    return dataclasses.asdict(dataclasses.replace(example, arrays={})) | {"arrays": arrays}


def _unpacked(packed: Mapping[str, Any]) -> Example:
    arrays = {name: np.array(values, dtype) for name, (dtype, values) in packed["arrays"].items()}
    return Example(**{**packed, "arrays": arrays, "answers": tuple(packed["answers"]), "times": tuple(packed["times"])})


def save_result(result: EvaluationResult, folder: Path) -> Path:
    """Writes ``NAME.json``; beforehand, beside it, the samples' frames and ``NAME.jsonl``: all that was said."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = (
        "name", "task", "recipe", "formats", "step", "num_examples", "seconds", "metrics", "confidence_intervals",
        "baselines", "absent", "warnings",
    )  # fmt: skip
    content: dict[str, Any] = {"format_version": FORMAT_VERSION} | {field: getattr(result, field) for field in fields}
    content["samples"] = save_samples(result.samples, result.name, folder)
    if result.confusion is not None:
        content["confusion"] = result.confusion.to_dict()
    content["skipped"] = [dataclasses.asdict(fault) for fault in result.skipped]
    lines = "".join(f"{json.dumps(row)}\n" for row in result.predictions)
    write_atomically(str(folder / f"{result.name}.jsonl"), lines.encode())
    path = folder / f"{result.name}.json"
    write_atomically(str(path), json.dumps(content, indent=1).encode())
    return path
