"""TensorBoard's charts: which metrics are together, as read from event files."""

import re
import shutil
from pathlib import Path

from tensorboardX.proto.layout_pb2 import Layout

from mplug2_jax.training.telemetry.charts import make_charts
from mplug2_jax.training.telemetry.metric_log import MetricLog
from tests.event_files import read_event_file

STEP = {
    "gradient_norm": 1.0, "learning_rate/rest": 1.0, "learning_rate/vision": 1.0, "loss": 1.0, "loss_scale": 1.0,
    "a.b/mlm/loss": 1.0, "a.b/ilm/loss": 1.0, "a.b/mlm/accuracy": 1.0, "c/vlc/loss": 1.0, "examples_per_second": 1.0,
    "seconds_per_step": 1.0, "data_wait": 1.0, "goodput/step": 1.0, "goodput/compile": 1.0,
}  # fmt: skip
HOSTS = {f"hosts/{cause}_{kind}": 1.0 for cause in ("data", "step", "memory") for kind in ("min", "median", "max")}


def read_layouts(folder: Path) -> list[dict[str, dict[str, list[str]]]]:
    """Return the charts of each event that has some: the tags by category and title, those of margins in a row."""
    layouts = []
    for path in sorted((folder / "tensorboard").iterdir()):
        values = [value for event in read_event_file(path.read_bytes()) for value in event.summary.value]
        for value in values:
            if value.tag == "custom_scalars__config__":
                assert value.metadata.plugin_data.plugin_name == "custom_scalars"
                layout = Layout.FromString(value.tensor.string_val[0])
                layouts.append({
                    category.title: {
                        chart.title: [*chart.multiline.tag]
                        or [tag for each in chart.margin.series for tag in (each.lower, each.value, each.upper)]
                        for chart in category.chart
                    }
                    for category in layout.category
                })  # fmt: skip
    return layouts


def test_metrics_that_belong_together_share_a_chart(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, 0)
    log.write(1, STEP)
    log.write(2, STEP)
    log.write(2, {"checkpoint/blocking_seconds": 1.0})
    (first,) = read_layouts(tmp_path)
    assert first == {
        "Losses": {"loss": ["loss$"], "a.b": [r"a\.b/mlm/loss$", r"a\.b/ilm/loss$"], "c": ["c/vlc/loss$"]},
        "Learning rates": {"learning_rate": ["learning_rate/rest$", "learning_rate/vision$"]},
        "Throughput": {"examples_per_second": ["examples_per_second$"], "seconds_per_step": ["seconds_per_step$"]},
        "Time": {"data_wait": ["data_wait$"], "goodput": ["goodput/step$", "goodput/compile$"]},
    }
    log.write(3, STEP | HOSTS)
    log.write(3, {"eval/words/top_1": 1.0, "eval/words/top_5": 1.0})
    log.close()
    _, with_hosts, last = read_layouts(tmp_path)
    assert with_hosts["Hosts"]["data"] == ["hosts/data_min", "hosts/data_median", "hosts/data_max"]
    assert last["Evaluations"] == {"words": ["eval/words/top_1$", "eval/words/top_5$"]}


def test_every_file_of_a_resumed_run_has_charts_of_all_metrics(tmp_path: Path) -> None:
    first = MetricLog(tmp_path, 0)
    first.write(1, STEP | {"eval/words/top_1": 1.0})
    first.close()
    (layout,) = read_layouts(tmp_path)
    assert layout["Evaluations"] == {"words": ["eval/words/top_1$"]}
    shutil.rmtree(tmp_path / "tensorboard")
    second = MetricLog(tmp_path, 1)
    second.write(2, STEP)
    second.close()
    assert read_layouts(tmp_path) == [layout]


def test_a_chart_has_only_metrics_of_the_run() -> None:
    assert make_charts(["gradient_norm", "hosts/data_min"]) == {}
    expressions = [tag for charts in make_charts(STEP).values() for _, tags in charts.values() for tag in tags]
    assert all(len([tag for tag in STEP if re.match(expression, tag)]) == 1 for expression in expressions)
