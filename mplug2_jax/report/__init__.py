"""A run's work directory as one self-contained page, for people who want to look rather than read.

Reads files alone and imports no JAX, so it runs anywhere and while the run goes on. Reading order: ``page`` (what is
on the page), ``results`` and ``metrics`` (files to plain data), ``curves`` (data to SVG), ``template.html``.
"""

from mplug2_jax.report.page import write_report

__all__ = ["write_report"]
