"""Read what a run serves to Prometheus."""

import urllib.request

from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics

Series = dict[tuple[str, ...], float]


def scrape(port: int, *, accept: str = "text/plain") -> tuple[dict[str, str], Series]:
    """Return the type of each metric, and each value by its name and the values of its labels, sorted by label."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith(accept)
        parse = openmetrics if "openmetrics" in accept else parser
        families = list(parse.text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    series = [((each.name, *(each.labels[name] for name in sorted(each.labels))), each.value) for each in samples]
    assert len(series) == len(dict(series)), "a series is there twice"
    return {family.name: family.type for family in families}, dict(series)
