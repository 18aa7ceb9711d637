"""Fills in the files of ``launch/``; whatever is put in is quoted for the file's language, without being asked to."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

_LINE = 100
_NEXT_LINE = " \\\n    "


def launch_folder() -> Path:
    """Where the shipped files are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    places = (package / "files", package.parents[1] / "launch")
    return next((place for place in places if place.is_dir()), places[0])


def render(template: str, **values: Any) -> str:
    """A file of :func:`launch_folder`, filled in: shell scripts, SLURM's too, and YAML.

    A sequence becomes the words of a command.
    """
    quote = yaml_value if ".yaml" in template else _shell_value
    return _environment(quote).get_template(template).render(**values)


def _environment(quote: Callable[[Any], str]) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(launch_folder()),
        undefined=jinja2.StrictUndefined,
        finalize=quote,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def shell_word(word: str) -> str:
    """A word for bash, on one line whatever is in it."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(map(_shell_character, word)) + "'"


def _shell_character(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))


def shell_command(words: list[str] | tuple[str, ...]) -> str:
    """A command for bash; a long one has a line for every option."""
    quoted = [shell_word(word) for word in words]
    if sum(map(len, quoted)) + len(quoted) <= _LINE:
        return " ".join(quoted)
    lines: list[str] = []
    for word in quoted:
        if word.startswith(("-", "'-", "$'-")) or not lines:
            lines.append(word)
        else:  # an option's value stays with it
            lines[-1] += f" {word}"
    return _NEXT_LINE.join(lines)


def _shell_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return shell_command(value)
    return shell_word(str(value))


def yaml_value(value: Any) -> str:
    """A scalar for YAML: numbers as they are, all else between double quotes."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return '"' + "".join(map(_yaml_character, str(value))) + '"'


def _yaml_character(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"
