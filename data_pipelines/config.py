"""The settings of a stream of batches: sources, frames, texts. Plain dataclasses, quick to import."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np

from data_pipelines.errors import DataError

T = TypeVar("T")
Runtime = Annotated[T, "runtime"]  # of fields that may change whenever a run resumes: they do not decide what it reads
Steps = Annotated[int, "steps"]  # of the run; may be given as a duration: "5%", "3 epochs"

Kind = Literal["image", "video", "text"]
Format = Literal[
    "annotations", "array_record", "captioned_folder", "coco_captions", "digitworld", "files", "glue", "image_folder",
    "karpathy", "kinetics", "ssv2", "tfds", "vqa_v2", "webdataset",
]  # fmt: skip
Color = tuple[int, int, int]  # red, green, blue, 0 to 255
Transform = Literal["test", "resize", "train", "released_test", "released_train", "released_pretrain"]
InstructionKind = Literal["caption", "question", "label", "box", "entailment"]

ALL_RECORDS = (0.0, 1.0)
WHITE: Color = (255, 255, 255)
RELEASE_PROMPT = "a video of"
MAX_MAGNITUDE = 10  # of an operation of RandAugment
NUM_OPERATIONS = 14  # of augment.OPERATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of records: the format, its path, and which part of it to read.

    A field that the format does not read must keep its default.

    ``hash_range=(0.05, 1.0)`` trains on 95% of the records, of which ``(0.0, 0.05)`` are held out. The hash depends on
    nothing but the ``visual_id``, else the key, so that new files move no old ones.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"each": "expand", "size": "max_records"}

    format: Format = "digitworld"  # file format; digitworld generates its records
    kind: Kind = "image"  # what the records are read as; the same for all sources of a stream
    path: Runtime[str] = ""  # file, folder or pattern, local or a URL ("gs://bucket/shards/*.tar")
    media: Runtime[str] = ""  # folder of the images or videos that annotation files name; empty: the folder of the file
    index: Runtime[str] = ""  # webdataset: folder of the tars' indexes, if they cannot be written next to the tars
    split: str = ""  # DigitWorld: "train" (default) or "heldout"; files: the name that they use
    seed: int = 0  # DigitWorld: its random seed
    label: str = ""  # DigitWorld: the attribute to label; empty: the digit in an image, the motion in a video
    hash_range: tuple[float, float] = ALL_RECORDS  # read records whose key's hash, 0 to 1, is in [a, b), in its order
    max_records: int | None = None  # read only the first max_records; None: all (DigitWorld: 100,000)
    expand: Literal["record", "text"] = "record"  # "text": one record per caption or text; reads all records on opening
    weight: float = 1.0  # weight in the mixture of sources; mixture_stages may change it

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            DataError: it is not within 0 and 1, or empty.
        """
        if not 0 <= self.hash_range[0] < self.hash_range[1] <= 1:
            raise DataError(f"hash_range is {self.hash_range}, expected two rising numbers from 0 to 1, as (0.05, 1.0)")

    def identity(self) -> dict[str, Any]:
        """Return what determines the records, as JSON values: all fields but where the index is.

        The range of all records is left out, as it is in files of older versions.
        """
        fields = dataclasses.asdict(self)
        del fields["index"], fields["hash_range"]
        return fields if self.hash_range == ALL_RECORDS else fields | {"hash_range": list(self.hash_range)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualConfig:
    """Sampling of frames from a video, and their transformation into squares of ``image_size`` pixels.

    This project's transforms, antialiased:

    - ``test``: a center crop.
    - ``resize``: the full frame, stretched to a square.
    - ``train``: a random resized crop, a random horizontal flip, RandAugment. Reads the last five fields.

    The release's transforms, bit for bit except for transparent pixels:

    - ``released_test``: the full frame, nearest-neighbor.
    - ``released_train``: fine-tuning. A random crop of 50% to 100% of the area, bicubic without antialiasing (overshoot
      wraps around), a random horizontal flip, two RandAugment operations.
    - ``released_pretrain``: pretraining. Images: a random crop of 20% to 100% of the area, antialiased, a random
      horizontal flip, up to two operations. Videos: the full frame, nearest-neighbor, at 1.14 times the size, two
      operations (one may be a flip), a random square crop.

    An evaluation may average over several views of each example: ``num_clips`` selections of a video's frames, evenly
    spread, times ``num_crops`` square crops, left to right or top to bottom.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"clips": "num_clips", "crops": "num_crops", "min_area": "min_crop_area"}
    OLD_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {"sampling": {"middle": "uniform"}}

    image_size: int = 32  # side of a frame in pixels
    num_frames: int = 4  # frames per video clip; an image has one
    sampling: Literal["uniform", "random", "fps"] = "uniform"  # evenly spaced frames, random ones, or a fixed rate
    fps: float = 2.0  # frames per second for sampling="fps", centered in the video
    num_clips: int = 1  # evaluation: selections of frames per video
    num_crops: int = 1  # evaluation: 1, as the transform crops; 3 needs transform="test"
    background: Color = WHITE  # shown through transparent pixels
    transform: Transform = "test"  # see above
    scaler: Literal["pillow", "swscale"] = "pillow"  # swscale resizes files 2 to 5 times faster, within 2 of 255
    min_crop_area: float = 0.5  # smallest random crop, as a fraction of the image area
    flip: bool = True  # random horizontal flips; False where left and right matter: text, digits, directions
    num_ops: int = 2  # RandAugment operations; 0: none
    magnitude: float = 5.0  # of RandAugment, 0 to 10
    color_on_device: bool = False  # apply its operations on colors in the step, after all others

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            DataError: a field is out of its range.
        """
        for field, valid, expected in (
            ("image_size", self.image_size >= 1, "at least 1"),
            ("num_frames", self.num_frames >= 1, "at least 1"),
            ("fps", 0 < self.fps < float("inf"), "above 0"),
            ("num_clips", self.num_clips >= 1, "at least 1"),
            ("num_crops", self.num_crops in (1, 3), "1 or 3"),
            ("background", [0 <= value <= 255 for value in self.background] == [True] * 3, "three of 0 to 255"),
            ("min_crop_area", 0 < self.min_crop_area <= 1, "above 0 and at most 1"),
            ("num_ops", 0 <= self.num_ops <= NUM_OPERATIONS, f"0 to {NUM_OPERATIONS}"),
            ("magnitude", 0 <= self.magnitude <= MAX_MAGNITUDE, f"0 to {MAX_MAGNITUDE}"),
        ):
            if not valid:
                raise DataError(f"visual.{field} is {getattr(self, field)}, expected {expected}")
        if self.num_clips > 1 and self.sampling == "random":
            raise DataError(
                f"visual.num_clips={self.num_clips} needs deterministic frames: set visual.sampling to 'uniform' or "
                "'fps'"
            )
        if self.scaler == "swscale" and self.transform.startswith("released"):
            raise DataError(
                f"visual.scaler='swscale' with visual.transform={self.transform!r}: the release's transforms are bit "
                "for bit; set scaler to 'pillow'"
            )
        if self.color_on_device and not (self.transform == "train" and self.num_ops):
            raise DataError(
                f"visual.color_on_device needs operations of transform='train', found {self.transform!r} with "
                f"num_ops={self.num_ops}; set it to False"
            )
        if self.num_crops > 1 and self.transform != "test":
            raise DataError(
                f"visual.num_crops={self.num_crops} with visual.transform={self.transform!r}: several crops need "
                "transform='test'"
            )

    @property
    def views(self) -> int:
        """Return the number of views of each example in an evaluation."""
        return self.num_clips * self.num_crops


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionConfig:
    """One kind of instruction: its templates and its weight. Placeholders are filled from the record.

    They are ``{question}`` (question), ``{expression}`` (box), ``{premise}`` and ``{hypothesis}`` (entailment),
    ``{text}`` and ``{other}`` (label of one text, or of a pair).
    """

    templates: tuple[str, ...]  # one is drawn for each example
    weight: float = 1.0  # probability, relative to the other kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """The arrays of an example. Lengths are in tokens, special tokens included; 0 omits the field.

    ``tokenization="released"`` tokenizes as the release's data code does: punctuation removed, instructions without a
    closing ``[SEP]``, truncation that cuts it off captions, and captions appended to ``prompt`` without a space, whose
    first tokens are no targets. It needs a BERT WordPiece tokenizer.

    With ``max_references`` an example holds up to this many of its captions as references for metrics and rewards;
    where a record has more, they are drawn anew in every epoch.

    With ``classes`` an example has a ``label``: the index of its answer. Where the classes are numbers, as similarity
    scores, a numeric answer belongs to the nearest class.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "form": "tokenization", "references": "max_references", "question_words": "max_question_words"
    }  # fmt: skip

    text: Literal["caption", "sentence"] = "caption"  # what `text` is made of
    text_length: int = 0  # tokens of `text`; 0: none
    word_starts: bool = False  # mark the first token of each word of ``text``, for whole-word masking
    instructions: Mapping[InstructionKind, InstructionConfig] = dataclasses.field(default_factory=dict)  # by kind
    instruction_length: int = 0  # tokens; 0: none
    target_length: int = 0  # tokens of answers and captions; 0: none
    max_references: int = 0  # reference captions per example; 0: none
    tokenization: Literal["standard", "released"] = "standard"  # this project's, or exactly as the release
    prompt: str = ""  # prefix of captions, for tokenization="released"
    max_question_words: int = 30  # tokenization="released" truncates questions to this many words, then to tokens
    classes: tuple[str, ...] = ()  # class names; empty: none

    def __post_init__(self) -> None:
        """Check that the fields fit each other.

        Raises:
            DataError: instructions without templates, weight or ``target_length``, an unused prompt, references
                without captions, duplicate classes, or classes without labels.
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
            raise DataError("instructions need target_length, the length of their answers in tokens, or classes")
        has_captions = set(self.instructions) == {"caption"} and self.target_length
        if self.max_references < 0 or (self.max_references and not has_captions):
            raise DataError(
                f"max_references={self.max_references} counts captions: set instructions to 'caption' alone, with "
                "target_length, and at least 0 references"
            )
        if self.classes and not self.instructions:
            raise DataError("classes need instructions: 'label' or 'entailment', with their templates")
        if self.classes and not set(self.instructions) <= {"label", "entailment"}:
            raise DataError(
                "classes need instructions of kind 'label' or 'entailment', found "
                f"{', '.join(self.instructions)}; remove these or the classes"
            )
        if len(set(self.classes)) < len(self.classes):
            raise DataError(f"classes has {len(self.classes)} names, only {len(set(self.classes))} of them distinct")
        if self.prompt and self.tokenization == "standard":
            raise DataError(
                f"prompt={self.prompt!r} needs tokenization='released'; with 'standard' write it into the templates"
            )

    def shapes(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Return the shape and dtype of every array that :func:`make_example` returns, except frames."""
        shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {"example_id": ((), np.int64)}
        if self.text_length:
            shapes |= {"text": ((self.text_length,), np.int32), "text_mask": ((self.text_length,), np.bool_)}
            if self.word_starts:
                shapes["word_starts"] = ((self.text_length,), np.bool_)
        if self.instructions and self.instruction_length:
            shape = (self.instruction_length,)
            shapes |= {"instruction": (shape, np.int32), "instruction_mask": (shape, np.bool_)}
        if self.instructions and self.target_length:
            shape = (self.target_length,)
            shapes |= {"target": (shape, np.int32), "target_weights": (shape, np.float32)}
        if self.max_references:
            shapes["references"] = ((self.max_references, self.target_length), np.int32)
        if self.classes:
            shapes["label"] = ((), np.int32)
        if self.has_boxes:
            shapes["box"] = ((4,), np.float32)
        return shapes

    @property
    def has_boxes(self) -> bool:
        """Return whether every example has a box."""
        return set(self.instructions) == {"box"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureStage:
    """The weights of a stream's sources from a step on, up to the next stage."""

    start_step: Steps  # the first step of the stage; a batch that a rollback skips counts as a step
    weights: Mapping[str, float]  # by source, at least 0; sources that are not named have their own weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchStage:
    """The batch size of a stream up to a step."""

    last_step: Steps  # the last step of the stage; a batch that a rollback skips counts as a step
    batch_size: int  # examples per step, over all hosts


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A stream of batches: its sources, their examples, and the global batch size."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "threads": "num_threads", "temperature": "mixture_temperature", "max_skipped": "max_bad_fraction"
    }  # fmt: skip

    sources: Mapping[str, SourceConfig]
    mixture_temperature: float | None = None  # mix by weight * num_records ** (1 / temperature); None: weights alone
    mixture_stages: tuple[MixtureStage, ...] = ()  # later weights of the sources; every source continues its epoch
    visual: VisualConfig = VisualConfig()
    examples: ExampleConfig
    batch_size: int  # examples per step, over all hosts
    batch_ramp: tuple[BatchStage, ...] = ()  # other batch sizes at first; batch_size holds after the last stage
    drop_remainder: bool = False  # drop an epoch's last partial batch; otherwise a batch may span two epochs
    max_bad_fraction: Runtime[float] = 0.01  # stop the run above this fraction of unusable records in a source
    num_workers: Runtime[int] = 0  # processes per host that build examples; 0: threads of the training process
    num_threads: Runtime[int] = 2  # threads that build examples, of each process; 0: only the reader's own
    prefetch: Runtime[int] = 64  # examples that a host keeps ready

    def __post_init__(self) -> None:
        """Check that the sources make one stream.

        Raises:
            DataError: no sources, sources of several kinds, or a field out of range.
        """
        kinds = {source.kind for source in self.sources.values()}
        if len(kinds) != 1:
            found = ", ".join(f"{name} ({source.kind})" for name, source in self.sources.items()) or "none"
            raise DataError(f"a stream needs sources of one kind, found {found}; give each kind a stream of its own")
        for name, source in self.sources.items():
            if not 0 < source.weight < float("inf"):
                raise DataError(
                    f"sources.{name}.weight={source.weight} must be above 0; to disable it, remove the source"
                )
        if self.mixture_temperature is not None and not self.mixture_temperature > 0:
            raise DataError(f"mixture_temperature={self.mixture_temperature} must be above 0, or none for the weights")
        self._check_mixture_stages()
        previous = 0
        for i, stage in enumerate(self.batch_ramp):
            if stage.last_step <= previous:
                raise DataError(
                    f"batch_ramp[{i}].last_step={stage.last_step} must be above {previous}, and rise by stage"
                )
            previous = stage.last_step
        if self.batch_ramp and self.drop_remainder:
            raise DataError("drop_remainder with batch_ramp: the batch size changes within an epoch; remove one")
        if not 0 <= self.max_bad_fraction <= 1:
            raise DataError(f"max_bad_fraction={self.max_bad_fraction} is a fraction, expected 0 to 1")
        synthetic = all(source.format == "digitworld" for source in self.sources.values())
        if "box" in self.examples.instructions and not (
            self.visual.transform in ("resize", "released_test") or (synthetic and self.visual.transform == "test")
        ):
            raise DataError(
                f"instructions.box with visual.transform='{self.visual.transform}': boxes are not transformed with "
                "crops and flips; use 'resize' or 'released_test'"
            )
        if self.visual.num_clips > 1 and self.kind != "video":
            raise DataError(f"visual.num_clips={self.visual.num_clips} needs videos, found sources of kind {self.kind}")
        if self.visual.num_crops > 1 and self.kind == "text":
            raise DataError(
                f"visual.num_crops={self.visual.num_crops} needs images or videos, found texts; set it to 1"
            )
        if self.drop_remainder and len(self.sources) > 1:
            raise DataError(
                "drop_remainder needs a single source: the sources of a mixture end epochs at different times"
            )

    def _check_mixture_stages(self) -> None:
        previous = 0
        for i, stage in enumerate(self.mixture_stages):
            where = f"mixture_stages[{i}]"
            if stage.start_step <= previous:
                raise DataError(f"{where}.start_step={stage.start_step} must be above {previous}, and rise by stage")
            previous = stage.start_step
            for name, weight in stage.weights.items():
                if name not in self.sources:
                    raise DataError(f"{where}.weights.{name} is not a source: expected {', '.join(self.sources)}")
                if not 0 <= weight < float("inf"):
                    raise DataError(f"{where}.weights.{name}={weight} must be at least 0, and finite")
            if not any(self.source_weights(stage.start_step).values()):
                raise DataError(f"{where}.weights are 0 for all sources, expected one above 0")

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Return the size of a batch in each stage of the ramp, and after the last, by field."""
        ramp = {f"batch_ramp[{i}].batch_size": stage.batch_size for i, stage in enumerate(self.batch_ramp)}
        return {**ramp, "batch_size": self.batch_size}

    def source_weights(self, step: int) -> dict[str, float]:
        """Return the weight of each source in a step, counted from 1, before ``mixture_temperature``."""
        stages = (stage.weights for stage in reversed(self.mixture_stages) if stage.start_step <= step)
        return {name: source.weight for name, source in self.sources.items()} | dict(next(stages, {}))

    @property
    def kind(self) -> Kind:
        """Return the kind of its records."""
        return next(iter(self.sources.values())).kind

    def shapes(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Return the shape and dtype of every array of a full training batch, without reading any records."""
        shapes = self.examples.shapes()
        if self.kind != "text":
            side = self.visual.image_size
            shapes["frames"] = ((1 if self.kind == "image" else self.visual.num_frames, side, side, 3), np.uint8)
            if self.visual.color_on_device:
                shapes["color_operations"] = ((self.visual.num_ops, 2), np.float32)
        return {key: ((self.batch_size, *shape), dtype) for key, (shape, dtype) in shapes.items()}
