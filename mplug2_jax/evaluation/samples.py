"""The samples of an evaluation that are kept to look at: the first, the best and the worst examples."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.examples import Example
from data_pipelines.media import write_image
from mplug2_jax.tasks.base import EvalOutput, RetrievalNeighbors

NUM_EXTREMES = 3  # best examples, and worst ones
THUMBNAIL_SIZE = 96  # pixels


@dataclasses.dataclass(frozen=True)
class SampleNeighbors:
    """The texts and images retrieved for a sample, nearest first, and which of them are correct."""

    texts: tuple[tuple[str, bool], ...]
    images: UInt8[np.ndarray, "y x 3"]  # side by side
    correct: tuple[bool, ...]  # of each image


@dataclasses.dataclass(frozen=True)
class Sample:
    """An example with its prediction."""

    example: Example
    prediction: str
    score: float
    category: str  # "first", "best" or "worst"
    nearest: SampleNeighbors | None = None  # of retrieval

    @property
    def references(self) -> tuple[str, ...]:
        """Return the reference answers."""
        return reference_answers(self.example)


def reference_answers(example: Example) -> tuple[str, ...]:
    """Return the reference answers of an example: at least one."""
    return example.answers or (example.text,)


def choose_samples(
    examples: Mapping[int, Example], output: EvalOutput, scores: Sequence[float], num_samples: int,
    read: Callable[[int], Example],
) -> tuple[Sample, ...]:  # fmt: skip
    """Choose the first examples, then the best and the worst of all; ties are in the order of the examples.

    Args:
        examples: of the evaluation, by their indices in its set; they need no frames.
        output: of the evaluation.
        scores: of each example.
        num_samples: first examples; also the maximum of best ones and of worst ones.
        read: the example of an index, with its frames.
    """
    indices, by_position = list(examples), list(examples.values())
    order = np.argsort(-np.asarray(scores), kind="stable").tolist()
    extremes = min(NUM_EXTREMES, num_samples, len(order) // 2)
    chosen = {"first": range(min(num_samples, len(order))), "best": order[:extremes], "worst": order[::-1][:extremes]}
    read = functools.cache(read)  # an example may be a first one, a best one and a neighbor
    thumbnail = functools.cache(lambda i: _thumbnail(read(indices[i])))

    def neighbors(nearest: RetrievalNeighbors, i: int) -> SampleNeighbors:
        visual, texts, visuals = nearest.visual_of[i], nearest.texts[i].tolist(), nearest.visuals[i].tolist()
        return SampleNeighbors(
            tuple((by_position[j].text, bool(nearest.visual_of[j] == visual)) for j in texts),
            np.concatenate([thumbnail(j) for j in visuals], axis=1),
            tuple(bool(j == visual) for j in visuals),
        )

    return tuple(
        Sample(
            read(indices[i]), output.predictions[i], scores[i], category,
            neighbors(output.nearest, i) if output.nearest else None,
        )
        for category, positions in chosen.items()
        for i in positions
    )  # fmt: skip


def save_samples(samples: Sequence[Sample], name: str, folder: Path) -> list[dict[str, Any]]:
    """Write the samples' images, ``NAME-I.png`` and ``NAME-I-nearest.png``; return all else as JSON values."""
    rows = []
    for i, sample in enumerate(samples):
        row: dict[str, Any] = {
            "key": sample.example.key, "instruction": sample.example.instruction, "text": sample.example.text,
            "prediction": sample.prediction, "references": list(sample.references), "score": sample.score,
            "category": sample.category,
        }  # fmt: skip
        frames = sample.example.arrays.get("frames")
        if frames is not None:
            row["frames"] = f"{name}-{i}.png"
            scale = max(1, THUMBNAIL_SIZE // frames.shape[1])
            write_image(folder / row["frames"], np.concatenate(list(frames), axis=1), scale)
        if sample.nearest:
            row["nearest_texts"] = [{"text": text, "correct": correct} for text, correct in sample.nearest.texts]
            row["nearest_images"] = {"frames": f"{name}-{i}-nearest.png", "correct": list(sample.nearest.correct)}
            write_image(folder / f"{name}-{i}-nearest.png", sample.nearest.images)
        rows.append(row)
    return rows


def _thumbnail(example: Example) -> UInt8[np.ndarray, "y x 3"]:
    """Return the middle frame at ``THUMBNAIL_SIZE``."""
    frames = example.arrays["frames"]
    middle = Image.fromarray(frames[len(frames) // 2])
    return np.asarray(middle.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX))
