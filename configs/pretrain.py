"""Pretraining on pods: ``pretrain:large``, ``pretrain:base``, or ``pretrain:tiny`` to try the same page on a laptop.

Three streams a step, as in the paper: pictures with text, clips of 16 frames with text, and text alone. Batch sizes
are global, and make 32 pictures and 8 clips a chip on v5p:8x8x8 (large) and v5e:16x16 (base); ``plan`` finds the mesh,
recomputation and accumulation that fit another machine and leave the curve alone.

DigitWorld stands in for the corpora, so that the recipe runs anywhere. With files, override each stream's
``sources.corpus``: its ``format`` (webdataset, array_record, ...), ``path`` and
``max_records=none``; and ``tokenizer.path``.
"""

from ml_collections import ConfigDict

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, Kind, SourceConfig, VisualConfig
from mplug2_jax.config import as_recipe
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.model.config import SIZES, RematConfig, model_config
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.training.config import (
    AdamWConfig,
    CheckpointConfig,
    RunConfig,
    ScheduleConfig,
    StreamConfig,
    TokenizerConfig,
)

# Pictures, clips and texts a step, of which as many are one chip's.
BATCHES = {"tiny": (16, 8, 16), "base": (8192, 2048, 4096), "large": (16384, 4096, 8192)}
# Parameters are split over so many chips, and copied beyond: their shards stay large enough to travel well.
MESHES = {"tiny": MeshConfig(), "base": MeshConfig(data=-1, fsdp=16), "large": MeshConfig(data=-1, fsdp=64)}
PEAK_RATES = {"tiny": 1e-3, "base": 1e-4, "large": 5e-5}  # v1's, of which the vision tower takes a tenth


def get_config(size: str = "large") -> ConfigDict:
    """The whole run."""
    if size not in SIZES:
        raise UserError(f"recipe pretrain:{size}: {did_you_mean(size, SIZES)}")
    # No dropout: a corpus of this size is hardly seen twice, and masks of long visual sequences cost a lot.
    # Matmul outputs of the vision tower are kept; what is cheap, or small next to the clips, is computed again.
    model = model_config(
        size, dropout=0.0, attention_dropout=0.0,
        remat=RematConfig(vision="dots", text="dots", fusion="dots", decoder="dots"),
    )  # fmt: skip
    lengths = {"text_length": 32, "instruction_length": 32, "target_length": 32}

    def stream(kind: Kind, batch_size: int, examples: ExampleConfig, **objectives: float) -> StreamConfig:
        visual = VisualConfig(
            image_size=model.image_size, num_frames=4 if size == "tiny" else 16, sampling="random", transform="train",
            min_crop_area=0.2,
        )  # fmt: skip
        source = SourceConfig(kind=kind, max_records=None if size == "tiny" else 1_000_000)
        data = DataConfig(
            sources={"corpus": source}, visual=visual, examples=examples, batch_size=batch_size, num_threads=16,
            prefetch=512,
        )  # fmt: skip
        return StreamConfig(data=data, objectives=objectives)

    seen = ExampleConfig(
        **lengths,
        instructions={
            "caption": InstructionConfig(templates=("describe it", "what do we see?", "what happens?")),
            "question": InstructionConfig(templates=("{question}",)),
        },
    )
    read = ExampleConfig(text="sentence", text_length=min(128, model.max_positions), word_starts=True)
    pictures, clips, texts = BATCHES[size]
    return as_recipe(
        RunConfig(
            name=f"pretrain_{size}",
            steps=30_000,
            model=model,
            tokenizer=TokenizerConfig(vocab_size=512),
            streams={
                "image_text": stream("image", pictures, seen, vlc=1.0, vlm=1.0, ilm=1.0),
                "video_text": stream("video", clips, seen, vlc=1.0, vlm=1.0, ilm=1.0),
                "text": stream("text", texts, read, mlm=1.0),
            },
            mesh=MESHES[size],
            optimizer=AdamWConfig(
                learning_rate=PEAK_RATES[size], vision_learning_rate=PEAK_RATES[size] / 10, b2=0.98, weight_decay=0.02
            ),
            schedule=ScheduleConfig(warmup_steps=1000),
            checkpoint=CheckpointConfig(every_steps=500, every_minutes=15.0, keep_last=3, keep_every_steps=5000),
        )
    )
