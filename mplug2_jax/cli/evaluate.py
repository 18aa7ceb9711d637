"""``mplug2 eval``: evaluate a checkpoint."""

import argparse
from typing import Any

from mplug2_jax.cli.common import add_command, add_run, open_run, results_table, sample_lines
from mplug2_jax.errors import UserError, did_you_mean


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "eval", run, config=True,
        what="Evaluate a checkpoint on its recipe's held-out data; the mesh and the evaluations can be overridden.",
        example="mplug2 eval --workdir runs/demo --only image_question --config.mesh.fsdp=1",
    )  # fmt: skip
    add_run(parser)
    parser.add_argument("--only", action="append", metavar="NAME", help="evaluate this one; may be given several times")


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the table and keeps the results in the work directory."""
    from mplug2_jax.evaluation.loop import Evaluation, save_result
    from mplug2_jax.parallel.processes import is_first, join
    from mplug2_jax.training.preemption import PreemptionNotice

    join()
    plan, params, step, tokenizer = open_run(args)
    config = plan.config
    names = args.only or list(config.evaluations)
    if not names:
        raise UserError(f"the run in {args.workdir} has no evaluations in its config")
    for name in names:
        if name not in config.evaluations:
            raise UserError(f"--only {name} is no evaluation of this run: {did_you_mean(name, config.evaluations)}")
    results = []
    with PreemptionNotice() as notice:
        for name in names:
            evaluation = Evaluation(
                name, config.evaluations[name], plan.definition, plan.context, tokenizer, plan.mesh, seed=config.seed
            )
            results.append(evaluation.run(params, step, lambda phase: notice.check()))
            if is_first():
                save_result(results[-1], args.workdir)
                print(
                    f"step {step}  {name}: {results[-1].examples} examples in {results[-1].seconds:.1f} s", flush=True
                )
    if is_first():
        print(f"\n{results_table(results)}\n\n{sample_lines(results)}")
    return 0
