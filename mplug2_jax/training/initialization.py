"""A run's initial state: fresh, or with parts of another checkpoint's weights."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from data_pipelines.loader import Stream
from data_pipelines.storage.paths import to_path
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.model.vision import resize_positions
from mplug2_jax.objectives.cider import DocumentFrequencies, count_document_frequencies
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints, open_checkpoint
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.optim.lora import remove_adapters
from mplug2_jax.training.optim.partition import LORA_KEY, combine, part_name, partition
from mplug2_jax.training.state import RunSpec, TrainState, init_ema

POSITIONS = ("vision", "positions")


def init_or_load_state(spec: RunSpec, streams: Mapping[str, Stream] | None = None) -> TrainState:
    """Return the state before step 1, and log where it came from.

    Where captions are rewarded by CIDEr, those of ``streams`` are counted first, with the same result in all processes.

    With ``config.init_from`` the chosen parts are loaded from another checkpoint, whole or not at all: its EMA where it
    has one, with LoRA's adapters merged. A teacher starts as that checkpoint's teacher, or else as a copy of the
    weights.

    Raises:
        UserError: no such checkpoint, or one that lacks a part, or has it in another size.
    """
    if spec.config.init_from:
        checkpoints, step = open_checkpoint(to_path(spec.config.init_from))
        with contextlib.closing(checkpoints):
            state = _load_parts(spec, checkpoints, step)
    else:
        state = spec.init()
    if "frequencies" in state and streams:
        state["frequencies"] = jax.device_put(_caption_frequencies(spec, streams), spec.shardings["frequencies"])
    return state


def with_init_from(path: Path, config: RunConfig) -> RunConfig:
    """Return the run with the parts of a checkpoint that both have. Raises UserError if there is no checkpoint."""
    checkpoints, step = open_checkpoint(path)
    with contextlib.closing(checkpoints):
        available = checkpoints.model_metadata(step).parts
    parts = tuple(part for part in config.parts() if part in available)
    return dataclasses.replace(config, init_from=str(path), init_parts=parts)


_SIZES: Mapping[str, tuple[str, ...]] = {
    "vision": ("vision_width", "vision_layers", "vision_heads", "patch_size", "temporal_downsampling"),
    "text": ("width", "heads", "mlp_width", "text_layers", "vocab_size", "max_positions"),
    "universal": ("width", "heads", "mlp_width", "universal_layers", "num_latents"),
    "fusion": ("width", "heads", "mlp_width", "fusion_layers", "fusion_stride"),
    "decoder": ("width", "heads", "mlp_width", "decoder_layers", "vocab_size", "max_positions"),
    "contrastive": ("contrastive_width",),
}
"""The model's sizes that each part has; not the image size, to which the position table is resized."""


def with_checkpoint_sizes(config: RunConfig, overrides: Sequence[str], previous: RunConfig | None) -> RunConfig:
    """Return a run with the model's sizes of the parts that it loads from ``config.init_from``; log what changed.

    Args:
        config: of the run.
        overrides: words as ``--config.model.width=64``; the fields that they set stay as they are.
        previous: the config in the run's work directory, which has these sizes already; None for a new run.

    Raises:
        UserError: no such checkpoint.
    """
    if not config.init_from:
        return config
    if previous is not None:
        available, model = previous.parts(), previous.model
    else:
        checkpoints, step = open_checkpoint(to_path(config.init_from))
        with contextlib.closing(checkpoints):
            try:
                metadata = checkpoints.model_metadata(step)
            except UserError:  # of an older version, or damaged: reading the arrays names the problem
                return config
        available, model = metadata.parts, metadata.config
    loaded = set(config.init_parts or config.parts()) & set(available) & set(_SIZES)
    overridden = {word.removeprefix("--config.model.").partition("=")[0] for word in overrides}
    fields = sorted({field for part in loaded for field in _SIZES[part]} - overridden)
    sizes = {field: getattr(model, field) for field in fields if getattr(model, field) != getattr(config.model, field)}
    if not sizes:
        return config
    changes = ", ".join(f"{field} {size} (not {getattr(config.model, field)})" for field, size in sizes.items())
    logging.info("model sizes are taken from %s: %s", config.init_from, changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))


def _caption_frequencies(spec: RunSpec, streams: Mapping[str, Stream]) -> DocumentFrequencies:
    """Return the document frequencies of the captions that are rewarded."""
    config = spec.config
    rewarded = [streams[name] for name, stream in config.streams.items() if "scst" in stream.objectives]
    documents = (ids for stream in rewarded for ids in stream.references(config.tasks.scst.num_documents))
    return count_document_frequencies(documents, spec.context.tokens)


def _load_parts(spec: RunSpec, checkpoints: Checkpoints, step: int) -> TrainState:
    stored = checkpoints.array_specs(step)
    available = {path[1] for path in stored if path[0] == "params"}
    loaded = _select_parts(spec.config, set(spec.shapes["params"]), available)
    fresh = sorted(set(spec.shapes["params"]) - set(loaded))
    # What was trained on images alone has no temporal units; fresh ones do not change a clip's frames.
    stored_parts = {part_name(path[1:]) for path in stored if path[0] == "params"}
    lacks_temporal = "vision" in loaded and "temporal" not in stored_parts
    fresh += ["temporal"] if lacks_temporal and "temporal" in spec.model_def.parts else []
    trees = {path[0] for path in stored}
    weights = "ema" if "ema" in trees else "params"
    details = ", EMA weights" if weights == "ema" else ""
    details += ", LoRA merged" if any(LORA_KEY in path for path in stored) else ""
    logging.info(
        "initializing from %s (step %d%s): %s%s", spec.config.init_from, step, details, ", ".join(loaded),
        f"; fresh: {', '.join(fresh)}" if fresh else "",
    )  # fmt: skip
    params = {}
    for tree in {"params", "teacher"} & set(spec.shapes):
        source = "teacher" if tree == "teacher" and "teacher" in trees else weights
        abstract_tree = remove_adapters({part: spec.shapes[tree][part] for part in loaded})
        abstract_tree = partition(abstract_tree, ("temporal",))[0] if lacks_temporal else abstract_tree
        params[tree] = _restore(checkpoints, step, source, abstract_tree)
    state = spec.init()
    state |= {tree: combine(parts, state[tree]) for tree, parts in params.items()}
    if "ema" in state:
        state["ema"] = init_ema(spec.config, state["params"])
    return state


def _select_parts(config: RunConfig, parts: set[str], available: set[str]) -> Sequence[str]:
    # Temporal units come and go with the tower that they are in.
    chosen = tuple(part for part in config.init_parts if part != "temporal")
    for part in chosen:
        if part not in parts:
            raise UserError(f"config.init_parts names {part!r}: {did_you_mean(part, parts)}")
    selected = chosen or tuple(sorted(parts))
    missing = [part for part in selected if part not in available]
    if missing:
        present = ", ".join(part for part in selected if part in available) or "none of them"
        raise UserError(
            f"config.init_from={config.init_from} lacks {', '.join(missing)} (it has {', '.join(sorted(available))}); "
            f"to load the other parts from it, set config.init_parts to {present}"
        )
    return selected


def _restore(checkpoints: Checkpoints, step: int, tree: str, abstract_tree: Any) -> Any:
    """Restore parts of a tree, laid out like ``abstract_tree``, with the position table resized to the model's grid."""
    stored = checkpoints.array_specs(step)
    path = next((path for path in ((tree, *POSITIONS), ("params", *POSITIONS)) if path in stored), POSITIONS)
    table = abstract_tree.get("vision", {}).get("positions")
    resized = None
    if table is not None and path in stored and stored[path][0] != table.shape:
        rows = checkpoints.read_arrays([path], step)[path]
        grid = round((table.shape[0] - 1) ** 0.5)
        resized = jax.device_put(resize_positions(jnp.asarray(rows), grid), table.sharding)
        abstract_tree = abstract_tree | {
            "vision": {name: leaf for name, leaf in abstract_tree["vision"].items() if name != "positions"}
        }
        if tree != "teacher":
            logging.info("resized the position table from %d to %d rows", rows.shape[0], table.shape[0])
    parts, _ = checkpoints.restore_params(abstract_tree, step, tree=tree)
    if resized is not None:
        parts["vision"]["positions"] = resized
    return parts
