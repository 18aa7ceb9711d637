"""Evaluate a model on held-out data: predict on the mesh, score on the host, keep samples to look at."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from numpy.typing import NDArray

from data_pipelines.bad_records import BadRecord, check_bad_fraction
from data_pipelines.errors import DataError
from data_pipelines.examples import Example, make_detokenizer
from data_pipelines.loader import EvaluationSet
from data_pipelines.order import HostShards
from data_pipelines.tokenizers import Tokenizer, round_trip
from data_pipelines.workers import check_workers
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.answers import add_answers, unreachable_answers_warning
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.evaluation.fixed_batch import predict_in_fixed_batches
from mplug2_jax.evaluation.matching import PairScorer
from mplug2_jax.evaluation.prompts import add_prompts
from mplug2_jax.evaluation.results import EvaluationResult
from mplug2_jax.evaluation.samples import Sample, choose_samples, reference_answers
from mplug2_jax.metrics.classification import average_views
from mplug2_jax.metrics.metric import bootstrap_ci
from mplug2_jax.metrics.vqa import normalize_answer
from mplug2_jax.model.config import check_has_parts
from mplug2_jax.model.mplug2 import ModelDef, Params
from mplug2_jax.parallel.placement import (
    check_batch_divisible,
    local_batch_shards,
    num_batch_shards,
    replicated_sharding,
)
from mplug2_jax.parallel.processes import allgather_dict, is_primary_process
from mplug2_jax.tasks.base import HostPredictions, Predictions, TaskContext
from mplug2_jax.tasks.specs import required_parts
from mplug2_jax.tasks.table import TASKS


class Evaluation:
    """One evaluation of a run, compiled once for all its calls.

    Raises:
        UserError: the mesh does not divide the batch size, or batches lack keys that the task reads.
        DataError: this machine cannot run the workers.
    """

    def __init__(
        self, name: str, config: EvaluationConfig, model_def: ModelDef, context: TaskContext, tokenizer: Tokenizer,
        mesh: Mesh, *, seed: int, recipe: str = "",
    ) -> None:  # fmt: skip
        self.name, self._config, self._mesh, self._tokenizer = name, config, mesh, tokenizer
        self._recipe, self._formats = recipe, tuple(sorted({source.format for source in config.data.sources.values()}))
        where = f"config.evaluations.{name}"
        check_batch_divisible(f"{where}.data.batch_size", config.data.batch_size, mesh)
        # A batch is scored, with its examples, while the next one is put together.
        check_workers({f"{where}.data": config.data}, jax.process_count(), num_batches=2)
        task = TASKS[config.task]
        predict_batch_size = config.per_device_batch_size * num_batch_shards(mesh)
        try:
            batch_size = -(-config.data.batch_size // predict_batch_size) * predict_batch_size
            data = dataclasses.replace(config.data, batch_size=batch_size)
            self._dataset = EvaluationSet(data, tokenizer, name=name, seed=seed, min_answers=task.min_answers)
            first = self._dataset.first_example()
        except DataError as error:
            raise UserError(f"{where}.data: {error}") from error
        check_task(where, config.task, {name: array.shape for name, array in first.arrays.items()}, model_def)
        assert task.score is not None
        if self._dataset.views > 1 and not task.averages_views:
            raise UserError(
                f"{where}.data.visual: num_clips={config.data.visual.num_clips} and "
                f"num_crops={config.data.visual.num_crops} are views whose probabilities are "
                f"averaged, as task 'classify' does; for task '{config.task}' set both to 1"
            )
        if config.java_metrics and task.external_metrics is None:
            raise UserError(f"{where}.java_metrics is for the task 'caption', not for '{config.task}': remove it")
        self._score, self._external_metrics = task.score, task.external_metrics if config.java_metrics else None
        context = add_answers(context, config, where, model_def, tokenizer)
        context = add_prompts(context, config, where, model_def, tokenizer, predict_batch_size)
        self._precompute = jit_precompute(config.task, model_def, context, mesh) if task.precompute else None
        self._predict = jit_predict(config.task, model_def, context, mesh)
        self._pair_scorer = None
        if task.score_pairs is not None:
            self._pair_scorer = PairScorer(
                task.score_pairs, self._dataset, predict_batch_size, model_def, context, mesh
            )
        self._rerank, self._context = task.rerank, context
        # References are compared as the tokenizer can represent them, but the release compares raw texts.
        self._round_trip: Callable[[str], str] = str
        if "decoder" in task.parts and config.data.examples.tokenization == "standard":
            self._round_trip = functools.partial(round_trip, tokenizer)

    def run(self, params: Params, step: int, on_batch: Callable[[str], None] = lambda phase: None) -> EvaluationResult:
        """Predict and score all examples; all processes call it, and get the same result.

        Only the primary process gets samples, whose frames are read again.

        Args:
            params: of the model.
            step: of the parameters.
            on_batch: called before every batch, with a description of it.

        Raises:
            DataError: a larger fraction of bad records than ``data.max_bad_fraction``.
        """
        start = time.perf_counter()
        batches: list[Mapping[str, NDArray[Any]]] = []
        local_examples: dict[int, Example] = {}
        local_bad_records: dict[int, BadRecord] = {}
        views = self._dataset.views
        shared: Predictions = {}
        if self._precompute is not None:
            on_batch(f"classes of evaluation {self.name}")
            with jax.set_mesh(self._mesh):
                shared = self._precompute(params)
        predict = lambda batch: self._predict(params, batch | shared)  # noqa: E731
        per_device_batch_size = self._config.per_device_batch_size
        for batch in self._dataset.batches(HostShards(local_batch_shards(self._mesh), num_batch_shards(self._mesh))):
            on_batch(f"batch {len(batches) + 1} of evaluation {self.name}")
            with jax.set_mesh(self._mesh):
                batches.append(predict_in_fixed_batches(predict, batch.arrays, per_device_batch_size, self._mesh))
            first_views = {row: example for row, example in batch.examples.items() if row % views == 0}
            local_examples |= {row: _without_frames(example) for row, example in first_views.items()}
            local_bad_records |= batch.bad_records
        examples, bad_records = _allgather_examples(local_examples, local_bad_records, views)
        check_bad_fraction(list(bad_records.values()), len(self._dataset), self._config.data.max_bad_fraction)
        # A row's index over all batches is its example's index in the set; rows without an example are skipped.
        indices = list(examples)
        predictions = _select_rows(batches, np.asarray(indices, np.int64), views)
        decode = make_detokenizer(self._config.data.examples, self._tokenizer)
        round_trip = functools.cache(self._round_trip)
        scored = [dataclasses.replace(e, answers=tuple(map(round_trip, e.answers))) for e in examples.values()]
        with jax.set_mesh(self._mesh):
            if self._rerank is not None and self._pair_scorer is not None:
                score_pairs = functools.partial(self._pair_scorer.run, params, examples, on_batch, self.name)
                predictions = self._rerank(predictions, scored, self._context, score_pairs)
            output = self._score(predictions, scored, decode)
        if self._external_metrics is not None:
            on_batch(f"METEOR and SPICE of evaluation {self.name}")
            output = self._external_metrics(output, scored)
        warnings = output.warnings
        if (answers := self._context.answers) is not None:
            normalize = normalize_answer if self._config.task == "vqa" else str
            warnings += unreachable_answers_warning(scored, answers, decode, normalize)
        # Rounded, because batch size and mesh change the last digits, and must not change which samples are best.
        scores = [round(float(value), 4) for value in output.example_scores]
        samples: tuple[Sample, ...] = ()
        if is_primary_process():
            samples = choose_samples(examples, output, scores, self._config.num_samples, self._dataset.__getitem__)
        rows = tuple(
            {"key": example.key, "instruction": example.instruction, "prediction": prediction,
             "reference": reference_answers(example)[0], "score": score}
            for example, prediction, score in zip(examples.values(), output.predictions, scores, strict=True)
        )  # fmt: skip
        return EvaluationResult(
            name=self.name, task=self._config.task, step=step, num_examples=len(examples),
            seconds=time.perf_counter() - start,
            metrics={name: metric.value for name, metric in output.metrics.items()}, baselines=output.baselines,
            samples=samples, skipped=tuple(bad_records.values()), confidence_intervals=bootstrap_ci(output.metrics),
            predictions=rows, confusion=output.confusion, recipe=self._recipe, formats=self._formats,
            absent=output.unavailable_metrics, warnings=warnings,
        )  # fmt: skip


def check_task(where: str, name: str, example: Mapping[str, tuple[int, ...]], model_def: ModelDef) -> None:
    """Check that a model can do a task with examples of these shapes.

    Raises:
        UserError: the examples lack arrays, the model lacks parts, or its head has another number of classes.
    """
    task, frames = TASKS[name], example.get("frames")
    task.check(set(example), where)
    needed = required_parts([(task, frames is not None, frames is not None and frames[0] > 1)])
    check_has_parts(f"{where}: task '{name}'", sorted(needed), model_def.parts)
    if task.num_classes and task.num_classes != model_def.config.num_classes:
        raise UserError(
            f"{where}: task '{name}' has {task.num_classes} classes, but config.model.num_classes="
            f"{model_def.config.num_classes}; set that to {task.num_classes}"
        )


def jit_predict(task: str, model_def: ModelDef, context: TaskContext, mesh: Mesh) -> Any:
    """Return the jitted (parameters, batch) -> predictions of a task; call it with the mesh in context."""
    predict = TASKS[task].predict
    assert predict is not None
    # Replicated, so that every process has all predictions of a batch.
    return jax.jit(
        model_def.with_precision(lambda params, batch: predict(model_def.bind(params), batch, context)),
        out_shardings=replicated_sharding(mesh),
    )


def jit_precompute(task: str, model_def: ModelDef, context: TaskContext, mesh: Mesh) -> Any:
    """Return the jitted parameters -> arrays that all batches of a task share, replicated on every device."""
    precompute = TASKS[task].precompute
    assert precompute is not None
    return jax.jit(
        model_def.with_precision(lambda params: precompute(model_def.bind(params), context)),
        out_shardings=replicated_sharding(mesh),
    )


def _without_frames(example: Example) -> Example:
    """Drop an example's frames, which scores do not read, and which would fill the memory."""
    arrays = {name: array for name, array in example.arrays.items() if name != "frames"}
    return dataclasses.replace(example, arrays=arrays)


def _select_rows(
    batches: Sequence[Mapping[str, NDArray[Any]]], indices: Int[np.ndarray, " n"], views: int
) -> HostPredictions:
    """Return the predictions of some examples, one row each: the mean probabilities of several views."""
    rows = (indices[:, None] * views + np.arange(views)).ravel()
    selected = {name: np.concatenate([batch[name] for batch in batches])[rows] for name in batches[0]}
    if views == 1:
        return selected
    return {"probabilities": average_views(selected["probabilities"], np.repeat(indices, views), indices)}


def _allgather_examples(
    examples: Mapping[int, Example], bad_records: Mapping[int, BadRecord], views: int
) -> tuple[dict[int, Example], dict[int, BadRecord]]:
    """Gather the examples and bad records of all processes by row; return both by index in the data set, sorted."""
    all_examples = allgather_dict({row: _to_json(example) for row, example in examples.items()})
    all_bad_records = allgather_dict({row: dataclasses.asdict(record) for row, record in bad_records.items()})
    bad = {row // views: BadRecord(**values) for row, values in all_bad_records.items()}
    # A view after the first may be the bad one.
    good = {row // views: _from_json(values) for row, values in all_examples.items() if row // views not in bad}
    return good, bad


def _to_json(example: Example) -> dict[str, Any]:
    arrays = {name: (array.dtype.str, array.tolist()) for name, array in example.arrays.items()}
    return dataclasses.asdict(dataclasses.replace(example, arrays={})) | {"arrays": arrays}


def _from_json(values: Mapping[str, Any]) -> Example:
    arrays = {name: np.array(array, dtype) for name, (dtype, array) in values["arrays"].items()}
    return Example(**{**values, "arrays": arrays, "answers": tuple(values["answers"]), "times": tuple(values["times"])})
