"""Helpers that several commands share: parsers, opening a run, tables."""

import argparse
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from data_pipelines.storage.paths import to_path
from mplug2_jax.cli.parsing import add_verbosity
from mplug2_jax.console import align_columns

if TYPE_CHECKING:
    from data_pipelines.tokenizers import Tokenizer
    from mplug2_jax.evaluation.results import EvaluationResult
    from mplug2_jax.model.mplug2 import Params
    from mplug2_jax.training.state import RunSpec


def add_group(subparsers: Any, name: str, *, summary: str, details: str = "", example: str) -> Any:
    """Add a command that only has sub-commands, and return the object that takes those."""
    return _add_parser(subparsers, name, summary, details, example).add_subparsers(
        dest="subcommand", required=True, metavar="COMMAND"
    )


def add_command(
    subparsers: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    details: str = "",
    example: str,
    accepts_overrides: bool = False,
) -> argparse.ArgumentParser:
    """Add a command, and return its parser.

    Args:
        subparsers: the sub-parsers to add it to.
        name: of the command.
        run: runs the command and returns its exit status.
        summary: a few words for lists of commands and the first line of its help.
        details: the other lines of its help.
        example: a command line that works.
        accepts_overrides: whether it accepts ``--config.field=value``.
    """
    parser = _add_parser(subparsers, name, summary, details, example)
    parser.set_defaults(run=run)
    if accepts_overrides:
        parser.set_defaults(overrides=[])
    return parser


def _add_parser(subparsers: Any, name: str, summary: str, details: str, example: str) -> argparse.ArgumentParser:
    paragraphs = (textwrap.fill(line, 100) for line in details.splitlines())
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description="\n".join([f"{summary}.", *([""] if details else []), *paragraphs]),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_verbosity(parser)
    return parser


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a run and a step of it."""
    parser.add_argument("--workdir", type=to_path, required=True, help="work directory of a training run")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the last)")


def restore_run(args: argparse.Namespace) -> "tuple[RunSpec, Params, int, Tokenizer]":
    """Open the run of a work directory, with overrides, and return its spec, parameters, step and tokenizer.

    The parameters are the EMA where the run keeps one, which is logged.
    """
    from mplug2_jax.inference.checkpoint_eval import CheckpointSource
    from mplug2_jax.parallel.mesh import make_mesh
    from mplug2_jax.training.state import make_run_spec
    from mplug2_jax.training.workdir import special_tokens

    run = CheckpointSource.from_workdir(args.workdir, args.overrides)
    spec = make_run_spec(run.config, special_tokens(run.tokenizer), make_mesh(run.config.mesh))
    tree = "ema" if run.use_ema else "params"
    try:
        params, step = run.checkpoints.restore_params(spec.eval_param_shapes, args.step, tree=tree)
    finally:
        run.checkpoints.close()
    if run.use_ema:
        logging.info("step %d: using the EMA parameters; --config.ema_decay=0 selects the last ones", step)
    return spec, params, step, run.tokenizer


def table(rows: Sequence[Sequence[str]], header: Sequence[str], right: Sequence[int] = ()) -> str:
    """Return a table with aligned columns, those in ``right`` aligned to the right."""
    dashes = ["-" * max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(align_columns([header, dashes, *rows], right))


def results_table(results: "Sequence[EvaluationResult]") -> str:
    """Return every metric, absent ones too, next to its baseline and published values, in a table."""
    from mplug2_jax.metrics.units import format_metric, ratio_to_baseline
    from mplug2_jax.report.published import published_results

    rows = []
    for result in results:
        references = published_results(result.recipe, result.formats)
        for name, value in result.metrics.items():
            base = result.baselines[name]
            ratio = ratio_to_baseline(name, value, base)
            times = "-" if math.isnan(ratio) else f"{ratio:.1f}x"
            low, high = (format_metric(name, end) for end in result.confidence_intervals[name])
            rows.append(
                (result.name, name, format_metric(name, value), f"{low} to {high}", format_metric(name, base), times,
                 str(result.num_examples), format_metric(name, references[name].value) if name in references else "")
            )  # fmt: skip
        rows += [(result.name, name, "absent", "", "", "", str(result.num_examples), "") for name in result.absent]
    header = ("evaluation", "metric", "model", "95% CI", "baseline", "ratio", "examples", "published")
    width = len(header) if any(row[-1] for row in rows) else len(header) - 1
    return table([row[:width] for row in rows], header[:width], right=range(2, width))


_DEFAULT_PROMPTS = {"vlc": "which text belongs to this {}?", "mlm": "which words are masked?"}
_DEFAULT_PROMPTS["rerank"] = _DEFAULT_PROMPTS["vlc"]


def sample_lines(results: "Sequence[EvaluationResult]", folder: Path, limit: int = 4) -> str:
    """Return the first held-out example of up to ``limit`` evaluations: its image, prediction and reference.

    Evaluations with images come first; examples are not chosen by how well the model does. ``folder`` holds the saved
    results.
    """
    firsts = [(result, result.samples[0]) for result in results if result.samples]
    lines = []
    for result, sample in sorted(firsts, key=lambda pair: "frames" not in pair[1].example.arrays)[:limit]:
        frames = sample.example.arrays.get("frames", ())
        medium = "video" if len(frames) > 1 else "image"
        prompt = sample.example.instruction or _DEFAULT_PROMPTS.get(result.task, result.task).format(medium)
        lines.append(f"{result.name}: {prompt}")
        if len(frames):
            lines.append(f"    {medium + ':':<11} {folder / f'{result.name}-0.png'}")
        lines += [f"    prediction: {sample.prediction}", f"    reference:  {sample.references[0]}"]
    return "\n".join(lines)
