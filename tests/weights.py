"""Random checkpoints in the formats of other projects."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mplug2_jax.conversion.files.open import open_source
from mplug2_jax.conversion.files.safetensors_writer import SafetensorsWriter
from mplug2_jax.conversion.files.sources import HostArray, TensorInfo
from mplug2_jax.conversion.files.torch_files import TorchWriter
from mplug2_jax.conversion.layouts.official import default_fusion_start
from mplug2_jax.conversion.layouts.official_config import to_config_json
from mplug2_jax.conversion.layouts.official_state import init_tensor, official_state, tied_to
from mplug2_jax.model.config import ModelConfig, model_config


class Harmful:
    """Content of a pickle that makes its reader run code: it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


class MemorySource:
    """Arrays in memory as a source of tensors."""

    def __init__(self, tensors: Mapping[str, HostArray]) -> None:
        self.tensors = dict(tensors)

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.tensors[name].shape, self.tensors[name].dtype)

    def read(self, name: str) -> HostArray:
        return self.tensors[name]


def official_config(**overrides: Any) -> ModelConfig:
    """Return a small config: width 64, one to three layers of each kind, one unused fusion layer."""
    sizes = {
        "vision_width": 64, "vision_layers": 2, "vision_heads": 1, "image_size": 16, "width": 64, "heads": 1,
        "mlp_width": 96, "text_layers": 2, "universal_layers": 2, "fusion_layers": 2, "decoder_layers": 3,
        "num_latents": 4, "vocab_size": 150, "max_positions": 24,
    }  # fmt: skip
    return model_config("tiny", **(sizes | overrides))


def official_file(
    path: Path, config: ModelConfig, *, task: str = "videoqa", teacher: bool = False, settings: bool = True
) -> Path:
    """Write an official checkpoint of random weights in the suffix's format; with ``settings`` also config.json."""
    start = default_fusion_start(config)
    state = official_state(config, start, teacher=teacher)
    path.parent.mkdir(parents=True, exist_ok=True)
    if settings:
        text = json.dumps(to_config_json(config, start, task=task, teacher=teacher))
        path.with_name("config.json").write_text(text)
    writer = TorchWriter(path, state) if path.suffix == ".pth" else SafetensorsWriter(path, state)
    rng = np.random.default_rng(0)
    ties = {tied_to(name): name for name in state}
    for name, info in state.items():
        if tied_to(name) is None:
            buffer = name.endswith(".position_ids")
            value = np.asarray(init_tensor(name, info) if buffer else 0.2 * rng.standard_normal(info.shape, np.float32))
            writer.write(name, value)
            if name in ties:
                writer.write(ties[name], value)
    writer.close()
    return path


def read_tensors(path: Path) -> dict[str, HostArray]:
    """Read all tensors of a checkpoint, in order."""
    source = open_source(path)
    return {name: source.read(name) for name in source.names()}


def assert_same(first: Path, second: Path) -> None:
    """Assert that two checkpoints have the same tensors, byte for byte."""
    a, b = open_source(first), open_source(second)
    assert set(a.names()) == set(b.names())
    for name in a.names():
        assert a.info(name) == b.info(name), name
        assert a.read(name).tobytes() == b.read(name).tobytes(), name


def bert_tensors(width: int = 128, layers: int = 2, *, words: int = 60, types: int = 2) -> dict[str, HostArray]:
    """Make random tensors of a BERT in Hugging Face's names, without prefix and heads."""
    shapes = {"embeddings.LayerNorm": (width,), "pooler.dense": (width, width)}
    tables = {"word": words, "position": 16, "token_type": types}
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        shapes |= {f"{layer}.attention.self.{which}": (width, width) for which in ("query", "key", "value")}
        shapes |= {
            f"{layer}.attention.output.dense": (width, width), f"{layer}.attention.output.LayerNorm": (width,),
            f"{layer}.intermediate.dense": (2 * width, width), f"{layer}.output.dense": (width, 2 * width),
            f"{layer}.output.LayerNorm": (width,),
        }  # fmt: skip
    tensors = {f"embeddings.{name}_embeddings.weight": (rows, width) for name, rows in tables.items()}
    return _random_tensors(tensors | _with_biases(shapes))


def hugging_face_clip(width: int = 128, layers: int = 2) -> dict[str, HostArray]:
    """Make random tensors of a CLIP in Hugging Face's names: 16-pixel images, 8-pixel patches, one text tensor."""
    shapes = {"pre_layrnorm": (width,), "post_layernorm": (width,)}
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        shapes |= {f"{layer}.self_attn.{which}_proj": (width, width) for which in ("q", "k", "v", "out")}
        shapes |= {
            f"{layer}.layer_norm1": (width,), f"{layer}.layer_norm2": (width,), f"{layer}.mlp.fc1": (4 * width, width),
            f"{layer}.mlp.fc2": (width, 4 * width),
        }  # fmt: skip
    embeddings = {
        "embeddings.class_embedding": (width,), "embeddings.patch_embedding.weight": (width, 3, 8, 8),
        "embeddings.position_embedding.weight": (5, width),
    }  # fmt: skip
    vision = {f"vision_model.{name}": shape for name, shape in (embeddings | _with_biases(shapes)).items()}
    return _random_tensors(vision | {"text_model.embeddings.token_embedding.weight": (9, 8), "logit_scale": ()})


def openai_clip(width: int = 128, layers: int = 2) -> dict[str, HostArray]:
    """Make random tensors of the same CLIP in the names of OpenAI and open_clip."""
    tensors = {
        "visual.class_embedding": (width,), "visual.conv1.weight": (width, 3, 8, 8), "visual.proj": (width, 8),
        "visual.positional_embedding": (5, width), "token_embedding.weight": (9, 8), "logit_scale": (),
    }  # fmt: skip
    shapes = {"visual.ln_pre": (width,), "visual.ln_post": (width,)}
    for i in range(layers):
        block = f"visual.transformer.resblocks.{i}"
        tensors |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= {
            f"{block}.ln_1": (width,), f"{block}.ln_2": (width,), f"{block}.attn.out_proj": (width, width),
            f"{block}.mlp.c_fc": (4 * width, width), f"{block}.mlp.c_proj": (width, 4 * width),
        }  # fmt: skip
    return _random_tensors(tensors | _with_biases(shapes))


def _with_biases(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in shapes.items()}


def _random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, HostArray]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


def write_checkpoint(
    path: Path, tensors: dict[str, HostArray], settings: dict[str, dict[str, Any]] | None = None
) -> Path:
    """Write tensors to a file in the suffix's format, and JSON files into its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    infos = {name: TensorInfo(value.shape, value.dtype) for name, value in tensors.items()}
    writer = SafetensorsWriter(path, infos) if path.suffix == ".safetensors" else TorchWriter(path, infos)
    for name, value in tensors.items():
        writer.write(name, value)
    writer.close()
    for name, content in (settings or {}).items():
        path.with_name(name).write_text(json.dumps(content))
    return path
