"""Generation for files: images, videos or texts in, texts out, in batches of one kind."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.examples import default_instruction, encode_instruction, make_detokenizer
from data_pipelines.media import file_media
from data_pipelines.tokenizers import Tokenizer
from data_pipelines.visual import load_visual
from mplug2_jax.errors import UserError
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.decode import generate
from mplug2_jax.inference.media import instruction_config, visual_config
from mplug2_jax.model.mplug2 import Params
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass
from mplug2_jax.training.state import RunSpec

LENGTH_MULTIPLE = 16
"""Instructions are padded to a multiple of this many tokens, so that few lengths are compiled."""


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """A file and its instruction; the index is the file's among all."""

    index: int
    path: Path
    kind: Kind
    instruction: str


Response = tuple[GenerateRequest, str] | DataError
"""A request with its prediction, or the reason why the file cannot be read."""


def read_requests(paths: Sequence[Path], instruction: str | None) -> tuple[list[GenerateRequest], dict[int, DataError]]:
    """Return the requests for all files, and the errors of texts that cannot be read, by index."""
    requests: list[GenerateRequest] = []
    errors: dict[int, DataError] = {}
    for index, path in enumerate(paths):
        try:
            requests.append(GenerateRequest(index, path, *read_request(path, instruction)))
        except DataError as error:
            errors[index] = error
    return requests, errors


def read_request(path: Path, instruction: str | None) -> tuple[Kind, str]:
    """Return the kind of a file, and its instruction.

    Raises:
        DataError: a text file is empty or not UTF-8.
        UserError: the instruction has no place for the text.
    """
    if path.suffix.lower() != ".txt":
        kind = file_media(path).kind
        return kind, instruction or default_instruction(kind)
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text:
        raise DataError(f"{path} is empty; expected an instruction, or the text for {{text}} in --instruction")
    if instruction and "{text}" not in instruction:
        raise UserError(f"--instruction {instruction!r} has no {{text}}, so the content of {path} would not be used")
    return "text", (instruction or "{text}").replace("{text}", text)


def check_request_parts(requests: Iterable[GenerateRequest], spec: RunSpec, workdir: Path) -> None:
    """Check that the model can read all requests, and generate.

    Raises:
        UserError: names the part that it lacks.
    """
    parts = spec.model_def.parts
    if "decoder" not in parts:
        raise UserError(f"the model in {workdir} has no decoder (its parts: {', '.join(parts)})")
    for request in requests:
        if request.kind == "text" and "text" not in parts:
            raise UserError(f"{request.path} is a text, but the model in {workdir} has no text encoder")
        if request.kind != "text" and "vision" not in parts:
            raise UserError(f"{request.path} is an image or a video, but the model in {workdir} has no vision encoder")


class Generator:
    """A generator of predictions for requests, in batches.

    Args:
        spec: of the run.
        params: of the model.
        tokenizer: of the run.
        search: config of the search, or of sampling.
        seed: of sampling: file N has the seed ``seed + N``, in any batch.
    """

    def __init__(self, spec: RunSpec, params: Params, tokenizer: Tokenizer, search: SearchConfig, *, seed: int) -> None:
        self._spec, self._params, self._tokenizer, self._seed = spec, params, tokenizer, seed
        self._examples = instruction_config(spec.config)
        self._decode = make_detokenizer(self._examples, tokenizer)
        self._visual = visual_config(spec.config)

        @jax.jit
        @spec.model_def.with_precision
        def generate_batch(params: Params, batch: DeviceBatch) -> tuple[jax.Array, jax.Array]:
            model = spec.model_def.bind(params)
            forward = ForwardPass(model, batch)
            memory, mask = forward.caption_memory if "frames" in batch else forward.instruction_memory
            output = generate(model.decoder, memory, mask, search, spec.context.tokens, batch["seed"])
            return output.ids[:, 0], output.lengths[:, 0]

        self._generate_batch = generate_batch

    def run(self, requests: Sequence[GenerateRequest], batch_size: int) -> Iterator[tuple[int, Response]]:
        """Yield every request's response with its index, batch by batch of one kind."""
        counts = Counter(request.kind for request in requests)
        for batch in _batch_by_kind(requests, batch_size):
            yield from self._run_batch(batch, min(batch_size, counts[batch[0].kind]))

    def _run_batch(self, batch: Sequence[GenerateRequest], rows: int) -> Iterator[tuple[int, Response]]:
        loaded: list[tuple[GenerateRequest, NDArray[Any] | None]] = []
        for request in batch:
            try:
                loaded.append((request, self._load_frames(request)))
            except DataError as error:
                yield request.index, error
        if not loaded:
            return
        with jax.set_mesh(self._spec.mesh):
            ids, lengths = map(np.asarray, self._generate_batch(self._params, self._arrays(loaded, rows)))
        for (request, _), row, length in zip(loaded, ids, lengths, strict=False):
            yield request.index, (request, self._decode(row[:length].tolist()))

    def _load_frames(self, request: GenerateRequest) -> NDArray[Any] | None:
        """Return the frames of an image or a video, None of a text. Raises DataError if the file cannot be read."""
        if request.kind == "text":
            return None
        return load_visual(file_media(request.path), self._visual, np.random.default_rng(0)).frames

    def _arrays(self, loaded: Sequence[tuple[GenerateRequest, NDArray[Any] | None]], rows: int) -> dict[str, Any]:
        """Return a batch of ``rows``, padded with the first request, so that one program serves all batches."""
        padded = [*loaded, *[loaded[0]] * (rows - len(loaded))]
        seeds = np.asarray([self._seed + request.index for request, _ in padded], np.int32)
        arrays: dict[str, NDArray[Any]] = {"seed": seeds}
        if loaded[0][1] is not None:
            arrays["frames"] = np.stack([frames for _, frames in padded if frames is not None])
        if "text" in self._spec.model_def.parts:
            max_length = self._spec.config.model.max_positions
            instructions = [request.instruction for request, _ in padded]
            ids = [encode_instruction(text, self._examples, self._tokenizer, max_length) for text in instructions]
            length = min(max_length, -(-max(map(len, ids)) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
            arrays["instruction"] = np.asarray([[*row, *[0] * (length - len(row))] for row in ids], np.int32)
            arrays["instruction_mask"] = np.asarray([np.arange(length) < len(row) for row in ids])
        return {name: jnp.asarray(value) for name, value in arrays.items()}


def in_order(known: Mapping[int, Response], responses: Iterable[tuple[int, Response]]) -> Iterator[Response]:
    """Yield responses by index, those that are known beforehand too, each as soon as all before it have arrived."""
    pending, next_index = dict(known), 0
    for index, response in responses:
        pending[index] = response
        while next_index in pending:
            yield pending.pop(next_index)
            next_index += 1
    yield from (response for _, response in sorted(pending.items()))


def _batch_by_kind(requests: Iterable[GenerateRequest], size: int) -> Iterator[list[GenerateRequest]]:
    """Yield requests of one kind, in order; the last batch of a kind may be smaller."""
    pending: dict[str, list[GenerateRequest]] = {}
    for request in requests:
        batch = pending.setdefault(request.kind, [])
        batch.append(request)
        if len(batch) == size:
            yield pending.pop(request.kind)
    yield from pending.values()
