"""Read what a run serves to Prometheus."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def scrape(port: int) -> tuple[dict[str, str], dict[tuple[str, ...], float]]:
    """Return the type of each metric, and each value by its name and the values of its labels, sorted by label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        families = list(text_string_to_metric_families(answer.read().decode()))
    series = [
        ((sample.name, *(value for _, value in sorted(sample.labels.items()))), sample.value)
        for f in families
        for sample in f.samples
    ]
    assert len(series) == len(dict(series)), "a series is there twice"
    return {family.name: family.type for family in families}, dict(series)
