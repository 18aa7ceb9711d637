"""DigitWorld: a synthetic data set of handwritten digits in images and videos, with annotations of every kind.

It needs no download and no disk, and every record is a function of (seed, split, kind, index). The demo and the tests
use it, and it exercises the whole stack in minutes.
"""

from data_pipelines.digitworld.scene import Motion, Scene, Thing
from data_pipelines.digitworld.source import IMAGE_LABELS, VIDEO_LABELS, DigitWorld, vocabulary_texts

__all__ = ["IMAGE_LABELS", "VIDEO_LABELS", "DigitWorld", "Motion", "Scene", "Thing", "vocabulary_texts"]
