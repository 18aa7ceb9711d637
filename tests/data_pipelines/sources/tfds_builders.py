"""Small TFDS data sets with the features of the public ones. TFDS needs builders in a separate module."""

import io
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

VERSION = tfds.core.Version("1.0.0")


def png(level: int, side: int = 8) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(file, "PNG")
    file.seek(0)
    return file


class _Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = VERSION
    FEATURES: ClassVar[dict]
    EXAMPLES: ClassVar[list]

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.FEATURES))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self.EXAMPLES)


class Digits(_Builder):
    """Like mnist and imagenet2012: an image and its class."""

    FEATURES: ClassVar = {
        "image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=["dark", "light"])
    }  # fmt: skip

    def _generate_examples(self):
        for i in range(12):
            yield i, {"image": png(20 * i), "label": i // 6}


class CocoCaptions(_Builder):
    """Like coco_captions: several captions, nested."""

    FEATURES: ClassVar = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
    }

    def _generate_examples(self):
        yield 0, {"image": png(7), "captions": [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]}


class Mnli(_Builder):
    """Like glue/mnli."""

    FEATURES: ClassVar = {
        "premise": tfds.features.Text(), "hypothesis": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["entailment", "neutral", "contradiction"]),
    }  # fmt: skip
    EXAMPLES: ClassVar = [{"premise": "é a", "hypothesis": "b", "label": 1}]


class Sst2(_Builder):
    """Like glue/sst2."""

    FEATURES: ClassVar = {
        "sentence": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["negative", "positive"])
    }  # fmt: skip
    EXAMPLES: ClassVar = [{"sentence": "fine", "label": 1}]


class Xsum(_Builder):
    """Like xsum."""

    FEATURES: ClassVar = {"document": tfds.features.Text(), "summary": tfds.features.Text()}
    EXAMPLES: ClassVar = [{"document": "a long story", "summary": "story"}]


class Ucf101(_Builder):
    """Like ucf101: a video, kept as its encoded frames, and its class.

    TFDS needs TensorFlow to prepare its feature Video, which stores what a sequence of images does; so this prepares
    the latter, and ``name_as_video`` changes its name.
    """

    FEATURES: ClassVar = {
        "video": tfds.features.Sequence(tfds.features.Image(shape=(16, 16, 3), encoding_format="png")),
        "label": tfds.features.ClassLabel(names=["darker", "lighter"]),
    }

    def _generate_examples(self):
        for i in range(4):
            yield i, {"video": [png(20 * level, 16) for level in range(10)][:: -1 if i % 2 else 1], "label": 1 - i % 2}


def name_as_video(folder: Path) -> None:
    """Change the features of a prepared data set from a sequence of images to a Video."""
    path = folder / "features.json"
    content = json.loads(path.read_text())
    content["featuresDict"]["features"]["video"] = {
        "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
        "video": {
            "shape": {"dimensions": ["-1", "16", "16", "3"]}, "dtype": "uint8", "encodingFormat": "png",
        },
    }  # fmt: skip
    path.write_text(json.dumps(content))
