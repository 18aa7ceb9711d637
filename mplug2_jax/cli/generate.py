"""``mplug2 generate``: images, videos or text files in, text out."""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import DataError
from mplug2_jax.cli.common import add_command, add_run, open_run
from mplug2_jax.cli.media import files_in, visual_of
from mplug2_jax.errors import UserError, check_range

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from data_pipelines.config import Kind
    from data_pipelines.tokenizers import Tokenizer
    from mplug2_jax.generation.config import SearchConfig
    from mplug2_jax.model.mplug2 import Params
    from mplug2_jax.training.config import RunConfig
    from mplug2_jax.training.state import RunSpec

BUCKET = 16
"""Instructions are padded to a multiple of so many tokens, so that few lengths are compiled."""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "generate", run, config=True,
        summary="Answer an instruction about images or videos",
        details="A text file holds an instruction of its own, or the text that the instruction is about.",
        example='mplug2 generate --workdir runs/demo clip.mp4 --instruction "which way does the red digit move?"',
    )  # fmt: skip
    add_run(parser)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="image, video, GIF or .txt, or a folder of them"
    )
    parser.add_argument("--instruction", help="what to do or answer; in it {text} stands for a text file's content")
    parser.add_argument("--out", type=Path, metavar="FILE", help="new .jsonl file for what is said, a line for each")
    parser.add_argument("--batch-size", type=int, default=8, help="files at a time (default: %(default)s)")
    parser.add_argument("--beams", type=int, help="beams of the search; 1 is greedy (default: the run's)")
    parser.add_argument(
        "--top-p", type=float, help="draw from the likeliest tokens that hold this much probability, as 0.9"
    )
    parser.add_argument(
        "--temperature", type=float, help="of what is drawn: below 1 is more cautious (default: the run's)"
    )
    parser.add_argument("--seed", type=int, help="of what is drawn (default: 0)")
    parser.add_argument("--max-length", type=int, help="most tokens of an answer (default: the run's)")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A file by its number among all, and what is asked about it."""

    number: int
    path: Path
    kind: "Kind"
    instruction: str


Answer = tuple[Asked, str] | DataError
"""What was said about a file, or why it could not be read."""


def run(args: argparse.Namespace) -> int:
    """Prints one line per file, in the order given; status 1 if some of several could not be read."""
    for option in ("beams", "max_length", "batch_size"):
        check_range(f"--{option.replace('_', '-')}", getattr(args, option), 1)
    if args.out and args.out.exists():
        raise UserError(f"--out {args.out} exists; choose a new file")
    paths = list(files_in(args.files))
    asked, broken = _read_inputs(paths, args.instruction)
    if broken and len(paths) == 1:
        raise broken[0]
    spec, params, _, tokenizer = open_run(args)
    search = _search(args, spec.config)
    _check_parts(asked, spec, args.workdir)
    answering = Answering(spec, params, tokenizer, search, seed=args.seed or 0)
    lost = 0
    with _lines(args.out) as write:
        for answer in _in_order(broken, answering.answers(asked, args.batch_size)):
            if isinstance(answer, DataError):
                if len(paths) == 1:
                    raise answer
                lost += 1
                print(f"mplug2: left out: {' '.join(str(answer).split())}", file=sys.stderr, flush=True)
                continue
            of, said = answer
            print(f"{of.path}: {said}", flush=True)
            write({"file": str(of.path), "instruction": of.instruction, "said": said})
    return 1 if lost else 0


def _search(args: argparse.Namespace, config: "RunConfig") -> "SearchConfig":
    """The run's search, with what the command line asks for."""
    asked = config.tasks.search
    search = dataclasses.replace(
        asked, num_beams=args.beams or asked.num_beams,
        max_length=min(args.max_length or asked.max_length, config.model.max_positions),
        top_p=asked.top_p if args.top_p is None else args.top_p,
        temperature=asked.temperature if args.temperature is None else args.temperature,
    )  # fmt: skip
    for option, value in (("--temperature", args.temperature), ("--seed", args.seed)):
        if value is not None and not search.top_p:
            raise UserError(
                f"{option} {value} is of what is drawn, and this searches: add --top-p 0.9, or leave it out"
            )
    return search


def _read_inputs(paths: Sequence[Path], instruction: str | None) -> tuple[list[Asked], dict[int, DataError]]:
    """What is asked about every file; and by their numbers, what is wrong with texts that cannot be read."""
    asked: list[Asked] = []
    broken: dict[int, DataError] = {}
    for number, path in enumerate(paths):
        try:
            asked.append(Asked(number, path, *read_input(path, instruction)))
        except DataError as error:
            broken[number] = error
    return asked, broken


def read_input(path: Path, instruction: str | None) -> "tuple[Kind, str]":
    """What a file is, and the instruction for it.

    Raises:
        DataError: a text file that is not UTF-8 or empty.
        UserError: an instruction that leaves a text file out.
    """
    from data_pipelines.media import local_media

    if path.suffix.lower() != ".txt":
        kind = local_media(path).kind
        return kind, instruction or f"describe the {'clip' if kind == 'video' else 'picture'}"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text:
        raise DataError(
            f"{path} is empty; a text file holds the instruction, or what {{text}} in --instruction stands for"
        )
    if instruction and "{text}" not in instruction:
        raise UserError(f"--instruction {instruction!r} has no {{text}}, so the content of {path} would go unread")
    return "text", (instruction or "{text}").replace("{text}", text)


def _check_parts(asked: Iterable[Asked], spec: "RunSpec", workdir: Path) -> None:
    """Checks that the model can read what it is asked about, and answer.

    Raises:
        UserError: it cannot.
    """
    parts = spec.definition.parts
    if "decoder" not in parts:
        raise UserError(f"the model in {workdir} has no decoder (its parts: {', '.join(parts)})")
    for one in asked:
        if one.kind == "text" and "text" not in parts:
            raise UserError(f"{one.path} is a text, but the model in {workdir} has no text encoder")
        if one.kind != "text" and "vision" not in parts:
            raise UserError(f"{one.path} is a picture, but the model in {workdir} has no vision")


class Answering:
    """A model that answers files in batches.

    Args:
        plan: the run's.
        params: the model's.
        tokenizer: the run's.
        search: how answers are found.
        seed: of what is drawn: file N's is ``seed + N``, whatever the batch it is in.
    """

    def __init__(
        self, spec: "RunSpec", params: "Params", tokenizer: "Tokenizer", search: "SearchConfig", *, seed: int
    ) -> None:
        import jax

        from data_pipelines.config import ExampleConfig
        from data_pipelines.examples import make_detokenizer
        from mplug2_jax.generation.decode import generate
        from mplug2_jax.objectives.forward import ForwardPass

        self._spec, self._params, self._tokenizer, self._seed = spec, params, tokenizer, seed
        # As evaluations ask, where there are any: the release cuts questions shorter when it learns them.
        told = [evaluation.data.examples for evaluation in spec.config.evaluations.values()]
        told += [stream.data.examples for stream in spec.config.streams.values()]
        self._form = next((examples for examples in told if examples.instructions), ExampleConfig())
        self._read = make_detokenizer(self._form, tokenizer)
        self._visual = visual_of(spec.config)

        @jax.jit
        def answer(params: Any, batch: Any) -> Any:
            model = spec.definition.bind(params)
            forward = ForwardPass(model, batch)
            memory, mask = forward.caption_memory if "frames" in batch else forward.instruction_memory
            found = generate(model.decoder, memory, mask, search, spec.context.tokens, batch["seed"])
            return found.ids[:, 0], found.lengths[:, 0]

        self._answer = answer

    def answers(self, asked: Sequence[Asked], batch_size: int) -> Iterator[tuple[int, Answer]]:
        """Every file's answer by its number, a batch of one kind at a time."""
        counts = Counter(one.kind for one in asked)
        for batch in _batches(asked, batch_size):
            yield from self._answered(batch, min(batch_size, counts[batch[0].kind]))

    def _answered(self, batch: Sequence[Asked], rows: int) -> Iterator[tuple[int, Answer]]:
        import jax
        import numpy as np

        read: list[tuple[Asked, NDArray[Any] | None]] = []
        for one in batch:
            try:
                read.append((one, self._frames(one)))
            except DataError as error:
                yield one.number, error
        if not read:
            return
        with jax.set_mesh(self._spec.mesh):
            ids, lengths = map(np.asarray, self._answer(self._params, self._arrays(read, rows)))
        for (one, _), row, length in zip(read, ids, lengths, strict=False):
            yield one.number, (one, self._read(row[:length].tolist()))

    def _frames(self, one: Asked) -> "NDArray[Any] | None":
        """A picture's frames, and nothing of a text. Raises DataError for a file that cannot be read."""
        import numpy as np

        from data_pipelines.media import local_media
        from data_pipelines.visual import load_visual

        if one.kind == "text":
            return None
        return load_visual(local_media(one.path), self._visual, np.random.default_rng(0)).frames

    def _arrays(self, read: "Sequence[tuple[Asked, NDArray[Any] | None]]", rows: int) -> dict[str, Any]:
        """A batch of so many rows; those beyond the files repeat the first, so that one program serves all batches."""
        import jax.numpy as jnp
        import numpy as np

        from data_pipelines.examples import encode_instruction

        filled = [*read, *[read[0]] * (rows - len(read))]
        arrays: dict[str, NDArray[Any]] = {"seed": np.asarray([self._seed + one.number for one, _ in filled], np.int32)}
        if read[0][1] is not None:
            arrays["frames"] = np.stack([frames for _, frames in filled if frames is not None])
        if "text" in self._spec.definition.parts:
            longest = self._spec.config.model.max_positions
            ids = [encode_instruction(one.instruction, self._form, self._tokenizer, longest) for one, _ in filled]
            length = min(longest, -(-max(map(len, ids)) // BUCKET) * BUCKET)
            arrays["instruction"] = np.asarray([[*row, *[0] * (length - len(row))] for row in ids], np.int32)
            arrays["instruction_mask"] = np.asarray([np.arange(length) < len(row) for row in ids])
        return {name: jnp.asarray(value) for name, value in arrays.items()}


def _batches(asked: Iterable[Asked], size: int) -> Iterator[list[Asked]]:
    """Files of one kind, in their order; a kind's last batch may be smaller."""
    waiting: dict[str, list[Asked]] = {}
    for one in asked:
        group = waiting.setdefault(one.kind, [])
        group.append(one)
        if len(group) == size:
            yield waiting.pop(one.kind)
    yield from waiting.values()


def _in_order(known: Mapping[int, Answer], found: Iterable[tuple[int, Answer]]) -> Iterator[Answer]:
    """Answers by their numbers, each as soon as all before it are there."""
    waiting, following = dict(known), 0
    for number, answer in found:
        waiting[number] = answer
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    yield from (answer for _, answer in sorted(waiting.items()))  # what is known behind the last that was found


@contextmanager
def _lines(path: Path | None) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Writes JSON lines into a file that appears when all went well; nowhere without a path."""
    if path is None:
        yield lambda row: None
        return
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield lambda row: print(json.dumps(row), file=file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
