"""Curves as small panels of inline SVG that take their colours from the page, so that dark mode and print just work."""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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

LINE_STYLES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)))  # lines differ in more than colour
_TOWER_NORMS = (("gradient norms", "gradient_norm"), ("parameter norms", "parameter_norm"))
_COLOURS = 6  # --c0 to --c5 of style.css
_MAX_PANELS = 90
# matplotlib wants colours; these stand for the page's variables and are replaced in its output.
_TEXT, _GRID = "#0a0a01", "#0a0a02"
_LINES = [f"#0a0b{i:02x}" for i in range(_COLOURS)]
_VARIABLES = {_TEXT: "var(--muted)", _GRID: "var(--line)"} | {c: f"var(--c{i})" for i, c in enumerate(_LINES)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line's place in the legend, with its last value."""

    label: str
    style: int
    last: str


@dataclasses.dataclass(frozen=True)
class Panel:
    """One drawing with its title and legend, which are the page's own text."""

    title: str
    entries: Sequence[Entry]
    svg: Markup
    baseline: str
    not_finite: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Panels that belong together."""

    title: str
    panels: Sequence[Panel]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a panel is to show: labels and metrics; a single line needs no label."""

    title: str
    lines: Sequence[tuple[str, str]]
    show: Callable[[float], str]
    from_zero: bool = False
    log: bool = False
    baseline: float = math.nan


def draw_groups(
    curves: Mapping[str, Curve], baselines: Mapping[str, Mapping[str, float]], shown: Mapping[str, str] | None = None
) -> list[Group]:
    """All curves of a run in the order in which people look at them.

    Args:
        curves: by the metrics' names.
        baselines: figures to compare with, by evaluation.
        shown: what the examples of evaluations show, if not pictures.
    """
    drawn, room = [], _MAX_PANELS
    for title, plans in _layout(curves, baselines, shown or {}):
        panels = [_draw(plan, curves) for plan in plans[:room]]
        room -= len(panels)
        if panels:
            drawn.append(Group(title, panels))
    return drawn


def _layout(
    names: Mapping[str, Curve], baselines: Mapping[str, Mapping[str, float]], shown_by: Mapping[str, str]
) -> list[tuple[str, list[_Plan]]]:
    objective = [name for name in names if name.count("/") == 2 and not name.startswith("eval/")]
    streams = list(dict.fromkeys(name.split("/")[0] for name in objective))
    accuracies = [name for name in objective if name.endswith("accuracy")]
    rates = [name for name in names if name.startswith("learning_rate")]
    groups = [
        (
            "The run",
            [
                *_single(names, "total loss", "loss", compact),
                *_lines("learning rate", [(n.partition("/")[2] or "all", n) for n in rates], compact, from_zero=True),
                *_single(names, "gradient norm", "gradient_norm", compact, log=True),
                *_single(names, "temperature", "temperature", compact),
            ],
        )
    ]
    towers = [(title, [n for n in names if n.startswith(f"{kind}/")]) for title, kind in _TOWER_NORMS]
    plans = [
        _Plan(title, [(n.partition("/")[2], n) for n in found], compact, log=True) for title, found in towers if found
    ]
    groups.append(("Towers", plans))
    for stream in streams:
        losses = [name for name in objective if name.startswith(f"{stream}/") and name.endswith("/loss")]
        groups.append(
            (
                f"Losses · {display_name(stream)}",
                [_Plan(display_name(n.split("/")[1]), [("", n)], compact) for n in losses],
            )
        )
    by_stream = [
        (s, [(display_name(n.split("/")[1]), n) for n in accuracies if n.startswith(f"{s}/")]) for s in streams
    ]
    groups.append(
        (
            "Accuracy in training",
            [plan for s, lines in by_stream for plan in _lines(display_name(s), lines, percent, from_zero=True)],
        )
    )
    groups.append(
        (
            "Speed",
            [
                *_single(names, "examples per second", "examples_per_second", compact, from_zero=True),
                *_single(names, "tokens/s per device", "tokens_per_second_per_device", compact, from_zero=True),
                *_single(names, "time spent waiting for data", "data_wait", percent, from_zero=True),
                *_single(names, "model FLOP/s utilisation", "mfu", percent, from_zero=True),
            ],
        )
    )
    groups.append(("Evaluations", _evaluations(names, baselines, shown_by)))
    shown = {name for _, plans in groups for plan in plans for _, name in plan.lines}
    # These are the examples per second in other words.
    shown |= {"seconds_per_step", "flops_per_second", "examples_per_second_per_device"}
    other = [name for name in names if name not in shown and not name.startswith("eval/")]
    groups.append(
        ("More", [_Plan(" · ".join(display_name(part) for part in n.split("/")), [("", n)], compact) for n in other])
    )
    return groups


def _single(
    names: Iterable[str], title: str, name: str, show: Callable[[float], str], *, from_zero: bool = False,
    log: bool = False,
) -> list[_Plan]:  # fmt: skip
    return [_Plan(title, [("", name)], show, from_zero, log)] if name in names else []


def _lines(
    title: str, lines: Sequence[tuple[str, str]], show: Callable[[float], str], *, from_zero: bool
) -> list[_Plan]:
    return [_Plan(title, lines, show, from_zero)] if lines else []


def _evaluations(
    names: Mapping[str, Curve], baselines: Mapping[str, Mapping[str, float]], shown_by: Mapping[str, str]
) -> list[_Plan]:
    """A panel per evaluation, per direction of retrieval, and for scores, where there are several points to draw."""
    panels: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name in names:
        if name.startswith("eval/") and len(names[name]) > 1:
            evaluation, _, figure = name.removeprefix("eval/").rpartition("/")
            said = display_name(figure, shown_by.get(evaluation, "picture"))
            direction, _, cutoff = said.rpartition(" R@")
            # What is no share would press shares to the axis.
            apart = direction or ("" if is_fraction(figure) else said if figure.endswith(RANK_SUFFIX) else "scores")
            panels.setdefault((evaluation, apart), []).append((f"R@{cutoff}" if direction else said, name))
    plans = []
    for (evaluation, apart), lines in panels.items():
        figure = lines[0][1].rpartition("/")[2]
        # Baselines of several figures would be a second set of lines.
        baseline = baselines.get(evaluation, {}).get(figure, math.nan) if len(lines) == 1 else math.nan
        title = f"{display_name(evaluation)}, {apart}" if apart else display_name(evaluation)
        plans.append(
            _Plan(title, lines, percent if is_fraction(figure) else compact, from_zero=True, baseline=baseline)
        )
    return plans


def _draw(plan: _Plan, curves: Mapping[str, Curve]) -> Panel:
    # The salt makes ids that differ between panels and are the same whenever a run is drawn.
    salt = repr((plan.title, plan.lines))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 8, "axes.linewidth": 0.6}):
        figure = Figure(figsize=(4.6, 2.1))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.115, 0.125, 0.865, 0.82))
        lines = [curves[name] for _, name in plan.lines]
        for i, curve in enumerate(lines):
            style, colour = LINE_STYLES[i % len(LINE_STYLES)], _LINES[i % _COLOURS]
            marker: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(curve) <= 12 else {}
            if curve.binned:
                axes.fill_between(curve.steps, curve.lows, curve.highs, color=colour, alpha=0.18, linewidth=0)
            axes.plot(curve.steps, curve.means, color=colour, linewidth=1.3, linestyle=style, **marker)
        if math.isfinite(plan.baseline):
            axes.axhline(plan.baseline, color=_TEXT, linewidth=1, linestyle=(0, (1, 1.5)))
        _dress(axes, plan, lines)
        buffer = io.StringIO()
        # Dates and the like would make two drawings of one run differ.
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    entries = [
        Entry(label, i, plan.show(curve.last))
        for i, ((label, _), curve) in enumerate(zip(plan.lines, lines, strict=True))
    ]
    baseline = plan.show(plan.baseline) if math.isfinite(plan.baseline) else ""
    return Panel(plan.title, entries, _for_page(buffer.getvalue()), baseline, sum(curve.not_finite for curve in lines))


def _dress(axes: Any, plan: _Plan, lines: Sequence[Curve]) -> None:
    """A light grid, no frame, few ticks."""
    values = np.concatenate([[plan.baseline], *(bound for c in lines for bound in (c.lows, c.highs))])
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    if plan.log and low > 0 and high / low > 20:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    elif plan.from_zero:
        axes.set_ylim(min(0.0, low), high * 1.06 if high > 0 else 1.0)
    if axes.get_yscale() != "log":
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plan.show(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_TEXT, pad=4)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
    axes.margins(x=0.01)


def _for_page(svg: str) -> Markup:
    """The drawing without what a file of its own would need, in the page's colours and font.

    It holds numbers alone (names are the page's text), so it needs no escaping.
    """
    viewbox, _, body = svg[svg.index("<svg") :].partition(">")
    box = re.search(r'viewBox="[\d. ]+"', viewbox)
    svg = f'<svg {box[0] if box else ""} aria-hidden="true">{body}'
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)  # axes_1 and the like would be there once per panel
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # as older versions write it
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    # Hundredths of a pixel will do; numbers outside of attributes are labels and stay as they are.
    svg = re.sub(r'"[^"]*"', lambda quoted: re.sub(r"(\.\d\d)\d+", r"\1", quoted[0]), svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(re.sub(r"\n\s*", "\n", svg))


def percent(value: float) -> str:
    """A share in percent: 38.1%, 2.68%."""
    return f"{100 * value:.3g}%" if math.isfinite(value) else "–"


def compact(value: float) -> str:
    """A number in few letters: 0.00025, 2.5e-5, 3.14, 12.3k, 1.5M."""
    if not math.isfinite(value):
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # where rounding reaches it
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}".replace("e-0", "e-")
