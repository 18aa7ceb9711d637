"""Vision-language matching: does this text match these frames?"""

from mplug2_jax.objectives.forward import ForwardPass, LossOutput
from mplug2_jax.objectives.vlm import vlm_loss
from mplug2_jax.tasks.base import Task, TaskContext
from mplug2_jax.tasks.specs import TASK_SPECS


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """Compute the binary cross entropy of true pairs and hard negatives."""
    return vlm_loss(forward, context.config.vlm, context.config.label_smoothing)


TASK = Task(**vars(TASK_SPECS["vlm"]), loss=loss)
