"""The demo: a tiny mPLUG-2, pretrained on images, video and text of DigitWorld in a few minutes on two CPU cores.

Three streams, as in the paper: images with text, videos with text, and text alone. Images and videos train contrast
(VLC), matching (VLM) and instructions (ILM); text trains masked language modeling (MLM) and entailment (ILM).

``demo:long`` takes about half an hour: batches four times as large, and twice as many steps. It is evaluated on classes
by prompts too.
"""

import dataclasses

from mplug2_jax.recipes.api import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExampleConfig,
    InstructionConfig,
    Kind,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SearchConfig,
    SourceConfig,
    StreamConfig,
    TasksConfig,
    TokenizerConfig,
    UserError,
    did_you_mean,
    model_config,
)

# Model
MODEL = model_config("tiny", dtype="float32", attention_dropout=0.0, dropout=0.0, scan_unroll=4)
TOKENIZER = TokenizerConfig(vocab_size=512)

# Data
IMAGE_CAPTION = InstructionConfig(templates=("describe the picture", "what do we see?"))
VIDEO_CAPTION = InstructionConfig(templates=("describe the clip", "what happens?"))
QUESTION = InstructionConfig(templates=("{question}",), weight=2.0)
ENTAILMENT = InstructionConfig(templates=("{premise} means {hypothesis}?",))
LENGTHS = {"text_length": 24, "instruction_length": 12, "target_length": 24}

IMAGES = ExampleConfig(**LENGTHS, instructions={"caption": IMAGE_CAPTION, "question": QUESTION})
VIDEOS = ExampleConfig(**LENGTHS, instructions={"caption": VIDEO_CAPTION, "question": QUESTION})
TEXTS = ExampleConfig(
    text="sentence", text_length=24, instructions={"entailment": ENTAILMENT}, instruction_length=32, target_length=4
)


def data(kind: Kind, examples: ExampleConfig, batch_size: int, **source: object) -> DataConfig:
    """Return examples of DigitWorld."""
    return DataConfig(sources={"digits": SourceConfig(kind=kind, **source)}, examples=examples, batch_size=batch_size)


# Objectives
STREAMS = {
    "image_text": StreamConfig(data=data("image", IMAGES, 32), objectives={"vlc": 1.0, "vlm": 1.0, "ilm": 1.0}),
    "video_text": StreamConfig(data=data("video", VIDEOS, 16), objectives={"vlc": 1.0, "vlm": 1.0, "ilm": 1.0}),
    "text": StreamConfig(data=data("text", TEXTS, 16), objectives={"mlm": 1.0, "ilm": 0.5}),
}

# Optimizer
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, vision_learning_rate=1e-3, b2=0.95, weight_decay=0.05)
SCHEDULE = ScheduleConfig(warmup_steps=25)
LARGER_BATCHES = 4  # of the long variant: contrast learns digits from pairs that are alike in all else

# Evaluation
IMAGE_CAPTIONS = ExampleConfig(**LENGTHS, instructions={"caption": IMAGE_CAPTION})
VIDEO_CAPTIONS = ExampleConfig(**LENGTHS, instructions={"caption": VIDEO_CAPTION})
QUESTIONS = ExampleConfig(**LENGTHS, instructions={"question": QUESTION})
PAIRS = ExampleConfig(text_length=24)
SENTENCES = ExampleConfig(text="sentence", text_length=24)


def heldout(task: str, kind: Kind, examples: ExampleConfig) -> EvaluationConfig:
    """Return an evaluation on 256 held-out examples."""
    return EvaluationConfig(
        task=task, data=data(kind, examples, 64, split="heldout", max_records=256), per_device_batch_size=32
    )


EVALUATIONS = {
    "image_caption": heldout("caption", "image", IMAGE_CAPTIONS),
    "image_question": heldout("answer", "image", QUESTIONS),
    "image_retrieval": heldout("vlc", "image", PAIRS),
    "video_caption": heldout("caption", "video", VIDEO_CAPTIONS),
    "video_question": heldout("answer", "video", QUESTIONS),
    "video_retrieval": heldout("vlc", "video", PAIRS),
    "masked_words": heldout("mlm", "text", SENTENCES),
}


def get_config(variant: str = "short") -> RunConfig:
    """Return the run; ``variant`` is "short" or "long"."""
    if variant not in ("short", "long"):
        raise UserError(f"recipe demo:{variant}: {did_you_mean(variant, ('short', 'long'))}")
    run = RunConfig(
        name="demo",
        steps=380,
        model=MODEL,
        tokenizer=TOKENIZER,
        streams=STREAMS,
        tasks=TasksConfig(search=SearchConfig(num_beams=1, max_length=23)),
        optimizer=OPTIMIZER,
        schedule=SCHEDULE,
        checkpoint=CheckpointConfig(every_steps=100, keep_last=2),
        evaluations=EVALUATIONS,
    )
    return run if variant == "short" else prolong(run)


def prolong(run: RunConfig) -> RunConfig:
    """Return the long variant."""
    from mplug2_jax.recipes.digitworld import zero_shot_evaluations  # imports codecs, which the demo does not need

    streams = {
        name: dataclasses.replace(
            stream, data=dataclasses.replace(stream.data, batch_size=LARGER_BATCHES * stream.data.batch_size)
        )
        for name, stream in run.streams.items()
    }
    return dataclasses.replace(
        run,
        steps=800,
        streams=streams,
        evaluations={**run.evaluations, **zero_shot_evaluations()},
    )
