"""Everything a run can be told, as frozen dataclasses. A recipe fills it in; ``config.json`` keeps what was used."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from data_pipelines.config import DataConfig
from mplug2_jax.errors import UserError, check_range, did_you_mean
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.model.config import PARTS, ModelConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.renames import accept_old_names
from mplug2_jax.tasks.config import TaskSettings
from mplug2_jax.tasks.contracts import CONTRACTS, required_parts

FsdpGather = Literal["layer", "step"]
DecayMask = Literal["kernels", "released"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokeniser file, or one that the run trains on DigitWorld's texts and keeps in its work directory."""

    path: str = ""  # a vocab.txt or a SentencePiece model; empty: train one
    kind: Literal["wordpiece", "sentencepiece"] = "wordpiece"  # of what is trained
    vocab_size: int = 512  # most tokens of what is trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """One of the batches that a step consumes, and what it is for: weights of objectives, by the tasks' names."""

    data: DataConfig
    objectives: Mapping[str, float]  # weights of losses, by the names of tasks: mplug2 tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW. Learning rates are per parameter group; the schedule scales between ``init_lr``, them and ``end_lr``."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"decay": "decay_mask", "offload": "offload_moments"}
    OLD_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {"decay_mask": {"matrices": "kernels"}}

    learning_rate: float = 1e-4  # at the schedule's peak
    vision_learning_rate: float | None = None  # None: the same as learning_rate
    layer_decay: float = 1.0  # of the rates, for each layer below the heads: see layer_decay.py; 1 = none
    weight_decay: float = 0.02  # per update, times the rate
    decay_mask: DecayMask = "kernels"  # what decays: kernels alone, or what the release decays
    b1: float = 0.9  # decay of the first moment, below 1
    b2: float = 0.999  # decay of the second moment, below 1
    eps: float = 1e-8  # added to the second moment's root
    clip_norm: float = 1.0  # of the gradient over all parameters; 0 = no clipping
    mu_dtype: Dtype = "float32"  # as the first moment is kept
    nu_dtype: Dtype = "float32"  # as the second is
    offload_moments: bool = False  # the moments wait in the hosts' memory for their update

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: names the field.
        """
        for name in ("learning_rate", "vision_learning_rate", "weight_decay", "eps", "clip_norm"):
            check_range(f"config.optimizer.{name}", getattr(self, name), 0)
        check_range("config.optimizer.layer_decay", self.layer_decay, 1e-3, 1)
        for name in ("b1", "b2"):
            check_range(f"config.optimizer.{name}", getattr(self, name), 0, 1 - 1e-9)
        if self.nu_dtype == "bfloat16" and self.b2 > 0.99:
            raise UserError(
                f"config.optimizer.nu_dtype=bfloat16 cannot follow b2={self.b2}: a step changes less than its 8 bits "
                "hold; set b2 to 0.99 or less, or nu_dtype to float32"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up from ``init_lr`` to the group's learning rate, then a cosine down to ``end_lr``.

    ``kind="released"`` follows the release's loop: the rate in force is that of the step before; the cosine's length is
    the whole run less 200 steps, counted from the end of the warm-up; ``released_caption`` also falls back to an early
    warm-up value for one step after every 100 of the first epoch. All of it counts micro-batches.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"start": "init_lr", "floor": "end_lr"}
    kind: Literal["cosine", "released", "released_caption"] = "cosine"  # see above; cosine is ours
    warmup_steps: int = 100  # from init_lr to the peak
    init_lr: float = 0.0  # the rate of the first step, for every group
    end_lr: float = 0.0  # the rate of the last step, for every group
    steps_per_epoch: int = 0  # released_caption needs it

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: names the field.
        """
        for name in ("warmup_steps", "init_lr", "end_lr", "steps_per_epoch"):
            check_range(f"config.schedule.{name}", getattr(self, name), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which parts of the model learn by pairs, and how thin and how strong those are."""

    parts: tuple[str, ...] = ()  # empty: none
    rank: int = 8  # columns of a pair's matrices, at least 1
    alpha: float = 16.0  # a pair's product counts alpha / rank

    def __post_init__(self) -> None:
        """Checks the ranges. Raises UserError."""
        check_range("config.lora.rank", self.rank, 1)
        check_range("config.lora.alpha", self.alpha, 1e-3)

    @property
    def scale(self) -> float:
        """What a pair's product counts in its kernel; 0 where there are no pairs."""
        return self.alpha / self.rank if self.parts else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep. The last step is always saved; what no rule keeps is deleted."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "keep": "keep_last", "best": "best_metric", "best_is": "best_mode", "keep_minutes": "keep_every_minutes",
        "keep_steps": "keep_every_steps",
    }  # fmt: skip
    OLD_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {"best_mode": {"lowest": "min", "highest": "max"}}
    every_steps: int = 1000  # at least 1
    every_minutes: float = 0.0  # also whenever so long has passed since the last save; 0: by steps alone
    keep_last: int = 3  # how many of the newest to keep, at least 1
    keep_best: int = 0  # how many of the best by `best_metric` to keep as well
    best_metric: str = (
        "loss"  # a name of metrics.jsonl, as eval/image_question/accuracy; judged where a saved step has it
    )
    best_mode: Literal["min", "max"] = "min"  # whether a lower or a higher `best_metric` is better
    keep_every_minutes: float = 0.0  # and one for each such span of time; 0: none
    keep_every_steps: int = 0  # and, for ever, those whose step is a multiple; 0: none

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: names the field.
        """
        for name, least in (("every_steps", 1), ("keep_last", 1)):
            check_range(f"config.checkpoint.{name}", getattr(self, name), least)
        for name in ("every_minutes", "keep_best", "keep_every_minutes", "keep_every_steps"):
            check_range(f"config.checkpoint.{name}", getattr(self, name), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """What a run does about steps that go wrong. An update that is not finite is always skipped."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "max_skipped": "max_consecutive_skips", "spike": "spike_zscore", "recheck_every": "sdc_check_every"
    }  # fmt: skip
    max_consecutive_skips: int = 10  # updates that may be skipped in a row before the run stops
    spike_zscore: float = 0.0  # standard deviations above the last losses' mean that roll the run back; 0: never
    spike_window: int = 100  # how many losses are the last ones
    max_rollbacks: int = 3  # to one checkpoint before the run stops
    sdc_check_every: int = 0  # steps after which one is computed twice and compared bit by bit; 0: never

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: names the field.
        """
        for name, least in (
            ("max_consecutive_skips", 1), ("spike_zscore", 0), ("spike_window", 2), ("max_rollbacks", 1),
            ("sdc_check_every", 0),
        ):  # fmt: skip
            check_range(f"config.faults.{name}", getattr(self, name), least)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps are traced for TensorBoard's profiler; a file ``profile`` in the work directory asks for more."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"at": "start_steps", "steps": "num_steps"}
    start_steps: tuple[int, ...] = ()  # the first step of each trace
    num_steps: int = 3  # steps per trace

    def __post_init__(self) -> None:
        """Checks the range. Raises UserError."""
        check_range("config.profile.num_steps", self.num_steps, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "universal": "use_universal_layers", "gather": "fsdp_gather", "accumulate": "grad_accum_steps",
        "stall_seconds": "watchdog_timeout", "parameter_dtype": "param_dtype", "evaluate_every": "eval_every",
        "wandb": "wandb_project", "log_examples": "log_example_ids",
    }  # fmt: skip
    name: str  # of the recipe, for logs and reports
    steps: int  # updates of the whole run, at least 1; may be raised when it resumes
    seed: int = 0  # of parameters, dropout, masking and the data's order
    model: ModelConfig
    init_from: str = ""  # checkpoint to start from, as a path: a work directory, its checkpoints, or one step of them
    init_parts: tuple[str, ...] = ()  # parts of the model to take from it; empty: all
    freeze: tuple[str, ...] = ()  # parts of the model that are not trained; empty: none
    use_universal_layers: bool = True  # False: a model without the layers that text and vision share, to compare with
    lora: LoraConfig = LoraConfig()  # parts of which thin matrices are trained in place of the kernels; see lora.py
    tokenizer: TokenizerConfig = TokenizerConfig()
    streams: Mapping[str, StreamConfig]
    tasks: TaskSettings = TaskSettings()
    mesh: MeshConfig = MeshConfig()
    param_dtype: Dtype = "float32"  # as parameters are kept, and their gradients made; a teacher stays float32
    optimizer: AdamWConfig = AdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    fsdp_gather: FsdpGather = "layer"  # when fsdp's shards of parameters come together: at each use, or once
    ema_decay: float = 0.0  # of the average of parameters that is evaluated and exported in their place; 0 = none
    grad_accum_steps: int = 1  # micro-batches per step; each stream's batch is cut into so many
    evaluations: Mapping[str, EvaluationConfig] = dataclasses.field(default_factory=dict)  # by name
    eval_every: int = 0  # steps; 0 = only after the last
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()
    log_every: int = 10  # steps
    log_example_ids: bool = False  # keep every step's example ids in examples.jsonl, to compare runs by
    watchdog_timeout: int = 1800  # a step, a wait for data or a save that takes longer ends the run; 0 = wait for ever
    profile: ProfileConfig = ProfileConfig()
    wandb_project: str = ""  # project of Weights & Biases that metrics are sent to; empty: none
    compilation_cache: str = "auto"  # a folder, "off", or "auto": ~/.cache/mplug2_jax

    def __post_init__(self) -> None:
        """Checks what spans several groups of fields.

        Raises:
            UserError: names the field, what was found and what is valid.
        """
        for field, value, least in (
            ("steps", self.steps, 1), ("grad_accum_steps", self.grad_accum_steps, 1), ("log_every", self.log_every, 1),
            ("eval_every", self.eval_every, 0), ("seed", self.seed, 0),
            ("watchdog_timeout", self.watchdog_timeout, 0),
        ):  # fmt: skip
            check_range(f"config.{field}", value, least)
        check_range("config.ema_decay", self.ema_decay, 0, 1 - 1e-9)
        if not self.streams:
            raise UserError("config.streams is empty: a run needs at least one stream of batches")
        trained = [name for name, task in CONTRACTS.items() if task.trainable]
        for name, stream in self.streams.items():
            where = f"config.streams.{name}"
            self._check_data(f"{where}.data", stream.data)
            if not stream.objectives:
                raise UserError(f"{where}.objectives is empty: {did_you_mean('', trained)}")
            for objective in stream.objectives:
                if objective not in trained:
                    raise UserError(f"{where}.objectives.{objective} is unknown: {did_you_mean(objective, trained)}")
            if "mlm" in stream.objectives and self.tasks.mlm.whole_word and not stream.data.examples.word_starts:
                raise UserError(
                    "config.tasks.mlm.whole_word needs to know where words begin: set "
                    f"{where}.data.examples.word_starts"
                )
            micro, rest = divmod(stream.data.batch_size, self.grad_accum_steps)
            if rest:
                raise UserError(
                    f"{where}.data.batch_size={stream.data.batch_size} is not a multiple of "
                    f"config.grad_accum_steps={self.grad_accum_steps}"
                )
            group = self.tasks.vlm.group_size
            if "vlm" in stream.objectives and group and micro % group:
                raise UserError(
                    f"{where}: {micro} examples per micro-batch are not a multiple of "
                    f"config.tasks.vlm.group_size={group}"
                )
            queue = self.tasks.vlc.queue_size
            if "vlc" in stream.objectives and queue and self.tasks.distillation is None:
                raise UserError(
                    f"config.tasks.vlc.queue_size={queue} is filled by a teacher: set config.tasks.distillation too"
                )
            if "vlc" in stream.objectives and queue and queue % micro:
                raise UserError(
                    f"config.tasks.vlc.queue_size={queue} is not a multiple of {where}'s {micro} examples per "
                    "micro-batch"
                )
        parts = self.parts()
        for part in self.freeze:
            if part not in parts:
                raise UserError(f"config.freeze names {part!r}: {did_you_mean(part, parts)}")
        for part in self.lora.parts:
            if part not in parts:
                raise UserError(f"config.lora.parts names {part!r}: {did_you_mean(part, parts)}")
            if part in self.freeze:
                raise UserError(
                    f"config.freeze and config.lora.parts both name {part!r}, which either stays as it is or learns by "
                    "pairs: take it out of one of them"
                )
        if set(parts) <= set(self.freeze):
            raise UserError(f"config.freeze={self.freeze} leaves nothing to train: keep a part of the model out of it")
        if self.evaluations and self.tasks.search.max_length > self.model.max_positions:
            raise UserError(
                f"config.tasks.search.max_length={self.tasks.search.max_length} exceeds config.model.max_positions="
                f"{self.model.max_positions}; lower it or raise that"
            )
        for name, evaluation in self.evaluations.items():
            self._check_data(f"config.evaluations.{name}.data", evaluation.data)
            check_range(f"config.evaluations.{name}.num_samples", evaluation.num_samples, 0)
            check_range(f"config.evaluations.{name}.per_device_batch_size", evaluation.per_device_batch_size, 1)
            able = [name for name, task in CONTRACTS.items() if task.evaluable]
            if evaluation.task not in able:
                raise UserError(
                    f"config.evaluations.{name}.task={evaluation.task!r}: {did_you_mean(evaluation.task, able)}"
                )

    def _check_data(self, where: str, data: DataConfig) -> None:
        for field, value, least in (
            ("batch_size", data.batch_size, 1), ("num_threads", data.num_threads, 0), ("prefetch", data.prefetch, 0),
        ):  # fmt: skip
            check_range(f"{where}.{field}", value, least)
        for field in ("text_length", "instruction_length", "target_length"):
            length = getattr(data.examples, field)
            if length > self.model.max_positions:
                raise UserError(
                    f"{where}.examples.{field}={length} exceeds config.model.max_positions={self.model.max_positions}; "
                    "lower it or raise that"
                )

    def parts(self) -> tuple[str, ...]:
        """The parts that the streams' objectives need, and no others."""
        uses = [
            (CONTRACTS[objective], stream.data) for stream in self.streams.values() for objective in stream.objectives
        ]
        needed = set(required_parts([(task, data.kind != "text", data.kind == "video") for task, data in uses]))
        # What can do without an instruction reads one that it is given.
        needed |= {part for task, data in uses if data.examples.instruction_length for part in task.optional_parts}
        return tuple(part for part in PARTS if part in needed and (self.use_universal_layers or part != "universal"))

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parts whose own parameters stay as they are, those that learn by LoRA's pairs among them."""
        return (*self.freeze, *self.lora.parts)

    @property
    def has_teacher(self) -> bool:
        """Whether an averaged copy of the parameters is kept, for distillation and momentum contrast."""
        return self.tasks.distillation is not None


accept_old_names(RunConfig)
