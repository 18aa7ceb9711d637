"""The samples of an evaluation: which examples they are, and their neighbors."""

import numpy as np
import pytest

from data_pipelines.examples import Example
from mplug2_jax.evaluation.samples import THUMBNAIL_SIZE, choose_samples
from mplug2_jax.tasks.base import EvalOutput, RetrievalNeighbors


def choose(scores, num_samples, size=8, **fields):
    """Return (category, index, score) of the samples chosen from examples with indices 10, 20, ..., and the samples."""
    examples = {10 * (i + 1): Example({}, f"{10 * (i + 1)}", text=f"text {i}") for i in range(len(scores))}
    output = EvalOutput({}, {}, [f"prediction {i}" for i in range(len(scores))], np.asarray(scores), **fields)
    samples = choose_samples(
        examples, output, scores, num_samples, lambda index: Example({"frames": clip(index, size)}, f"{index}")
    )
    return [(sample.category, int(sample.example.key), sample.score) for sample in samples], samples


def clip(index, size):
    """Return three frames, each of one color."""
    return np.full((3, size, size, 3), index, np.uint8) + np.uint8([0, 80, 160])[:, None, None, None]


def test_the_first_are_kept_then_the_best_and_the_worst_of_all():
    kept, samples = choose([0.5, 0.1, 0.9, 0.7, 0.3, 0.2, 0.8, 0.4], 4)
    assert kept == [
        ("first", 10, 0.5), ("first", 20, 0.1), ("first", 30, 0.9), ("first", 40, 0.7),
        ("best", 30, 0.9), ("best", 70, 0.8), ("best", 40, 0.7),
        ("worst", 20, 0.1), ("worst", 60, 0.2), ("worst", 50, 0.3),
    ]  # fmt: skip
    assert samples[4].prediction == "prediction 2"
    assert samples[4].example.arrays["frames"].shape == (3, 8, 8, 3)


@pytest.mark.parametrize(
    ("count", "num_samples", "best", "worst"),
    [(8, 6, [10, 20, 30], [80, 70, 60]), (5, 6, [10, 20], [50, 40]), (1, 6, [], []), (8, 1, [10], [80])],
)
def test_of_equals_the_first_are_the_best_and_none_is_both(count, num_samples, best, worst):
    kept, _ = choose([0.5] * count, num_samples)
    assert [index for category, index, _ in kept if category == "best"] == best
    assert [index for category, index, _ in kept if category == "worst"] == worst
    assert [index for category, index, _ in kept if category == "first"] == [
        10 * (i + 1) for i in range(min(count, num_samples))
    ]


@pytest.mark.parametrize("size", [8, 96, 200])
def test_neighbors_have_thumbnails_of_their_middle_frames(size):
    texts, visuals = np.asarray([[2, 0], [1, 0], [1, 2]]), np.asarray([[2, 0], [0, 2], [0, 2]])
    _, samples = choose([1.0, 0.5, 0.0], 1, size, nearest=RetrievalNeighbors(texts, visuals, np.asarray([0, 0, 2])))
    nearest = samples[0].nearest
    assert nearest.texts == (("text 2", False), ("text 0", True))
    assert nearest.correct == (False, True)
    assert nearest.images.shape[1] == 2 * nearest.images.shape[0]
    assert THUMBNAIL_SIZE <= nearest.images.shape[0] < 2 * THUMBNAIL_SIZE
    half = nearest.images.shape[0]
    assert (nearest.images[:, :half] == 30 + 80).all()
    assert (nearest.images[:, half:] == 10 + 80).all()
