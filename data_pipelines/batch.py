"""The batch contract: the only interface between this package and the rest of the stack.

The leading axis is that of examples. Hosts build numpy arrays; pixels stay uint8 until the device normalizes them.
"""

from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

# numpy arrays on hosts; the same names and shapes as jax arrays on devices.
NpArray = np.ndarray


class Batch(TypedDict, total=False):
    """All keys that a batch may have. A task lists those it needs; the others are absent."""

    frames: UInt8[NpArray, "b t y x 3"]
    """Square frames; an image has t = 1."""
    color_operations: Float[NpArray, "b o 2"]
    """Operations to apply to ``frames`` on the device: number in ``augment.DEVICE_OPERATIONS`` (-1: none), level."""
    text: Int[NpArray, "b l"]
    """Token ids of a caption or sentence, ``[CLS] words [SEP]`` and padding 0."""
    text_mask: Bool[NpArray, "b l"]
    """False where ``text`` is padding."""
    word_starts: Bool[NpArray, "b l"]
    """True where a word of ``text`` begins, for whole-word masking."""
    instruction: Int[NpArray, "b l2"]
    """Token ids of an instruction or question for the decoder to answer."""
    instruction_mask: Bool[NpArray, "b l2"]
    """False where ``instruction`` is padding."""
    target: Int[NpArray, "b m"]
    """Token ids to generate, ``[CLS] words [SEP]`` and padding 0."""
    target_weights: Float[NpArray, "b m"]
    """Weight of each target token in the loss: 0 for padding, and for a prompt."""
    references: Int[NpArray, "b r m"]
    """Token ids of reference captions, each as ``target``; rows after the last one are 0."""
    answer_weights: Float[NpArray, " a"]
    """Weight of each answer if questions have several; ``target`` then has a = b * r rows."""
    label: Int[NpArray, " b"]
    """Class index."""
    box: Float[NpArray, "b 4"]
    """x0, y0, x1, y1 in 0..1."""
    example_mask: Bool[NpArray, " b"]
    """False for padding examples, which are ignored."""
    example_id: Int[NpArray, " b"]
    """Id of the example, int64, stable across epochs and meshes. Examples of the same image or video share it."""


BATCH_KEYS = frozenset(Batch.__annotations__)
