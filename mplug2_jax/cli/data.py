"""``mplug2 data``: tokenizers and samples; ``data_files`` adds what reads data, ``data_preparation`` what writes it."""

import argparse
from typing import Any

from data_pipelines.storage.paths import to_path
from mplug2_jax.cli import data_files, data_preparation
from mplug2_jax.cli.common import add_command, add_group
from mplug2_jax.cli.parsing import check_output, output_path
from mplug2_jax.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add the command with its sub-commands."""
    subcommands = add_group(
        subparsers, "data",
        summary="Inspect, validate and convert data; train tokenizers",
        example="mplug2 data show demo --stream video_text --step 7",
    )  # fmt: skip
    data_files.add_parsers(subcommands)
    data_preparation.add_parsers(subcommands)
    tokenizer = add_command(
        subcommands, "tokenizer", run_tokenizer,
        summary="Train a WordPiece or SentencePiece tokenizer",
        details="Trains on lines of text, or on DigitWorld's texts.",
        example="mplug2 data tokenizer --kind sentencepiece --vocab-size 120 --out runs/pieces",
    )  # fmt: skip
    tokenizer.add_argument(
        "texts", nargs="*", type=to_path, metavar="FILE", help="text files (default: DigitWorld's texts)"
    )
    tokenizer.add_argument("--kind", choices=("wordpiece", "sentencepiece"), default="wordpiece")
    tokenizer.add_argument(
        "--vocab-size", type=int, default=512, help="maximum number of tokens (default: %(default)s)"
    )
    tokenizer.add_argument("--out", type=output_path, required=True, metavar="DIR", help="new folder for the tokenizer")
    sample = add_command(
        subcommands, "sample", run_sample,
        summary="Write held-out DigitWorld images or videos as files, and print their annotations",
        example="mplug2 data sample --kind video --count 2 --out runs/samples",
    )  # fmt: skip
    sample.add_argument("--kind", choices=("image", "video"), default="image")
    sample.add_argument("--count", type=int, default=3, help="number of files (default: %(default)s)")
    sample.add_argument("--out", type=output_path, required=True, metavar="DIR", help="output folder")


def run_tokenizer(args: argparse.Namespace) -> int:
    """Train a tokenizer and save it; never over an existing folder."""
    from data_pipelines.sources.files import read_lines
    from data_pipelines.tokenizers import train_sentencepiece, train_wordpiece
    from mplug2_jax.training.workdir import tokenizer_training_texts

    check_output("--out", args.out)
    texts = list(read_lines(args.texts) if args.texts else tokenizer_training_texts())
    if not texts:
        raise UserError(f"{', '.join(map(str, args.texts))}: found no text, expected lines of words")
    train = train_wordpiece if args.kind == "wordpiece" else train_sentencepiece
    tokenizer = train(texts, args.vocab_size)
    print(f"{tokenizer.save(args.out)}: {tokenizer.vocab_size} tokens")
    return 0


def run_sample(args: argparse.Namespace) -> int:
    """Write the files, and print a caption and a question for each."""
    from data_pipelines.digitworld.source import DigitWorld
    from data_pipelines.media import write_image, write_video

    if args.count < 1:
        raise UserError(f"--count {args.count} should be at least 1")
    suffix = "png" if args.kind == "image" else "mp4"
    paths = [args.out / f"{args.kind}-{i}.{suffix}" for i in range(args.count)]
    if existing := [path for path in paths if path.exists()]:
        raise UserError(f"{existing[0]} exists; choose another --out")
    world = DigitWorld(args.kind, split="heldout", size=args.count)
    args.out.mkdir(parents=True, exist_ok=True)
    for i, path in enumerate(paths):
        record = world[i]
        assert record.frames is not None
        if args.kind == "image":
            write_image(path, record.frames[0], scale=8)
        else:
            write_video(path, record.frames, scale=8)
        question = record.questions[0]
        print(f"{path}: {record.captions[0]}; {question.question} {question.answer}")
    return 0
