"""How figures are quoted, by their names."""

import math

SCORES = ("bleu", "cider", "meteor", "rouge", "spice")
"""What names begin with whose figures are scores times 100, as papers quote them."""
RANK = "median_rank"
"""What names end with whose figures are places, the first of which is 1."""
NEGATED_PREFIX = "minus_"
"""What names begin with that say how good an example is by how bad it is: 0 is best, or -1 of ranks."""


def is_fraction(figure: str) -> bool:
    """Whether a figure is a fraction, to be shown in percent."""
    return not figure.rpartition("/")[2].startswith((*SCORES, NEGATED_PREFIX)) and not figure.endswith(RANK)


def show(figure: str, value: float) -> str:
    """A figure as people read it.

    Example:
        >>> show("accuracy", 0.48), show("cider", 80.3)
        ('48.0%', '80.3')
    """
    if not math.isfinite(value):
        return "–"
    if figure.startswith(NEGATED_PREFIX):
        return f"{value:.4g}"
    return f"{value:.1%}" if is_fraction(figure) else f"{value:.1f}"


def ratio_to_baseline(figure: str, value: float, baseline: float) -> float:
    """How many times as good as its baseline a figure is; of ranks the lower is better.

    NaN where that has no meaning: beside a baseline that is shown as 0, and of a figure below 0.
    """
    better, worse = (baseline, value) if figure.endswith(RANK) else (value, baseline)
    shown = round(100 * worse if is_fraction(figure) else worse, 1) if math.isfinite(worse) else math.nan
    return better / worse if shown > 0 and better >= 0 else math.nan
