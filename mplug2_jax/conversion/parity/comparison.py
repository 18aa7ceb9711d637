"""Rows, tolerances, and the goldens' names for our intermediates, shared by the runners of both frameworks.

A :class:`Runner` computes the numbers of one framework under their golden names. An array in the golden files that it
does not compute is a failure, so that new arrays are never ignored.
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
from mplug2_jax.conversion.tolerance import ACTIVATION_TOLERANCE, max_errors, relative_error

NamedArrays = Iterator[tuple[str, HostArray]]
Intermediates = Mapping[str, Any]  # arrays of either framework; layer outputs are stacked over depth

# Relative to a tensor's norm; arrays that are stored in full have ACTIVATION_TOLERANCE.
GRADIENT_TOLERANCE = 1e-4
TRAINED_TOLERANCE = 1e-3  # Adam amplifies rounding errors


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: the largest absolute and relative difference, and whether it is within the tolerance."""

    section: str
    name: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    passed: bool
    note: str = ""


@runtime_checkable
class Runner(Protocol):
    """Computes one framework's numbers for one model of a golden folder, with official names and shapes of tensors."""

    def load_summary(self) -> str:
        """Return how many of the checkpoint's tensors were loaded."""

    def arrays(self) -> NamedArrays:
        """Compute every array in the golden's outputs."""

    def gradients(self, alpha: float | None = None) -> Mapping[str, HostArray]:
        """Compute gradients of the loss; with ``alpha``, of the distillation loss, after one update of the teacher."""

    def updated_teacher(self) -> Mapping[str, HostArray]:
        """Return the teacher after one update, under the teacher's names."""

    def train(self) -> tuple[list[float], Mapping[str, HostArray]]:
        """Return the losses before every AdamW step and after the last, and the final parameters, the teacher's too."""


def compare(section: str, name: str, actual: HostArray, expected: HostArray) -> Row:
    """Compare two arrays: integers exactly, floats by their largest error relative to the largest of ``expected``.

    If ``expected`` is small because large numbers cancel, rounding may exceed the tolerance. Among the goldens only
    gradients of the keys' biases are, and they are not compared.
    """
    if actual.shape != expected.shape:
        return Row(section, name, expected.shape, np.inf, np.inf, False, f"shape is {list(actual.shape)}")
    absolute, relative = max_errors(actual, expected)
    exact = np.issubdtype(expected.dtype, np.integer) or expected.dtype == bool
    return Row(section, name, expected.shape, absolute, relative, relative <= (0 if exact else ACTIVATION_TOLERANCE))


def compare_summary(section: str, name: str, actual: HostArray, expected: dict[str, Any], tolerance: float) -> Row:
    """Compare a tensor with its recorded norm, sum and first eight values, relative to its norm.

    The first eight are relative to the largest of them, or to the tensor's root mean square if that is larger.
    """
    flat = actual.astype(np.float64).reshape(-1)
    norm, total, first = float(expected["l2"]), float(expected["sum"]), np.asarray(expected["first8"])
    scale = max(norm / np.sqrt(flat.size), float(np.abs(first).max(initial=0.0)))
    head_error = float(np.abs(flat[: len(first)] - first).max())
    errors = (abs(float(np.linalg.norm(flat)) - norm), abs(float(flat.sum()) - total), head_error)
    relative = max(relative_error(e, s) for e, s in zip(errors, (norm, norm, scale), strict=True))
    return Row(section, name, actual.shape, head_error, relative, relative <= tolerance)


def make_weights_row(golden: Golden, load_summary: str, note: str = "") -> Row:
    """Return the first row of a model, which says how many of its weights were loaded."""
    return Row(golden.model, f"weights: {load_summary}", (), 0.0, 0.0, True, note)


def compare_all(golden: Golden, runner: Runner) -> Iterator[Row]:
    """Compare every number of a caption or question-answering golden; yields rows as they are computed."""
    yield make_weights_row(golden, runner.load_summary())
    yield from compare_outputs(golden, runner.arrays())
    stats, computed = golden.stats, {"grads", "train"}
    yield from compare_gradients(golden, "grads", runner.gradients())
    if golden.teacher is not None:
        alpha = golden.settings["alpha"]
        distilled, updated = f"grads_distill_alpha{alpha}", "teacher_after_1_update"
        computed |= {distilled, updated}
        yield from compare_gradients(golden, distilled, runner.gradients(alpha))
        for name, actual in runner.updated_teacher().items():
            section = f"{golden.model}.{updated}"
            yield compare_summary(section, name, actual, stats[updated][name], GRADIENT_TOLERANCE)
    yield from _compare_training(golden, *runner.train())
    for kind in sorted(set(stats) - computed):
        yield Row(golden.model, kind, (), np.inf, np.inf, False, "not computed")


def compare_outputs(golden: Golden, computed: NamedArrays, inputs: tuple[str, ...] = ()) -> Iterator[Row]:
    """Compare every array of the outputs but those that are ``inputs``."""
    actual = dict(computed)
    for name, expected in golden.outputs.items():
        if name in actual:
            yield compare(golden.model, name, np.asarray(actual[name]), expected)
        elif name not in inputs:
            yield Row(golden.model, name, expected.shape, np.inf, np.inf, False, "not computed")


def compare_gradients(golden: Golden, kind: str, actual: Mapping[str, HostArray]) -> Iterator[Row]:
    """Compare which parameters get a gradient, and each gradient."""
    recorded, section = golden.stats[kind], f"{golden.model}.{kind}"
    with_gradient = {name for name, value in recorded.items() if value is not None}
    differing = sorted(with_gradient ^ set(actual))
    yield Row(
        section, "which parameters get a gradient", (len(with_gradient),), float(len(differing)), 0.0, not differing,
        f"differ: {', '.join(differing[:4])}" if differing else "",
    )  # fmt: skip
    for name in sorted(with_gradient & set(actual)):
        if not name.endswith(".key.bias"):  # zero in exact arithmetic
            yield compare_summary(section, name, actual[name], recorded[name], GRADIENT_TOLERANCE)


def _compare_training(golden: Golden, losses: list[float], params: Mapping[str, HostArray]) -> Iterator[Row]:
    recorded, section = golden.stats["train"], f"{golden.model}.train"
    yield compare(section, "losses", np.asarray(losses), np.asarray(recorded["losses"]))
    for name, expected in recorded["params_after"].items():
        if name in params and not name.endswith((".key.bias", ".in_proj_bias")):
            yield compare_summary(section, name, params[name], expected, TRAINED_TOLERANCE)
        elif name not in params and name == student_name(name):
            # Ignored weights must not have changed: after training they are those of the file.
            yield compare_summary(section, name, golden.source.read(name), expected, 1e-6)


def with_teacher_names(tensors: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """Return tensors under the teacher's names."""
    return {teacher_name(name): value for name, value in tensors.items()}


# --- inputs -----------------------------------------------------------------------------------------------------------


def make_caption_weights(golden: Golden, *, masked_prompt: bool = True) -> HostArray:
    """Return the weights of the captions' tokens: 0 for padding, and for the prompt if it is masked."""
    mask = golden.inputs["caption_mask"].astype(bool)
    prompt = golden.settings["prompt_mask_length"] if masked_prompt else 0
    return (mask & (np.arange(mask.shape[1]) >= prompt)).astype(np.float32)


def find_numbers(golden: Golden, pattern: str) -> list[int]:
    """Return the numbers that the group of a pattern matches in the names of the outputs."""
    return sorted({int(match[1]) for match in map(re.compile(pattern).fullmatch, golden.outputs) if match})


# --- our intermediates under the goldens' names -----------------------------------------------------------------------


def name_intermediates(
    taps: Intermediates, golden: Golden, logits: ArrayLike, rows: HostArray | slice = slice(None),
    fused: tuple[Any, Any] | None = None,
) -> NamedArrays:  # fmt: skip
    """Yield all intermediates.

    Args:
        taps: those of the layers.
        golden: the model's golden.
        logits: the decoder's output.
        rows: the captions or answers that are not padding.
        fused: the two results of fusion, of a model that encodes text.
    """
    yield "vision_ln_pre", np.asarray(taps["vision/norm_pre"])
    for i, block in enumerate(taps["vision/block"]):
        yield f"vision_block{i}", np.asarray(block).transpose(1, 0, 2)
    yield "vision_out", np.asarray(taps["vision/out"])
    yield "visn_embeds_pre", np.asarray(taps["visual/in"])
    depth = golden.model_def.config.universal_layers
    for i in range(depth):
        yield f"uni_layer{i}", np.asarray(taps[f"universal/visual{i}"])
    yield "uni_out", np.asarray(taps[f"universal/visual{depth - 1}"])
    yield "visn_embeds_post", np.asarray(taps["visual/out"])
    if fused is not None:
        yield "text_embed", np.asarray(taps["text/embed"])
        for i, layer in enumerate([*taps.get("text/layer", ()), *taps["universal/text"]]):
            yield f"text_layer{i}", np.asarray(layer)
        yield "text_out", np.asarray(taps["text/out"])
        stacked: list[Any] = []
        for j in range(golden.model_def.config.fusion_layers):
            if f"fusion/layer{j}" in taps:
                stacked.append(taps[f"fusion/layer{j}"])
            elif f"fusion/layers_from{j}" in taps:
                stacked.extend(taps[f"fusion/layers_from{j}"])
        for j, layer in enumerate(stacked):
            yield f"fusion_layer{golden.fusion_start + j}", np.asarray(layer)
        yield "fusion_image", np.asarray(fused[0])
        yield "fusion_text", np.asarray(fused[1])
    yield "dec_embed", np.asarray(taps["decoder/embed"])[rows]
    for i, layer in enumerate(taps["decoder/layer"]):
        yield f"dec_layer{i}", np.asarray(layer)[rows]
    yield "dec_logits", np.asarray(logits)[rows]


def name_beam_arrays(golden: Golden, width: int, ids: HostArray, lengths: HostArray, scores: HostArray) -> NamedArrays:
    """Yield one beam search's results, ids [b, r, m] filled with -1 after their ``lengths`` [b, r]."""
    max_length = golden.outputs[f"beam{width}_ids"].shape[-1]
    ended = np.arange(ids.shape[-1]) >= lengths[..., None]
    yield f"beam{width}_ids", np.where(ended, -1, ids)[..., :max_length].astype(np.int64)
    yield f"beam{width}_scores", scores
