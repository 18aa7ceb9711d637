"""Runs that train a part of the model."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.config import OptimizerConfig, RunConfig
from mplug2_jax.training.loop import device_batches, open_streams
from mplug2_jax.training.state import RunSpec, make_run_spec
from mplug2_jax.training.step import make_train_step
from mplug2_jax.training.workdir import WorkDir, special_tokens
from tests.runs import small_run, text_run

DISTILLED = TasksConfig(distillation=DistillationConfig(momentum=0.5))


def answer_run(**overrides: Any) -> RunConfig:
    """Return a run of questions about video clips: every part between pixels and words, temporal units included."""
    clips = dataclasses.replace(small_run().streams["video_text"], objectives={"answer": 1.0})
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.5)
    return small_run(**({"streams": {"clips": clips}, "evaluations": {}, "optimizer": optimizer} | overrides))


def mlm_run(**overrides: Any) -> RunConfig:
    """Return a run of masked words: text, universal layers and a head."""
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.5, clip_norm=0.0)
    return text_run(**({"optimizer": optimizer} | overrides))


def make_spec(config: RunConfig, mesh: MeshConfig | None = None) -> RunSpec:
    mesh = mesh or MeshConfig(fsdp=1)
    tokens = special_tokens(WorkDir(Path("nowhere")).load_tokenizer(config))
    return make_run_spec(config, tokens, make_mesh(mesh, jax.devices()[: mesh.fsdp * mesh.tensor]))


def train_steps(config: RunConfig, steps: int, mesh: MeshConfig | None = None) -> tuple[Any, Any, dict[str, float]]:
    """Return the first parameters, the last state and the last metrics."""
    spec = make_spec(config, mesh)
    state, step = spec.init(), make_train_step(spec)
    start = jax.tree.map(np.asarray, state["params"])
    batches = device_batches(open_streams(config, WorkDir(Path("nowhere")).load_tokenizer(config)), spec.mesh, 0)
    metrics: Any = {}
    for _ in range(steps):
        state, metrics = step(state, next(batches)[0])
    return start, state, {name: float(value) for name, value in metrics.items()}
