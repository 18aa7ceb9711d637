"""``mplug2 generate``: an image, video or text file in, text out."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplug2_jax.cli.common import add_command, add_run, open_run
from mplug2_jax.errors import UserError, check_range

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mplug2_jax.training.config import RunConfig


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "generate", run, config=True,
        what="Answer an instruction about images or videos, or the instruction that a text file holds.",
        example='mplug2 generate --workdir runs/demo clip.mp4 --instruction "which way does the red digit move?"',
    )  # fmt: skip
    add_run(parser)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="image, video, GIF or .txt")
    parser.add_argument("--instruction", help="what to do or answer; in it {text} stands for a text file's content")
    parser.add_argument("--beams", type=int, help="beams of the search; 1 is greedy (default: the run's)")
    parser.add_argument(
        "--top-p", type=float, help="draw from the likeliest tokens that hold this much probability, as 0.9"
    )
    parser.add_argument(
        "--temperature", type=float, help="of what is drawn: below 1 is more cautious (default: the run's)"
    )
    parser.add_argument("--seed", type=int, help="of what is drawn (default: 0)")
    parser.add_argument("--max-length", type=int, help="most tokens of an answer (default: the run's)")


def run(args: argparse.Namespace) -> int:
    """Prints one line per file."""
    import jax
    import jax.numpy as jnp

    from data_pipelines.examples import ExampleConfig, instruction_ids
    from mplug2_jax.generation.decode import generate
    from mplug2_jax.objectives.forward import Forward

    check_range("--beams", args.beams, 1)
    check_range("--max-length", args.max_length, 1)
    inputs = [(path, *read_input(path, args.instruction)) for path in args.files if check_file(path)]
    plan, params, _, tokenizer = open_run(args)
    config = plan.config
    if "decoder" not in plan.definition.parts:
        raise UserError(f"the model in {args.workdir} has no decoder (its parts: {', '.join(plan.definition.parts)})")
    longest = config.model.max_positions
    asked = config.tasks.search
    search = dataclasses.replace(
        asked, beams=args.beams or asked.beams, max_length=min(args.max_length or asked.max_length, longest),
        top_p=asked.top_p if args.top_p is None else args.top_p,
        temperature=asked.temperature if args.temperature is None else args.temperature,
    )  # fmt: skip
    for option, value in (("--temperature", args.temperature), ("--seed", args.seed)):
        if value is not None and not search.top_p:
            raise UserError(
                f"{option} {value} is of what is drawn, and this searches: add --top-p 0.9, or leave it out"
            )
    trained = [stream.data.examples for stream in config.streams.values() if stream.data.examples.instructions]
    form = trained[0] if trained else ExampleConfig()
    read = form.reader(tokenizer)

    @jax.jit
    def answer(params: Any, batch: Any) -> Any:
        model = plan.definition.bind(params)
        forward = Forward(model, batch)
        memory, mask = forward.described if "frames" in batch else forward.instructed
        found = generate(model.decoder, memory, mask, search, plan.context.tokens, batch["seed"])
        return found.ids[:, 0], found.lengths[:, 0]

    for number, (path, is_picture, instruction) in enumerate(inputs):
        batch: dict[str, Any] = {"seed": jnp.asarray([(args.seed or 0) + number], jnp.int32)}
        if is_picture:
            batch["frames"] = jnp.asarray(read_frames(path, config))[None]
            if "vision" not in plan.definition.parts:
                raise UserError(f"{path} is a picture, but the model in {args.workdir} has no vision")
        if instruction and "text" in plan.definition.parts:
            ids = instruction_ids(instruction, form, tokenizer, longest)
            batch["instruction"] = jnp.asarray([ids], jnp.int32)
            batch["instruction_mask"] = jnp.ones((1, len(ids)), bool)
        elif not is_picture:
            raise UserError(f"{path} is a text, but the model in {args.workdir} has no text encoder")
        with jax.set_mesh(plan.mesh):
            ids, length = answer(params, batch)
        print(f"{path}: {read(ids[0, : int(length[0])].tolist())}", flush=True)
    return 0


def check_file(path: Path) -> bool:
    """True for a file that exists.

    Raises:
        UserError: there is none.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; expected an image, a video or a .txt file")
    return True


def read_input(path: Path, instruction: str | None) -> tuple[bool, str]:
    """Whether a file is a picture, and the instruction for it.

    Raises:
        UserError: a text file that is not UTF-8 or empty, or an instruction that leaves it out.
    """
    if path.suffix.lower() != ".txt":
        return True, instruction or "describe the picture"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text:
        raise UserError(
            f"{path} is empty; a text file holds the instruction, or what {{text}} in --instruction stands for"
        )
    if instruction and "{text}" not in instruction:
        raise UserError(f"--instruction {instruction!r} has no {{text}}, so the content of {path} would go unread")
    return False, (instruction or "{text}").replace("{text}", text)


def read_frames(path: Path, config: "RunConfig") -> "NDArray[Any]":
    """A picture's frames at the model's size: one of an image, as many of a video as the run was trained on."""
    import numpy as np

    from data_pipelines.media import media_of
    from data_pipelines.visual import VisualConfig, load_visual

    data = [stream.data for stream in config.streams.values() if stream.data.kind != "text"]
    released = any(each.visual.transform.startswith("released") for each in data)
    visual = VisualConfig(
        image_size=config.model.image_size,
        num_frames=max((each.visual.num_frames for each in data if each.kind == "video"), default=1),
        transform="released_test" if released else "resize",
    )
    return load_visual(media_of(path), visual, np.random.default_rng(0)).frames
