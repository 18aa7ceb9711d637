"""Self-critical sequence training: sampled captions with an above-average CIDEr-D reward become likelier."""

import dataclasses

import jax

from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.decode import generate
from mplug2_jax.objectives.forward import ForwardPass, LossOutput
from mplug2_jax.objectives.scst import scst_loss
from mplug2_jax.tasks import caption
from mplug2_jax.tasks.base import TaskContext
from mplug2_jax.tasks.specs import TASK_SPECS


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """Sample captions of each example by its own key, and reinforce them; both without dropout, so on-policy."""
    batch = forward.batch
    deterministic = ForwardPass(forward.model, batch, frequencies=forward.frequencies)
    search = SearchConfig(
        num_beams=context.config.scst.num_samples, min_length=0, max_length=batch["references"].shape[-1] - 1,
        top_p=1.0,
    )  # fmt: skip
    decoder, memory = jax.lax.stop_gradient((forward.model.decoder, deterministic.caption_memory))
    output = generate(decoder, *memory, search, context.tokens, batch["example_id"], key=forward.key("scst"))
    return scst_loss(deterministic, output.ids, output.lengths, context.tokens)


TASK = dataclasses.replace(caption.TASK, **vars(TASK_SPECS["scst"]), loss=loss)
