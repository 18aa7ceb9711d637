"""A run or its evaluations as one self-contained page, for people who want to look rather than read.

Reads files alone and imports no JAX, so it runs anywhere and while the run goes on. Reading order: ``page`` (what is
on the page), ``results`` and ``metrics`` (files to plain data), ``curves`` (data to SVG), ``template.html``;
``comparison`` (two of them side by side).
"""

from mplug2_jax.report.comparison import write_comparison
from mplug2_jax.report.page import write_report

__all__ = ["write_comparison", "write_report"]
