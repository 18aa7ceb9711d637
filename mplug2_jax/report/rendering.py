"""Render templates to HTML, and write HTML to a file."""

from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from data_pipelines.storage.file_system import write_atomically
from mplug2_jax.errors import UserError
from mplug2_jax.report.names import display_name


def render(template: str, **values: object) -> str:
    """Return a page as HTML. Everything except this package's style sheet and drawings is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mplug2_jax", "report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["display_name"] = display_name
    style = Markup((files("mplug2_jax.report") / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


def write_page(path: Path, html: str) -> None:
    """Write a page atomically. Raises UserError if that fails."""
    try:
        write_atomically(str(path), html.encode(errors="replace"))  # JSON may hold lone surrogates, which UTF-8 cannot
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose a writable folder") from error
