"""Load golden folders: sizes, inputs, official weights, and the numbers that the release computed with them."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import StorageUnavailableError
from mplug2_jax.conversion.files.sources import HostArray, SafetensorsSource
from mplug2_jax.conversion.layouts.official import CAPTION_PARTS, QUESTION_PARTS, load_official, map_tensors
from mplug2_jax.conversion.layouts.official_config import sizes_from_settings
from mplug2_jax.conversion.layouts.tensor_mapping import TensorMapping
from mplug2_jax.errors import UserError
from mplug2_jax.model.mplug2 import ModelDef, Params, define_model

MATCHING_PARTS = ("vision", "text", "fusion", "contrastive", "matching")  # mPLUG v1's retrieval model

Arrays = Mapping[str, HostArray]


@dataclasses.dataclass(frozen=True)
class Golden:
    """One model of a golden folder, loaded into ours."""

    model: str  # caption, videoqa or retrieval
    model_def: ModelDef
    params: Params
    teacher: Params | None
    source: SafetensorsSource
    fusion_start: int
    settings: Mapping[str, Any]  # config.json
    inputs: Arrays
    outputs: Arrays
    stats: Mapping[str, Any]
    load_summary: str

    @functools.cached_property
    def mappings(self) -> list[TensorMapping]:
        """Map every official tensor in use to our parameter tree."""
        return map_tensors(self.model_def.config, self.model_def.parts, self.fusion_start)

    def fusion_with_stride(self, stride: int) -> tuple[ModelDef, Params]:
        """Return the model rebuilt with another fusion stride, from the same weights."""
        config = dataclasses.replace(self.model_def.config, fusion_stride=stride)
        model_def = define_model(config, self.model_def.parts)
        return model_def, load_official(self.source, model_def, self.fusion_start)[0]


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_npz(path: Path) -> Arrays:
    """Read all arrays of an npz file; rejects pickled objects.

    Raises:
        UserError: the file is missing, truncated, or holds pickles.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (StorageUnavailableError, PermissionError):
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise their own for a damaged file
        raise UserError(f"{path} is damaged or holds more than plain arrays: {error}") from error


def load_goldens(folder: Path) -> list[Golden]:
    """Load every model in a golden folder.

    Raises:
        UserError: the folder or a file in it is missing, or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"golden folder {folder} does not exist")
    settings = read_json(folder / "config.json")
    goldens = [
        _load(folder, settings, model, parts)
        for model, parts in (("caption", CAPTION_PARTS), ("videoqa", QUESTION_PARTS))
        if (folder / f"{model}_weights.safetensors").exists() or (folder / f"{model}_outputs.npz").exists()
    ]
    if (folder / "weights.safetensors").exists():
        goldens.append(_load(folder, settings, "retrieval", MATCHING_PARTS))
    if not goldens:
        raise UserError(f"{folder} holds no model: expected caption_, videoqa_ or plain weights.safetensors")
    return goldens


def _load(folder: Path, settings: Mapping[str, Any], model: str, parts: tuple[str, ...]) -> Golden:
    retrieval = model == "retrieval"
    source = SafetensorsSource(folder / ("weights.safetensors" if retrieval else f"{model}_weights.safetensors"))
    config, fusion_start = sizes_from_settings(settings, source)
    config = dataclasses.replace(config, dtype="float32")
    model_def = define_model(config, parts)
    params, report = load_official(source, model_def, fusion_start)
    teacher = None
    if retrieval:
        teacher_definition = define_model(config, ("vision", "text", "contrastive"))
        teacher = load_official(source, teacher_definition, fusion_start, teacher=True)[0]
        outputs = read_npz(folder / "data.npz")
        inputs, stats = outputs, {"grads": read_json(folder / "grads.json")}
    else:
        if model == "videoqa" and settings.get("distill"):
            teacher = load_official(source, model_def, fusion_start, teacher=True)[0]
        inputs, outputs = read_npz(folder / "inputs.npz"), read_npz(folder / f"{model}_outputs.npz")
        stats = read_json(folder / f"{model}_stats.json")
    params, teacher = jax.tree.map(jnp.asarray, (params, teacher))
    return Golden(
        model, model_def, params, teacher, source, fusion_start, settings, inputs, outputs, stats, str(report)
    )
