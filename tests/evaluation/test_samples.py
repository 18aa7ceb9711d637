"""The examples that are kept to look at: which they are, and what is nearest to them."""

import numpy as np
import pytest

from data_pipelines.examples import Example
from mplug2_jax.evaluation.samples import SIDE, choose_samples
from mplug2_jax.tasks.base import EvalOutput, RetrievalNeighbors


def chosen(goodness, most, side=8, **fields):
    """(why, place, goodness) of what is chosen of examples at the places 10, 20, ..., and the samples themselves."""
    examples = {10 * (i + 1): Example({}, f"{10 * (i + 1)}", text=f"text {i}") for i in range(len(goodness))}
    scored = EvalOutput({}, {}, [f"said {i}" for i in range(len(goodness))], np.asarray(goodness), **fields)
    samples = choose_samples(
        examples, scored, goodness, most, lambda place: Example({"frames": clip(place, side)}, f"{place}")
    )
    return [(sample.category, int(sample.example.key), sample.score) for sample in samples], samples


def clip(place, side):
    """Three frames, each of one colour."""
    return np.full((3, side, side, 3), place, np.uint8) + np.uint8([0, 80, 160])[:, None, None, None]


def test_the_first_are_kept_then_the_best_and_the_worst_of_all():
    kept, samples = chosen([0.5, 0.1, 0.9, 0.7, 0.3, 0.2, 0.8, 0.4], 4)
    assert kept == [
        ("first", 10, 0.5), ("first", 20, 0.1), ("first", 30, 0.9), ("first", 40, 0.7),
        ("best", 30, 0.9), ("best", 70, 0.8), ("best", 40, 0.7),
        ("worst", 20, 0.1), ("worst", 60, 0.2), ("worst", 50, 0.3),
    ]  # fmt: skip
    assert samples[4].prediction == "said 2"
    assert samples[4].example.arrays["frames"].shape == (3, 8, 8, 3)


@pytest.mark.parametrize(
    ("count", "most", "best", "worst"),
    [(8, 6, [10, 20, 30], [80, 70, 60]), (5, 6, [10, 20], [50, 40]), (1, 6, [], []), (8, 1, [10], [80])],
)
def test_of_equals_the_first_are_the_best_and_none_is_both(count, most, best, worst):
    kept, _ = chosen([0.5] * count, most)
    assert [place for why, place, _ in kept if why == "best"] == best
    assert [place for why, place, _ in kept if why == "worst"] == worst
    assert [place for why, place, _ in kept if why == "first"] == [10 * (i + 1) for i in range(min(count, most))]


@pytest.mark.parametrize("side", [8, 96, 200])
def test_what_is_nearest_comes_with_pictures_of_its_middle_frames(side):
    texts, pictures = np.asarray([[2, 0], [1, 0], [1, 2]]), np.asarray([[2, 0], [0, 2], [0, 2]])
    _, samples = chosen([1.0, 0.5, 0.0], 1, side, nearest=RetrievalNeighbors(texts, pictures, np.asarray([0, 0, 2])))
    nearest = samples[0].nearest
    assert nearest.texts == (("text 2", False), ("text 0", True))
    assert nearest.right == (False, True)
    assert nearest.pictures.shape[1] == 2 * nearest.pictures.shape[0]
    assert SIDE <= nearest.pictures.shape[0] < 2 * SIDE
    half = nearest.pictures.shape[0]
    assert (nearest.pictures[:, :half] == 30 + 80).all()
    assert (nearest.pictures[:, half:] == 10 + 80).all()
