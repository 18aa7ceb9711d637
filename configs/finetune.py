"""Our fine-tuning on videos: ``finetune:TASK[,SIZE[,FRAMES]]``, such as ``finetune:caption,large,64`` for long videos.

It has the release's batch sizes and learning rates but not its quirks (``configs/released.py`` has them). Videos of
more than 16 frames are sharded over the mesh's ``sequence`` axis.

DigitWorld replaces the data. With files, override ``streams.video.data.sources.clips`` and the evaluation's sources.
"""

from mplug2_jax.recipes.api import (
    DataConfig,
    EvaluationConfig,
    ExampleConfig,
    InstructionConfig,
    MeshConfig,
    OptimizerConfig,
    RematConfig,
    RunConfig,
    ScheduleConfig,
    SearchConfig,
    SourceConfig,
    StreamConfig,
    TasksConfig,
    TokenizerConfig,
    UserError,
    VisualConfig,
    check_size,
    did_you_mean,
    model_config,
)

OBJECTIVES = {"caption": "caption", "videoqa": "answer"}
EXAMPLES = {
    "caption": ExampleConfig(
        instructions={"caption": InstructionConfig(templates=("what happens?",))}, target_length=32
    ),
    "videoqa": ExampleConfig(
        instructions={"question": InstructionConfig(templates=("{question}",))}, instruction_length=32,
        target_length=16,
    ),
}  # fmt: skip
LONG_VIDEO = 16  # frames; longer videos are sharded


def get_config(arg: str = "videoqa") -> RunConfig:
    """Return the run of a task, a model size and a number of frames."""
    task, size, frames, *extra = (*arg.split(","), "", "")
    if any(extra):
        raise UserError(f"recipe finetune:{arg}: takes a task, a size and a number of frames")
    size, frames = size or "large", frames or ("4" if size == "tiny" else "16")
    if task not in OBJECTIVES:
        raise UserError(f"recipe finetune:{arg}: {did_you_mean(task, OBJECTIVES)}")
    check_size(size, f"finetune:{arg}")
    if not frames.isdecimal() or not int(frames):
        raise UserError(f"recipe finetune:{arg}: {frames!r} should be a number of frames")
    return video_run(task, size, int(frames))


def video_run(task: str, size: str, num_frames: int) -> RunConfig:
    """Return the run of a task."""
    # Model
    model = model_config(
        size, dropout=0.0, attention_dropout=0.0,
        remat=RematConfig(vision="dots", text="dots", fusion="dots", decoder="dots"),
    )  # fmt: skip

    # Data
    train_visual = VisualConfig(
        image_size=model.image_size, num_frames=num_frames, sampling="random", transform="train"
    )
    eval_visual = VisualConfig(image_size=model.image_size, num_frames=num_frames, transform="test")
    batch_size = 8 if size == "tiny" else 64 if task == "caption" else 32
    # Without a backward pass there is memory for more, and parameters are gathered less often.
    eval_batch_size = batch_size if size == "tiny" else 4 * batch_size

    def data(split: str, max_records: int, visual: VisualConfig, batch_size: int) -> DataConfig:
        source = SourceConfig(kind="video", split=split, max_records=max_records)
        return DataConfig(sources={"clips": source}, visual=visual, examples=EXAMPLES[task], batch_size=batch_size)

    train_data = data("train", 100_000, train_visual, batch_size)
    eval_data = data("heldout", 512, eval_visual, eval_batch_size)

    return RunConfig(
        name=f"finetune_{task}",
        steps=20_000,
        model=model,
        tokenizer=TokenizerConfig(vocab_size=min(model.vocab_size, 512)),
        streams={"video": StreamConfig(data=train_data, objectives={OBJECTIVES[task]: 1.0})},
        tasks=TasksConfig(search=SearchConfig(num_beams=5, max_length=min(32, model.max_positions) - 1)),
        mesh=MeshConfig(sequence=2 if num_frames > LONG_VIDEO else 1),
        optimizer=OptimizerConfig(learning_rate=2e-5, vision_learning_rate=2e-6, weight_decay=0.02),
        schedule=ScheduleConfig(warmup_steps=500),
        evaluations={"video": EvaluationConfig(task=OBJECTIVES[task], data=eval_data)},
        eval_every=2000,
    )
