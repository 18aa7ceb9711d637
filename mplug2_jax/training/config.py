"""The config of a run as frozen dataclasses. A recipe fills it in; ``config.json`` records what was used."""

import dataclasses
import ipaddress
from collections.abc import Mapping
from typing import ClassVar, Literal

from data_pipelines.config import DataConfig, SourceConfig
from mplug2_jax.errors import UserError, check_range, did_you_mean
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.fields import Execution, Runtime, Steps
from mplug2_jax.model.config import PARTS, ModelConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.renames import accept_old_names
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.tasks.specs import TASK_SPECS, required_parts

FsdpGather = Literal["layer", "step"]
OptimizerKind = Literal["adamw", "muon"]
DecayMask = Literal["kernels", "released"]
ScheduleKind = Literal["cosine", "linear", "constant", "rsqrt", "wsd", "released", "released_caption"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer file, or a tokenizer that the run trains on texts and stores in its work directory."""

    path: Runtime[str] = ""  # a vocab.txt or a SentencePiece model; empty: train one
    kind: Literal["wordpiece", "sentencepiece"] = "wordpiece"  # of a trained tokenizer
    vocab_size: int = 512  # at most, of a trained tokenizer
    source: SourceConfig | None = None  # of the texts to train on, of kind "text"; None: DigitWorld's


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """A stream of batches, of which a step reads one, and the objectives that it trains."""

    OLD_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {"objectives": {"summarise": "summarize"}}
    data: DataConfig
    objectives: Mapping[str, float]  # weights of the losses, by task name (mplug2 tasks lists them)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon, with separate learning rates for the vision tower and for everything else.

    ``kind="muon"`` orthogonalizes the update of each layer's kernels, one matrix at a time, and scales it to the RMS of
    AdamW's (0.2), so that learning rates and ``weight_decay`` serve both. It keeps one moment, of ``muon_momentum`` and
    ``mu_dtype``. Everything else takes AdamW's step with ``b1`` and ``b2``: embeddings, positions, latents, norms,
    biases, heads, the patch embedding, projections between widths, temporal convolutions, LoRA's adapters.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"decay": "decay_mask", "offload": "offload_moments"}
    OLD_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {"decay_mask": {"matrices": "kernels"}}

    kind: OptimizerKind = "adamw"  # see above
    learning_rate: float = 1e-4  # at the schedule's peak
    vision_learning_rate: float | None = None  # None: the same as learning_rate
    layer_decay: float = 1.0  # factor of the learning rate per layer below the heads (layer_decay.py); 1 = none
    weight_decay: float = 0.02  # per update, times the learning rate
    decay_mask: DecayMask = "kernels"  # what is decayed: kernels alone, or what the release decays
    b1: float = 0.9  # decay rate of the first moment, below 1
    b2: float = 0.999  # decay rate of the second moment, below 1
    eps: float = 1e-8  # added to the square root of the second moment, and to the norm that muon divides by
    muon_momentum: float = 0.95  # decay rate of muon's moment, below 1
    clip_norm: float = 1.0  # global norm of the gradient above which it is scaled down; 0 = no clipping
    mu_dtype: Dtype = "float32"  # of the first moment as stored
    nu_dtype: Dtype = "float32"  # of the second moment as stored
    offload_moments: Execution[bool] = False  # keep the moments in host memory between updates

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: names the field.
        """
        for name in ("learning_rate", "vision_learning_rate", "weight_decay", "eps", "clip_norm"):
            check_range(f"config.optimizer.{name}", getattr(self, name), 0)
        check_range("config.optimizer.layer_decay", self.layer_decay, 1e-3, 1)
        for name in ("b1", "b2", "muon_momentum"):
            check_range(f"config.optimizer.{name}", getattr(self, name), 0, 1 - 1e-9)
        if self.kind != "muon" and self.muon_momentum != OptimizerConfig.muon_momentum:
            raise UserError(
                f"config.optimizer.muon_momentum={self.muon_momentum} is not read by kind='{self.kind}': remove it, or "
                "set kind to 'muon'"
            )
        if self.nu_dtype == "bfloat16" and self.b2 > 0.99:
            raise UserError(
                f"config.optimizer.nu_dtype=bfloat16 is too coarse for b2={self.b2}: an update is smaller than its "
                "8 bits resolve; set b2 to 0.99 or less, or nu_dtype to float32"
            )


AdamWConfig = OptimizerConfig
"""The name of older versions, for their recipes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up from ``init_lr`` to the group's learning rate, then what ``kind`` says.

    - ``cosine``, ``linear``: down to ``end_lr`` in the run's last step.
    - ``constant``: no change.
    - ``rsqrt``: down with the inverse square root of the step.
    - ``wsd``: no change, and in the last ``decay_steps`` linearly down to ``end_lr``. Without any the run stays at its
      learning rate; a resume from any checkpoint may set them, with ``steps`` where the decay is to end.

    ``kind="released"`` follows the release's loop: a step uses the rate of the step before it; the cosine lasts 200
    steps less than the run, counted from the end of the warm-up; ``released_caption`` also falls back to an early
    warm-up value for one step after every 100 of the first epoch. These schedules count micro-batches.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"start": "init_lr", "floor": "end_lr"}
    kind: ScheduleKind = "cosine"  # see above
    warmup_steps: Steps = 100  # from init_lr to the learning rate
    init_lr: float = 0.0  # the rate of the first step, for every group
    end_lr: float = 0.0  # the rate of the last step, for every group; 0 for constant and rsqrt, which have none
    decay_steps: Steps = 0  # for wsd; 0: no decay
    steps_per_epoch: Steps = 0  # for released_caption

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: names the field.
        """
        for name in ("warmup_steps", "init_lr", "end_lr", "decay_steps", "steps_per_epoch"):
            check_range(f"config.schedule.{name}", getattr(self, name), 0)
        unread = {"end_lr": self.kind in ("constant", "rsqrt"), "decay_steps": self.kind != "wsd"}
        for name in (name for name in unread if unread[name] and getattr(self, name)):
            raise UserError(
                f"config.schedule.{name}={getattr(self, name)} is not read by kind='{self.kind}': set it to 0, or kind "
                "to 'wsd'"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The parts of the model that LoRA trains, and the rank and scale of its adapters."""

    parts: tuple[str, ...] = ()  # empty: none
    rank: int = 8  # of an adapter's matrices, at least 1
    alpha: float = 16.0  # an adapter's product is scaled by alpha / rank

    def __post_init__(self) -> None:
        """Check the ranges. Raises UserError."""
        check_range("config.lora.rank", self.rank, 1)
        check_range("config.lora.alpha", self.alpha, 1e-3)

    @property
    def scale(self) -> float:
        """Return the factor of an adapter's product in its kernel; 0 without LoRA."""
        return self.alpha / self.rank if self.parts else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and which checkpoints to keep. The last step is always saved; what no rule keeps is deleted."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "keep": "keep_last", "best": "best_metric", "best_is": "best_mode", "keep_minutes": "keep_every_minutes",
        "keep_steps": "keep_every_steps",
    }  # fmt: skip
    OLD_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {"best_mode": {"lowest": "min", "highest": "max"}}
    every_steps: Steps = 1000  # steps between saves, at least 1
    every_minutes: float = 0.0  # also save when this time has passed since the last save; 0 = by steps alone
    keep_last: int = 3  # how many of the newest to keep, at least 1
    keep_best: int = 0  # how many of the best by `best_metric` to keep as well
    best_metric: str = "loss"  # a name in metrics.jsonl, as eval/words/accuracy; steps without it are not ranked
    best_mode: Literal["min", "max"] = "min"  # whether a lower or a higher `best_metric` is better
    keep_every_minutes: float = 0.0  # also keep one checkpoint per this time; 0 = none
    keep_every_steps: Steps = 0  # also keep, forever, steps that are multiples of this; 0 = none
    max_failed_saves: int = 10  # in a row, after which the run exits with status 69, to be started again

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: names the field.
        """
        for name, least in (("every_steps", 1), ("keep_last", 1), ("max_failed_saves", 1)):
            check_range(f"config.checkpoint.{name}", getattr(self, name), least)
        for name in ("every_minutes", "keep_best", "keep_every_minutes", "keep_every_steps"):
            check_range(f"config.checkpoint.{name}", getattr(self, name), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """Handling of faulty steps. An update that is not finite is always skipped."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "max_skipped": "max_consecutive_skips", "spike": "spike_zscore", "recheck_every": "sdc_check_every"
    }  # fmt: skip
    max_consecutive_skips: int = 10  # skipped updates in a row after which the run stops
    spike_zscore: float = 0.0  # standard deviations above the mean of recent losses that trigger a rollback; 0 = never
    spike_window: int = 100  # number of recent losses
    max_rollbacks: int = 3  # to the same checkpoint before the run stops
    sdc_check_every: Steps = 0  # steps between steps that are recomputed and compared bit by bit; 0 = never

    def __post_init__(self) -> None:
        """Check the ranges.

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
    """The steps that are traced for TensorBoard's profiler; a file ``profile`` in the work directory requests more."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"at": "start_steps", "steps": "num_steps"}
    start_steps: tuple[Steps, ...] = ()  # the first step of each trace
    num_steps: Steps = 3  # steps per trace

    def __post_init__(self) -> None:
        """Check the range. Raises UserError."""
        check_range("config.profile.num_steps", self.num_steps, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "universal": "use_universal_layers", "gather": "fsdp_gather", "accumulate": "grad_accum_steps",
        "stall_seconds": "watchdog_timeout", "parameter_dtype": "param_dtype", "evaluate_every": "eval_every",
        "wandb": "wandb_project", "log_examples": "log_example_ids",
    }  # fmt: skip
    name: str  # of the recipe, for logs and reports
    steps: Steps  # of the whole run, at least 1; may be raised at any resume
    seed: int = 0  # of parameters, dropout, masking and data order
    model: ModelConfig
    init_from: str = ""  # checkpoint to initialize from: path of a work directory, its checkpoints, or one step
    init_parts: tuple[str, ...] = ()  # parts of the model to load from it; empty: all
    freeze: tuple[str, ...] = ()  # parts of the model that are not trained; empty: none
    use_universal_layers: bool = True  # False: an ablation without the layers that text and vision share
    lora: LoraConfig = LoraConfig()  # parts that train low-rank adapters in place of their kernels (lora.py)
    streams: Mapping[str, StreamConfig]
    tokenizer: TokenizerConfig = TokenizerConfig()
    tasks: TasksConfig = TasksConfig()
    mesh: Execution[MeshConfig] = MeshConfig()
    param_dtype: Dtype = "float32"  # of stored parameters and their gradients; a teacher stays float32
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    fsdp_gather: Execution[FsdpGather] = "layer"  # all-gather fsdp's shards in each layer, or once per step
    ema_decay: float = 0.0  # of the EMA of parameters, which is evaluated and exported in their place; 0 = none
    grad_accum_steps: Execution[int] = 1  # micro-batches per step, into which each stream's batch is split
    evaluations: Runtime[Mapping[str, EvaluationConfig]] = dataclasses.field(default_factory=dict)  # by name
    eval_every: Runtime[Steps] = 0  # steps between evaluations; 0 = only after the last step
    checkpoint: Runtime[CheckpointConfig] = CheckpointConfig()
    faults: Runtime[FaultConfig] = FaultConfig()
    log_every: Runtime[Steps] = 10  # steps between lines of metrics
    log_example_ids: Runtime[bool] = False  # write every step's example ids to examples.jsonl, to compare runs
    prefetch_memory: Runtime[float] = 8.0  # GiB of examples a host keeps ready, for all streams; limits their prefetch
    storage_timeout: Runtime[float] = 600.0  # seconds for which requests are retried; then the run exits with status 69
    watchdog_timeout: Runtime[int] = 1800  # seconds after which a stalled phase (a save, ...) ends the run; 0 = never
    watchdog_step_medians: Runtime[float] = 20.0  # a step of this many medians and 60 s ends the run; 0: the timeout
    heartbeat_timeout: Runtime[int] = 100  # seconds after which a silent process is taken for dead, and the others end
    profile: Runtime[ProfileConfig] = ProfileConfig()
    metrics_port: Runtime[int] = 0  # on which process 0 serves GET /metrics to Prometheus; 0 = none
    metrics_address: Runtime[str] = "127.0.0.1"  # the IP address to serve it on; "0.0.0.0" admits other machines
    wandb_project: Runtime[str] = ""  # Weights & Biases project that receives the metrics; empty: none
    compilation_cache: Runtime[str] = "auto"  # a folder, "off", or "auto": ~/.cache/mplug2_jax, or the run's bucket

    def __post_init__(self) -> None:
        """Check what spans several groups of fields.

        Raises:
            UserError: names the field, what was found and what is valid.
        """
        for name in ("steps", "grad_accum_steps", "log_every", "heartbeat_timeout"):
            check_range(f"config.{name}", getattr(self, name), 1)
        for name in (
            "eval_every", "seed", "prefetch_memory", "storage_timeout", "watchdog_timeout", "watchdog_step_medians",
        ):  # fmt: skip
            check_range(f"config.{name}", getattr(self, name), 0)
        check_range("config.metrics_port", self.metrics_port, 0, 65535)
        try:
            ipaddress.ip_address(self.metrics_address)
        except ValueError:
            raise UserError(
                f"config.metrics_address={self.metrics_address!r} is not an IP address: 127.0.0.1 serves this machine, "
                "0.0.0.0 others too"
            ) from None
        check_range("config.ema_decay", self.ema_decay, 0, 1 - 1e-9)
        if not self.streams:
            raise UserError("config.streams is empty: a run needs at least one stream of batches")
        trained = [name for name, task in TASK_SPECS.items() if task.trainable]
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
                    f"config.tasks.mlm.whole_word needs {where}.data.examples.word_starts, which marks where words "
                    "begin: set it to True"
                )
            for field, size in stream.data.batch_sizes.items():
                self._check_micro_batch(where, stream, f"{where}.data.{field}", size)
        parts = self.parts()
        for part in self.freeze:
            if part not in parts:
                raise UserError(f"config.freeze names {part!r}: {did_you_mean(part, parts)}")
        for part in self.lora.parts:
            if part not in parts:
                raise UserError(f"config.lora.parts names {part!r}: {did_you_mean(part, parts)}")
            if part in self.freeze:
                raise UserError(
                    f"config.freeze and config.lora.parts both name {part!r}, which is either frozen or trained by "
                    "LoRA: remove it from one of them"
                )
        if set(parts) <= set(self.freeze):
            raise UserError(f"config.freeze={self.freeze} leaves nothing to train: remove a part of the model from it")
        if self.evaluations and self.tasks.search.max_length > self.model.max_positions:
            raise UserError(
                f"config.tasks.search.max_length={self.tasks.search.max_length} exceeds config.model.max_positions="
                f"{self.model.max_positions}; lower the former or raise the latter"
            )
        for name, evaluation in self.evaluations.items():
            self._check_data(f"config.evaluations.{name}.data", evaluation.data)
            check_range(f"config.evaluations.{name}.num_samples", evaluation.num_samples, 0)
            check_range(f"config.evaluations.{name}.per_device_batch_size", evaluation.per_device_batch_size, 1)
            evaluable = [name for name, task in TASK_SPECS.items() if task.evaluable]
            if evaluation.task not in evaluable:
                raise UserError(
                    f"config.evaluations.{name}.task={evaluation.task!r}: {did_you_mean(evaluation.task, evaluable)}"
                )

    def _check_micro_batch(self, where: str, stream: StreamConfig, field: str, batch_size: int) -> None:
        micro, remainder = divmod(batch_size, self.grad_accum_steps)
        if remainder:
            raise UserError(
                f"{field}={batch_size} is not a multiple of config.grad_accum_steps={self.grad_accum_steps}"
            )
        group = self.tasks.vlm.group_size
        if "vlm" in stream.objectives and group and micro % group:
            raise UserError(
                f"{where}: {micro} examples per micro-batch are not a multiple of "
                f"config.tasks.vlm.group_size={group}; use a divisor, or 0 for all of them"
            )
        queue = self.tasks.vlc.queue_size
        if "vlc" in stream.objectives and queue and self.tasks.distillation is None:
            raise UserError(
                f"config.tasks.vlc.queue_size={queue} is filled by a teacher: set config.tasks.distillation too"
            )
        if "vlc" in stream.objectives and queue and queue % micro:
            raise UserError(
                f"config.tasks.vlc.queue_size={queue} is not a multiple of {where}'s {micro} examples per micro-batch"
            )

    def data_paths(self) -> list[str]:
        """Return the files and folders that streams and evaluations read."""
        data = [*(stream.data for stream in self.streams.values()), *(each.data for each in self.evaluations.values())]
        sources = [source for each in data for source in each.sources.values()]
        return [path for path in dict.fromkeys(p for source in sources for p in (source.path, source.media)) if path]

    def _check_data(self, where: str, data: DataConfig) -> None:
        for field, size in data.batch_sizes.items():
            check_range(f"{where}.{field}", size, 1)
        for field in ("num_workers", "num_threads", "prefetch"):
            check_range(f"{where}.{field}", getattr(data, field), 0)
        for field in ("text_length", "instruction_length", "target_length"):
            length = getattr(data.examples, field)
            if length > self.model.max_positions:
                raise UserError(
                    f"{where}.examples.{field}={length} exceeds config.model.max_positions={self.model.max_positions}; "
                    "lower the former or raise the latter"
                )

    def parts(self) -> tuple[str, ...]:
        """Return the parts of the model that the streams' objectives need."""
        uses = [
            (TASK_SPECS[objective], stream.data) for stream in self.streams.values() for objective in stream.objectives
        ]
        needed = set(required_parts([(task, data.kind != "text", data.kind == "video") for task, data in uses]))
        # Tasks with an optional instruction read one if the data has it.
        needed |= {part for task, data in uses if data.examples.instruction_length for part in task.optional_parts}
        return tuple(part for part in PARTS if part in needed and (self.use_universal_layers or part != "universal"))

    @property
    def frozen(self) -> tuple[str, ...]:
        """Return the parts whose own parameters are frozen, including those that LoRA trains."""
        return (*self.freeze, *self.lora.parts)

    @property
    def has_teacher(self) -> bool:
        """Return whether the run keeps an averaged copy of the model, for distillation and momentum contrast."""
        return self.tasks.distillation is not None


accept_old_names(RunConfig)
