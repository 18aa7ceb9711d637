"""Curves as small panels of inline SVG that take their colors from the page, so that dark mode and print work."""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from mplug2_jax.metrics.units import RANK_SUFFIX, is_fraction
from mplug2_jax.report.metrics import Curve
from mplug2_jax.report.names import display_name

LINE_STYLES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)))  # lines differ in more than color
_TOWER_NORMS = (("gradient norms", "gradient_norm"), ("parameter norms", "parameter_norm"))
_HOST_TITLES = {"data": "waiting for data", "step": "working on the host", "memory": "memory in use"}
_NUM_COLORS = 6  # --c0 to --c5 of style.css
_MAX_PANELS = 90
# matplotlib needs colors; these stand for the page's CSS variables and are replaced in its output.
_TEXT, _GRID = "#0a0a01", "#0a0a02"
_LINES = [f"#0a0b{i:02x}" for i in range(_NUM_COLORS)]
_VARIABLES = {_TEXT: "var(--muted)", _GRID: "var(--line)"} | {c: f"var(--c{i})" for i, c in enumerate(_LINES)}


@dataclasses.dataclass(frozen=True)
class LegendEntry:
    """The legend of a line, with its last value."""

    label: str
    style: int
    last: str


@dataclasses.dataclass(frozen=True)
class Panel:
    """A drawing with its title and legend, which are text of the page."""

    title: str
    entries: Sequence[LegendEntry]
    svg: Markup
    baseline: str
    not_finite: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Panels that belong together."""

    title: str
    panels: Sequence[Panel]


@dataclasses.dataclass(frozen=True)
class _PanelSpec:
    """The contents of a panel: labels and metrics; a single line needs no label."""

    title: str
    lines: Sequence[tuple[str, str]]
    format_value: Callable[[float], str]
    from_zero: bool = False
    log: bool = False
    baseline: float = math.nan


def draw_groups(
    curves: Mapping[str, Curve],
    baselines: Mapping[str, Mapping[str, float]],
    modalities: Mapping[str, str] | None = None,
) -> list[Group]:
    """Return all curves of a run, the most important first.

    Args:
        curves: by metric.
        baselines: values to compare with, by evaluation and metric.
        modalities: what the examples of evaluations show, "image" or "video"; images by default.
    """
    drawn, remaining = [], _MAX_PANELS
    for title, specs in _layout(curves, baselines, modalities or {}).items():
        panels = [_draw(spec, curves) for spec in specs[:remaining]]
        remaining -= len(panels)
        if panels:
            drawn.append(Group(title, panels))
    return drawn


def draw_panel(title: str, curves: Mapping[str, Curve]) -> Panel:
    """Return a drawing of curves, by their labels."""
    return _draw(_PanelSpec(title, [(label, label) for label in curves], compact), curves)


def _layout(
    names: Mapping[str, Curve], baselines: Mapping[str, Mapping[str, float]], modalities: Mapping[str, str]
) -> Mapping[str, list[_PanelSpec]]:
    """Return the panels of each group."""
    groups: dict[str, list[_PanelSpec]] = {}

    def add(
        group: str, title: str, lines: Sequence[tuple[str, str]], format_value: Callable[[float], str] = compact,
        *, from_zero: bool = False, log: bool = False,
    ) -> None:  # fmt: skip
        if lines and all(name in names for _, name in lines):
            groups.setdefault(group, []).append(_PanelSpec(title, lines, format_value, from_zero, log))

    add("Training", "total loss", [("", "loss")])
    rates = [name for name in names if name.startswith("learning_rate")]
    add("Training", "learning rate", [(n.partition("/")[2] or "all", n) for n in rates], from_zero=True)
    add("Training", "gradient norm", [("", "gradient_norm")], log=True)
    add("Training", "temperature", [("", "temperature")])
    for title, kind in _TOWER_NORMS:
        add("Towers", title, [(n.partition("/")[2], n) for n in names if n.startswith(f"{kind}/")], log=True)
    objective_metrics = [name.split("/") for name in names if name.count("/") == 2 and not name.startswith("eval/")]
    for stream, objective, metric in objective_metrics:
        if metric == "loss":
            line = f"{stream}/{objective}/loss"
            add(f"Losses · {display_name(stream)}", display_name(objective), [("", line)])
    for each in dict.fromkeys(stream for stream, _, _ in objective_metrics):
        lines = [
            (display_name(objective), f"{stream}/{objective}/{metric}")
            for stream, objective, metric in objective_metrics if stream == each and metric.endswith("accuracy")
        ]  # fmt: skip
        add("Training accuracy", display_name(each), lines, percent, from_zero=True)
    add("Throughput", "examples per second", [("", "examples_per_second")], from_zero=True)
    add("Throughput", "tokens/s per device", [("", "tokens_per_second_per_device")], from_zero=True)
    add("Throughput", "data wait", [("", "data_wait")], percent, from_zero=True)
    add("Throughput", "MFU", [("", "mfu")], percent, from_zero=True)
    for cause, title in _HOST_TITLES.items():
        lines = [(kind, f"hosts/{cause}_{kind}") for kind in ("max", "median", "min")]
        add("Hosts", title, lines, percent, from_zero=True)
    groups["Evaluations"] = _evaluations(names, baselines, modalities)
    shown = {name for specs in groups.values() for spec in specs for _, name in spec.lines}
    shown.add("hosts/slowest")  # the number of a process
    # These follow from the examples per second.
    shown |= {"seconds_per_step", "flops_per_second", "examples_per_second_per_device"}
    for name in names:
        if name not in shown and not name.startswith(("eval/", "goodput/")):  # the page has a table of the latter
            add("Other", " · ".join(display_name(part) for part in name.split("/")), [("", name)])
    return groups


def _evaluations(
    names: Mapping[str, Curve], baselines: Mapping[str, Mapping[str, float]], modalities: Mapping[str, str]
) -> list[_PanelSpec]:
    """Return a panel per evaluation, per direction of retrieval, and for scores, if there are several points."""
    panels: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name in names:
        if name.startswith("eval/") and len(names[name]) > 1:
            evaluation, _, metric = name.removeprefix("eval/").rpartition("/")
            label = display_name(metric, modalities.get(evaluation, "image"))
            direction, _, cutoff = label.rpartition(" R@")
            # Values that are not fractions would press fractions to the axis.
            group = direction or ("" if is_fraction(metric) else label if metric.endswith(RANK_SUFFIX) else "scores")
            panels.setdefault((evaluation, group), []).append((f"R@{cutoff}" if direction else label, name))
    specs = []
    for (evaluation, group), lines in panels.items():
        metric = lines[0][1].rpartition("/")[2]
        # Baselines of several metrics would be a second set of lines.
        baseline = baselines.get(evaluation, {}).get(metric, math.nan) if len(lines) == 1 else math.nan
        title = f"{display_name(evaluation)}, {group}" if group else display_name(evaluation)
        specs.append(
            _PanelSpec(title, lines, percent if is_fraction(metric) else compact, from_zero=True, baseline=baseline)
        )
    return specs


def _draw(spec: _PanelSpec, curves: Mapping[str, Curve]) -> Panel:
    # The salt makes ids that differ between panels and are the same whenever a run is drawn.
    salt = repr((spec.title, spec.lines))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 8, "axes.linewidth": 0.6}):
        figure = Figure(figsize=(4.6, 2.1))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.115, 0.125, 0.865, 0.82))
        lines = [curves[name] for _, name in spec.lines]
        for i, curve in enumerate(lines):
            style, color = LINE_STYLES[i % len(LINE_STYLES)], _LINES[i % _NUM_COLORS]
            marker: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(curve) <= 12 else {}
            if curve.binned:
                axes.fill_between(curve.steps, curve.lows, curve.highs, color=color, alpha=0.18, linewidth=0)
            axes.plot(curve.steps, curve.means, color=color, linewidth=1.3, linestyle=style, **marker)
        if math.isfinite(spec.baseline):
            axes.axhline(spec.baseline, color=_TEXT, linewidth=1, linestyle=(0, (1, 1.5)))
        _style_axes(axes, spec, lines)
        buffer = io.StringIO()
        # Dates would make two drawings of one run differ.
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    entries = [
        LegendEntry(label, i, spec.format_value(curve.last))
        for i, ((label, _), curve) in enumerate(zip(spec.lines, lines, strict=True))
    ]
    baseline = spec.format_value(spec.baseline) if math.isfinite(spec.baseline) else ""
    not_finite = sum(curve.not_finite for curve in lines)
    return Panel(spec.title, entries, _to_inline_svg(buffer.getvalue()), baseline, not_finite)


def _style_axes(axes: Any, spec: _PanelSpec, lines: Sequence[Curve]) -> None:
    """Draw a light grid, no frame, and few ticks."""
    values = np.concatenate([[spec.baseline], *(bound for c in lines for bound in (c.lows, c.highs))])
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    if spec.log and low > 0 and high / low > 20:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    elif spec.from_zero:
        axes.set_ylim(min(0.0, low), high * 1.06 if high > 0 else 1.0)
    if axes.get_yscale() != "log":
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: spec.format_value(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_TEXT, pad=4)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
    axes.margins(x=0.01)


def _to_inline_svg(svg: str) -> Markup:
    """Return a drawing for inline use, in the colors and the font of the page.

    It has only numbers (names are text of the page), so it needs no escaping.
    """
    viewbox, _, body = svg[svg.index("<svg") :].partition(">")
    box = re.search(r'viewBox="[\d. ]+"', viewbox)
    svg = f'<svg {box[0] if box else ""} aria-hidden="true">{body}'
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)  # ids like axes_1 would be repeated in every panel
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # as older versions of matplotlib write it
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    # Two decimals are enough; numbers outside of attributes are labels and stay as they are.
    svg = re.sub(r'"[^"]*"', lambda quoted: re.sub(r"(\.\d\d)\d+", r"\1", quoted[0]), svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return Markup(re.sub(r"\n\s*", "\n", svg))


def percent(value: float) -> str:
    """Return a fraction in percent: 38.1%, 2.68%."""
    return f"{100 * value:.3g}%" if math.isfinite(value) else "–"


def compact(value: float) -> str:
    """Return a number in few characters: 0.00025, 2.5e-5, 3.14, 12.3k, 1.5M."""
    if not math.isfinite(value):
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # numbers that round to it too
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}".replace("e-0", "e-")
