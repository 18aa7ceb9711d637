"""FLOPs of a step by stream, tower and objective: counted from the traced losses, independent of the machine.

Attention counts as two matmuls whatever its kernel. Counts are for the whole batch, on all devices together.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mplug2_jax.model.config import PARTS
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.planning.programs import TracedProgram
from mplug2_jax.tasks.table import TASKS
from mplug2_jax.training.state import RunSpec
from mplug2_jax.training.telemetry.flops import count_flops
from mplug2_jax.training.telemetry.step_flops import count_gradient_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """FLOPs of one step over the whole batch."""

    towers: Mapping[str, Mapping[str, int]]  # stream -> tower -> forward and backward
    objectives: Mapping[str, Mapping[str, int]]  # stream -> objective -> forward and backward of it alone
    recomputed_flops: int  # by the remat policies

    @property
    def model_flops(self) -> int:
        """Return the FLOPs that the model needs: the numerator of MFU."""
        return sum(sum(towers.values()) for towers in self.towers.values())

    @property
    def hardware_flops(self) -> int:
        """Return the FLOPs that are executed, recomputed ones included."""
        return self.model_flops + self.recomputed_flops

    @property
    def recompute_overhead(self) -> float:
        """Return the recomputed FLOPs as a fraction of the model's."""
        return self.recomputed_flops / self.model_flops


def training_costs(spec: RunSpec, batches: Mapping[str, Any]) -> Costs:
    """Count the FLOPs of a training step, without compiling it."""
    config = spec.config
    towers, objectives, recomputed = {}, {}, 0
    for name, stream in config.streams.items():
        flops = count_gradient_flops(spec, {name: stream}, batches, remat=False)
        towers[name] = _sum_by_tower(flops)
        recomputed += count_gradient_flops(spec, {name: stream}, batches, remat=True).total() - flops.total()
        objectives[name] = {
            objective: count_gradient_flops(
                spec, {name: dataclasses.replace(stream, objectives={objective: weight})}, batches, remat=False
            ).total()
            for objective, weight in stream.objectives.items()
        }
    return Costs(towers=towers, objectives=objectives, recomputed_flops=recomputed)


_TOWERS = frozenset(PARTS) | {"class_head", "vision_projection"}


def _sum_by_tower(counts: collections.Counter[str]) -> dict[str, int]:
    """Sum counts by tower; what belongs to none (similarities, sampling of negatives) is "objectives"."""
    towers: collections.Counter[str] = collections.Counter()
    for scope, count in sorted(counts.items()):
        towers[scope if scope in _TOWERS else "objectives"] += count
    return {tower: count for tower, count in towers.items() if count}


def prediction_costs(program: TracedProgram) -> Costs:
    """Count the FLOPs of an evaluation's batch; searches run to their maximum length."""
    spec, evaluation = program.spec, program.spec.config.evaluations[program.name]
    model = dataclasses.replace(spec.config.model, attention="xla")
    predict = TASKS[evaluation.task].predict
    assert predict is not None
    model_def = define_model(model, spec.model_def.parts)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (program.state, dict(program.batches)))
    max_length = spec.config.tasks.search.max_length
    counts = count_flops(
        lambda params, batch: predict(model_def.bind(params), batch, spec.context), *arguments, trip_count=max_length
    )
    return Costs(towers={program.name: _sum_by_tower(counts)}, objectives={}, recomputed_flops=0)
