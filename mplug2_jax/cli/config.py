"""``mplug2 config``: print the fields of a recipe, with their meanings and types."""

import argparse
from typing import Any

from mplug2_jax.cli.common import add_command


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "config", run, accepts_overrides=True,
        summary="Print every field of a recipe, its meaning and type",
        details="Overrides are applied and checked as in mplug2 train. --only selects the fields whose name or meaning "
        "contains a word. Fields of steps take durations: 5%, \"1.5M examples\", \"3 epochs of text\".",
        example="mplug2 config demo --only learning_rate --config.optimizer.learning_rate=1e-4",
    )  # fmt: skip
    parser.add_argument("recipe", help="a file or the name of a shipped recipe; FILE:ARG passes ARG to it")
    parser.add_argument("--only", metavar="WORD", help="only fields whose name or meaning contains WORD")


def run(args: argparse.Namespace) -> int:
    """Print one line per field, in the form of an override."""
    from mplug2_jax.errors import UserError, did_you_mean
    from mplug2_jax.fields import iter_fields
    from mplug2_jax.training.durations import load_run_config

    fields = list(iter_fields(load_run_config(args.recipe, args.overrides)))
    word = (args.only or "").lower()
    shown = [field for field in fields if word in field.path.lower() or word in field.description.lower()]
    if not shown:
        names = {part for field in fields for part in field.path.split(".")}
        raise UserError(f"--only {args.only}: no field's name or meaning contains it: {did_you_mean(word, names)}")
    overrides = [f"--config.{field.path}={_format(field.value)}" for field in shown]
    width = min(max(map(len, overrides)), 80)
    for field, text in zip(shown, overrides, strict=True):
        print(f"{text:<{width}}  # {field.description} ({field.type})")
    return 0


def _format(value: Any) -> str:
    """Return a value as an override writes it, truncated to 60 characters."""
    text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
