"""``mplug2 generate``: images, videos or text files in, text out."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from data_pipelines.errors import DataError
from data_pipelines.storage.local_files import staged_write
from data_pipelines.storage.paths import to_path
from mplug2_jax.cli.common import add_checkpoint_options, add_command, restore_run
from mplug2_jax.cli.parsing import check_output, output_path
from mplug2_jax.errors import UserError, check_range

if TYPE_CHECKING:
    from mplug2_jax.generation.config import SearchConfig
    from mplug2_jax.training.config import RunConfig


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "generate", run, accepts_overrides=True,
        summary="Answer an instruction about images or videos",
        details="A text file holds its own instruction, or the text that the instruction is about.",
        example='mplug2 generate --workdir runs/demo clip.mp4 --instruction "which way does the red digit move?"',
    )  # fmt: skip
    add_checkpoint_options(parser)
    parser.add_argument(
        "files", nargs="+", type=to_path, metavar="FILE", help="image, video, GIF or .txt, or a folder of them"
    )
    parser.add_argument("--instruction", help="what to do or answer; {text} is replaced by a text file's content")
    parser.add_argument(
        "--out", type=output_path, metavar="FILE", help="new .jsonl file for the predictions, one per line"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="files per batch (default: %(default)s)")
    parser.add_argument("--num-beams", type=int, help="beams of the search; 1 is greedy (default: the run's)")
    parser.add_argument("--beams", dest="num_beams", type=int, help=argparse.SUPPRESS)  # its old name
    parser.add_argument(
        "--top-p", type=float, help="sample from the likeliest tokens with this total probability, as 0.9"
    )
    parser.add_argument(
        "--temperature", type=float, help="sampling temperature; lower is more deterministic (default: the run's)"
    )
    parser.add_argument("--seed", type=int, help="sampling seed (default: 0)")
    parser.add_argument("--max-length", type=int, help="maximum tokens of a prediction (default: the run's)")


def run(args: argparse.Namespace) -> int:
    """Print one line per file, in the given order; return 1 if some of several files cannot be read."""
    from mplug2_jax.inference.generator import Generator, check_request_parts, in_order, read_requests
    from mplug2_jax.inference.media import find_media

    for option in ("num_beams", "max_length", "batch_size"):
        check_range(f"--{option.replace('_', '-')}", getattr(args, option), 1)
    check_output("--out", args.out)
    paths = list(find_media(args.files))
    requests, errors = read_requests(paths, args.instruction)
    if errors and len(paths) == 1:
        raise errors[0]
    spec, params, _, tokenizer = restore_run(args)
    search = _search_config(args, spec.config)
    check_request_parts(requests, spec, args.workdir)
    generator = Generator(spec, params, tokenizer, search, seed=args.seed or 0)
    num_skipped = 0
    with _open_jsonl(args.out) as write:
        for response in in_order(errors, generator.run(requests, args.batch_size)):
            if isinstance(response, DataError):
                if len(paths) == 1:
                    raise response
                num_skipped += 1
                logging.warning("skipped: %s", " ".join(str(response).split()))
                continue
            request, prediction = response
            print(f"{request.path}: {prediction}", flush=True)
            write({"file": str(request.path), "instruction": request.instruction, "prediction": prediction})
    return 1 if num_skipped else 0


def _search_config(args: argparse.Namespace, config: "RunConfig") -> "SearchConfig":
    """Return the run's search with the options of the command line."""
    search = config.tasks.search
    search = dataclasses.replace(
        search, num_beams=args.num_beams or search.num_beams,
        max_length=min(args.max_length or search.max_length, config.model.max_positions),
        top_p=search.top_p if args.top_p is None else args.top_p,
        temperature=search.temperature if args.temperature is None else args.temperature,
    )  # fmt: skip
    for option, value in (("--temperature", args.temperature), ("--seed", args.seed)):
        if value is not None and not search.top_p:
            raise UserError(f"{option} {value} needs sampling, and this is a search: add --top-p 0.9, or remove it")
    return search


@contextmanager
def _open_jsonl(path: Path | None) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Open a file for JSON lines, which appears once all are written; without a path discard them."""
    if path is None:
        yield lambda row: None
        return
    with staged_write(str(path)) as name, open(name, "w", encoding="utf-8") as file:
        yield lambda row: print(json.dumps(row), file=file)
