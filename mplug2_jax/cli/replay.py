"""``mplug2 replay``: recompute a step of a run."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data_pipelines.storage.paths import to_path
from mplug2_jax.cli.common import add_command, table

if TYPE_CHECKING:
    from mplug2_jax.inference.replay import ExampleContribution, ReplayedStep
    from mplug2_jax.training.config_changes import ConfigChange


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "replay", run,
        summary="Recompute a step of a run, and rank its examples",
        details="Prints the step's examples, its loss and norms, and how much each example contributed.",
        example="mplug2 replay runs/demo --step 120",
    )  # fmt: skip
    parser.add_argument("workdir", type=to_path, help="work directory of a training run")
    parser.add_argument("--step", type=int, required=True, help="step to recompute; the first is 1")
    parser.add_argument(
        "--rank", type=int, default=64, help="examples of each stream to rank, a backward pass each (default: 64)"
    )
    parser.add_argument("--top", type=int, default=20, help="examples to print (default: 20)")


def run(args: argparse.Namespace) -> int:
    """Print the step; return 1 if it differs from what the run recorded."""
    from mplug2_jax.inference.replay import replay_step
    from mplug2_jax.training.workdir import WorkDir

    replayed = replay_step(WorkDir(args.workdir), args.step, num_ranked=args.rank)
    print(f"step {replayed.step}: batch {replayed.batch}, replayed from step {replayed.start_step}\n")
    if replayed.changes:
        print(f"{describe_changes(replayed.changes)}\n")
    rows = [_metric_row(replayed, name) for name in replayed.metrics]
    print(table(rows, ("metric", "replayed", "recorded"), right=(1, 2)))
    print(f"\n{verdict(replayed)}\n")
    print(table([_example_row(each) for each in replayed.contributions[: args.top]], _HEADER, right=(3, 4, 5)))
    return 1 if replayed.mismatched else 0


def describe_changes(changes: "Sequence[ConfigChange]") -> str:
    """Return a sentence on the config of the step where it is not the run's present one."""
    listed = "; ".join(f"config.{change}" for change in changes)
    return (
        "replayed with the config of that step, except for the mesh and runtime fields, which are the run's "
        f"present ones: {listed} now"
    )


def verdict(replayed: "ReplayedStep") -> str:
    """Return a sentence on whether the step equals what the run recorded."""
    if not replayed.recorded:
        return "metrics.jsonl has no line of this step to compare with"
    compared = sum(name in replayed.recorded for name in replayed.metrics)
    if replayed.mismatched:
        return f"{len(replayed.mismatched)} of {compared} metrics differ: {', '.join(replayed.mismatched)}"
    if differences := replayed.differences:
        largest = max(differences, key=differences.__getitem__)
        return (
            f"{compared - len(differences)} of {compared} metrics equal the recorded ones bit for bit; the others "
            f"differ by at most {differences[largest]:.1e} ({largest}): rounding, if the run had another number of "
            "processes or other devices"
        )
    return f"all {compared} metrics equal the recorded ones bit for bit"


def _metric_row(replayed: "ReplayedStep", name: str) -> tuple[str, str, str]:
    recorded = replayed.recorded.get(name, "-")
    return name, repr(replayed.metrics[name]), "not finite" if recorded is None else str(recorded)


_HEADER = ("stream", "key", "frame times", "loss", "gradient norm", "share")


def _example_row(contribution: "ExampleContribution") -> tuple[str, ...]:
    example = contribution.loaded.example
    times = " ".join(f"{seconds:.2f}" for seconds in example.times)
    numbers = f"{contribution.loss:.4f}", f"{contribution.gradient_norm:.4f}", f"{contribution.share:.1%}"
    return contribution.stream, example.key, times, *numbers
