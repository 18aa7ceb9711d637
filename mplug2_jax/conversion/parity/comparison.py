"""What every parity runner shares: the rows, the tolerances, the goldens' names for our intermediates.

A framework's part is a :class:`Runner`: it computes numbers and gives them their golden names. What the golden
files list and it does not compute is a failure, so a folder with new arrays can never pass by being ignored.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from mplug2_jax.conversion.files.sources import HostArray
from mplug2_jax.conversion.layouts.official import student_name, teacher_name
from mplug2_jax.conversion.parity.goldens import Golden
from mplug2_jax.conversion.tolerance import ACTIVATION_TOLERANCE, errors, share

Named = Iterator[tuple[str, HostArray]]
Intermediates = Mapping[str, Any]  # arrays of either framework; towers' outputs are stacked over depth

# Shares of a tensor's length; arrays that are there in full have ACTIVATION_TOLERANCE.
GRADIENT_TOLERANCE = 1e-4
TRAINED_TOLERANCE = 1e-3  # Adam turns rounding noise into visible steps


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: the largest difference, its share of the array's scale, and whether that is tolerated."""

    section: str
    name: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    passed: bool
    note: str = ""


@runtime_checkable
class Runner(Protocol):
    """One framework's numbers for one model of a golden folder; tensors have their official names and shapes."""

    def account(self) -> str:
        """What became of the checkpoint's tensors."""

    def arrays(self) -> Named:
        """Everything that the golden's outputs list."""

    def gradients(self, alpha: float | None = None) -> Mapping[str, HostArray]:
        """Gradients of the loss; with ``alpha``, of the distilled one, after one update of the teacher."""

    def updated_teacher(self) -> Mapping[str, HostArray]:
        """The teacher after one update, under the teacher's names."""

    def trained(self) -> tuple[list[float], Mapping[str, HostArray]]:
        """Losses before every AdamW step and after the last, and all parameters then, the teacher's too."""


def compare(section: str, name: str, ours: HostArray, theirs: HostArray) -> Row:
    """Compares two arrays: integers exactly, floats by the largest error as a share of the largest of ``theirs``.

    Where ``theirs`` is small because large numbers cancel, that share is of what is left, and rounding may exceed the
    tolerance. No array of the goldens is; gradients of the keys' biases are, and are not compared.
    """
    if ours.shape != theirs.shape:
        return Row(section, name, theirs.shape, np.inf, np.inf, False, f"ours has shape {list(ours.shape)}")
    absolute, relative = errors(ours, theirs)
    exact = np.issubdtype(theirs.dtype, np.integer) or theirs.dtype == bool
    return Row(section, name, theirs.shape, absolute, relative, relative <= (0 if exact else ACTIVATION_TOLERANCE))


def compare_summary(section: str, name: str, ours: HostArray, theirs: dict[str, Any], tolerance: float) -> Row:
    """Compares a tensor with its recorded length, sum and first eight values, as shares of its length.

    The first eight are measured by the largest of them, or by a typical value of the tensor if that is larger.
    """
    flat = ours.astype(np.float64).reshape(-1)
    length, total, first = float(theirs["l2"]), float(theirs["sum"]), np.asarray(theirs["first8"])
    head = flat[: len(first)]
    typical = max(length / np.sqrt(flat.size), float(np.abs(first).max(initial=0.0)))
    gaps = (
        abs(float(np.linalg.norm(flat)) - length),
        abs(float(flat.sum()) - total),
        float(np.abs(head - first).max()),
    )
    relative = max(share(gaps[0], length), share(gaps[1], length), share(gaps[2], typical))
    return Row(section, name, ours.shape, gaps[2], relative, relative <= tolerance)


def weights_row(golden: Golden, account: str, note: str = "") -> Row:
    """The row that opens a model: what became of its weights."""
    return Row(golden.model, f"weights: {account}", (), 0.0, 0.0, True, note)


def compare_all(golden: Golden, computation: Runner) -> Iterator[Row]:
    """Everything that a caption or question-answering golden lists; rows come as they are computed."""
    yield weights_row(golden, computation.account())
    yield from compare_outputs(golden, computation.arrays())
    stats, known = golden.stats, {"grads", "train"}
    yield from gradient_rows(golden, "grads", computation.gradients())
    if golden.teacher is not None:
        alpha = golden.settings["alpha"]
        distilled, updated = f"grads_distill_alpha{alpha}", "teacher_after_1_update"
        known |= {distilled, updated}
        yield from gradient_rows(golden, distilled, computation.gradients(alpha))
        for name, ours in computation.updated_teacher().items():
            section = f"{golden.model}.{updated}"
            yield compare_summary(section, name, ours, stats[updated][name], GRADIENT_TOLERANCE)
    yield from _trained_rows(golden, *computation.trained())
    for kind in sorted(set(stats) - known):
        yield Row(golden.model, kind, (), np.inf, np.inf, False, "not computed")


def compare_outputs(golden: Golden, computed: Named, inputs: tuple[str, ...] = ()) -> Iterator[Row]:
    """A row for every array of the outputs but those that are ``inputs``."""
    ours = dict(computed)
    for name, theirs in golden.outputs.items():
        if name in ours:
            yield compare(golden.model, name, np.asarray(ours[name]), theirs)
        elif name not in inputs:
            yield Row(golden.model, name, theirs.shape, np.inf, np.inf, False, "not computed")


def gradient_rows(golden: Golden, kind: str, ours: Mapping[str, HostArray]) -> Iterator[Row]:
    """Which parameters get a gradient, and each gradient."""
    recorded, section = golden.stats[kind], f"{golden.model}.{kind}"
    reached = {name for name, value in recorded.items() if value is not None}
    differing = sorted(reached ^ set(ours))
    yield Row(
        section, "which parameters get a gradient", (len(reached),), float(len(differing)), 0.0, not differing,
        f"differ: {', '.join(differing[:4])}" if differing else "",
    )  # fmt: skip
    for name in sorted(reached & set(ours)):
        if not name.endswith(".key.bias"):  # zero in exact arithmetic
            yield compare_summary(section, name, ours[name], recorded[name], GRADIENT_TOLERANCE)


def _trained_rows(golden: Golden, losses: list[float], after: Mapping[str, HostArray]) -> Iterator[Row]:
    recorded, section = golden.stats["train"], f"{golden.model}.train"
    yield compare(section, "losses", np.asarray(losses), np.asarray(recorded["losses"]))
    for name, theirs in recorded["params_after"].items():
        if name in after and not name.endswith((".key.bias", ".in_proj_bias")):
            yield compare_summary(section, name, after[name], theirs, TRAINED_TOLERANCE)
        elif name not in after and name == student_name(name):
            # What we call dead must not have moved: its weights after training are those of the file.
            yield compare_summary(section, name, golden.source.read(name), theirs, 1e-6)


def teachers(tensors: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """Tensors under their teacher's names."""
    return {teacher_name(name): value for name, value in tensors.items()}


# --- inputs -----------------------------------------------------------------------------------------------------------


def caption_weights(golden: Golden, *, masked_prompt: bool = True) -> HostArray:
    """Which tokens of the captions count: not padding, and not the prompt where it is masked."""
    mask = golden.inputs["caption_mask"].astype(bool)
    prompt = golden.settings["prompt_mask_length"] if masked_prompt else 0
    return (mask & (np.arange(mask.shape[1]) >= prompt)).astype(np.float32)


def find_numbers(golden: Golden, pattern: str) -> list[int]:
    """The numbers in the names of the outputs that match a pattern, taken from its group."""
    return sorted({int(found[1]) for found in map(re.compile(pattern).fullmatch, golden.outputs) if found})


# --- our intermediates under the goldens' names -----------------------------------------------------------------------


def visual_arrays(taps: Intermediates, golden: Golden) -> Named:
    """The path of the visual tokens."""
    yield "vision_ln_pre", np.asarray(taps["vision/norm_pre"])
    for i, block in enumerate(taps["vision/block"]):
        yield f"vision_block{i}", np.asarray(block).transpose(1, 0, 2)
    yield "vision_out", np.asarray(taps["vision/out"])
    yield "visn_embeds_pre", np.asarray(taps["visual/in"])
    depth = golden.definition.config.universal_layers
    for i in range(depth):
        yield f"uni_layer{i}", np.asarray(taps[f"universal/visual{i}"])
    yield "uni_out", np.asarray(taps[f"universal/visual{depth - 1}"])
    yield "visn_embeds_post", np.asarray(taps["visual/out"])


def text_arrays(taps: Intermediates) -> Named:
    """The question through the text encoder."""
    yield "text_embed", np.asarray(taps["text/embed"])
    for i, layer in enumerate([*taps.get("text/layer", ()), *taps["universal/text"]]):
        yield f"text_layer{i}", np.asarray(layer)
    yield "text_out", np.asarray(taps["text/out"])


def fusion_arrays(taps: Intermediates, golden: Golden, image: ArrayLike, text: ArrayLike) -> Named:
    """The fusion layers in use, and the two results."""
    stacked: list[Any] = []
    for j in range(golden.definition.config.fusion_layers):
        if f"fusion/layer{j}" in taps:
            stacked.append(taps[f"fusion/layer{j}"])
        elif f"fusion/layers_from{j}" in taps:
            stacked.extend(taps[f"fusion/layers_from{j}"])
    for j, layer in enumerate(stacked):
        yield f"fusion_layer{golden.fusion_start + j}", np.asarray(layer)
    yield "fusion_image", np.asarray(image)
    yield "fusion_text", np.asarray(text)


def decoder_arrays(taps: Intermediates, logits: ArrayLike, rows: HostArray | slice = slice(None)) -> Named:
    """The decoder on captions or answers; ``rows`` are those that count."""
    yield "dec_embed", np.asarray(taps["decoder/embed"])[rows]
    for i, layer in enumerate(taps["decoder/layer"]):
        yield f"dec_layer{i}", np.asarray(layer)[rows]
    yield "dec_logits", np.asarray(logits)[rows]


def beam_arrays(golden: Golden, width: int, ids: HostArray, lengths: HostArray, scores: HostArray) -> Named:
    """One beam search's results, ids [b, r, m] filled with -1 after their ``lengths`` [b, r]."""
    longest = golden.outputs[f"beam{width}_ids"].shape[-1]
    ended = np.arange(ids.shape[-1]) >= lengths[..., None]
    yield f"beam{width}_ids", np.where(ended, -1, ids)[..., :longest].astype(np.int64)
    yield f"beam{width}_scores", scores
