"""``mplug2 corpora``: list the public corpora of the paper's pretraining, and how to fetch them."""

import argparse
from typing import TYPE_CHECKING, Any

from mplug2_jax.cli.common import add_command, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mplug2_jax.recipes.corpora import Corpus


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "corpora", run,
        summary="List the public corpora of pretraining, and whether they are present",
        details="--config pretrain:large,paper reads them. Data is searched in $MPLUG2_DATA, or ./data. With a name: "
        "what the corpus is, its licence, the commands that fetch it, and what is missing.",
        example="mplug2 corpora cc3m",
    )  # fmt: skip
    parser.add_argument("name", nargs="?", help="a corpus, to print its details")


def run(args: argparse.Namespace) -> int:
    """Print the table, or the details of a corpus."""
    from mplug2_jax.errors import UserError, did_you_mean
    from mplug2_jax.recipes.base import data_folder
    from mplug2_jax.recipes.corpora import CORPORA

    if args.name is not None:
        if args.name not in CORPORA:
            raise UserError(f"corpus '{args.name}' is unknown: {did_you_mean(args.name, CORPORA)}")
        print("\n".join(_details(CORPORA[args.name])))
        return 0
    rows = [
        (name, corpus.title, corpus.kind, corpus.size, "yes" if all(_paths(corpus).values()) else "no")
        for name, corpus in CORPORA.items()
    ]
    print(table(rows, ("corpus", "what", "kind", "size", "data here")))
    print(f"\ndata folder: {data_folder().absolute()}; mplug2 corpora NAME prints how to fetch a corpus")
    return 0


def _details(corpus: "Corpus") -> "Iterator[str]":
    yield f"{corpus.title}: {corpus.size}"
    yield f"from: {corpus.homepage}"
    yield f"licence: {corpus.licence}"
    yield from (f"fetch: {step}" for step in corpus.fetch)
    yield f"weight in its stream of pretrain:large,paper: {corpus.weight:g}"
    for path, exists in _paths(corpus).items():
        yield f"{'here   ' if exists else 'missing'}  {path}"


def _paths(corpus: "Corpus") -> dict[str, bool]:
    """Return whether the paths of a corpus exist."""
    from data_pipelines.sources.files import path_exists

    source = corpus.source()
    return {path: path_exists(path) for path in (source.path, source.media) if path}
