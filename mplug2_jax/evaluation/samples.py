"""The examples of an evaluation that are kept for people to look at: the first, the best and the worst."""

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

EXTREMES = 3  # so many of the best, and of the worst
SIDE = 96  # pixels of a frame that is there to be recognised


@dataclasses.dataclass(frozen=True)
class SampleNeighbors:
    """What was nearest to a sample's picture and to its text, the nearest first, and which of it is right."""

    texts: tuple[tuple[str, bool], ...]
    pictures: UInt8[np.ndarray, "y x 3"]  # side by side
    right: tuple[bool, ...]  # which of the pictures are


@dataclasses.dataclass(frozen=True)
class Sample:
    """One example with what the model said to it, how good that was, and why it is looked at."""

    example: Example
    prediction: str
    score: float
    category: str  # "first", "best" or "worst"
    nearest: SampleNeighbors | None = None  # of retrieval

    @property
    def references(self) -> tuple[str, ...]:
        """What would have been right."""
        return reference_answers(self.example)


def reference_answers(example: Example) -> tuple[str, ...]:
    """What is right to say to an example: at least one."""
    return example.answers or (example.text,)


def choose_samples(
    examples: Mapping[int, Example], scored: EvalOutput, goodness: Sequence[float], most: int,
    read: Callable[[int], Example],
) -> tuple[Sample, ...]:  # fmt: skip
    """The first ``most`` examples, then the best and the worst of all. Of equals, the first are the best.

    Args:
        examples: of the evaluation, by their places in its set; they need no frames.
        scored: what came of them.
        goodness: how good each is.
        most: so many first ones, and no more of the others.
        read: the example of a place, with its frames.
    """
    places, listed = list(examples), list(examples.values())
    order = np.argsort(-np.asarray(goodness), kind="stable").tolist()
    extremes = min(EXTREMES, most, len(order) // 2)
    chosen = {"first": range(min(most, len(order))), "best": order[:extremes], "worst": order[::-1][:extremes]}
    read = functools.cache(read)  # one may be a first, a best and a neighbour
    thumbnail = functools.cache(lambda i: _thumbnail(read(places[i])))

    def neighbours(found: RetrievalNeighbors, i: int) -> SampleNeighbors:
        own, texts, pictures = found.visual_of[i], found.texts[i].tolist(), found.visuals[i].tolist()
        return SampleNeighbors(
            tuple((listed[j].text, bool(found.visual_of[j] == own)) for j in texts),
            np.concatenate([thumbnail(j) for j in pictures], axis=1),
            tuple(bool(j == own) for j in pictures),
        )

    return tuple(
        Sample(
            read(places[i]),
            scored.predictions[i],
            goodness[i],
            why,
            neighbours(scored.nearest, i) if scored.nearest else None,
        )
        for why, numbers in chosen.items()
        for i in numbers
    )


def save_samples(samples: Sequence[Sample], name: str, folder: Path) -> list[dict[str, Any]]:
    """Writes the samples' pictures, ``NAME-I.png`` and ``NAME-I-nearest.png``; the rest of them is returned as JSON."""
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
            write_image(folder / row["frames"], np.concatenate(list(frames), axis=1), max(1, SIDE // frames.shape[1]))
        if sample.nearest:
            row["nearest_texts"] = [{"text": text, "correct": correct} for text, correct in sample.nearest.texts]
            row["nearest_images"] = {"frames": f"{name}-{i}-nearest.png", "correct": list(sample.nearest.right)}
            write_image(folder / f"{name}-{i}-nearest.png", sample.nearest.pictures)
        rows.append(row)
    return rows


def _thumbnail(example: Example) -> UInt8[np.ndarray, "y x 3"]:
    """The middle frame at ``SIDE`` pixels."""
    frames = example.arrays["frames"]
    middle = Image.fromarray(frames[len(frames) // 2])
    return np.asarray(middle.resize((SIDE, SIDE), Image.Resampling.BOX))
