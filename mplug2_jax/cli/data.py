"""``mplug2 data``: tokenisers and samples."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mplug2_jax.cli.common import add_command
from mplug2_jax.errors import UserError


def add_parser(commands: Any) -> None:
    """Adds the command with its sub-commands."""
    parser = commands.add_parser("data", help="Train tokenisers, write sample files.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    tokenizer = add_command(
        kinds, "tokenizer", run_tokenizer,
        what="Train a WordPiece or SentencePiece tokeniser on lines of text, or on DigitWorld's texts.",
        example="mplug2 data tokenizer --kind sentencepiece --vocab-size 120 --out runs/pieces",
    )  # fmt: skip
    tokenizer.add_argument(
        "texts", nargs="*", type=Path, metavar="FILE", help="text files, a line each (default: DigitWorld)"
    )
    tokenizer.add_argument("--kind", choices=("wordpiece", "sentencepiece"), default="wordpiece")
    tokenizer.add_argument("--vocab-size", type=int, default=512, help="at most so many tokens (default: %(default)s)")
    tokenizer.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the tokeniser")
    sample = add_command(
        kinds, "sample", run_sample,
        what="Write held-out DigitWorld pictures or clips as files, with what is true of them.",
        example="mplug2 data sample --kind video --count 2 --out runs/samples",
    )  # fmt: skip
    sample.add_argument("--kind", choices=("image", "video"), default="image")
    sample.add_argument("--count", type=int, default=3, help="how many (default: %(default)s)")
    sample.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into")


def run_tokenizer(args: argparse.Namespace) -> int:
    """Trains and saves; never over an existing folder."""
    from data_pipelines.tokenizers import train_sentencepiece, train_wordpiece
    from mplug2_jax.training.workdir import training_texts

    if args.out.exists():
        raise UserError(f"--out {args.out} exists; choose a new folder")
    train = train_wordpiece if args.kind == "wordpiece" else train_sentencepiece
    tokenizer = train(_lines(args.texts) if args.texts else training_texts(), args.vocab_size)
    print(f"{tokenizer.save(args.out)}: {tokenizer.vocab_size} tokens")
    return 0


def _lines(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                yield from (line.strip() for line in file if line.strip())
        except FileNotFoundError:
            raise UserError(f"text file {path} does not exist") from None
        except UnicodeDecodeError as error:
            raise UserError(f"text file {path} is not UTF-8 ({error.reason} at byte {error.start})") from error


def run_sample(args: argparse.Namespace) -> int:
    """Writes the files and prints what they show."""
    from data_pipelines.digitworld.source import DigitWorld
    from data_pipelines.media import write_image, write_video

    world = DigitWorld(args.kind, split="heldout", size=max(args.count, 1))
    args.out.mkdir(parents=True, exist_ok=True)
    for i in range(args.count):
        record = world[i]
        path = args.out / f"{args.kind}-{i}.{'png' if args.kind == 'image' else 'mp4'}"
        if path.exists():
            raise UserError(f"{path} exists; choose another --out")
        assert record.frames is not None
        if args.kind == "image":
            write_image(path, record.frames[0], scale=8)
        else:
            write_video(path, record.frames, scale=8)
        question = record.questions[0]
        print(f"{path}: {record.captions[0]}; {question.question} {question.answer}")
    return 0
