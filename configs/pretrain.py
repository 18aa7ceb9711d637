"""Pretraining on pods: ``pretrain:large``, ``pretrain:base``, or ``pretrain:tiny`` to try the recipe on a laptop.

Three streams per step, as in the paper: images with text, videos of 16 frames with text, and text alone. Batch sizes
are global: 32 images and 8 videos per chip on v5p:8x8x8 (large) and v5e:16x16 (base). ``mplug2 plan`` finds the mesh,
rematerialization and accumulation for another machine, which do not change the loss curve.

DigitWorld replaces the corpora, so that the recipe runs anywhere. With files, override ``sources.corpus`` of each
stream: its ``format`` (webdataset, array_record, ...), ``path``, and ``max_records=none``; and ``tokenizer.path``.

``pretrain:large,paper`` and ``base,paper`` read the paper's corpora (``mplug2 corpora``) with BERT's vocabulary, and
start from CLIP and BERT as the paper does. They need, in the data folder: the corpora, ``bert-SIZE-uncased/vocab.txt``,
and ``clip-bert-SIZE``, which ``mplug2 convert import`` makes of the two.
"""

from mplug2_jax.recipes.api import (
    CheckpointConfig,
    DataConfig,
    ExampleConfig,
    InstructionConfig,
    Kind,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RematConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    StreamConfig,
    TokenizerConfig,
    VisualConfig,
    corpus_sources,
    data_folder,
    model_config,
    parse_variant,
)

# Images, videos and texts per step.
BATCH_SIZES = {"tiny": (16, 8, 16), "base": (8192, 2048, 4096), "large": (16384, 4096, 8192)}
# Processes per host that decode, with two threads each: as many cores as benchmarks/feed.py says, and some to spare.
WORKERS: dict[Kind, int] = {"image": 4, "video": 16, "text": 1}
# Parameters are sharded over this many chips and replicated beyond, so that shards stay large enough to send fast.
MESHES = {"tiny": MeshConfig(), "base": MeshConfig(data=-1, fsdp=16), "large": MeshConfig(data=-1, fsdp=64)}
LEARNING_RATES = {"tiny": 1e-3, "base": 1e-4, "large": 5e-5}  # of mPLUG v1; the vision tower takes a tenth


def get_config(variant: str = "large") -> RunConfig:
    """Return the run at a model size, or a variant: ``SIZE,paper``."""
    size, corpora = parse_variant("pretrain", variant, "paper")

    # Model. No dropout: a corpus of this size is hardly seen twice, and masks of long visual sequences are expensive.
    # Matmul outputs of the vision tower are saved; what is cheap or small next to the videos is recomputed.
    model = model_config(
        size, dropout=0.0, attention_dropout=0.0,
        remat=RematConfig(vision="dots", text="dots", fusion="dots", decoder="dots"),
        **({"vocab_size": ModelConfig.vocab_size} if corpora else {}),  # BERT's
    )  # fmt: skip

    # Data
    vocabulary = data_folder() / f"bert-{'base' if size == 'tiny' else size}-uncased" / "vocab.txt"
    visual = VisualConfig(
        image_size=model.image_size, num_frames=4 if size == "tiny" else 16, sampling="random", transform="train",
        min_crop_area=0.2, scaler="swscale",
    )  # fmt: skip
    pairs = ExampleConfig(
        text_length=32,
        instruction_length=32,
        target_length=32,
        instructions={
            "caption": InstructionConfig(templates=("describe it", "what do we see?", "what happens?")),
            **({} if corpora else {"question": InstructionConfig(templates=("{question}",))}),
        },
    )
    sentences = ExampleConfig(text="sentence", text_length=min(128, model.max_positions), word_starts=True)

    def data(kind: Kind, examples: ExampleConfig, batch_size: int) -> DataConfig:
        digitworld = {"corpus": SourceConfig(kind=kind, max_records=None if size == "tiny" else 1_000_000)}
        return DataConfig(
            sources=corpus_sources(kind) if corpora else digitworld, visual=visual, examples=examples,
            batch_size=batch_size, num_workers=0 if size == "tiny" else WORKERS[kind], prefetch=512,
        )  # fmt: skip

    # Objectives
    images, videos, texts = BATCH_SIZES[size]
    streams = {
        "image_text": StreamConfig(data=data("image", pairs, images), objectives={"vlc": 1.0, "vlm": 1.0, "ilm": 1.0}),
        "video_text": StreamConfig(data=data("video", pairs, videos), objectives={"vlc": 1.0, "vlm": 1.0, "ilm": 1.0}),
        "text": StreamConfig(data=data("text", sentences, texts), objectives={"mlm": 1.0}),
    }

    # Optimizer
    learning_rate = LEARNING_RATES[size]
    optimizer = OptimizerConfig(
        learning_rate=learning_rate, vision_learning_rate=learning_rate / 10, b2=0.98, weight_decay=0.02
    )

    return RunConfig(
        name=f"pretrain_{size}{corpora and f'_{corpora}'}",
        steps=30_000,
        model=model,
        tokenizer=TokenizerConfig(path=str(vocabulary) if corpora else "", vocab_size=512),
        init_from=str(data_folder() / f"clip-bert-{size}") if corpora and size != "tiny" else "",
        streams=streams,
        mesh=MESHES[size],
        optimizer=optimizer,
        schedule=ScheduleConfig(warmup_steps=1000),
        checkpoint=CheckpointConfig(every_steps=500, every_minutes=15.0, keep_last=3, keep_every_steps=5000),
    )
