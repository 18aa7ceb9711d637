"""A run or its evaluations as one self-contained HTML page.

The package only reads files and does not import JAX, so it runs anywhere, also while a run is active. Reading order:
``page`` (the contents of the page), ``results``, ``metrics`` and ``run_history`` (files to plain data), ``curves``
(data to SVG), ``template.html``; ``comparison`` (two of them side by side).
"""

from mplug2_jax.report.comparison import write_comparison
from mplug2_jax.report.page import write_report

__all__ = ["write_comparison", "write_report"]
