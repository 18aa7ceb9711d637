"""The demo: mPLUG-2, tiny, pretrained on images, clips and text of DigitWorld in a few minutes on two CPU cores.

Three streams, as in the paper: pictures with text, clips with text, and text alone. Pictures and clips learn contrast
(VLC), matching (VLM) and to follow instructions (ILM); text learns to fill in masked words (MLM) and to judge whether
one sentence follows from another (ILM).
"""

from ml_collections import ConfigDict

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig
from mplug2_jax.config import as_recipe
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import model_config
from mplug2_jax.tasks.config import TaskSettings
from mplug2_jax.training.config import (
    AdamWConfig,
    CheckpointConfig,
    RunConfig,
    ScheduleConfig,
    StreamConfig,
    TokenizerConfig,
)

LENGTHS = {"text_length": 24, "instruction_length": 12, "target_length": 24}

DESCRIBE = InstructionConfig(templates=("describe the picture", "what do we see?"), weight=1.0)
DESCRIBE_CLIP = InstructionConfig(templates=("describe the clip", "what happens?"), weight=1.0)
QUESTION = InstructionConfig(templates=("{question}",), weight=2.0)


def get_config() -> ConfigDict:
    """The whole run."""
    pictures = ExampleConfig(**LENGTHS, instructions={"caption": DESCRIBE, "question": QUESTION})
    clips = ExampleConfig(**LENGTHS, instructions={"caption": DESCRIBE_CLIP, "question": QUESTION})
    entailment = InstructionConfig(templates=("{premise} means {hypothesis}?",))
    sentences = ExampleConfig(
        text="sentence", text_length=24, instructions={"entailment": entailment}, instruction_length=32, target_length=4
    )

    def stream(kind: str, examples: ExampleConfig, batch_size: int, **objectives: float) -> StreamConfig:
        return StreamConfig(
            data=DataConfig(sources={"digits": SourceConfig(kind=kind)}, examples=examples, batch_size=batch_size),
            objectives=objectives,
        )

    def heldout(kind: str, task: str, size: int, **examples: object) -> EvaluationConfig:
        lengths = {
            name: length for name, length in LENGTHS.items() if name in ("text_length",) or "instructions" in examples
        }
        return EvaluationConfig(
            task=task,
            per_device_batch_size=32,
            data=DataConfig(
                sources={"digits": SourceConfig(kind=kind, split="heldout", max_records=size)},
                examples=ExampleConfig(**{**lengths, **examples}),
                batch_size=64,
            ),
        )

    return as_recipe(
        RunConfig(
            name="demo",
            steps=380,
            model=model_config("tiny", dtype="float32", attention_dropout=0.0, dropout=0.0, scan_unroll=4),
            tokenizer=TokenizerConfig(vocab_size=512),
            streams={
                "image_text": stream("image", pictures, 32, vlc=1.0, vlm=1.0, ilm=1.0),
                "video_text": stream("video", clips, 16, vlc=1.0, vlm=1.0, ilm=1.0),
                "text": stream("text", sentences, 16, mlm=1.0, ilm=0.5),
            },
            tasks=TaskSettings(search=SearchConfig(num_beams=1, max_length=23)),
            optimizer=AdamWConfig(learning_rate=2e-3, vision_learning_rate=1e-3, b2=0.95, weight_decay=0.05),
            schedule=ScheduleConfig(warmup_steps=25),
            checkpoint=CheckpointConfig(every_steps=100, keep_last=2),
            evaluations={
                "image_caption": heldout("image", "caption", 256, instructions={"caption": DESCRIBE}),
                "image_question": heldout("image", "answer", 256, instructions={"question": QUESTION}),
                "image_retrieval": heldout("image", "vlc", 256),
                "video_caption": heldout("video", "caption", 256, instructions={"caption": DESCRIBE_CLIP}),
                "video_question": heldout("video", "answer", 256, instructions={"question": QUESTION}),
                "video_retrieval": heldout("video", "vlc", 256),
                "masked_words": heldout("text", "mlm", 256, text="sentence"),
            },
        )
    )
