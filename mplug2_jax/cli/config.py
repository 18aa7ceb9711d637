"""``mplug2 config``: a recipe with all of its fields, what they mean, and what they take."""

import argparse
from typing import Any

from mplug2_jax.cli.common import add_command


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "config", run, config=True,
        summary="Print every field of a recipe, what it means and takes",
        details="Overrides are applied and checked, as mplug2 train does. --only shows fields whose name, or meaning, "
        "holds a word.",
        example="mplug2 config demo --only learning_rate --config.optimizer.learning_rate=1e-4",
    )  # fmt: skip
    parser.add_argument("recipe", help="a file, or the name of a shipped one; FILE:ARG passes ARG")
    parser.add_argument("--only", metavar="WORD", help="fields that have to do with this")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each field, in the form of an override."""
    from mplug2_jax.config import build, load_recipe
    from mplug2_jax.errors import UserError, did_you_mean
    from mplug2_jax.fields import iter_fields
    from mplug2_jax.training.config import RunConfig

    fields = list(iter_fields(build(RunConfig, load_recipe(args.recipe, args.overrides))))
    word = (args.only or "").lower()
    shown = [field for field in fields if word in field.path.lower() or word in field.meaning.lower()]
    if not shown:
        names = {part for field in fields for part in field.path.split(".")}
        raise UserError(f"--only {args.only} is in no field's name or meaning: {did_you_mean(word, names)}")
    words = [f"--config.{field.path}={_word(field.value)}" for field in shown]
    width = min(max(map(len, words)), 80)
    for field, text in zip(shown, words, strict=True):
        print(f"{text:<{width}}  # {field.meaning} ({field.valid})")
    return 0


def _word(value: Any) -> str:
    """A value as an override writes it; a long one is cut."""
    text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
