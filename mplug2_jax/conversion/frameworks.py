"""Both frameworks on the same input: every tap, by JAX from our checkpoint and by PyTorch from the official tensors."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug2_jax.conversion.files.sources import HostArray, TensorSource
from mplug2_jax.conversion.report import Comparison
from mplug2_jax.conversion.tolerance import ACTIVATION_TOLERANCE, errors
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.mplug2 import Mplug2, Params, define
from mplug2_jax.model.taps import Taps
from mplug2_jax.objectives.forward import Forward

_CLIP_FRAMES = 3
_LENGTH = 9  # tokens of questions and of targets

Batch = Mapping[str, HostArray]
Tapped = dict[str, HostArray]  # "path: tap" -> value


def compare_frameworks(
    params: Params, config: ModelConfig, parts: tuple[str, ...], fusion_start: int, tensors: TensorSource
) -> list[Comparison]:
    """Runs a random picture, clip and text through both, and compares every tap and the logits.

    Args:
        params: our parameters, on the host.
        config: their sizes.
        parts: those of one of the release's models.
        fusion_start: the first fusion layer in use.
        tensors: the official state dict.

    Raises:
        UserError: PyTorch is not installed.
    """
    check_torch()
    batches = dict(_batches(config))
    ours = _by_jax(params, dataclasses.replace(config, dtype="float32", attention="xla"), parts, batches)
    theirs = _by_torch(config, "text" in parts, fusion_start, tensors, batches)
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    rows = []
    for name, value in ours.items():
        path, tap = name.split(": ")
        absolute, relative = errors(value, theirs[name])
        rows.append(Comparison(path, tap, value.shape, absolute, relative, relative <= ACTIVATION_TOLERANCE))
    return rows


def check_torch() -> None:
    """Raises UserError if PyTorch is not installed, before any long work."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError("comparing frameworks needs PyTorch: install mplug2-jax[torch]") from error


def _batches(config: ModelConfig) -> Iterator[tuple[str, Batch]]:
    rng = np.random.default_rng(0)
    for path, frames in (("image", 1), ("video", _CLIP_FRAMES)):
        length = min(_LENGTH, config.max_positions)
        mask = np.arange(length) < np.array([[length], [max(2, length // 2)]])
        ids = rng.integers(1, config.vocab_size, (2, 2, length), np.int32)
        side = config.image_size
        yield path, {
            "frames": rng.standard_normal((2, frames, side, side, 3)).astype(np.float32),
            "instruction": np.where(mask, ids[0], 0), "instruction_mask": mask, "target": np.where(mask, ids[1], 0),
        }  # fmt: skip


def _by_jax(params: Params, config: ModelConfig, parts: tuple[str, ...], batches: Mapping[str, Batch]) -> Tapped:
    definition = define(config, parts)

    @jax.jit
    def run(params: Params, batch: Any) -> Any:
        taps = Taps()
        model: Mplug2 = definition.bind(params)
        visual = model.visual_tokens(batch["frames"], taps=taps)
        memory, mask = visual, jnp.ones(visual.shape[:2], bool)
        if "text" in parts:
            text = model.text_tokens(batch["instruction"], batch["instruction_mask"], taps=taps)
            model.fusion(text, batch["instruction_mask"], visual, taps=taps)
            memory, mask = Forward(model, batch).instructed
        logits = model.decoder(batch["target"], batch["target"] != 0, memory, mask, taps=taps)
        return {**taps, "logits": logits}

    found: Tapped = {}
    on_device = jax.tree.map(jnp.asarray, params)
    for path, batch in batches.items():
        tapped = run(on_device, jax.tree.map(jnp.asarray, dict(batch)))
        found |= {f"{path}: {name}": np.asarray(value) for name, value in tapped.items()}
    return found


def _by_torch(
    config: ModelConfig, question: bool, fusion_start: int, tensors: TensorSource, batches: Mapping[str, Batch]
) -> Tapped:
    import torch

    from mplug2_jax.conversion import torch_runtime as runtime

    sizes = dataclasses.asdict(config) | {"fusion_start": fusion_start}
    table = tensors.info("visual_encoder.visual.positional_embedding").shape[0]
    sizes["image_size"] = round((table - 1) ** 0.5) * config.patch_size  # it resizes by itself
    kind = runtime.VideoQA if question else runtime.Caption
    model = kind(runtime.Config(**{field.name: sizes[field.name] for field in dataclasses.fields(runtime.Config)}))
    student = [name for name in tensors.names() if not name.partition(".")[0].endswith("_m")]
    # Half-precision files are read exactly and computed in float32, as ours are.
    with warnings.catch_warnings():  # memory-mapped files are read-only, and nothing writes to them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        model.load_official({name: torch.from_numpy(_plain(tensors.read(name))) for name in student})
    model.eval()
    found: Tapped = {}
    for path, batch in batches.items():
        taps = runtime.Taps()
        frames = torch.from_numpy(batch["frames"]).permute(0, 4, 1, 2, 3)
        target = torch.from_numpy(batch["target"]).long()
        with torch.no_grad():
            if isinstance(model, runtime.VideoQA):
                asked = torch.from_numpy(batch["instruction"]).long(), torch.from_numpy(batch["instruction_mask"])
                logits = model.answer_logits(frames, *asked, target, taps=taps)
            else:
                logits = model.text_decoder(target, target != 0, model.visual_tokens(frames, taps), taps=taps)
        found |= {f"{path}: {name}": value.numpy() for name, value in {**taps, "logits": logits}.items()}
    return found


def _plain(value: HostArray) -> HostArray:
    return value if value.dtype.kind in "iub" else np.asarray(value, np.float32)
