"""Our own fine-tuning on clips: ``finetune:TASK[,SIZE[,FRAMES]]``, as ``finetune:caption,large,64`` for long clips.

Without the quirks of the release (``configs/released.py`` has them), at its batch sizes and rates. Clips of more than
16 frames lie split over the mesh's ``sequence`` axis.

DigitWorld stands in for the data; with files, override ``streams.video.data.sources.clips`` and the evaluation's.
"""

from ml_collections import ConfigDict

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig, VisualConfig
from mplug2_jax.config import as_recipe
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import SIZES, RematConfig, model_config
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.tasks.config import TaskSettings
from mplug2_jax.training.config import AdamWConfig, RunConfig, ScheduleConfig, StreamConfig, TokenizerConfig

OBJECTIVES = {"caption": "caption", "videoqa": "answer"}
LONG = 16  # frames


def get_config(arg: str = "videoqa") -> ConfigDict:
    """The whole run."""
    task, size, frames, *more = (*arg.split(","), "", "")
    if any(more):
        raise UserError(f"recipe finetune:{arg}: takes a task, a size and a number of frames")
    size, frames = size or "large", frames or ("4" if size == "tiny" else "16")
    if task not in OBJECTIVES:
        raise UserError(f"recipe finetune:{arg}: {did_you_mean(task, OBJECTIVES)}")
    if size not in SIZES:
        raise UserError(f"recipe finetune:{arg}: {did_you_mean(size, SIZES)}")
    if not frames.isdecimal() or not int(frames):
        raise UserError(f"recipe finetune:{arg}: {frames!r} should be a number of frames")
    return recipe(task, size, int(frames))


def recipe(task: str, size: str, frames: int) -> ConfigDict:
    """The run of a task."""
    model = model_config(
        size, dropout=0.0, attention_dropout=0.0,
        remat=RematConfig(vision="dots", text="dots", fusion="dots", decoder="dots"),
    )  # fmt: skip
    if task == "caption":
        examples = ExampleConfig(
            instructions={"caption": InstructionConfig(templates=("what happens?",))}, target_length=32
        )
    else:
        examples = ExampleConfig(
            instructions={"question": InstructionConfig(templates=("{question}",))}, instruction_length=32,
            target_length=16,
        )  # fmt: skip

    def data(split: str, batch_size: int, records: int) -> DataConfig:
        train = split == "train"
        visual = VisualConfig(
            image_size=model.image_size, num_frames=frames, sampling="random" if train else "uniform",
            transform="train" if train else "test",
        )  # fmt: skip
        source = SourceConfig(kind="video", split=split, max_records=records)
        return DataConfig(sources={"clips": source}, visual=visual, examples=examples, batch_size=batch_size)

    batch_size = 8 if size == "tiny" else 64 if task == "caption" else 32
    # Without a backward pass there is room for more at a time, and parameters are gathered for more.
    asked = batch_size if size == "tiny" else 4 * batch_size
    return as_recipe(
        RunConfig(
            name=f"finetune_{task}",
            steps=20_000,
            model=model,
            tokenizer=TokenizerConfig(vocab_size=min(model.vocab_size, 512)),
            streams={
                "video": StreamConfig(data=data("train", batch_size, 100_000), objectives={OBJECTIVES[task]: 1.0})
            },
            tasks=TaskSettings(search=SearchConfig(num_beams=5, max_length=min(32, model.max_positions) - 1)),
            mesh=MeshConfig(sequence=2 if frames > LONG else 1),
            optimizer=AdamWConfig(learning_rate=2e-5, vision_learning_rate=2e-6, weight_decay=0.02),
            schedule=ScheduleConfig(warmup_steps=500),
            evaluations={"video": EvaluationConfig(task=OBJECTIVES[task], data=data("heldout", asked, 512))},
            eval_every=2000,
        )
    )
