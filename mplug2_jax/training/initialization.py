"""A run's first state: fresh, or with parts of another checkpoint's weights in it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from data_pipelines.loader import Stream
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.model.vision import resize_positions
from mplug2_jax.objectives.cider import DocumentFrequencies, count_document_frequencies
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints, open_checkpoint
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.optim.lora import remove_adapters
from mplug2_jax.training.optim.partition import LORA_KEY, combine, part_name, partition
from mplug2_jax.training.state import RunSpec, TrainState, init_ema

POSITIONS = ("vision", "positions")


def init_or_load_state(spec: RunSpec, streams: Mapping[str, Stream] | None = None) -> tuple[TrainState, list[str]]:
    """The state before step 1, and what is to be said of where it came from.

    What rewards captions by CIDEr counts those of ``streams`` first, alike in all processes.

    With ``config.init_from`` the chosen parts are another checkpoint's, whole or not at all, averaged where it keeps an
    average, and with LoRA's pairs in their kernels; a teacher starts as that checkpoint's teacher, or else as a copy of
    the weights.

    Raises:
        UserError: no such checkpoint, or one that lacks a part, or has it in another size.
    """
    state, said = _begun(spec)
    if "frequencies" in state and streams:
        state["frequencies"] = jax.device_put(_counted(spec, streams), spec.shardings["frequencies"])
    return state, said


def with_init_from(path: Path, config: RunConfig) -> RunConfig:
    """The run with the parts of a checkpoint that both have. Raises UserError where there is no checkpoint."""
    checkpoints, step = open_checkpoint(path)
    try:
        has = checkpoints.model_metadata(step).parts
    finally:
        checkpoints.close()
    return dataclasses.replace(config, init_from=str(path), init_parts=tuple(p for p in config.parts() if p in has))


_SIZES: Mapping[str, tuple[str, ...]] = {
    "vision": ("vision_width", "vision_layers", "vision_heads", "patch_size", "temporal_downsampling"),
    "text": ("width", "heads", "mlp_width", "text_layers", "vocab_size", "max_positions"),
    "universal": ("width", "heads", "mlp_width", "universal_layers", "num_latents"),
    "fusion": ("width", "heads", "mlp_width", "fusion_layers", "fusion_stride"),
    "decoder": ("width", "heads", "mlp_width", "decoder_layers", "vocab_size", "max_positions"),
    "contrastive": ("contrastive_width",),
}
"""What of a model's sizes each part has; not the size of pictures, to which the position table is resized."""


def with_checkpoint_sizes(
    config: RunConfig, overrides: Sequence[str], begun: RunConfig | None
) -> tuple[RunConfig, str]:
    """Return a run with the model's sizes of the parts that it takes from ``config.init_from``, and a line about them.

    Args:
        config: of the run.
        overrides: words as ``--config.model.width=64``; what these set stays as it is.
        begun: the run's config as its work directory keeps it, which has these sizes already; None: it is a new run.

    Raises:
        UserError: no such checkpoint.
    """
    if not config.init_from:
        return config, ""
    if begun is not None:
        has, model = begun.parts(), begun.model
    else:
        checkpoints, step = open_checkpoint(Path(config.init_from))
        try:
            identity = checkpoints.model_metadata(step)
        except UserError:  # of an older version, or damaged: what reads the arrays says so
            return config, ""
        finally:
            checkpoints.close()
        has, model = identity.parts, identity.config
    taken = set(config.init_parts or config.parts()) & set(has)
    asked = {word.removeprefix("--config.model.").partition("=")[0] for word in overrides}
    fields = dict.fromkeys(field for part in taken & set(_SIZES) for field in _SIZES[part] if field not in asked)
    sizes = {field: getattr(model, field) for field in fields if getattr(model, field) != getattr(config.model, field)}
    if not sizes:
        return config, ""
    told = ", ".join(f"{field} {size} (not {getattr(config.model, field)})" for field, size in sorted(sizes.items()))
    sized = dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))
    return sized, f"the model's sizes are those of {config.init_from}: {told}"


def _counted(spec: RunSpec, streams: Mapping[str, Stream]) -> DocumentFrequencies:
    """The document frequencies of the captions that are rewarded."""
    config = spec.config
    rewarded = [streams[name] for name, stream in config.streams.items() if "scst" in stream.objectives]
    documents = (ids for stream in rewarded for ids in stream.references(config.tasks.scst.num_documents))
    return count_document_frequencies(documents, spec.context.tokens)


def _begun(spec: RunSpec) -> tuple[TrainState, list[str]]:
    if not spec.config.init_from:
        return spec.init(), []
    checkpoints, step = open_checkpoint(Path(spec.config.init_from))
    try:
        return _started(spec, checkpoints, step)
    finally:
        checkpoints.close()


def _started(spec: RunSpec, checkpoints: Checkpoints, step: int) -> tuple[TrainState, list[str]]:
    stored = checkpoints.array_specs(step)
    has = {path[1] for path in stored if path[0] == "params"}
    wanted = _wanted(spec.config, set(spec.shapes["params"]), has)
    fresh = sorted(set(spec.shapes["params"]) - set(wanted))
    # What was trained on pictures alone has no temporal units; fresh ones change nothing of a clip's frames.
    still = "vision" in wanted and "temporal" not in {part_name(path[1:]) for path in stored if path[0] == "params"}
    fresh += ["temporal"] if still and "temporal" in spec.definition.parts else []
    trees = {path[0] for path in stored}
    own = "ema" if "ema" in trees else "params"
    taken_as = ", averaged" if own == "ema" else ""
    taken_as += ", LoRA in its kernels" if any(LORA_KEY in path for path in stored) else ""
    said = [f"starting from {spec.config.init_from} (step {step}{taken_as}): {', '.join(wanted)}"]
    said += [f"  fresh: {', '.join(fresh)}"] if fresh else []
    taken = {}
    for tree in {"params", "teacher"} & set(spec.shapes):
        kept = "teacher" if tree == "teacher" and "teacher" in trees else own
        like = remove_adapters({part: spec.shapes[tree][part] for part in wanted})
        like = partition(like, ("temporal",))[0] if still else like
        taken[tree] = _restored(checkpoints, step, kept, like, said)
    state = spec.init()
    state |= {tree: combine(parts, state[tree]) for tree, parts in taken.items()}
    if "ema" in state:
        state["ema"] = init_ema(spec.config, state["params"])
    return state, said


def _wanted(config: RunConfig, own: set[str], has: set[str]) -> Sequence[str]:
    # Temporal units come and go with the tower that they are in.
    chosen = tuple(part for part in config.init_parts if part != "temporal")
    for part in chosen:
        if part not in own:
            raise UserError(f"config.init_parts names {part!r}: {did_you_mean(part, own)}")
    wanted = chosen or tuple(sorted(own))
    missing = [part for part in wanted if part not in has]
    if missing:
        there = ", ".join(part for part in wanted if part in has) or "none of them"
        raise UserError(
            f"config.init_from={config.init_from} lacks {', '.join(missing)} (it has {', '.join(sorted(has))}); to "
            f"take the rest from it, set config.init_parts to {there}"
        )
    return wanted


def _restored(checkpoints: Checkpoints, step: int, tree: str, like: Any, said: list[str]) -> Any:
    """Parts of a tree, laid out like ``like``; the position table on its own grid."""
    stored = checkpoints.array_specs(step)
    path = next((path for path in ((tree, *POSITIONS), ("params", *POSITIONS)) if path in stored), POSITIONS)
    table = like.get("vision", {}).get("positions")
    resized = None
    if table is not None and path in stored and stored[path][0] != table.shape:
        rows = checkpoints.read_arrays([path], step)[path]
        grid = round((table.shape[0] - 1) ** 0.5)
        resized = jax.device_put(resize_positions(jnp.asarray(rows), grid), table.sharding)
        like = like | {"vision": {name: leaf for name, leaf in like["vision"].items() if name != "positions"}}
        if tree != "teacher":
            said.append(f"  the position table of {rows.shape[0]} rows is resized to {table.shape[0]}")
    parts, _ = checkpoints.restore_params(like, step, tree=tree)
    if resized is not None:
        parts["vision"]["positions"] = resized
    return parts
