"""All that a stream of batches can be told: sources, what is seen, what is read. Data alone, quick to import."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from data_pipelines.errors import DataError

Kind = Literal["image", "video", "text"]
Format = Literal[
    "annotations", "array_record", "coco_captions", "digitworld", "files", "glue", "image_folder", "karpathy",
    "kinetics", "ssv2", "tfds", "vqa_v2", "webdataset",
]  # fmt: skip
Colour = tuple[int, int, int]  # red, green, blue, 0 to 255
Transform = Literal["test", "resize", "train", "released_test", "released_train", "released_pretrain"]
InstructionKind = Literal["caption", "question", "label", "box", "entailment"]

WHITE: Colour = (255, 255, 255)
RELEASE_PROMPT = "a video of"
MAX_MAGNITUDE = 10  # of an operation of RandAugment
NUM_OPERATIONS = 14  # of augment.OPERATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of records: the format, where it is, which part of it.

    A field that the format does not read must keep its default, so that nothing is set in vain.
    """

    format: Format = "digitworld"  # of the files; digitworld draws its own
    kind: Kind = "image"  # what its records are taken for; all sources of a stream agree
    path: str = ""  # file, folder or pattern, local or a URL ("gs://bucket/shards/*.tar")
    media: str = ""  # folder of the pictures or clips that annotation files name; empty: beside the file
    split: str = ""  # DigitWorld: "train" (default) or "heldout"; files: the name that they use
    seed: int = 0  # DigitWorld's
    label: str = ""  # DigitWorld: what a record's label is of; empty: the digit in a picture, the motion in a clip
    size: int | None = None  # the first so many records; None: all (DigitWorld: 100,000)
    each: Literal["record", "text"] = "record"  # "text": a record for every caption, or text; all are read at first
    weight: float = 1.0  # share of a mixture, against the other sources' weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualConfig:
    """Which frames of a clip are taken, and how they become squares of ``image_size`` pixels.

    Ours, antialiased:

    - ``test``: the square in the middle.
    - ``resize``: all of the picture, whatever its aspect.
    - ``train``: a random part; perhaps flipped, by even chance as everywhere; RandAugment. The last four fields are
      its own.

    The release's, exactly, but for transparent pixels:

    - ``released_test``: all of the picture, by the nearest pixel.
    - ``released_train``: of fine-tuning. A random part of 50 to 100 %, bicubic without antialiasing, what overshoots
      wrapped round; perhaps flipped; two operations.
    - ``released_pretrain``: of pretraining. Pictures: a random part of 20 to 100 %, antialiased; perhaps flipped;
      up to two operations. Videos: all of the picture by the nearest pixel, 1.14 times as large; two operations, of
      which a flip may be one; a random square.

    An evaluation may look at each example several times: at ``clips`` choices of a video's frames, evenly spread, and
    at ``crops`` squares of each, left to right or top to bottom.
    """

    image_size: int = 32  # pixels of a frame's side
    num_frames: int = 4  # of a clip; a picture has one
    sampling: Literal["middle", "random", "fps"] = "middle"  # frames evenly spaced, at random places, or at fps
    fps: float = 2.0  # frames per second for sampling="fps", from the middle of the clip
    clips: int = 1  # choices of frames that an evaluation looks at
    crops: int = 1  # 1: as the transform has it; 3: of transform="test"
    background: Colour = WHITE  # what is seen through transparent pixels, whatever colour these hide
    transform: Transform = "test"  # how frames become squares: see above
    min_area: float = 0.5  # least share of a picture that training sees
    flip: bool = True  # False where left and right matter: text, digits, "moves to the left"
    num_ops: int = 2  # operations of RandAugment, 0 for none
    magnitude: float = 5.0  # how strong they are, 0 to 10

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            DataError: a field is out of its range.
        """
        for field, valid, expected in (
            ("image_size", self.image_size >= 1, "at least 1"),
            ("num_frames", self.num_frames >= 1, "at least 1"),
            ("fps", 0 < self.fps < float("inf"), "above 0"),
            ("clips", self.clips >= 1, "at least 1"),
            ("crops", self.crops in (1, 3), "1 or 3"),
            ("background", [0 <= value <= 255 for value in self.background] == [True] * 3, "three of 0 to 255"),
            ("min_area", 0 < self.min_area <= 1, "above 0 and at most 1"),
            ("num_ops", 0 <= self.num_ops <= NUM_OPERATIONS, f"0 to {NUM_OPERATIONS}"),
            ("magnitude", 0 <= self.magnitude <= MAX_MAGNITUDE, f"0 to {MAX_MAGNITUDE}"),
        ):
            if not valid:
                raise DataError(f"visual.{field} is {getattr(self, field)}, expected {expected}")
        if self.clips > 1 and self.sampling == "random":
            raise DataError(f"visual.clips={self.clips} needs frames that are not drawn: sampling 'middle' or 'fps'")
        if self.crops > 1 and self.transform != "test":
            raise DataError(
                f"visual.crops={self.crops} with visual.transform={self.transform!r}: several squares are cut by 'test'"
            )

    @property
    def views(self) -> int:
        """How often an evaluation looks at each example."""
        return self.clips * self.crops


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionConfig:
    """One kind of instruction: how often, and in which words. Braces take the record's own words.

    ``{question}`` (question), ``{expression}`` (box), ``{premise}`` and ``{hypothesis}`` (entailment), ``{text}`` and
    ``{other}`` (label of a text, or of two).
    """

    templates: tuple[str, ...]  # one is drawn for each example
    weight: float = 1.0  # how often, against the other kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """What an example holds. Lengths are in tokens, specials included; 0 leaves the field out.

    ``form="released"`` writes texts as the release's data code does: punctuation dropped, instructions without a
    closing ``[SEP]``, truncation that cuts it off captions, and captions glued to ``prompt`` without a space, whose
    first pieces are no targets. It needs BERT's word pieces.

    With ``references`` examples bring so many of their captions, as targets, to measure others by; where a record has
    more, they are drawn anew in every epoch.

    With ``classes`` examples have a ``label``: the place of their answer among them. Where these are numbers, as
    degrees of likeness, an answer that is a number is of the class that is nearest.
    """

    text: Literal["caption", "sentence"] = "caption"  # what `text` is made of
    text_length: int = 0  # tokens of `text`; 0: none
    word_starts: bool = False  # marks the first piece of each word of ``text``, for whole-word masking
    instructions: Mapping[InstructionKind, InstructionConfig] = dataclasses.field(default_factory=dict)  # by kind
    instruction_length: int = 0  # tokens; 0: none
    target_length: int = 0  # tokens of answers and captions; 0: none
    references: int = 0  # captions of an example that others are measured by; 0: none
    form: Literal["standard", "released"] = "standard"  # how texts are written: ours, or as the release does
    prompt: str = ""  # released captions begin with it
    question_words: int = 30  # released questions are cut to so many words, before they are cut to tokens
    classes: tuple[str, ...] = ()  # names; empty: none

    def __post_init__(self) -> None:
        """Checks that what is asked for has room and a meaning.

        Raises:
            DataError: instructions without words, without weight or without a length for their answers, a prompt that
                nothing reads, references of what has no captions, or classes twice or of what has none.
        """
        for kind, instruction in self.instructions.items():
            if not instruction.templates or instruction.weight < 0:
                raise DataError(
                    f"instructions.{kind} has {len(instruction.templates)} templates and weight {instruction.weight}; "
                    "expected at least one template, and a weight of at least 0"
                )
        if self.instructions and not any(instruction.weight for instruction in self.instructions.values()):
            raise DataError(f"the instructions {', '.join(self.instructions)} all have weight 0; expected one above 0")
        if self.instructions and not self.target_length and not self.classes:
            raise DataError("an example with instructions needs target_length, the room for their answers, or classes")
        captioned = set(self.instructions) == {"caption"} and self.target_length
        if self.references < 0 or (self.references and not captioned):
            raise DataError(
                f"references={self.references} are a number of captions: set instructions to 'caption' alone, with "
                "target_length"
            )
        if self.classes and not self.instructions:
            raise DataError("classes need instructions: 'label', or 'entailment', with their templates")
        if self.classes and not set(self.instructions) <= {"label", "entailment"}:
            raise DataError(
                f"classes are of labels and entailments, but the instructions are {', '.join(self.instructions)}"
            )
        if len(set(self.classes)) < len(self.classes):
            raise DataError(f"classes: {len(self.classes)} names, of which only {len(set(self.classes))} differ")
        if self.prompt and self.form == "standard":
            raise DataError(f"prompt={self.prompt!r} is for form='released'; elsewhere write it into the templates")

    def shapes(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape and type of every array that :func:`make_example` makes, frames left out."""
        made: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {"example_id": ((), np.int64)}
        if self.text_length:
            made |= {"text": ((self.text_length,), np.int32), "text_mask": ((self.text_length,), np.bool_)}
            if self.word_starts:
                made["word_starts"] = ((self.text_length,), np.bool_)
        if self.instructions and self.instruction_length:
            asked = (self.instruction_length,)
            made |= {"instruction": (asked, np.int32), "instruction_mask": (asked, np.bool_)}
        if self.instructions and self.target_length:
            told = (self.target_length,)
            made |= {"target": (told, np.int32), "target_weights": (told, np.float32)}
        if self.references:
            made["references"] = ((self.references, self.target_length), np.int32)
        if self.classes:
            made["label"] = ((), np.int32)
        if self.has_boxes:
            made["box"] = ((4,), np.float32)
        return made

    @property
    def has_boxes(self) -> bool:
        """Whether every example is of a box."""
        return set(self.instructions) == {"box"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A stream of batches: records, what becomes of them, and how many at a time over all hosts."""

    sources: Mapping[str, SourceConfig]
    temperature: float | None = None  # shares are weight * records ** (1 / temperature); None: the weights alone
    visual: VisualConfig = VisualConfig()
    examples: ExampleConfig
    batch_size: int  # examples of a step, over all hosts
    drop_remainder: bool = False  # an epoch's last records that fill no batch; else a batch may span two epochs
    max_skipped: float = 0.01  # share of a source's records that may be unusable before the run stops
    threads: int = 2  # of a host that make examples; 0: none but the reader's own
    prefetch: int = 64  # examples that a host holds ready

    def __post_init__(self) -> None:
        """Checks that the sources make one stream.

        Raises:
            DataError: no sources, sources of several kinds, shares or settings out of range.
        """
        kinds = {source.kind for source in self.sources.values()}
        if len(kinds) != 1:
            found = ", ".join(f"{name} ({source.kind})" for name, source in self.sources.items()) or "none"
            raise DataError(f"a stream needs sources of one kind, found {found}; give each kind a stream of its own")
        for name, source in self.sources.items():
            if not 0 < source.weight < float("inf"):
                raise DataError(
                    f"sources.{name}.weight={source.weight} should be above 0; leave the source out instead"
                )
        if self.temperature is not None and not self.temperature > 0:
            raise DataError(f"temperature={self.temperature} should be above 0, or none for the weights alone")
        if not 0 <= self.max_skipped <= 1:
            raise DataError(f"max_skipped={self.max_skipped} is a share, expected 0 to 1")
        drawn = all(source.format == "digitworld" for source in self.sources.values())
        if "box" in self.examples.instructions and not (
            self.visual.transform in ("resize", "released_test") or (drawn and self.visual.transform == "test")
        ):
            raise DataError(
                f"instructions.box with visual.transform='{self.visual.transform}': boxes do not follow what is "
                "cropped or turned; use 'resize' or 'released_test'"
            )
        if self.visual.clips > 1 and self.kind != "video":
            raise DataError(f"visual.clips={self.visual.clips} is of videos, and the sources are of kind {self.kind}")
        if self.visual.crops > 1 and self.kind == "text":
            raise DataError(f"visual.crops={self.visual.crops}, but texts are not seen: leave it out")
        if self.drop_remainder and len(self.sources) > 1:
            raise DataError("drop_remainder needs a single source: the epochs of a mixture end at different times")

    @property
    def kind(self) -> Kind:
        """What the records are taken for."""
        return next(iter(self.sources.values())).kind

    def shapes(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape and type of every array of a whole batch of training, known before there are any records."""
        made = self.examples.shapes()
        if self.kind != "text":
            side = self.visual.image_size
            made["frames"] = ((1 if self.kind == "image" else self.visual.num_frames, side, side, 3), np.uint8)
        return {key: ((self.batch_size, *shape), dtype) for key, (shape, dtype) in made.items()}
