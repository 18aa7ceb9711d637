"""The handwritten digits of scikit-learn, and their split into training and held-out glyphs."""

import functools
import importlib.metadata
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Split = Literal["train", "heldout"]

HELD_OUT_EVERY = 5


@functools.cache
def _load() -> tuple[Float[np.ndarray, "glyph 8 8"], Int[np.ndarray, " glyph"]]:
    # Only the file is read: importing scikit-learn takes a second of every process.
    file = importlib.metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")
    return (rows[:, :-1].reshape(-1, 8, 8) / 16).astype(np.float32), rows[:, -1].astype(np.int64)


def glyph_image(glyph: int) -> Float[np.ndarray, "8 8"]:
    """Return one of the 1797 digits, as ink 0..1 in 16 steps."""
    return _load()[0][glyph]


@functools.cache
def glyphs_for(digit: int, split: Split) -> Int[np.ndarray, " n"]:
    """Return the glyphs of a digit in a split.

    In the order of the data set, every fifth glyph of each digit is held out; the others are for training.
    """
    glyphs = np.flatnonzero(_load()[1] == digit)
    held_out = np.arange(len(glyphs)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return glyphs[held_out if split == "heldout" else ~held_out]
