"""The plan as a page: all in one file, safe with any name, bars no longer than their tracks."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mplug2_jax.planning.html import write_page
from mplug2_jax.planning.memory import Memory
from mplug2_jax.planning.report import Report
from mplug2_jax.planning.timing import Timing
from tests.planning.reports import GIB, hostile, report

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, what is open, and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def page(made: Report, folder: Path) -> Page:
    path = write_page(made, folder / "plan.html")
    assert [each.name for each in folder.iterdir()] == ["plan.html"]
    return Page(path)


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    shown = page(report(), tmp_path)
    assert shown.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in shown.elements}
    assert not any(name in ("src", "href") or name.startswith("on") for _, named in shown.elements for name in named)
    assert not re.search(r"https?://|@import|url\(", (tmp_path / "plan.html").read_text())


def test_the_figures_are_there(tmp_path: Path) -> None:
    words = " ".join(page(report(), tmp_path).text.split())
    for figure in (
        "mine on v5p:2x2x2", "it fits", "train, 123,456 parameters, mesh data=2, fsdp=4", "clips 48, text 16",
        "1.18 s to 2.02 s a step, MFU 41% to 72%; 86,400 steps in 1.18 to 2.02 days, 226 to 388 chip-hours",
        "10.00 GiB of 40.00 GiB", "optimiser 4.00 GiB", "20 ms (2.0% of compute)",
        "5 PFLOP a step, 20.0% computed twice", "24 GB", "3 x bf16[8,1024]", "Compiled ahead of time in 61 s.",
    ):  # fmt: skip
        assert figure in words, figure


@pytest.mark.parametrize("words", ["<script>alert(1)</script>", '"><b onclick="x">', "{{ 7 * 7 }}", "&amp; 'it'"])
def test_names_are_words_and_nothing_else(tmp_path: Path, words: str) -> None:
    plain, shown = page(report(), tmp_path), page(hostile(words), tmp_path)
    assert {tag for tag, _ in shown.elements} <= {tag for tag, _ in plain.elements} | {"b"}
    assert not any(name.startswith("on") for _, named in shown.elements for name in named)
    assert shown.open == []
    assert f"{words} on {words}" in shown.text


def widths(shown: Page) -> list[float]:
    styles = [named.get("style") or "" for tag, named in shown.elements if tag == "i"]
    return [float(match.group(1)) for style in styles if (match := re.search(r"width: ([\d.]+)%", style))]


def test_bars_are_no_longer_than_their_tracks(tmp_path: Path) -> None:
    full = Memory(parts={"a": 3 * GIB, "b": 3 * GIB, "c": 3 * GIB}, peak=9 * GIB, capacity=2 * GIB)
    hidden = Timing(compute=1.0, memory=0.5, network=10.0, exposed=0.5)
    for made, memories in ((report(), 6), (report(memory=full), 3), (report(timing=hidden), 6)):
        shown = widths(page(made, tmp_path))
        assert len(shown) == memories + 4
        assert sum(shown[:memories]) <= 100.01
        assert all(0 <= width <= 100.01 for width in shown[memories:])
    assert sum(widths(page(report(), tmp_path))[:6]) == pytest.approx(25)  # of the capacity
    assert sum(widths(page(report(memory=full), tmp_path))[:3]) == pytest.approx(100, abs=0.01)
