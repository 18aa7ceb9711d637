"""Random checkpoints in the layouts of other worlds."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mplug2_jax.conversion.files.safetensors_writer import SafetensorsWriter
from mplug2_jax.conversion.files.sources import HostArray, open_source
from mplug2_jax.conversion.files.torch_files import TorchWriter
from mplug2_jax.conversion.layouts.official import default_fusion_start
from mplug2_jax.conversion.layouts.official_config import settings_of
from mplug2_jax.conversion.layouts.official_state import fresh, official_state, tie_of
from mplug2_jax.model.config import ModelConfig, model_config


def official_config(**overrides: Any) -> ModelConfig:
    """One or two layers of each kind, 64 wide, and a fusion layer below those in use."""
    sizes = {
        "vision_width": 64, "vision_layers": 2, "vision_heads": 1, "image_size": 16, "width": 64, "heads": 1,
        "mlp_width": 96, "text_layers": 2, "universal_layers": 2, "fusion_layers": 2, "decoder_layers": 3,
        "num_latents": 4, "vocab_size": 150, "max_positions": 24,
    }  # fmt: skip
    return model_config("tiny", **(sizes | overrides))


def official_file(
    path: Path, config: ModelConfig, *, task: str = "videoqa", teacher: bool = False, settings: bool = True
) -> Path:
    """A whole official checkpoint of random weights; the suffix chooses the format. ``settings``: config.json too."""
    start = default_fusion_start(config)
    state = official_state(config, start, teacher=teacher)
    path.parent.mkdir(parents=True, exist_ok=True)
    if settings:
        text = json.dumps(settings_of(config, start, task=task, teacher=teacher))
        path.with_name("config.json").write_text(text)
    writer = TorchWriter(path, state) if path.suffix == ".pth" else SafetensorsWriter(path, state)
    rng = np.random.default_rng(0)
    ties = {tie_of(name): name for name in state}
    for name, info in state.items():
        if name.endswith(".position_ids"):
            writer.write(name, fresh(name, info))
        elif tie_of(name) is None:
            value = np.asarray(0.2 * rng.standard_normal(info.shape, np.float32))
            writer.write(name, value)
            if name in ties:
                writer.write(ties[name], value)
    writer.close()
    return path


def tensors_of(path: Path) -> dict[str, HostArray]:
    """Everything in a checkpoint, in its order."""
    source = open_source(path)
    return {name: source.read(name) for name in source.names()}


def assert_same(one: Path, other: Path) -> None:
    """Checks that two checkpoints hold the same tensors, to the byte."""
    a, b = open_source(one), open_source(other)
    assert set(a.names()) == set(b.names())
    for name in a.names():
        assert a.info(name) == b.info(name), name
        assert a.read(name).tobytes() == b.read(name).tobytes(), name
