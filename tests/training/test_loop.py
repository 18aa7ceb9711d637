"""The loop in one process: what a run leaves behind, and a loss that is not a number."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.mesh import MeshConfig
from mplug2_jax.training.loop import train
from mplug2_jax.training.optimizer import AdamWConfig
from mplug2_jax.training.telemetry import read_metrics
from tests.runs import small_run

TEXT = {"text": small_run().streams["text"]}  # the cheapest to compile


def test_a_run_explains_itself(tmp_path: Path, capsys) -> None:
    config = small_run(streams=TEXT, evaluations={}, accumulate=1, mesh=MeshConfig(fsdp=8))
    assert train(config, tmp_path / "run") == []
    printed = capsys.readouterr().out
    assert "parameters in text, universal, decoder, mlm" in printed
    assert "mesh data=1, fsdp=8, tensor=1" in printed
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "text/mlm/accuracy", "gradient_norm", "learning_rate/rest", "examples_per_second", "data_wait",
            "flops_per_second"} <= set(lines[0])  # fmt: skip
    assert lines[0]["flops_per_second"] > 0
    kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdecimal())
    assert kept == [2, 4]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["name"] == "small"


def test_a_loss_that_is_not_a_number_stops_the_run_with_its_step(tmp_path: Path) -> None:
    config = small_run(
        streams=TEXT, evaluations={}, steps=6, optimizer=AdamWConfig(learning_rate=1e38, clip_norm=0.0),
        mesh=MeshConfig(fsdp=8),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"the loss of step \d is (nan|inf).*lower the learning rate"):
        train(config, tmp_path / "run")
    assert not any(np.isnan(line["loss"]) for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["loss"])


def test_a_model_that_is_refused_leaves_no_trace(tmp_path: Path) -> None:
    config = dataclasses.replace(small_run(), mesh=MeshConfig(data=3))
    with pytest.raises(UserError, match="does not divide the 8 devices"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
