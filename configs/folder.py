"""Any folder of images and videos with captions: ``folder:PATH[,SIZE[,FRACTION]]``, such as ``folder:ours,base``.

PATH may be a URL. Captions are in a table ``captions.csv`` (``.tsv``, ``.jsonl``, ``.json``, or ``metadata.*``), in a
``.txt`` or ``.json`` next to each file, or they are the names of the files. FRACTION of the records is held out, by a
hash of each record's path.

Three streams per step, as in pretraining: images with captions, videos with captions, and all captions alone. A
tokenizer is trained on the captions; to use BERT's set ``tokenizer.path`` and ``model.vocab_size=30522``.
"""

import dataclasses

from mplug2_jax.recipes.api import (
    CheckpointConfig,
    DataConfig,
    Durations,
    EvaluationConfig,
    ExampleConfig,
    InstructionConfig,
    Kind,
    OptimizerConfig,
    RematConfig,
    RunConfig,
    ScheduleConfig,
    SearchConfig,
    StreamConfig,
    TasksConfig,
    TokenizerConfig,
    UserError,
    VisualConfig,
    check_size,
    model_config,
    split_folder,
)

EPOCHS = 20
BATCH_SIZES: dict[str, dict[Kind, int]] = {  # at most: a small folder has smaller ones
    "tiny": {"image": 32, "video": 8, "text": 32},
    "base": {"image": 512, "video": 128, "text": 512},
    "large": {"image": 512, "video": 128, "text": 512},
}
LEARNING_RATES = {"tiny": (1e-3, 1e-3), "base": (1e-4, 1e-5), "large": (5e-5, 5e-6)}  # the latter of the vision tower
MAX_EVALUATED = 1000  # records of each kind
MAX_TOKENIZED = 20_000  # records whose captions train the tokenizer
TEXT_LENGTH = 32


def get_config(arg: str = "") -> RunConfig:
    """Return the run on a folder."""
    path, size, fraction, *extra = (*arg.split(","), "", "")
    size, spec = size or "tiny", f"folder:{arg}"
    if not path or any(extra):
        raise UserError(f"recipe {spec}: takes a folder, a size and a fraction, as folder:PATH,tiny,0.05")
    check_size(size, spec)
    try:
        split = split_folder(path.rstrip("/") or "/", float(fraction) if fraction else None)
    except ValueError:
        raise UserError(f"recipe {spec}: {fraction!r} should be the fraction to hold out, as 0.05") from None
    tiny = size == "tiny"

    # Model
    sizes = {"dtype": "float32", "scan_unroll": 4, "vocab_size": 2048} if tiny else {}
    remat = RematConfig() if tiny else RematConfig(vision="dots", text="dots", fusion="dots", decoder="dots")
    model = model_config(size, dropout=0.0, attention_dropout=0.0, remat=remat, **sizes)

    # Data
    caption = InstructionConfig(templates=("describe it", "what do we see?"))
    pairs = ExampleConfig(text_length=TEXT_LENGTH)
    captions = ExampleConfig(instructions={"caption": caption}, instruction_length=8, target_length=TEXT_LENGTH)
    both = dataclasses.replace(captions, text_length=TEXT_LENGTH)
    sentences = ExampleConfig(text="sentence", text_length=TEXT_LENGTH, word_starts=True)
    num_frames = 4 if tiny else 16
    train_visual = VisualConfig(
        image_size=model.image_size, num_frames=num_frames, sampling="random", transform="train", scaler="swscale"
    )
    eval_visual = VisualConfig(image_size=model.image_size, num_frames=num_frames, transform="resize", scaler="swscale")

    def batch_size(kind: Kind) -> int:
        num_records = split.num_train.get(kind) or sum(split.num_train.values())
        return min(BATCH_SIZES[size][kind], max(8, 1 << (num_records // 2).bit_length() - 1))

    def stream(kind: Kind, examples: ExampleConfig, **objectives: float) -> StreamConfig:
        data = DataConfig(
            sources={"folder": split.train(kind)}, visual=train_visual, examples=examples, batch_size=batch_size(kind),
            num_workers=0 if tiny else 4, max_bad_fraction=0.05,
        )  # fmt: skip
        return StreamConfig(data=data, objectives=objectives)

    def evaluation(task: str, kind: Kind, examples: ExampleConfig) -> EvaluationConfig:
        sources = {"folder": split.eval(kind, MAX_EVALUATED)}
        data = DataConfig(sources=sources, visual=eval_visual, examples=examples, batch_size=batch_size(kind))
        return EvaluationConfig(task=task, data=data)

    # Objectives
    kinds = sorted(split.num_train)
    streams = {f"{kind}_text": stream(kind, both, vlc=1.0, vlm=1.0, ilm=1.0) for kind in kinds}
    streams["text"] = stream("text", sentences, mlm=1.0)
    steps = Durations(streams).to_steps(f"{EPOCHS} epochs of {kinds[0]}_text")

    # Optimizer
    learning_rate, vision_learning_rate = LEARNING_RATES[size]
    optimizer = OptimizerConfig(
        learning_rate=learning_rate, vision_learning_rate=vision_learning_rate, b2=0.98, weight_decay=0.05
    )

    return RunConfig(
        name="folder",
        steps=steps,
        model=model,
        tokenizer=TokenizerConfig(vocab_size=min(model.vocab_size, 2048), source=split.train("text", MAX_TOKENIZED)),
        streams=streams,
        tasks=TasksConfig(search=SearchConfig(num_beams=1 if tiny else 5, max_length=TEXT_LENGTH - 1)),
        optimizer=optimizer,
        schedule=ScheduleConfig(warmup_steps=max(1, steps // 20)),
        checkpoint=CheckpointConfig(every_steps=500, every_minutes=15.0),
        evaluations={
            **{f"{kind}_retrieval": evaluation("vlc", kind, pairs) for kind in kinds},
            **{f"{kind}_captions": evaluation("caption", kind, captions) for kind in kinds},
        },
        eval_every=max(1, steps // 5),
    )
