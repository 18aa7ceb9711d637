"""The HTML page: self-contained, safe for any name, with bars within their tracks."""

import re
from pathlib import Path

import pytest

from mplug2_jax.planning.html import write_html
from mplug2_jax.planning.memory import Memory
from mplug2_jax.planning.report import PlanReport
from mplug2_jax.planning.timing import Timing
from tests.pages import Elements
from tests.planning.reports import GIB, make_hostile_report, make_report


def render(report: PlanReport, folder: Path) -> Elements:
    path = write_html(report, folder / "plan.html")
    assert [each.name for each in folder.iterdir()] == ["plan.html"]
    return Elements(path.read_text(encoding="utf-8"))


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    page = render(make_report(), tmp_path)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.elements}
    assert not any(name in ("src", "href") or name.startswith("on") for _, named in page.elements for name in named)
    assert not re.search(r"https?://|@import|url\(", (tmp_path / "plan.html").read_text())


def test_the_values_are_there(tmp_path: Path) -> None:
    text = " ".join(render(make_report(), tmp_path).text.split())
    for value in (
        "mine on v5p:2x2x2", "fits", "train, 123,456 parameters, mesh data=2, fsdp=4", "clips 48, text 16",
        "1.18 s to 2.02 s per step, MFU 41% to 72%; 86,400 steps in 1.18 to 2.02 days, 226 to 388 chip-hours",
        "10.00 GiB of 40.00 GiB", "optimizer 4.00 GiB", "20 ms (2.0% of compute)",
        "4 GB per device and step; dark: 2 GB if every scope", "dot_general 67%, copy 33%",
        "5 PFLOP per step, 20.0% recomputed", "24 GB", "3 x bf16[8,1024]", "Compiled ahead of time in 61 s.",
    ):  # fmt: skip
        assert value in text, value


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><b onclick="x">', "{{ 7 * 7 }}", "&amp; 'it'"])
def test_names_are_escaped(tmp_path: Path, name: str) -> None:
    plain, page = render(make_report(), tmp_path), render(make_hostile_report(name), tmp_path)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements} | {"b"}
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert page.open == []
    assert f"{name} on {name}" in page.text


def bar_widths(page: Elements) -> list[float]:
    styles = [attributes.get("style") or "" for tag, attributes in page.elements if tag == "i"]
    return [float(match.group(1)) for style in styles if (match := re.search(r"width: ([\d.]+)%", style))]


def test_bars_are_within_their_tracks(tmp_path: Path) -> None:
    full = Memory(breakdown={"a": 3 * GIB, "b": 3 * GIB, "c": 3 * GIB}, peak=9 * GIB, capacity=2 * GIB)
    slow_network = Timing(compute_seconds=1.0, hbm_seconds=0.5, communication_seconds=10.0, exposed_seconds=0.5)
    for report, uses in ((make_report(), 6), (make_report(memory=full), 3), (make_report(timing=slow_network), 6)):
        widths = bar_widths(render(report, tmp_path))
        assert len(widths) == uses + 4 + 2 * 2  # two towers
        assert sum(widths[:uses]) <= 100.01
        assert all(0 <= width <= 100.01 for width in widths[uses:])
    assert sum(bar_widths(render(make_report(), tmp_path))[:6]) == pytest.approx(25)  # of the capacity
    assert sum(bar_widths(render(make_report(memory=full), tmp_path))[:3]) == pytest.approx(100, abs=0.01)
