"""The settings that all tasks share."""

import dataclasses
from typing import Literal

from mplug2_jax.errors import check_range
from mplug2_jax.fields import Runtime
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.objectives.config import DistillationConfig, MlmConfig, ScstConfig, VlcConfig, VlmConfig

PromptPooling = Literal["features", "probabilities"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Settings of the objectives and predictions of a run."""

    mlm: MlmConfig = MlmConfig()
    vlc: VlcConfig = VlcConfig()
    vlm: VlmConfig = VlmConfig()
    scst: ScstConfig = ScstConfig()
    distillation: DistillationConfig | None = None  # None: no teacher
    label_smoothing: float = 0.0  # of all cross entropies over tokens and classes: all losses but vlc and scst
    search: Runtime[SearchConfig] = SearchConfig()
    rerank_k: Runtime[int] = 16  # nearest candidates by contrast that the matching head reranks

    def __post_init__(self) -> None:
        """Check the ranges. Raises UserError."""
        check_range("config.tasks.label_smoothing", self.label_smoothing, 0, 1 - 1e-9)
        check_range("config.tasks.rerank_k", self.rerank_k, 1)


TaskSettings = TasksConfig
"""The name of older versions, for their recipes."""
