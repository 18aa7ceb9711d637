"""Pairs of one example's text and another's picture, scored on the mesh."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from data_pipelines.examples import Example
from data_pipelines.loader import EvaluationSet, HostBatch, stack
from data_pipelines.order import Shard
from mplug2_jax.model.mplug2 import ModelDef, Mplug2, Params
from mplug2_jax.objectives.forward import DeviceBatch
from mplug2_jax.parallel.placement import local_batch_shards, num_batch_shards, put_batch, replicated_sharding
from mplug2_jax.tasks.base import TaskContext

TEXTS = 16
"""Most texts of a picture in one row of a batch; a picture of more has several rows."""


class Rows(NamedTuple):
    """Pictures with several texts each. ``pairs`` are the places in ``texts``, flat, of the pairs that were asked for.

    Rows that have fewer texts are filled with their first.
    """

    pictures: Int[np.ndarray, " n"]
    texts: Int[np.ndarray, "n r"]
    pairs: Int[np.ndarray, " p"]


def group_pairs(pairs: Int[np.ndarray, "p 2"], most: int = TEXTS) -> Rows:
    """Pairs (text, picture) side by side for each picture, at most ``most``."""
    order = np.lexsort(pairs.T)
    text, picture = pairs[order].T
    begins = np.append(True, picture[1:] != picture[:-1])
    place = np.arange(len(order)) - np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    width = min(most, int(place.max()) + 1)
    begins = place % width == 0
    row = np.cumsum(begins) - 1
    texts = np.repeat(text[begins, None], width, axis=1)
    texts[row, place % width] = text
    places = np.empty(len(order), np.int64)
    places[order] = row * width + place % width
    return Rows(picture[begins], texts, places)


class PairScorer:
    """Scores of pairs by a task's ``match``, compiled once.

    A picture is encoded once for every ``TEXTS`` of its texts, a text once for every pair: nothing is kept of a batch
    but its scores, because tokens of all examples would fill the memory. Retrieval with k candidates both ways has k
    to 2 k pairs for each example, so it reads and encodes each picture about k / 8 times.
    """

    def __init__(
        self,
        match: Callable[[Mplug2, DeviceBatch, TaskContext], Float[Array, "b r"]],
        examples: EvaluationSet,
        rows: int,
        definition: ModelDef,
        context: TaskContext,
        mesh: Mesh,
    ) -> None:
        self._set, self._size, self._mesh = examples, rows, mesh
        # Every process gets all scores of a batch, whoever's devices made them.
        self._match = jax.jit(
            lambda params, batch: match(definition.bind(params), batch, context),
            out_shardings=replicated_sharding(mesh),
        )

    def run(
        self,
        params: Params,
        examples: Mapping[int, Example],
        on_batch: Callable[[str], None],
        name: str,
        pairs: Int[np.ndarray, "p 2"],
    ) -> Float[np.ndarray, " p"]:
        """One score for each pair; all processes call it with the same, and get the same.

        Args:
            params: the model's.
            examples: of the set, by their numbers in it; they need no frames.
            on_batch: called with what is done next, before every batch.
            name: of the evaluation.
            pairs: (the text's example, the picture's), counted in ``examples``.
        """
        places, listed = list(examples), list(examples.values())
        rows = group_pairs(pairs)
        steps = -(-len(rows.pictures) // self._size)
        mine = Shard(local_batch_shards(self._mesh), num_batch_shards(self._mesh)).rows(self._size)
        # Rows behind the last are the last again.
        numbers = np.minimum(np.arange(steps)[:, None] * self._size + mine, len(rows.pictures) - 1)
        seen = self._frames([places[i] for i in rows.pictures[numbers].ravel()])
        scores = []
        for step in range(steps):
            on_batch(f"batch {step + 1} of {steps} of pairs of evaluation {name}")
            batch = {"frames": np.stack(list(itertools.islice(seen, len(mine))))}
            batch |= _texts(listed, rows.texts[numbers[step]])
            with jax.set_mesh(self._mesh):
                scores.append(np.asarray(self._match(params, put_batch(batch, self._mesh))))
        return np.concatenate(scores).ravel()[rows.pairs]

    def _frames(self, places: list[int]) -> Iterator[np.ndarray]:
        """Frames of examples by their places in the set; of neighbours that are the same, once."""
        runs = [(place, len(list(run))) for place, run in itertools.groupby(places)]
        made = self._set.each([place for place, _ in runs])
        for (_, count), example in zip(runs, made, strict=True):
            yield from itertools.repeat(example.arrays["frames"], count)


def _texts(examples: list[Example], numbers: Int[np.ndarray, "b r"]) -> HostBatch:
    flat = stack([{name: examples[i].arrays[name] for name in ("text", "text_mask")} for i in numbers.ravel()])
    return {name: x.reshape(*numbers.shape, -1) for name, x in flat.items()}
