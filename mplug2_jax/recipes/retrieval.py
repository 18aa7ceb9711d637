"""Texts for pictures and pictures for texts: vision, text, universal, contrast, and matching by fusion beside."""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Family, Sets, recipe
from mplug2_jax.training.config import AdamWConfig


def retrieval(name: str, size: str, sets: Sets, *, text_length: int = 40, epochs: int = 10) -> ConfigDict:
    """Contrast and matching, as the fine-tuning of mPLUG (v1) and ALBEF has them."""
    examples = {"text_length": text_length}
    family = Family(
        objectives={"vlc": 1.0, "vlm": 1.0}, task="vlc", learned=examples, told=examples, epochs=epochs,
        train_visual={"transform": "train", "flip": False}, batch_size=256,
        optimizer=AdamWConfig(learning_rate=1e-5, vision_learning_rate=1e-6, weight_decay=0.02),
    )  # fmt: skip
    return recipe(name, size, sets, family)
