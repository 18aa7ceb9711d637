"""DigitWorld as a source of records."""

import operator
from collections.abc import Iterator
from typing import SupportsIndex, TypeVar, get_args

import numpy as np

from data_pipelines.config import Kind
from data_pipelines.digitworld import language
from data_pipelines.digitworld.digits import Split
from data_pipelines.digitworld.render import bounding_box, render
from data_pipelines.digitworld.scene import DIGITS, DIRECTIONS, Scene, sample_scene
from data_pipelines.errors import DataError
from data_pipelines.record import Expression, Record

Choice = TypeVar("Choice", bound=str)

KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)
LABELS = ("", "colour", "place")

IMAGE_LABELS = DIGITS
VIDEO_LABELS = ("still", *(f"moving {direction}" for direction in DIRECTIONS), "appears")

MIN_IMAGE_SIZE = 16  # a small digit is then five pixels high


class DigitWorld:
    """Images, videos or texts about one or two handwritten digits on a dark canvas.

    A record is a function of (seed, split, kind, index) alone; its scene does not depend on ``image_size`` and
    ``num_frames``. Held-out records use handwriting that no training record uses.

    The label of an image is its largest digit (``IMAGE_LABELS``), that of a video the motion of its largest digit
    (``VIDEO_LABELS``); or, with ``label``, the color or place of it. Text records have sentences, entailments, and a
    report to summarize as a question; no frames.

    Args:
        kind: of the records: "image", "video" or "text".
        split: "train", or "heldout" for other scenes in other handwriting.
        seed: random seed of the scenes.
        size: number of records.
        image_size: side of the frames in pixels.
        num_frames: frames of a video; the motion takes all of them.
        label: "colour" or "place", to label these instead of the digit or its motion.

    Raises:
        DataError: an argument is out of range.
    """

    def __init__(
        self, kind: str = "image", *, split: str = "train", seed: int = 0, size: int = 100_000, image_size: int = 32,
        num_frames: int = 4, label: str = "",
    ) -> None:  # fmt: skip
        self.kind = _check_choice("kind", kind, KINDS)
        self.label = _check_choice("label", label, LABELS)
        self.split = _check_choice("split", split, SPLITS)
        at_least = {"seed": 0, "size": 1, "image_size": MIN_IMAGE_SIZE, "num_frames": 2 if kind == "video" else 1}
        for field, value in (("seed", seed), ("size", size), ("image_size", image_size), ("num_frames", num_frames)):
            if value < at_least[field]:
                raise DataError(f"DigitWorld's {field} is {value}, expected at least {at_least[field]}")
        self.seed, self.size, self.image_size = seed, size, image_size
        self.num_frames = num_frames if kind == "video" else 1

    def __len__(self) -> int:
        """Return the number of records."""
        return self.size

    def _sample(self, index: int) -> tuple[Scene, bool, np.random.Generator]:
        """Return a scene, whether its things may move, and the generator for its annotations."""
        if not 0 <= index < self.size:
            raise IndexError(f"record {index} of a DigitWorld of {self.size}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), KINDS.index(self.kind), index])
        moving = self.kind == "video" or (self.kind == "text" and bool(rng.integers(2)))
        return sample_scene(rng, self.split, moving=moving), moving, rng

    def scene(self, index: SupportsIndex) -> Scene:
        """Return the scene of a record. Raises IndexError outside 0..size-1."""
        return self._sample(operator.index(index))[0]

    def __getitem__(self, index: SupportsIndex) -> Record:
        """Return one record. Raises IndexError outside 0..size-1."""
        index = operator.index(index)
        scene, moving, rng = self._sample(index)
        key = f"digitworld/{self.kind}/{self.split}/{self.seed}/{index}"
        if self.kind == "text":
            return Record(
                key=key,
                texts=language.sentences(scene, rng, moving=moving),
                entailments=language.entailments(scene, rng, moving=moving),
                questions=(language.report(scene, rng, moving=moving),),
            )
        return Record(
            key=key,
            frames=render(scene, self.image_size, self.num_frames),
            captions=language.captions(scene, rng, moving=moving),
            questions=language.questions(scene, rng, moving=moving),
            expressions=self._expressions(scene, rng),
            label=_label(scene, moving, self.label),
        )

    def _expressions(self, scene: Scene, rng: np.random.Generator) -> tuple[Expression, ...]:
        """Return referring expressions of all things visible in the first frame, in random order."""
        expressions = [
            Expression(phrase, bounding_box(thing, self.image_size))
            for thing in scene.things
            if thing.visible_at(0.0)
            for phrase in language.referring_expressions(thing, rng)
        ]
        return tuple(expressions[i] for i in rng.permutation(len(expressions)))


def _check_choice(field: str, value: str, choices: tuple[Choice, ...]) -> Choice:
    for choice in choices:
        if choice == value:
            return choice
    raise DataError(f"DigitWorld's {field} is {value!r}, expected one of {', '.join(choices)}")


def _label(scene: Scene, moving: bool, attribute: str) -> str:
    largest = scene.things[0]
    if attribute:
        return str(getattr(largest, attribute))
    if not moving:
        return largest.name
    motion = largest.motion
    return f"moving {motion.direction}" if motion.kind == "moves" else motion.kind


def vocabulary_texts(count: int = 300, seed: int = 0) -> Iterator[str]:
    """Yield all texts of ``count`` training scenes of each kind, to train a tokenizer on."""
    for kind in KINDS:
        world = DigitWorld(kind, seed=seed, size=count)
        for record in map(world.__getitem__, range(count)):
            yield from (*record.captions, *record.texts)
            for question in record.questions if kind != "text" else ():  # reports repeat the words of other texts
                yield from (question.question, question.answer)
            yield from (expression.text for expression in record.expressions)
            for entailment in record.entailments:
                yield from (entailment.premise, entailment.hypothesis, entailment.answer)
