"""``python run.py caption | answer | rank | embed``: the command line of an exported folder."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import DataError, StorageUnavailableError

from ...errors import USER_ERROR, UserError

if TYPE_CHECKING:
    from .model import ExportedModel

Run = Callable[["ExportedModel", argparse.Namespace], Iterator[str]]


def caption(model: "ExportedModel", args: argparse.Namespace) -> Iterator[str]:
    """Yield a line per file, as ``mplug2 generate`` prints it."""
    for start in range(0, len(args.files), args.batch_size):
        paths = args.files[start : start + args.batch_size]
        for path, prediction in zip(paths, model.generate_batch(paths), strict=True):
            yield f"{path}: {prediction.text}"


def answer(model: "ExportedModel", args: argparse.Namespace) -> Iterator[str]:
    """Yield the answer, as ``mplug2 generate`` prints it."""
    yield f"{args.file}: {model.generate(args.file, args.question).text}"


def rank(model: "ExportedModel", args: argparse.Namespace) -> Iterator[str]:
    """Yield a line per candidate, the likeliest first."""
    for candidate, probability in model.rank(args.file, args.candidates, args.question):
        yield f"{probability:.4f}  {candidate}"


def embed(model: "ExportedModel", args: argparse.Namespace) -> Iterator[str]:
    """Yield a line of JSON per file."""
    for path in args.files:
        yield json.dumps({"file": str(path), "features": model.embed(path)})


def main(folder: Path, words: Sequence[str] | None = None) -> int:
    """Run a command on the model of a folder; return the exit status: 0, or 2 after an error that the user can fix."""
    args = _make_parser().parse_args(words)
    import torch  # after parsing: it takes seconds

    from .model import ExportedModel

    torch.backends.cudnn.allow_tf32 = False  # or float32 would be rounded in convolutions on GPUs
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        options = {"dtype": getattr(torch, args.dtype), "compiled": args.compile, "int8": args.int8}
        for line in args.run(ExportedModel(folder, device=device, **options), args):
            print(line, flush=True)
    except (UserError, DataError, StorageUnavailableError) as error:
        return _fail(" ".join(str(error).split()))
    except torch.OutOfMemoryError:
        return _fail(f"the memory of {device} is full; use --dtype bfloat16 or --device cpu")
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Ask the model in this folder about images and clips.",
        epilog='example:\n  python run.py answer clip.mp4 "who is singing?"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = _add(commands, "caption", caption, "describe images and clips", "caption clip.mp4 photo.jpg", many=True)
    command.add_argument("--batch-size", type=_positive, default=1, help="files at once (default: %(default)s)")
    command = _add(commands, "answer", answer, "answer a question", 'answer clip.mp4 "who is singing?"')
    command.add_argument("question", metavar="QUESTION")
    command = _add(commands, "rank", rank, "rank captions or answers by probability", "rank clip.mp4 'a dog' 'a cat'")
    command.add_argument("candidates", nargs="+", metavar="CANDIDATE")
    command.add_argument("--question", help="rank them as answers to it (default: as captions)")
    _add(commands, "embed", embed, "print the mean of the visual tokens as JSON", "embed clip.mp4", many=True)
    return parser


def _add(
    commands: Any, name: str, run: Run, summary: str, example: str, *, many: bool = False
) -> argparse.ArgumentParser:
    """Add a command with its files and the options that all have."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary.capitalize()}.", epilog=f"example:\n  python run.py {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.set_defaults(run=run)
    command.add_argument("files" if many else "file", nargs="+" if many else None, type=Path, metavar="FILE")
    command.add_argument("--device", help="as cuda, cuda:1 or cpu (default: cuda if there is one)")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    command.add_argument("--compile", action="store_true", help="faster for many files; compiles for a minute first")
    command.add_argument("--int8", action="store_true", help="round the weights to 8 bits (needs torchao)")
    return command
