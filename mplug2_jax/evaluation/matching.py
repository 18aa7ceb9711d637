"""Scores of pairs of one example's text and another's frames, computed on the mesh."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from data_pipelines.examples import Example
from data_pipelines.loader import EvaluationSet, HostBatch, collate
from data_pipelines.order import HostShards
from mplug2_jax.model.mplug2 import ModelDef, Mplug2, Params
from mplug2_jax.objectives.forward import DeviceBatch
from mplug2_jax.parallel.placement import local_batch_shards, num_batch_shards, put_batch, replicated_sharding
from mplug2_jax.tasks.base import TaskContext

MAX_TEXTS = 16
"""Texts per row of a batch; frames with more texts take several rows."""


class GroupedPairs(NamedTuple):
    """Pairs in rows of one visual and several texts; shorter rows are padded with their first text."""

    visuals: Int[np.ndarray, " n"]
    texts: Int[np.ndarray, "n r"]
    pairs: Int[np.ndarray, " p"]  # flat index in ``texts`` of each pair


def group_pairs(pairs: Int[np.ndarray, "p 2"], max_texts: int) -> GroupedPairs:
    """Group pairs (text, visual) by visual, with at most ``max_texts`` texts in a row."""
    order = np.lexsort(pairs.T)
    text, visual = pairs[order].T
    starts = np.append(True, visual[1:] != visual[:-1])
    position = np.arange(len(order)) - np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
    width = min(max_texts, int(position.max()) + 1)
    starts = position % width == 0
    row = np.cumsum(starts) - 1
    texts = np.repeat(text[starts, None], width, axis=1)
    texts[row, position % width] = text
    index = np.empty(len(order), np.int64)
    index[order] = row * width + position % width
    return GroupedPairs(visual[starts], texts, index)


class PairScorer:
    """A scorer of pairs by a task's ``score_pairs``, compiled once.

    Frames are encoded once for every ``MAX_TEXTS`` of their texts, a text once for every pair: only scores are kept of
    a batch, because the tokens of all examples would fill the memory. Retrieval with k candidates both ways has k to
    2 k pairs per example, so it reads and encodes the frames of each example about k / 8 times.
    """

    def __init__(
        self, score_pairs: Callable[[Mplug2, DeviceBatch, TaskContext], Float[Array, "b r"]], examples: EvaluationSet,
        predict_batch_size: int, model_def: ModelDef, context: TaskContext, mesh: Mesh,
    ) -> None:  # fmt: skip
        self._dataset, self._predict_batch_size, self._mesh = examples, predict_batch_size, mesh
        # Replicated, so that every process has all scores of a batch.
        self._score_pairs = jax.jit(
            model_def.with_precision(lambda params, batch: score_pairs(model_def.bind(params), batch, context)),
            out_shardings=replicated_sharding(mesh),
        )

    def run(
        self, params: Params, examples: Mapping[int, Example], on_batch: Callable[[str], None], name: str,
        pairs: Int[np.ndarray, "p 2"],
    ) -> Float[np.ndarray, " p"]:  # fmt: skip
        """Return one score per pair; all processes call it with the same arguments, and get the same scores.

        Args:
            params: of the model.
            examples: of the set, by their indices in it; they need no frames.
            on_batch: called before every batch, with a description of it.
            name: of the evaluation.
            pairs: (example of the text, example of the frames), as positions in ``examples``.
        """
        indices, by_position = list(examples), list(examples.values())
        grouped = group_pairs(pairs, MAX_TEXTS)
        steps = -(-len(grouped.visuals) // self._predict_batch_size)
        local_rows = HostShards(local_batch_shards(self._mesh), num_batch_shards(self._mesh)).rows(
            self._predict_batch_size
        )
        # The last row is repeated as padding.
        rows = np.minimum(np.arange(steps)[:, None] * self._predict_batch_size + local_rows, len(grouped.visuals) - 1)
        frames = self._frames([indices[i] for i in grouped.visuals[rows].ravel()])
        scores = []
        for step in range(steps):
            on_batch(f"batch {step + 1} of {steps} of pairs of evaluation {name}")
            batch = {"frames": np.stack(list(itertools.islice(frames, len(local_rows))))}
            batch |= _texts(by_position, grouped.texts[rows[step]])
            with jax.set_mesh(self._mesh):
                scores.append(np.asarray(self._score_pairs(params, put_batch(batch, self._mesh))))
        return np.concatenate(scores).ravel()[grouped.pairs]

    def _frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        """Yield the frames of examples by their indices in the set; runs of equal indices are read once."""
        runs = [(index, len(list(run))) for index, run in itertools.groupby(indices)]
        examples = self._dataset.iter_examples([index for index, _ in runs])
        for (_, count), example in zip(runs, examples, strict=True):
            yield from itertools.repeat(example.arrays["frames"], count)


def _texts(examples: list[Example], positions: Int[np.ndarray, "b r"]) -> HostBatch:
    flat = collate([{name: examples[i].arrays[name] for name in ("text", "text_mask")} for i in positions.ravel()])
    return {name: x.reshape(*positions.shape, -1) for name, x in flat.items()}
