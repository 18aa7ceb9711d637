"""A plan as one self-contained page."""

from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from data_pipelines.sources.files import write_atomically
from mplug2_jax.planning.report import Report
from mplug2_jax.planning.text import duration, quantity, size_of, span


def write_page(report: Report, path: Path) -> Path:
    """Writes the page, whole or not at all."""
    here, drawn = files("mplug2_jax.planning"), files("mplug2_jax.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    t = report.timing
    page = environment.from_string((here / "plan.html").read_text(encoding="utf-8")).render(
        r=report,
        style=Markup((drawn / "style.css").read_text(encoding="utf-8")),
        scale=max(report.memory.capacity, report.memory.peak),
        roof=(
            ("compute", t.compute, ""),
            ("memory", t.memory, ""),
            ("network", t.network, ""),
            ("not hidden", t.exposed, f"({t.exposed_share:.1%} of compute)"),
        ),
        duration=duration,
        size_of=size_of,
        quantity=quantity,
        span=span,
    )
    write_atomically(str(path), page.encode())
    return path
