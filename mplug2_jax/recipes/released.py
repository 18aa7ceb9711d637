"""The release's own fine-tuning, quirks included, each of which is marked: for its weights, and to compare with it.

Sizes, rates and lengths are those of its recipes for MSRVTT (8 GPUs). Our own recipes have none of the quirks. Part of
the architecture, and so always on: question text runs through the universal layers without cross attention, the last
universal layer swaps query and memory, two LayerNorm epsilons, two GELUs, no gradient for the padding row. Left out on
purpose: starting from a checkpoint deletes the fusion encoder's weights, and the sampler's duplicates count.
"""

import dataclasses

from ml_collections import ConfigDict

from data_pipelines.config import (
    RELEASE_PROMPT,
    DataConfig,
    ExampleConfig,
    InstructionConfig,
    SourceConfig,
    VisualConfig,
)
from mplug2_jax.config import as_recipe
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import SIZES, ModelConfig, model_config
from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.recipes.base import FRAMES, Sets
from mplug2_jax.tasks.config import TaskSettings
from mplug2_jax.training.config import AdamWConfig, RunConfig, ScheduleConfig, StreamConfig, TokenizerConfig

EPOCHS = 10
STAND_IN = Sets(
    train=SourceConfig(kind="video", split="train", max_records=100_000), examples=128_000,
    asked={"video": SourceConfig(kind="video", split="heldout", max_records=512)},
)  # fmt: skip
"""DigitWorld, so that the recipe runs anywhere."""


def released(name: str, size: str, task: str, sets: Sets = STAND_IN) -> ConfigDict:
    """A page's run at one of the sizes of the model."""
    # CLIP's position table is lost on the way, so the tower starts without positions.
    return released_at(model_config(size, positions_init="zeros"), task, name, sets)


def released_at(model: ModelConfig, task: str, name: str, sets: Sets = STAND_IN) -> ConfigDict:
    """The whole run of a task.

    Args:
        model: its sizes. What is smaller than the base is to try the recipe out: small batches, few frames.
        task: which of the release's two, caption or videoqa.
        name: of the page.
        sets: the data.
    """
    trial = model.width < SIZES["base"]["width"]
    caption = task == "caption"
    objective = "caption" if caption else "answer"
    if caption:
        # The prompt is glued to the caption's first word ("a video ofa man"), and its last piece is learned.
        examples = asked = ExampleConfig(
            tokenization="released", prompt=RELEASE_PROMPT, target_length=20,
            instructions={"caption": InstructionConfig(templates=("",))},
        )  # fmt: skip
        search = SearchConfig(num_beams=5, min_length=4, max_length=20, extend_finished=True)
    else:
        # Questions end without [SEP]; answers bring one in their text.
        examples = ExampleConfig(
            tokenization="released", max_question_words=30, instruction_length=min(50, model.max_positions),
            target_length=10,
            instructions={"question": InstructionConfig(templates=("{question}",))},
        )  # fmt: skip
        # When they are asked they may be longer. There is no limit on their tokens; here 50 words of two pieces fit.
        asked = dataclasses.replace(examples, max_question_words=50, instruction_length=min(128, model.max_positions))
        # Beams that ended are kept alive and may go on.
        search = SearchConfig(num_beams=5, min_length=1, max_length=10, extend_finished=True)
    seen = VisualConfig(
        image_size=model.image_size, num_frames=4 if trial else FRAMES,
        # An interval's last frame is never drawn, and what overshoots in bicubic crops wraps round.
        sampling="random", transform="released_train",
    )  # fmt: skip
    # Asked, frames are resized by the nearest pixel.
    shown = dataclasses.replace(seen, sampling="uniform", transform="released_test")
    whole = 64 if caption else 32
    batch_size, steps_per_epoch = 8 if trial else whole, max(1, sets.examples // whole)

    def data(source: SourceConfig, visual: VisualConfig, told: ExampleConfig) -> DataConfig:
        return DataConfig(sources={"clips": source}, visual=visual, examples=told, batch_size=batch_size)

    return as_recipe(
        RunConfig(
            name=name,
            steps=EPOCHS * steps_per_epoch,
            seed=42,
            model=model,
            # The release's files are BERT's: tokenizer.path=vocab.txt.
            tokenizer=TokenizerConfig(vocab_size=min(model.vocab_size, 512)),
            # A caption's loss is the mean over all tokens of the batch, an answer's the sum over its own.
            streams={"video": StreamConfig(data=data(sets.train, seen, examples), objectives={objective: 1.0})},
            tasks=TaskSettings(
                # A teacher is kept and asked, but alpha is dropped on its way to the decoder, so it changes nothing;
                # were it not, its term would be normalised over time and its fusion module would never follow.
                distillation=None
                if caption
                else DistillationConfig(alpha=0.0, softmax_axis="time", average_fusion=False),
                search=search,
            ),
            optimizer=AdamWConfig(
                learning_rate=2e-5, vision_learning_rate=2e-6, weight_decay=0.02, clip_norm=0.0,
                # A rule of substrings, which decays CLIP's norms, latents and embeddings too.
                decay_mask="released",
            ),
            schedule=ScheduleConfig(
                # One step late, 200 steps too short, and for captions with a dip after every 100 steps of epoch 0.
                kind="released_caption" if caption else "released",
                warmup_steps=200, init_lr=1e-6, end_lr=1e-6, steps_per_epoch=steps_per_epoch,
            ),
            grad_accum_steps=2 if caption else 1,
            evaluations={
                key: EvaluationConfig(
                    task=objective, data=data(source, shown, asked), java_metrics=caption and not trial
                )
                for key, source in sets.asked.items()
            },
            eval_every=steps_per_epoch,
        )
    )  # fmt: skip
