"""What a task is, and the settings that all tasks share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from data_pipelines.examples import Example
from mplug2_jax.metrics.classification import ConfusionSummary
from mplug2_jax.metrics.metric import Metric
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass, LossOutput
from mplug2_jax.tasks.config import TaskSettings
from mplug2_jax.tasks.contracts import Contract

Predictions = dict[str, Any]  # arrays with a leading example axis
HostPredictions = Mapping[str, NDArray[Any]]
ScorePairs = Callable[[Int[np.ndarray, "p 2"]], Float[np.ndarray, " p"]]


class Prompts(NamedTuple):
    """Texts of classes: all of a class one after the other, in k batches of r, the last of them filled up."""

    ids: Int[np.ndarray, "k r l"]
    num_classes: int
    num_templates: int  # texts of each class


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskContext:
    """The settings, the ids of the run's tokeniser, and what some evaluations bring.

    ``answers`` are the only ones that may be given, where there is a list; ``prompts`` stand for classes.
    """

    settings: TaskSettings
    tokens: SpecialTokens
    answers: Int[np.ndarray, "a m"] | None = None
    num_ranked: int = 0  # answers, likeliest by their first token, that are ranked by likelihood; 0: search
    double_count_first_token: bool = False  # the first token counts twice in a rank, as in the release
    prompts: Prompts | None = None


@dataclasses.dataclass(frozen=True)
class RetrievalNeighbors:
    """What retrieval found for each example, the nearest first, as places among the examples.

    A picture of several examples is its first one.
    """

    texts: Int[np.ndarray, "n k"]  # for the example's picture
    visuals: Int[np.ndarray, "n j"]  # for its text
    visual_of: Int[np.ndarray, " n"]  # which each example has: what is right is of the same


@dataclasses.dataclass(frozen=True)
class EvalOutput:
    """The result of an evaluation: figures by name, shares as fractions, scores as their field quotes them."""

    metrics: Mapping[str, Metric]
    baselines: Mapping[str, float]  # the same figures for something that has learned nothing
    predictions: Sequence[str]  # for each example, what the model said, in words
    example_scores: Float[np.ndarray, " n"]  # and how good that was: the higher, the better
    confusion: ConfusionSummary | None = None  # of classes
    nearest: RetrievalNeighbors | None = None  # of retrieval
    absent: tuple[str, ...] = ()  # figures that could not be computed here
    warnings: tuple[str, ...] = ()  # sentences about examples that cannot be judged


def unscored_warning(examples: Sequence[Example], judged: Sequence[bool], why: str) -> tuple[str, ...]:
    """The warning about examples that weigh nothing, if there are any; ``why`` follows the number of them."""
    keys = [example.key for example, fine in zip(examples, judged, strict=True) if not fine]
    return (f"{len(keys)} of {len(examples)} {why} and weigh nothing, the first is {keys[0]}",) if keys else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Contract):
    """One task.

    ``loss`` trains it. ``predict`` runs on the device under jit, ``score`` on the host over all examples, with the mesh
    in context; a task that has none cannot be evaluated by itself, and one without a loss not be trained.
    ``precompute`` makes, on the device too, the arrays that are the same for all batches, and that ``predict`` finds in
    each of them.

    A task whose evaluation compares examples with each other looks at some pairs again, of one's text and another's
    picture. ``score_pairs`` runs on the device under jit: ``frames`` of b examples, and of each r texts (``text``,
    ``text_mask`` [b, r, l]), in; [b, r] scores out. ``rerank`` runs on the host once all examples are predicted, in all
    processes alike, with the mesh in context. It is given a function from pairs (the text's example, the picture's) to
    their scores, and returns what ``score`` reads in place of the predictions.

    ``external_metrics`` adds to a score the figures of Java programs, of which one process starts those that it has.
    """

    loss: Callable[[ForwardPass, TaskContext], LossOutput] | None = None
    precompute: Callable[[Mplug2, TaskContext], Predictions] | None = None
    num_classes: int = 0  # that its score tells apart; 0: as many as the model does
    averages_views: bool = False  # whether its predictions are probabilities, of which an example's views have a mean
    predict: Callable[[Mplug2, DeviceBatch, TaskContext], Predictions] | None = None
    score: Callable[[HostPredictions, Sequence[Example], Callable[[Sequence[int]], str]], EvalOutput] | None = None
    score_pairs: Callable[[Mplug2, DeviceBatch, TaskContext], Float[Array, "b r"]] | None = None
    rerank: Callable[[HostPredictions, Sequence[Example], TaskContext, ScorePairs], HostPredictions] | None = None
    external_metrics: Callable[[EvalOutput, Sequence[Example]], EvalOutput] | None = None
