"""The release's fine-tuning with all its quirks, each marked by a comment: for its weights, and to compare with it.

Sizes, learning rates and lengths are those of its recipes for MSRVTT (8 GPUs). Our own recipes have none of the quirks.
Some are part of the architecture and so always on: question text passes the universal layers without cross attention,
the last universal layer swaps query and memory, two LayerNorm epsilons, two GELUs, no gradient for the padding row.
Two are omitted on purpose: the release deletes the fusion encoder's weights when it starts from a checkpoint, and
counts the duplicates of its distributed sampler in evaluations.
"""

import dataclasses

from data_pipelines.config import (
    RELEASE_PROMPT,
    DataConfig,
    ExampleConfig,
    InstructionConfig,
    SourceConfig,
    VisualConfig,
)
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import SIZES, ModelConfig, model_config
from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.recipes.base import NUM_FRAMES, TaskData
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.config import OptimizerConfig, RunConfig, ScheduleConfig, StreamConfig, TokenizerConfig

EPOCHS = 10
PLACEHOLDER_DATA = TaskData(
    train=SourceConfig(kind="video", split="train", max_records=100_000), num_train=128_000,
    eval={"video": SourceConfig(kind="video", split="heldout", max_records=512)},
)  # fmt: skip
"""DigitWorld, so that the recipe runs anywhere."""


def released_recipe(name: str, size: str, task: str, data: TaskData = PLACEHOLDER_DATA) -> RunConfig:
    """Return the release's run at a model size; see :func:`released_run`."""
    # The release loses CLIP's position table when it loads it, so the tower starts without positions.
    return released_run(model_config(size, positions_init="zeros"), task, name, data)


def released_run(model: ModelConfig, task: str, name: str, data: TaskData = PLACEHOLDER_DATA) -> RunConfig:
    """Return the release's run of a task.

    Args:
        model: smaller than the base size only tries the recipe out: small batches, few frames.
        task: of the release, "caption" or "videoqa".
        name: of the recipe.
        data: the data set.
    """
    small = model.width < SIZES["base"]["width"]
    caption = task == "caption"
    objective = "caption" if caption else "answer"
    if caption:
        # The prompt is joined to the caption's first word ("a video ofa man"), and its last piece is a target.
        train_examples = eval_examples = ExampleConfig(
            tokenization="released", prompt=RELEASE_PROMPT, target_length=20,
            instructions={"caption": InstructionConfig(templates=("",))},
        )  # fmt: skip
        search = SearchConfig(num_beams=5, min_length=4, max_length=20, extend_finished=True)
    else:
        # Questions end without [SEP]; answers have one in their text.
        train_examples = ExampleConfig(
            tokenization="released", max_question_words=30, instruction_length=min(50, model.max_positions),
            target_length=10, instructions={"question": InstructionConfig(templates=("{question}",))},
        )  # fmt: skip
        # Evaluated questions may be longer. The release does not limit their tokens; here 50 words of two pieces fit.
        eval_examples = dataclasses.replace(
            train_examples, max_question_words=50, instruction_length=min(128, model.max_positions)
        )
        # Finished beams are kept alive and may be extended.
        search = SearchConfig(num_beams=5, min_length=1, max_length=10, extend_finished=True)
    train_visual = VisualConfig(
        image_size=model.image_size, num_frames=4 if small else NUM_FRAMES,
        # The last frame of an interval is never drawn, and overshoot of bicubic crops wraps around.
        sampling="random", transform="released_train",
    )  # fmt: skip
    # Evaluated frames are resized by nearest neighbor.
    eval_visual = dataclasses.replace(train_visual, sampling="uniform", transform="released_test")
    full_batch_size = 64 if caption else 32
    batch_size, steps_per_epoch = 8 if small else full_batch_size, max(1, data.num_train // full_batch_size)

    def data_config(source: SourceConfig, visual: VisualConfig, examples: ExampleConfig) -> DataConfig:
        return DataConfig(sources={"clips": source}, visual=visual, examples=examples, batch_size=batch_size)

    train_data = data_config(data.train, train_visual, train_examples)
    return RunConfig(
        name=name,
        steps=EPOCHS * steps_per_epoch,
        seed=42,
        model=model,
        # The release has BERT's vocabulary: tokenizer.path=vocab.txt.
        tokenizer=TokenizerConfig(vocab_size=min(model.vocab_size, 512)),
        # A caption's loss is the mean over all tokens of the batch, an answer's the sum over its own tokens.
        streams={"video": StreamConfig(data=train_data, objectives={objective: 1.0})},
        tasks=TasksConfig(
            # The release runs a teacher but loses alpha on the way to the decoder, so the teacher has no effect. With
            # alpha, its term would be normalized over time and its fusion module would never be updated.
            distillation=(
                None if caption else DistillationConfig(alpha=0.0, softmax_axis="time", average_fusion=False)
            ),
            search=search,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-5,
            vision_learning_rate=2e-6,
            weight_decay=0.02,
            clip_norm=0.0,
            decay_mask="released",  # a rule of substrings that decays CLIP's norms, latents and embeddings too
        ),
        schedule=ScheduleConfig(
            # One step late, 200 steps short, and for captions with a dip after every 100 steps of epoch 0.
            kind="released_caption" if caption else "released",
            warmup_steps=200,
            init_lr=1e-6,
            end_lr=1e-6,
            steps_per_epoch=steps_per_epoch,
        ),
        grad_accum_steps=2 if caption else 1,
        evaluations={
            key: EvaluationConfig(
                task=objective, data=data_config(source, eval_visual, eval_examples), java_metrics=caption and not small
            )
            for key, source in data.eval.items()
        },
        eval_every=steps_per_epoch,
    )
