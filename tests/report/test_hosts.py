"""Hosts on the page: the busiest first, and the slowest with its cause; none for a single process."""

import json
from typing import Any

import pytest

from mplug2_jax.report import write_report
from mplug2_jax.report.hosts import read_hosts

from .conftest import Run


def write(run: Run, *lines: Any) -> None:
    path = run.path / "hosts.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def line(step: int, *rows: tuple[float, float, float], host: str = "host") -> dict[str, Any]:
    shares = dict(zip(("data", "step", "memory"), zip(*rows, strict=True), strict=True))
    return {"step": step, "names": [f"{host}-{i}" for i in range(len(rows))], "shares": shares}


def test_the_busiest_host_comes_first_and_the_slowest_is_named(run: Run) -> None:
    busy, idle = (0.9, 0.05, 0.3), (0.0, 0.05, 0.3)
    write(run, line(1, busy, idle), line(5, idle, idle, busy), '{"step": 6}\n', line(10, idle, idle, busy))
    hosts = read_hosts(run.path)
    assert (hosts.count, hosts.lines) == (3, 2)  # earlier, the run had two processes
    assert [(row.process, row.name, row.data, row.step, row.memory, row.times_slowest) for row in hosts.rows] == [
        (2, "host-2", 90.0, 5.0, 30.0, 2), (0, "host-0", 0.0, 5.0, 30.0, 0), (1, "host-1", 0.0, 5.0, 30.0, 0)
    ]  # fmt: skip
    assert hosts.slowest == "Process 2 (host-2) waits for data for 90% of a step, the others 0%."
    assert hosts.slowest in write_report(run.path).read_text()


def test_of_many_hosts_the_busiest_are_listed(run: Run) -> None:
    write(run, line(1, *((i / 1000, 0.1, 0.2) for i in range(128)), host="<b>"))
    run.metrics({"step": 1, "hosts/slowest": 127, **{f"hosts/data_{kind}": 0.1 for kind in ("min", "median", "max")}})
    assert [row.process for row in read_hosts(run.path).rows] == list(range(127, 111, -1))
    html = write_report(run.path).read_text()
    for words in ("128 processes", "No host slows the others down.", "The busiest 16 are listed.", "waiting for data"):
        assert words in html
    assert "<b>-" not in html
    assert "hosts · slowest" not in html


@pytest.mark.parametrize(
    "content", ["", line(1, (0.9, 0.1, 0.1)), "nothing", {"names": ["a", "b"], "shares": {"data": [1], "step": 2}}]
)
def test_one_process_and_damaged_lines_have_no_section(run: Run, content: Any) -> None:
    write(run, content)
    assert 'id="hosts"' not in write_report(run.path).read_text()
