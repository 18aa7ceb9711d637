"""Evaluations outside of the run that a checkpoint is of: by its own config, or by another recipe's."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.config import as_recipe, build, load_recipe, override, to_dict
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.evaluation.loop import Evaluation
from mplug2_jax.evaluation.results import EvaluationResult
from mplug2_jax.model.mplug2 import Params
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.contracts import required_parts
from mplug2_jax.tasks.table import TASKS
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints, open_checkpoint
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.state import make_run_spec
from mplug2_jax.training.workdir import WorkDir, special_tokens

AVERAGED = 0.5
"""The decay that stands for a checkpoint's own, which it does not tell: any but 0 says that there is an average."""


@dataclasses.dataclass(frozen=True)
class CheckpointUnderTest:
    """A model whose checkpoints are evaluated, and how."""

    config: RunConfig  # whose evaluations; its model is the checkpoints'
    workdir: WorkDir  # that the checkpoints are in
    checkpoints: Checkpoints
    step: int | None  # which of them; None: the last
    parts: tuple[str, ...]  # that the model has
    tokenizer: Tokenizer
    averaged: bool  # whether the average is evaluated
    own: bool  # whether the config is the run's, which may see pictures of other sizes than it was trained on


def from_workdir(path: Path, overrides: Sequence[str], step: int | None = None) -> CheckpointUnderTest:
    """A run by its own config, with overrides.

    Raises:
        UserError: no run, or no checkpoint in it.
    """
    workdir = WorkDir(path)
    begun = workdir.read_config()
    config = build(RunConfig, override(as_recipe(begun), overrides))
    tokenizer = workdir.load_tokenizer(config)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint, read_only=True)
    averaged = bool(begun.ema_decay and config.ema_decay)
    return CheckpointUnderTest(config, workdir, checkpoints, step, begun.parts(), tokenizer, averaged, own=True)


def from_recipe(spec: str, path: Path, overrides: Sequence[str]) -> CheckpointUnderTest:
    """A checkpoint by a recipe, with overrides: the checkpoint's are the sizes of the model and the tokeniser.

    Args:
        spec: the recipe, as ``finetune:videoqa,tiny``.
        path: a work directory, its checkpoints, or one step of them.
        overrides: words as ``--config.mesh.fsdp=1``.

    Raises:
        UserError: no such recipe or checkpoint, or no tokeniser.
    """
    checkpoints, step = open_checkpoint(path)
    model = checkpoints.model_metadata(step)
    averaged = any(place[0] == "ema" for place in checkpoints.array_specs(step))
    own = {"model": to_dict(model.config), "ema_decay": AVERAGED if averaged else 0.0}
    config = build(RunConfig, override(as_recipe(load_recipe(spec).to_dict() | own), overrides))
    workdir = WorkDir(checkpoints.folder.parent)
    if not workdir.tokenizer_folder.exists() and not config.tokenizer.path:
        raise UserError(
            f"{workdir.path} keeps no tokeniser, and words mean what the model learned them by: set "
            "--config.tokenizer.path to its file"
        )
    averaged = averaged and bool(config.ema_decay)
    tokenizer = workdir.load_tokenizer(config)
    return CheckpointUnderTest(config, workdir, checkpoints, step, model.parts, tokenizer, averaged, own=False)


class Evaluator:
    """Evaluations of a subject, set up and compiled once for all of its checkpoints.

    Only the parts of the model that they need are built and read.

    Args:
        subject: what is evaluated.
        only: names of evaluations; empty: all.

    Raises:
        UserError: unknown names, or evaluations that the model has not the parts for, or not the size.
    """

    def __init__(self, subject: CheckpointUnderTest, only: Sequence[str] = ()) -> None:
        self.subject, config = subject, subject.config
        names = only or list(config.evaluations)
        if not names:
            raise UserError(f"{config.name} has no evaluations in its config")
        for name in names:
            if name not in config.evaluations:
                raise UserError(f"--only {name} is no evaluation of this run: {did_you_mean(name, config.evaluations)}")
        needed = {part for name in names for part in self._parts(name)}
        parts = tuple(part for part in subject.parts if part in needed)
        spec = make_run_spec(config, special_tokens(subject.tokenizer), make_mesh(config.mesh), parts)
        self._like = spec.eval_param_shapes
        self.evaluations = {
            name: Evaluation(
                name, config.evaluations[name], spec.definition, spec.context, subject.tokenizer, spec.mesh,
                seed=config.seed, recipe=config.name,
            )
            for name in names
        }  # fmt: skip

    def _parts(self, name: str) -> set[str]:
        """What an evaluation needs of the model, and what it uses besides. Raises UserError where they do not fit."""
        model, has = self.subject.config.model, self.subject.parts
        evaluation = self.subject.config.evaluations[name]
        task, data = TASKS[evaluation.task], evaluation.data
        clips = data.kind == "video" and (data.visual.num_frames > 1 or model.temporal_downsampling)
        needed = required_parts([(task, data.kind != "text", clips)])
        # A run may choose to go without universal layers.
        missing = [part for part in needed if part not in (*has, "universal")]
        if missing:
            raise UserError(
                f"config.evaluations.{name}: task '{task.name}' needs the parts {', '.join(missing)}, which the model "
                f"in {self.subject.workdir.path} lacks (it has {', '.join(has)}); choose others with --only"
            )
        field, pixels = f"config.evaluations.{name}.data.visual.image_size", data.visual.image_size
        if data.kind != "text" and pixels != model.image_size and not self.subject.own:
            raise UserError(
                f"{field}={pixels}, but the model in {self.subject.workdir.path} sees {model.image_size} pixels: set "
                f"--{field}={model.image_size}"
            )
        return {*needed, *(task.optional_parts if set(task.optional_parts) <= set(has) else ())}

    def read(self, step: int | None) -> tuple[Params, int]:
        """The parameters of a step, and which it is. Raises as :meth:`Checkpoints.restore`."""
        return self.subject.checkpoints.restore_params(
            self._like, step, tree="ema" if self.subject.averaged else "params"
        )

    def run(
        self, params: Params, step: int, names: Sequence[str], on_batch: Callable[[str], None]
    ) -> Iterator[EvaluationResult]:
        """The results of evaluations, one after the other; all processes call it alike."""
        for name in names:
            yield self.evaluations[name].run(params, step, on_batch)
