"""DigitWorld: a small world of handwritten digits with pictures, clips, and everything that can be said of them.

It needs no download and no disk, and every record is a function of (seed, split, kind, index): the data of the demo,
of tests, and of anyone who wants to see the whole stack work in minutes.
"""

from data_pipelines.digitworld.scene import Motion, Scene, Thing
from data_pipelines.digitworld.source import IMAGE_LABELS, VIDEO_LABELS, DigitWorld, vocabulary_texts

__all__ = [
    "IMAGE_LABELS",
    "VIDEO_LABELS",
    "DigitWorld",
    "Motion",
    "Scene",
    "Thing",
    "vocabulary_texts",
]
