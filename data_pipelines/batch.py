"""The batch contract: what travels from the data room to the rest of the stack, and nothing else does.

Leading axis: examples. Hosts build numpy; pixels stay bytes until they are on the device, which normalises them.
"""

from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

# numpy arrays on hosts; the same names and shapes as jax arrays on devices.
NpArray = np.ndarray


class Batch(TypedDict, total=False):
    """Every key a batch may have. A task names those it needs; the others are absent."""

    frames: UInt8[NpArray, "b t y x 3"]
    """Square pictures; an image has t = 1."""
    text: Int[NpArray, "b l"]
    """Token ids of a caption or sentence, ``[CLS] words [SEP]`` and padding 0."""
    text_mask: Bool[NpArray, "b l"]
    """True where ``text`` is no padding."""
    word_starts: Bool[NpArray, "b l"]
    """True where a word of ``text`` begins, for whole-word masking."""
    instruction: Int[NpArray, "b l2"]
    """Token ids of an instruction or question for the decoder to answer."""
    instruction_mask: Bool[NpArray, "b l2"]
    """True where ``instruction`` is no padding."""
    target: Int[NpArray, "b m"]
    """Token ids to generate, ``[CLS] words [SEP]`` and padding 0."""
    target_weights: Float[NpArray, "b m"]
    """How much each target token counts as a prediction: 0 for padding, and for a prompt."""
    references: Int[NpArray, "b r m"]
    """Token ids of right captions, each as ``target``; rows beyond the last one are 0."""
    answer_weights: Float[NpArray, " a"]
    """Weight of each answer where questions have several; ``target`` then has a = b * r rows."""
    label: Int[NpArray, " b"]
    """Class index."""
    box: Float[NpArray, "b 4"]
    """x0, y0, x1, y1 in 0..1."""
    example_mask: Bool[NpArray, " b"]
    """False for padding examples, which count for nothing."""
    example_id: Int[NpArray, " b"]
    """Which example this is, int64, stable across epochs and meshes. Equal ids are the same picture."""


BATCH_KEYS = frozenset(Batch.__annotations__)
