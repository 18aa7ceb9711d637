"""Render the templates of ``launch/``; all values are quoted for the language of the file."""

import shlex
from pathlib import Path
from typing import Any

import jinja2

_MAX_LINE = 100
_CONTINUATION = " \\\n    "


def launch_folder() -> Path:
    """Return the folder of the templates: inside an installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent
    folders = (package / "files", package.parents[1] / "launch")
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def render(template: str, **values: Any) -> str:
    """Render a template of :func:`launch_folder`: a shell script, an sbatch file, or YAML.

    In shell, a sequence is rendered as the words of a command.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(launch_folder()), undefined=jinja2.StrictUndefined, autoescape=False,
        finalize=quote_yaml if ".yaml" in template else _quote_shell, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)


def quote_word(word: str) -> str:
    """Quote a word for bash, on one line even if it has line breaks."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(map(_escape_shell, word)) + "'"


def _escape_shell(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))


def quote_command(words: list[str] | tuple[str, ...]) -> str:
    """Quote a command for bash; a long one gets a line per option."""
    quoted = [quote_word(word) for word in words]
    if sum(map(len, quoted)) + len(quoted) <= _MAX_LINE:
        return " ".join(quoted)
    lines: list[str] = []
    for word in quoted:
        if word.startswith(("-", "'-", "$'-")) or not lines:
            lines.append(word)
        else:  # the value of an option stays on its line
            lines[-1] += f" {word}"
    return _CONTINUATION.join(lines)


def _quote_shell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return quote_command(value)
    return quote_word(str(value))


def quote_yaml(value: Any) -> str:
    """Format a YAML scalar: numbers unquoted, everything else in double quotes."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return '"' + "".join(map(_escape_yaml, str(value))) + '"'


def _escape_yaml(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"
