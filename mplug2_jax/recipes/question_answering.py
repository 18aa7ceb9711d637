"""Open-ended questions about images and videos. Parts: vision, text, universal, fusion, decoder."""

from data_pipelines.config import InstructionConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.recipes.base import TaskData, TaskFamily, finetune_recipe, parse_variant
from mplug2_jax.recipes.released import released_recipe
from mplug2_jax.training.config import RunConfig


def vqa_recipe(name: str, arg: str, data: TaskData, *, task: str = "answer") -> RunConfig:
    """Return a question answering run with the release's loss and batch size of 32.

    Args:
        name: of the recipe.
        arg: ``SIZE``, or for videos also ``SIZE,released``, the release's protocol.
        data: the data set.
        task: "answer" scores by exact match, "vqa" as VQA v2 does.

    Raises:
        UserError: an unknown size or variant.
    """
    size, variant = parse_variant(name, arg, *(["released"] if data.train.kind == "video" else []))
    if variant == "released":
        return released_recipe(name, size, "videoqa", data)
    family = TaskFamily(
        objectives={"answer": 1.0}, task=task,
        train_examples={
            "instructions": {"question": InstructionConfig(templates=("{question}",))}, "instruction_length": 32,
            "target_length": 16,
        },
        train_visual={"transform": "train", "flip": False},  # questions may tell left from right
        search=SearchConfig(num_beams=5, max_length=15), batch_size=32,
    )  # fmt: skip
    return finetune_recipe(name, size, data, family)
