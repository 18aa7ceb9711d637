"""A run of random weights and its export, which tests of several modules use."""

import json
import math
import wave
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.media import write_image, write_video
from mplug2_jax.conversion.export_weights import export
from tests.cli.conftest import save_random_run
from tests.runs import small_model, small_run


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of random weights, its export "hub", a.mp4, a.png, and sound.wav."""
    pytest.importorskip("torch", reason="PyTorch is not installed here")
    folder = tmp_path_factory.mktemp("exported")
    streams = {name: stream for name, stream in small_run().streams.items() if name != "text"}
    # With smaller weights it would give the same answer to everything.
    save_random_run(folder / "run", small_run(streams=streams, model=small_model(universal_layers=2)), scale=2.0)
    results = folder / "run" / "evaluations" / "1" / "answers.json"
    results.parent.mkdir(parents=True)
    results.write_text(
        json.dumps({"name": "answers", "num_examples": 8, "metrics": {"accuracy": 0.25, "f1": math.nan}})
    )
    export(folder / "run", folder / "hub", base_models=("openai/clip-vit-large-patch14", "bert-large-uncased"))
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
    write_image(folder / "a.png", frames[0])
    write_video(folder / "a.mp4", frames)
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    return folder
