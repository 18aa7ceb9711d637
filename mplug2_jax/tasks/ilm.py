"""Instruction-based language modeling: instruction in, answer out; with frames through fusion, or text alone."""

from mplug2_jax.objectives.forward import ForwardPass, LossOutput
from mplug2_jax.objectives.language import ilm_loss
from mplug2_jax.tasks.answer import predict, score
from mplug2_jax.tasks.base import Task, TaskContext
from mplug2_jax.tasks.specs import TASK_SPECS


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """Compute the cross entropy of the answer's tokens."""
    return ilm_loss(forward, context.config.label_smoothing)


TASK = Task(**vars(TASK_SPECS["ilm"]), loss=loss, predict=predict, score=score)
