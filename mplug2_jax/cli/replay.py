"""``mplug2 replay``: make a step of a run again."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplug2_jax.cli.common import add_command, table

if TYPE_CHECKING:
    from mplug2_jax.inference.replay import ExampleContribution, ReplayedStep


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "replay", run,
        summary="Recompute a step of a run, and rank its examples",
        details="Prints the step's examples, its loss and norms, and how much each example contributed.",
        example="mplug2 replay runs/demo --step 120",
    )  # fmt: skip
    parser.add_argument("workdir", type=Path, help="work directory of a training run")
    parser.add_argument("--step", type=int, required=True, help="step to make again; the first is 1")
    parser.add_argument(
        "--rank", type=int, default=64, help="examples of each stream to rank, a backward pass each (default: 64)"
    )
    parser.add_argument("--top", type=int, default=20, help="examples to print (default: 20)")


def run(args: argparse.Namespace) -> int:
    """Prints the step; status 1 if it is not what the run recorded."""
    from mplug2_jax.inference.replay import replay_step
    from mplug2_jax.training.workdir import WorkDir

    found = replay_step(WorkDir(args.workdir), args.step, num_ranked=args.rank)
    print(f"step {found.step}: batch {found.batch}, made again from step {found.start}\n")
    print(table([_compared(found, name) for name in found.metrics], ("metric", "again", "recorded"), right=(1, 2)))
    print(f"\n{verdict(found)}\n")
    print(table([_row(part) for part in found.contributions[: args.top]], _HEADER, right=(3, 4, 5)))
    return 1 if found.wrong else 0


def verdict(found: "ReplayedStep") -> str:
    """Whether the step is what the run recorded, in a sentence."""
    if not found.recorded:
        return "metrics.jsonl has no line of this step to compare with"
    compared = sum(name in found.recorded for name in found.metrics)
    if found.wrong:
        return f"{len(found.wrong)} of {compared} metrics differ: {', '.join(found.wrong)}"
    if found.differences:
        largest = max(found.differences, key=found.differences.__getitem__)
        return (
            f"{compared - len(found.differences)} of {compared} metrics equal the recorded ones bit for bit; others "
            f"differ by at most {found.differences[largest]:.1e} ({largest}), which is rounding if the run had another "
            "number of processes or other devices"
        )
    return f"all {compared} metrics equal the recorded ones, bit for bit"


def _compared(found: "ReplayedStep", name: str) -> tuple[str, str, str]:
    recorded = found.recorded.get(name, "-")
    return name, repr(found.metrics[name]), "not finite" if recorded is None else str(recorded)


_HEADER = ("stream", "key", "frame times", "loss", "gradient norm", "share")


def _row(part: "ExampleContribution") -> tuple[str, ...]:
    example = part.made.example
    times = " ".join(f"{seconds:.2f}" for seconds in example.times)
    return part.stream, example.key, times, f"{part.loss:.4f}", f"{part.gradient_norm:.4f}", f"{part.share:.1%}"
