"""The release's own fine-tuning, quirks included: ``released:caption`` or ``released:videoqa``, ``,tiny`` to try it.

Sizes, rates and lengths are those of its recipes for MSRVTT (8 GPUs). Use it to continue from the release's weights or
to compare with its numbers; our own recipes have none of the quirks, each of which is marked below. DigitWorld stands
in for MSRVTT, so that the recipe runs anywhere; with the release's files, override each ``sources.clips``: its
``format=annotations``, ``path``, ``media``, ``split`` (empty) and ``size=none``.

Part of the architecture, and so always on: question text runs through the universal layers without cross attention,
the last universal layer swaps query and memory, two LayerNorm epsilons, two GELUs, no gradient for the padding row.
Left out on purpose: starting from a checkpoint deletes the fusion encoder's weights.
"""

from ml_collections import ConfigDict

from data_pipelines.examples import ExampleConfig, InstructionConfig
from data_pipelines.loader import DataConfig
from data_pipelines.sources.config import SourceConfig
from data_pipelines.text import RELEASE_PROMPT
from data_pipelines.visual import VisualConfig
from mplug2_jax.config import as_recipe
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.evaluation.loop import EvaluationConfig
from mplug2_jax.generation.beam import SearchConfig
from mplug2_jax.model.config import SIZES, ModelConfig, model_config
from mplug2_jax.objectives.language import DistillationConfig
from mplug2_jax.tasks.base import TaskSettings
from mplug2_jax.training.config import RunConfig, StreamConfig, TokenizerConfig
from mplug2_jax.training.optimizer import AdamWConfig
from mplug2_jax.training.schedule import ScheduleConfig

TASKS = ("caption", "videoqa")
EPOCHS, STEPS_PER_EPOCH = 10, 4000  # the release counts in epochs; set both from the size of the data


def get_config(arg: str = "videoqa") -> ConfigDict:
    """The recipe of a task, at one of the sizes of the table."""
    task, _, size = arg.partition(",")
    if task not in TASKS:
        raise UserError(f"recipe released:{task}: {did_you_mean(task, TASKS)}")
    if size and size not in SIZES:
        raise UserError(f"recipe released:{task},{size}: {did_you_mean(size, SIZES)}")
    # CLIP's position table is lost on the way, so the tower starts without positions.
    return recipe(task, model_config(size or "large", positions_init="zeros"))


def recipe(task: str, model: ModelConfig) -> ConfigDict:
    """The whole run."""
    tiny = model.width < SIZES["base"]["width"]
    caption = task == "caption"
    objective = "caption" if caption else "answer"
    if caption:
        # The prompt is glued to the caption's first word ("a video ofa man"), and its last piece is learned.
        examples = ExampleConfig(
            form="released", prompt=RELEASE_PROMPT, target_length=20,
            instructions={"caption": InstructionConfig(templates=("",))},
        )  # fmt: skip
        search = SearchConfig(beams=5, min_length=4, max_length=20, extend_finished=True)
    else:
        # Questions end without [SEP]; answers bring one in their text.
        examples = ExampleConfig(
            form="released", instruction_length=min(50, model.max_positions), target_length=10,
            instructions={"question": InstructionConfig(templates=("{question}",))},
        )  # fmt: skip
        # Beams that ended are kept alive and may go on.
        search = SearchConfig(beams=5, min_length=1, max_length=10, extend_finished=True)

    def data(split: str, batch_size: int, records: int) -> DataConfig:
        source = SourceConfig(kind="video", split=split, size=records)
        train = split == "train"
        visual = VisualConfig(
            image_size=model.image_size, num_frames=4 if tiny else 16,
            # An interval's last frame is never drawn.
            sampling="random" if train else "middle",
            # In training what overshoots in bicubic crops wraps round; asked, frames are resized by the nearest pixel.
            transform="released_train" if train else "released_test",
        )  # fmt: skip
        return DataConfig(sources={"clips": source}, visual=visual, examples=examples, batch_size=batch_size)

    batch_size = 8 if tiny else 64 if caption else 32
    return as_recipe(
        RunConfig(
            name=f"released_{task}",
            steps=EPOCHS * STEPS_PER_EPOCH,
            seed=42,
            model=model,
            # The release's files are BERT's: tokenizer.path=vocab.txt.
            tokenizer=TokenizerConfig(vocab_size=min(model.vocab_size, 512)),
            # A caption's loss is the mean over all tokens of the batch, an answer's the sum over its own.
            streams={"video": StreamConfig(data=data("train", batch_size, 100_000), objectives={objective: 1.0})},
            tasks=TaskSettings(
                # A teacher is kept and asked, but alpha is dropped on its way to the decoder, so it changes nothing;
                # were it not, its term would be normalised over time and its fusion module would never follow.
                distillation=None if caption else DistillationConfig(alpha=0.0, over="time", fusion=False),
                search=search,
            ),
            optimizer=AdamWConfig(
                learning_rate=2e-5, vision_learning_rate=2e-6, weight_decay=0.02, clip_norm=0.0,
                # A rule of substrings, which decays CLIP's norms, latents and embeddings too.
                decay="released",
            ),
            schedule=ScheduleConfig(
                # One step late, 200 steps too short, and for captions with a dip after every 100 steps of epoch 0.
                kind="released_caption" if caption else "released",
                warmup_steps=200, start=1e-6, floor=1e-6, steps_per_epoch=STEPS_PER_EPOCH,
            ),
            accumulate=2 if caption else 1,
            evaluations={"video": EvaluationConfig(task=objective, data=data("heldout", batch_size, 512))},
            evaluate_every=STEPS_PER_EPOCH,
        )
    )  # fmt: skip
