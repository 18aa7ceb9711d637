"""What several commands share: their parsers' form, opening a run, tables."""

import argparse
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from mplug2_jax.cli.parsing import add_verbosity

if TYPE_CHECKING:
    from data_pipelines.tokenizers import Tokenizer
    from mplug2_jax.evaluation.results import EvaluationResult
    from mplug2_jax.model.mplug2 import Params
    from mplug2_jax.training.state import RunSpec


def add_group(commands: Any, name: str, *, summary: str, details: str = "", example: str) -> Any:
    """A command that only has sub-commands; they are added to what is returned."""
    return _add_parser(commands, name, summary, details, example).add_subparsers(
        dest="subcommand", required=True, metavar="COMMAND"
    )


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    details: str = "",
    example: str,
    config: bool = False,
) -> argparse.ArgumentParser:
    """A sub-parser for a command.

    Args:
        commands: what it is added to.
        name: of the command.
        run: does it, and returns the exit status.
        summary: what it does in a few words, for lists of commands and as the first line of its own help.
        details: all else that its own help says.
        example: one that works.
        config: lets ``--config.field=value`` through.
    """
    added = _add_parser(commands, name, summary, details, example)
    added.set_defaults(run=run)
    if config:
        added.set_defaults(overrides=[])
    return added


def _add_parser(commands: Any, name: str, summary: str, details: str, example: str) -> argparse.ArgumentParser:
    paragraphs = (textwrap.fill(line, 100) for line in details.splitlines())
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description="\n".join([f"{summary}.", *([""] if details else []), *paragraphs]),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_verbosity(added)
    return added


def add_run(parser: argparse.ArgumentParser) -> None:
    """The options that choose a run and a step of it."""
    parser.add_argument("--workdir", type=Path, required=True, help="work directory of a training run")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the last)")


def open_run(args: argparse.Namespace) -> "tuple[RunSpec, Params, int, Tokenizer]":
    """The run of a work directory, with overrides: its plan, the parameters of a step, that step, its tokeniser.

    The parameters are the averaged ones where the run keeps an average, which is then said.
    """
    from mplug2_jax.config import as_recipe, build, override
    from mplug2_jax.parallel.mesh import make_mesh
    from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
    from mplug2_jax.training.config import RunConfig
    from mplug2_jax.training.state import make_run_spec
    from mplug2_jax.training.workdir import WorkDir, special_tokens

    workdir = WorkDir(args.workdir)
    begun = workdir.read_config()
    config = build(RunConfig, override(as_recipe(begun), args.overrides))
    tokenizer = workdir.load_tokenizer(config)
    spec = make_run_spec(config, special_tokens(tokenizer), make_mesh(config.mesh))
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint, read_only=True)
    try:
        averaged = bool(begun.ema_decay and config.ema_decay)
        params, step = checkpoints.restore_params(
            spec.eval_param_shapes, args.step, tree="ema" if averaged else "params"
        )
    finally:
        checkpoints.close()
    if averaged:
        logging.info("step %d: using the EMA parameters; --config.ema_decay=0 selects the last ones", step)
    return spec, params, step, tokenizer


def table(rows: Sequence[Sequence[str]], header: Sequence[str], right: Sequence[int] = ()) -> str:
    """Aligned columns; those in ``right`` are aligned to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def show(line: Sequence[str]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join([show(lines[0]), "  ".join("-" * w for w in widths), *map(show, lines[1:])])


def results_table(results: "Sequence[EvaluationResult]") -> str:
    """Every figure, those that are absent too, beside its baseline and what is published, where anything is."""
    from mplug2_jax.metrics.units import format_metric, ratio_to_baseline
    from mplug2_jax.report.published import published_results

    rows = []
    for result in results:
        others = published_results(result.recipe, result.formats)
        for what, value in result.metrics.items():
            base = result.baselines[what]
            ratio = ratio_to_baseline(what, value, base)
            times = "-" if math.isnan(ratio) else f"{ratio:.1f}x"
            low, high = (format_metric(what, end) for end in result.confidence_intervals[what])
            rows.append(
                (result.name, what, format_metric(what, value), f"{low} to {high}", format_metric(what, base), times,
                 str(result.num_examples), format_metric(what, others[what].value) if what in others else "")
            )  # fmt: skip
        rows += [(result.name, what, "absent", "", "", "", str(result.num_examples), "") for what in result.absent]
    header = ("evaluation", "figure", "model", "95 % interval", "baseline", "ratio", "examples", "published")
    width = len(header) if any(row[-1] for row in rows) else len(header) - 1
    return table([row[:width] for row in rows], header[:width], right=range(2, width))


_ASKED = {"vlc": "which text belongs to this {}?", "mlm": "which words are masked?"}
_ASKED["rerank"] = _ASKED["vlc"]


def sample_lines(results: "Sequence[EvaluationResult]", folder: Path, most: int = 4) -> str:
    """Return the first held-out example of up to ``most`` evaluations: its picture, prediction and reference.

    Evaluations with pictures come first; examples are not chosen by how well the model does. ``folder`` is where the
    results are kept.
    """
    firsts = [(result, result.samples[0]) for result in results if result.samples]
    lines = []
    for result, sample in sorted(firsts, key=lambda pair: "frames" not in pair[1].example.arrays)[:most]:
        frames = sample.example.arrays.get("frames", ())
        shown = "clip" if len(frames) > 1 else "picture"
        asked = sample.example.instruction or _ASKED.get(result.task, result.task).format(shown)
        lines.append(f"{result.name}: {asked}")
        if len(frames):
            lines.append(f"    {shown + ':':<11} {folder / f'{result.name}-0.png'}")
        lines += [f"    prediction: {sample.prediction}", f"    reference:  {sample.references[0]}"]
    return "\n".join(lines)
