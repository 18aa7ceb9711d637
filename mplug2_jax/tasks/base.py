"""The interface of a task."""

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
from mplug2_jax.tasks.config import PromptPooling, TasksConfig
from mplug2_jax.tasks.specs import TaskSpec

Predictions = dict[str, Any]  # arrays with a leading example axis
HostPredictions = Mapping[str, NDArray[Any]]
Decode = Callable[[Sequence[int]], str]  # token ids to text
ScorePairs = Callable[[Int[np.ndarray, "p 2"]], Float[np.ndarray, " p"]]


class Prompts(NamedTuple):
    """Texts that represent classes, class by class, in k batches of r texts; the last batch is padded."""

    ids: Int[np.ndarray, "k r l"]
    num_classes: int
    num_templates: int  # texts per class
    pooling: PromptPooling = "features"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskContext:
    """The config, the tokenizer's special tokens, and what only some evaluations have."""

    config: TasksConfig
    tokens: SpecialTokens
    answers: Int[np.ndarray, "a m"] | None = None  # the only valid answers, if there is a list
    num_ranked: int = 0  # answers, likeliest by their first token, that are ranked by likelihood; 0: search
    double_count_first_token: bool = False  # the first token counts twice in a rank, as in the release
    prompts: Prompts | None = None  # of zero-shot classification


@dataclasses.dataclass(frozen=True)
class RetrievalNeighbors:
    """The retrieved texts and visuals of each example, nearest first, as indices of examples.

    A visual that several examples share has the index of the first of them.
    """

    texts: Int[np.ndarray, "n k"]  # retrieved for the example's visual
    visuals: Int[np.ndarray, "n j"]  # retrieved for the example's text
    visual_of: Int[np.ndarray, " n"]  # the visual of each example: equal ones are correct


@dataclasses.dataclass(frozen=True)
class EvalOutput:
    """The scored predictions of an evaluation; metrics are fractions, or scores as papers quote them."""

    metrics: Mapping[str, Metric]
    baselines: Mapping[str, float]  # the same metrics of a trivial model
    predictions: Sequence[str]  # of each example, as text
    example_scores: Float[np.ndarray, " n"]  # of each prediction; higher is better
    confusion: ConfusionSummary | None = None  # of classification
    nearest: RetrievalNeighbors | None = None  # of retrieval
    unavailable_metrics: tuple[str, ...] = ()  # metrics that cannot be computed on this machine
    warnings: tuple[str, ...] = ()  # about examples that cannot be scored


def unscored_warning(examples: Sequence[Example], scorable: Sequence[bool], reason: str) -> tuple[str, ...]:
    """Return a warning about examples with weight 0, if there are any; ``reason`` follows their number."""
    keys = [example.key for example, ok in zip(examples, scorable, strict=True) if not ok]
    return (f"{len(keys)} of {len(examples)} {reason} and have weight 0, first {keys[0]}",) if keys else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(TaskSpec):
    """One task.

    ``loss`` trains it. ``predict`` runs on the device under jit, ``score`` on the host over all examples, with the mesh
    in context. A task without ``score`` cannot be evaluated by itself, one without ``loss`` cannot be trained.
    ``precompute`` runs once on the device; the arrays it returns are added to every batch of ``predict``.

    Retrieval tasks may score some pairs of one example's text and another's frames again. ``score_pairs`` runs on the
    device under jit: it takes ``frames`` of b examples, and r texts for each (``text``, ``text_mask`` [b, r, l]), and
    returns scores [b, r]. ``rerank`` runs on the host after all predictions, with the mesh in context and in the same
    way in all processes: it takes a function from pairs (example of the text, example of the frames) to scores, and
    returns what ``score`` reads in place of the predictions.

    ``external_metrics`` adds the metrics of Java programs, which the primary process runs where they are installed.
    """

    loss: Callable[[ForwardPass, TaskContext], LossOutput] | None = None
    precompute: Callable[[Mplug2, TaskContext], Predictions] | None = None
    num_classes: int = 0  # that the score expects; 0: the model's
    averages_views: bool = False  # predictions are probabilities, averaged over the views of an example
    predict: Callable[[Mplug2, DeviceBatch, TaskContext], Predictions] | None = None
    score: Callable[[HostPredictions, Sequence[Example], Decode], EvalOutput] | None = None
    score_pairs: Callable[[Mplug2, DeviceBatch, TaskContext], Float[Array, "b r"]] | None = None
    rerank: Callable[[HostPredictions, Sequence[Example], TaskContext, ScorePairs], HostPredictions] | None = None
    external_metrics: Callable[[EvalOutput, Sequence[Example]], EvalOutput] | None = None
