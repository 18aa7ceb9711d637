"""Text-to-visual and visual-to-text retrieval. Parts: vision, text, universal, contrastive, and fusion for matching."""

from mplug2_jax.recipes.base import TaskData, TaskFamily, finetune_recipe
from mplug2_jax.training.config import OptimizerConfig, RunConfig


def retrieval_recipe(name: str, size: str, data: TaskData, *, text_length: int = 40, epochs: int = 10) -> RunConfig:
    """Return a retrieval run: contrast and matching, as in the fine-tuning of mPLUG (v1) and ALBEF."""
    family = TaskFamily(
        objectives={"vlc": 1.0, "vlm": 1.0}, task="vlc", train_examples={"text_length": text_length}, epochs=epochs,
        train_visual={"transform": "train", "flip": False}, batch_size=256,
        optimizer=OptimizerConfig(learning_rate=1e-5, vision_learning_rate=1e-6, weight_decay=0.02),
    )  # fmt: skip
    return finetune_recipe(name, size, data, family)
