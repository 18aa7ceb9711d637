"""What a step computes, by stream, tower and objective: counted from the traced losses, the same on every machine.

Attention counts as two matmuls whatever kernel serves it, because kernels' own operations are nobody's business but
theirs; the counts are those of the whole batch, of all devices together.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mplug2_jax.model.config import PARTS
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.planning.programs import Program
from mplug2_jax.tasks.table import TASKS
from mplug2_jax.training.config import StreamConfig
from mplug2_jax.training.state import RunSpec
from mplug2_jax.training.telemetry.flops import count_flops
from mplug2_jax.training.telemetry.step_flops import count_gradient_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Floating-point operations of one step over the whole batch."""

    towers: Mapping[str, Mapping[str, int]]  # stream -> tower -> forward and backward
    objectives: Mapping[str, Mapping[str, int]]  # stream -> objective -> what it would cost without the others
    recomputed: int  # what the remat policies compute twice

    @property
    def step(self) -> int:
        """Operations that the maths needs: what MFU counts."""
        return sum(sum(towers.values()) for towers in self.towers.values())

    @property
    def executed(self) -> int:
        """With what is computed twice."""
        return self.step + self.recomputed

    @property
    def overhead(self) -> float:
        """What is computed twice, as a share of the rest."""
        return self.recomputed / self.step


def training_costs(spec: RunSpec, batches: Mapping[str, Any]) -> Costs:
    """Counts a run's step; nothing is compiled."""
    config = spec.config
    towers, objectives, again = {}, {}, 0
    for name, stream in config.streams.items():
        once = count_gradient_flops(spec, {name: stream}, batches, remat=False)
        towers[name] = _by_tower(once)
        again += count_gradient_flops(spec, {name: stream}, batches, remat=True).total() - once.total()
        objectives[name] = {
            objective: count_gradient_flops(spec, {name: _only(stream, objective)}, batches, remat=False).total()
            for objective in stream.objectives
        }
    return Costs(towers=towers, objectives=objectives, recomputed=again)


_TOWERS = frozenset(PARTS) | {"class_head", "vision_projection"}


def _by_tower(counts: collections.Counter[str]) -> dict[str, int]:
    """What belongs to no tower (similarities, draws of negatives) is the objectives'."""
    towers: collections.Counter[str] = collections.Counter()
    for scope, count in sorted(counts.items()):
        towers[scope if scope in _TOWERS else "objectives"] += count
    return {tower: count for tower, count in towers.items() if count}


def _only(stream: StreamConfig, objective: str) -> StreamConfig:
    return dataclasses.replace(stream, objectives={objective: stream.objectives[objective]})


def prediction_costs(program: Program) -> Costs:
    """Counts what an evaluation does with a batch, searches to their greatest length."""
    spec, evaluation = program.spec, program.spec.config.evaluations[program.name]
    model = dataclasses.replace(spec.config.model, attention="xla")
    predict = TASKS[evaluation.task].predict
    assert predict is not None
    definition = define_model(model, spec.definition.parts)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (program.state, dict(program.batches)))
    turns = spec.config.tasks.search.max_length
    counts = count_flops(
        lambda params, batch: predict(definition.bind(params), batch, spec.context), *arguments, turns=turns
    )
    return Costs(towers={program.name: _by_tower(counts)}, objectives={}, recomputed=0)
