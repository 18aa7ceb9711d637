"""Jobs to render, and values that break files without quoting."""

from typing import Any

from hypothesis import strategies as st

from mplug2_jax.launch.job import Job
from mplug2_jax.parallel.accelerators import parse_topology

HOSTILE = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.text("$(){}`'\"\\\n\r\t #&;|<>*?!~-%:,[]\x1b\x85\u2028EOF", max_size=20),
    st.sampled_from([
        "$(touch broken)", "`touch broken`", "'; touch broken; '", '"; touch broken; "', "\ntouch broken\n", "$'\\n'",
        "$(JOBSET_NAME)", "$$(JOBSET_NAME)", "{{ 7 * 7 }}", "{% raw %}", "a: b", "- x", "*a", "&a",
        "!!python/name:os.system", "no", "1e3", "~", "", "-n", "\udcff",
    ]),
)  # fmt: skip
"""Any word that a shell can pass."""


def make_job(topology: str = "v5p:2x2x4", slices: int = 1, **values: Any) -> Job:
    fields: dict[str, Any] = {
        "config": "demo", "overrides": (), "topology": parse_topology(topology, slices),
        "workdir": "gs://bucket/runs/demo", "name": "demo",
    }  # fmt: skip
    return Job(**(fields | values))
