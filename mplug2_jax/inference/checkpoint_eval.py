"""Evaluation of a run's checkpoints, by the run's own config or by another recipe."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import logging

from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.config import as_recipe, load_recipe, override, to_dict
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.evaluation.results import EvaluationResult
from mplug2_jax.model.config import check_has_parts
from mplug2_jax.model.mplug2 import Params
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.specs import required_parts
from mplug2_jax.tasks.table import TASKS
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints, open_checkpoint
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.durations import build_run_config
from mplug2_jax.training.loop import open_evaluations
from mplug2_jax.training.state import make_run_spec
from mplug2_jax.training.workdir import WorkDir, special_tokens

_ANY_DECAY = 0.5
"""Replaces the decay of a checkpoint with EMA parameters, which is not stored: any value but 0 enables them."""


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """The checkpoints of a model, and the config of their evaluations."""

    config: RunConfig  # its model is that of the checkpoints
    workdir: WorkDir  # that contains the checkpoints
    checkpoints: Checkpoints
    step: int | None  # of the checkpoint; None: the last
    parts: tuple[str, ...]  # of the model
    tokenizer: Tokenizer
    use_ema: bool  # evaluate the EMA parameters
    uses_run_config: bool  # the config is the run's own, which may evaluate images of another size than the model's

    @classmethod
    def from_workdir(cls, path: Path, overrides: Sequence[str], step: int | None = None) -> "CheckpointSource":
        """Open a run by its own config, with overrides.

        Raises:
            UserError: no run, or no checkpoint in it.
        """
        workdir = WorkDir(path)
        recorded = workdir.read_config()
        config = build_run_config(override(as_recipe(recorded), overrides))
        tokenizer = workdir.load_tokenizer(config)
        checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint, read_only=True)
        use_ema = bool(recorded.ema_decay and config.ema_decay)
        return cls(config, workdir, checkpoints, step, recorded.parts(), tokenizer, use_ema, uses_run_config=True)

    @classmethod
    def from_recipe(cls, recipe: str, path: Path, overrides: Sequence[str]) -> "CheckpointSource":
        """Open a checkpoint by a recipe, with overrides; the model's sizes and the tokenizer are the checkpoint's.

        Args:
            recipe: as ``finetune:videoqa,tiny``.
            path: a work directory, its checkpoints, or one step of them.
            overrides: as ``--config.mesh.fsdp=1``.

        Raises:
            UserError: no such recipe or checkpoint, or no tokenizer.
        """
        checkpoints, step = open_checkpoint(path)
        model = checkpoints.model_metadata(step)
        has_ema = any(leaf[0] == "ema" for leaf in checkpoints.array_specs(step))
        stored = {"model": to_dict(model.config), "ema_decay": _ANY_DECAY if has_ema else 0.0}
        config = build_run_config(override(as_recipe(load_recipe(recipe).to_dict() | stored), overrides))
        workdir = WorkDir(checkpoints.folder.parent)
        if not workdir.tokenizer_folder.exists() and not config.tokenizer.path:
            raise UserError(
                f"{workdir.path} has no tokenizer, and the model needs the one that it was trained with: set "
                "--config.tokenizer.path to its file"
            )
        use_ema = has_ema and bool(config.ema_decay)
        tokenizer = workdir.load_tokenizer(config)
        return cls(config, workdir, checkpoints, step, model.parts, tokenizer, use_ema, uses_run_config=False)


class CheckpointEvaluator:
    """The evaluations of a checkpoint, compiled once for all checkpoints of the run.

    Only the parts of the model that they need are built and read.

    Args:
        source: the checkpoints and their config.
        only: names of evaluations; empty: all.

    Raises:
        UserError: unknown names, or evaluations that need other parts or another image size than the model has.
    """

    def __init__(self, source: CheckpointSource, only: Sequence[str] = ()) -> None:
        self.source, config = source, source.config
        names = only or list(config.evaluations)
        if not names:
            raise UserError(f"{config.name} has no evaluations in its config")
        for name in names:
            if name not in config.evaluations:
                raise UserError(
                    f"--only {name} is not an evaluation of this run: {did_you_mean(name, config.evaluations)}"
                )
        needed = {part for name in names for part in self._required_parts(name)}
        parts = tuple(part for part in source.parts if part in needed)
        spec = make_run_spec(config, special_tokens(source.tokenizer), make_mesh(config.mesh), parts)
        self._param_shapes = spec.eval_param_shapes
        if source.use_ema:
            logging.info("evaluating the EMA parameters; --config.ema_decay=0 selects the last ones")
        self.evaluations = open_evaluations(spec, source.tokenizer, names)

    def _required_parts(self, name: str) -> set[str]:
        """Return the parts that an evaluation needs, or uses if they exist. Raises UserError if some are missing."""
        model, parts = self.source.config.model, self.source.parts
        evaluation = self.source.config.evaluations[name]
        task, data = TASKS[evaluation.task], evaluation.data
        is_video = data.kind == "video" and (data.visual.num_frames > 1 or model.temporal_downsampling)
        needed = required_parts([(task, data.kind != "text", is_video)])
        check_has_parts(
            f"config.evaluations.{name}: task '{task.name}'", needed, parts,
            model=f"the model in {self.source.workdir.path}", advice="; select other evaluations with --only",
        )  # fmt: skip
        field, pixels = f"config.evaluations.{name}.data.visual.image_size", data.visual.image_size
        if data.kind != "text" and pixels != model.image_size and not self.source.uses_run_config:
            raise UserError(
                f"{field}={pixels}, but the model in {self.source.workdir.path} has image_size={model.image_size}: "
                f"set --{field}={model.image_size}"
            )
        return {*needed, *(task.optional_parts if set(task.optional_parts) <= set(parts) else ())}

    def read(self, step: int | None) -> tuple[Params, int]:
        """Return the parameters of a step, and that step. Raises as :meth:`Checkpoints.restore`."""
        tree = "ema" if self.source.use_ema else "params"
        return self.source.checkpoints.restore_params(self._param_shapes, step, tree=tree)

    def run(
        self, params: Params, step: int, names: Sequence[str], on_batch: Callable[[str], None]
    ) -> Iterator[EvaluationResult]:
        """Yield the results of evaluations, one after the other; all processes call it with the same names."""
        for name in names:
            yield self.evaluations[name].run(params, step, on_batch)
