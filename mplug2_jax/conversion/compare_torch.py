"""Compare JAX, running our checkpoint, with PyTorch, running the official tensors, tap by tap on the same inputs."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.conversion.files.sources import HostArray, TensorSource
from mplug2_jax.conversion.report import Comparison
from mplug2_jax.conversion.tolerance import ACTIVATION_TOLERANCE, max_errors
from mplug2_jax.errors import UserError
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.decode import generate
from mplug2_jax.model.config import ModelConfig, SpecialTokens
from mplug2_jax.model.mplug2 import Mplug2, Params, define_model
from mplug2_jax.model.taps import Taps
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.training.workdir import special_tokens

_VIDEO_FRAMES = 3
_LENGTH = 9  # in tokens, of questions and targets
_SEARCH = SearchConfig(num_beams=2, min_length=1, max_length=8, extend_finished=True)

Batch = Mapping[str, HostArray]
Activations = dict[str, HostArray]  # "path: tap" -> value


class GeneratedText(NamedTuple):
    """The best sequence of each video clip, and its score."""

    ids: list[list[int]]
    scores: HostArray


def _best_sequences(ids: Any, scores: Any, lengths: Any) -> GeneratedText:
    """Return the first of each clip's sequences."""
    ids, scores, lengths = (np.asarray(x)[:, 0] for x in (ids, scores, lengths))
    return GeneratedText([row[:length].tolist() for row, length in zip(ids, lengths, strict=True)], scores)


def compare_frameworks(
    params: Params, config: ModelConfig, parts: tuple[str, ...], fusion_start: int, tensors: TensorSource, *,
    tokenizer: Tokenizer | None = None, settings: Path | None = None,
) -> list[Comparison]:  # fmt: skip
    """Run a random image, video clip and text through both, and compare every tap, the logits and a generated text.

    Args:
        params: our parameters, on the host.
        config: the model's sizes.
        parts: the parts of one of the release's models.
        fusion_start: the first fusion layer in use.
        tensors: the official state dict.
        tokenizer: decodes texts, and defines the ids that begin and end them (default: BERT's ids, and no decoding).
        settings: the ``config.json`` of an export, from which PyTorch's model reads sizes and ids.

    Raises:
        UserError: PyTorch is not installed.
    """
    check_torch()
    batches = dict(_random_batches(config))
    tokens = special_tokens(tokenizer) if tokenizer else _bert_tokens(config.vocab_size)
    search = dataclasses.replace(_SEARCH, max_length=min(_SEARCH.max_length, config.max_positions))
    exact = dataclasses.replace(config, dtype="float32", attention="xla", matmul_precision="highest")
    jax_taps, jax_text = _run_jax(params, exact, parts, batches, tokens, search)
    sizes = dataclasses.asdict(config) | {
        "fusion_start": fusion_start, "bos_token_id": tokens.begin, "eos_token_id": tokens.end,
    }  # fmt: skip
    torch_taps, torch_text = _run_torch(sizes, settings, "text" in parts, tensors, batches, search)
    assert set(jax_taps) == set(torch_taps), set(jax_taps) ^ set(torch_taps)
    rows = [_compare_texts(jax_text, torch_text, tokenizer)]
    for name, value in jax_taps.items():
        path, tap = name.split(": ")
        absolute, relative = max_errors(value, torch_taps[name])
        rows.append(Comparison(path, tap, value.shape, absolute, relative, relative <= ACTIVATION_TOLERANCE))
    return rows


def _bert_tokens(vocab_size: int) -> SpecialTokens:
    """Return BERT's ids, or the last ones of a smaller vocabulary."""
    return SpecialTokens(begin=min(SpecialTokens.begin, vocab_size - 2), end=min(SpecialTokens.end, vocab_size - 1))


def _compare_texts(jax_text: GeneratedText, torch_text: GeneratedText, tokenizer: Tokenizer | None) -> Comparison:
    """Compare the texts; those of equal score, which rounding chooses between, count as equal."""
    absolute, relative = (
        (0.0, 0.0) if jax_text.ids == torch_text.ids else max_errors(jax_text.scores, torch_text.scores)
    )
    first = torch_text.ids[0]
    decoded = tokenizer.decode(first) if tokenizer else " ".join(map(str, first))
    shape = (len(jax_text.ids), max(map(len, jax_text.ids)))
    return Comparison("video", "generated text", shape, absolute, relative, relative <= ACTIVATION_TOLERANCE, decoded)


def check_torch() -> None:
    """Raise UserError if PyTorch is not installed, before any long work."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError("comparing frameworks needs PyTorch: install mplug2-jax[torch]") from error


def _random_batches(config: ModelConfig) -> Iterator[tuple[str, Batch]]:
    rng = np.random.default_rng(0)
    for path, frames in (("image", 1), ("video", _VIDEO_FRAMES)):
        length = min(_LENGTH, config.max_positions)
        mask = np.arange(length) < np.array([[length], [max(2, length // 2)]])
        ids = rng.integers(1, config.vocab_size, (2, 2, length), np.int32)
        side = config.image_size
        yield path, {
            "frames": rng.standard_normal((2, frames, side, side, 3)).astype(np.float32),
            "instruction": np.where(mask, ids[0], 0), "instruction_mask": mask, "target": np.where(mask, ids[1], 0),
        }  # fmt: skip


def _run_jax(
    params: Params, config: ModelConfig, parts: tuple[str, ...], batches: Mapping[str, Batch], tokens: SpecialTokens,
    search: SearchConfig,
) -> tuple[Activations, GeneratedText]:  # fmt: skip
    model_def = define_model(config, parts)

    @jax.jit
    @model_def.with_precision
    def run(params: Params, batch: Any) -> Any:
        taps = Taps()
        model: Mplug2 = model_def.bind(params)
        visual = model.encode_visual(batch["frames"], taps=taps)
        memory, mask = visual, jnp.ones(visual.shape[:2], bool)
        if "text" in parts:
            text = model.encode_text(batch["instruction"], batch["instruction_mask"], taps=taps)
            model.fusion(text, batch["instruction_mask"], visual, taps=taps)
            memory, mask = ForwardPass(model, batch).instruction_memory
        logits = model.decoder(batch["target"], batch["target"] != 0, memory, mask, taps=taps)
        return {**taps, "logits": logits}, memory, mask

    @jax.jit
    @model_def.with_precision
    def decode(params: Params, memory: Any, mask: Any) -> Any:
        return generate(model_def.bind(params).decoder, memory, mask, search, tokens)

    activations: Activations = {}
    on_device = jax.tree.map(jnp.asarray, params)
    for path, batch in batches.items():
        taps, memory, mask = run(on_device, jax.tree.map(jnp.asarray, dict(batch)))
        activations |= {f"{path}: {name}": np.asarray(value) for name, value in taps.items()}
    output = decode(on_device, memory, mask)  # of the video clip, which is the last batch
    return activations, _best_sequences(output.ids, output.scores, output.lengths)


def _run_torch(
    sizes: dict[str, Any], settings: Path | None, answers_questions: bool, tensors: TensorSource,
    batches: Mapping[str, Batch], search: SearchConfig,
) -> tuple[Activations, GeneratedText]:  # fmt: skip
    import torch

    from mplug2_jax.conversion import torch_runtime as runtime

    num_positions = tensors.info("visual_encoder.visual.positional_embedding").shape[0]
    sizes["image_size"] = round((num_positions - 1) ** 0.5) * sizes["patch_size"]  # the runtime resizes the table
    model_class = runtime.VideoQA if answers_questions else runtime.Caption
    fields = {field.name: sizes[field.name] for field in dataclasses.fields(runtime.Config)}
    model = model_class(runtime.read_config(settings) if settings else runtime.Config(**fields))
    student_names = [name for name in tensors.names() if not name.partition(".")[0].endswith("_m")]
    # Half-precision weights are read exactly and computed in float32, as in our model.
    with warnings.catch_warnings():  # memory-mapped arrays are read-only, and nothing writes to them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        model.load_official({name: torch.from_numpy(_to_float32(tensors.read(name))) for name in student_names})
    model.eval()
    activations: Activations = {}
    search_config = runtime.SearchConfig(
        num_beams=search.num_beams, min_length=search.min_length, max_length=search.max_length,
        extend_finished=search.extend_finished,
    )  # fmt: skip
    for path, batch in batches.items():
        taps = runtime.Taps()
        frames = torch.from_numpy(batch["frames"]).permute(0, 4, 1, 2, 3)
        target = torch.from_numpy(batch["target"]).long()
        with torch.no_grad():
            if isinstance(model, runtime.VideoQA):
                question = torch.from_numpy(batch["instruction"]).long(), torch.from_numpy(batch["instruction_mask"])
                logits = model.answer_logits(frames, *question, target, taps=taps)
                output = model.generate(frames, *question, search_config)
            else:
                logits = model.text_decoder(target, target != 0, model.encode_visual(frames, taps), taps=taps)
                output = model.generate(frames, search_config)
        activations |= {f"{path}: {name}": value.numpy() for name, value in {**taps, "logits": logits}.items()}
    return activations, _best_sequences(output.ids, output.scores, output.lengths)


def _to_float32(value: HostArray) -> HostArray:
    return value if value.dtype.kind in "iub" else np.asarray(value, np.float32)
