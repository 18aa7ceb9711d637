"""The tasks, by name. A task is the parts it needs, the batch keys it reads, its objective and its prediction."""

from collections.abc import Mapping

from mplug2_jax.tasks import answer, caption, ilm, mlm, vlc, vlm
from mplug2_jax.tasks.base import Task

TASKS: Mapping[str, Task] = {t.name: t for t in (mlm.TASK, vlc.TASK, vlm.TASK, ilm.TASK, caption.TASK, answer.TASK)}
