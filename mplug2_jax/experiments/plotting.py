"""Plots of experiments as PNG files."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data_pipelines.storage.file_system import write_atomically
from mplug2_jax.report.names import display_name


@contextlib.contextmanager
def png_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure of a size in inches, and write it, with its folder, when it has been plotted."""
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 8}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(str(path), buffer.getvalue())


def metric_title(name: str) -> str:
    """Return the displayed name of an evaluation/metric."""
    evaluation, _, metric = name.rpartition("/")
    modality = "video" if evaluation.startswith("video") else "image"
    return f"{display_name(evaluation)}: {display_name(metric, modality)}"
