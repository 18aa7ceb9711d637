"""A plan's report as one self-contained HTML page."""

from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from data_pipelines.storage.file_system import write_atomically
from mplug2_jax.planning import text
from mplug2_jax.planning.hbm_traffic import traffic_by_tower
from mplug2_jax.planning.report import PlanReport


def write_html(report: PlanReport, path: Path) -> Path:
    """Write the page, atomically, and return its path."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = (files("mplug2_jax.planning") / "plan.html").read_text(encoding="utf-8")
    style = (files("mplug2_jax.report") / "style.css").read_text(encoding="utf-8")
    t = report.timing
    page = environment.from_string(template).render(
        r=report, style=Markup(style), memory_scale=max(report.memory.capacity, report.memory.peak),
        resources=(
            ("compute", t.compute_seconds, text.format_passes(t)), ("HBM", t.hbm_seconds, ""),
            ("communication", t.communication_seconds, ""),
            ("exposed", t.exposed_seconds, f"({t.exposed_fraction:.1%} of compute)"),
        ),
        format_seconds=text.format_seconds, format_bytes=text.format_bytes, format_quantity=text.format_quantity,
        format_range=text.format_range, towers=traffic_by_tower(report.hbm_traffic),
        largest_scopes=report.hbm_traffic[: text.LARGEST_SCOPES], format_operations=text.format_operations,
    )  # fmt: skip
    write_atomically(str(path), page.encode())
    return path
