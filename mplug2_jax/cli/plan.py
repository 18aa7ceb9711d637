"""``mplug2 plan``: what a run would be, before there is any."""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplug2_jax.cli.common import add_command, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from jax.sharding import AbstractMesh, Mesh

    from mplug2_jax.parallel.accelerators import Topology
    from mplug2_jax.parallel.sharding import MeshAxes
    from mplug2_jax.planning.programs import Program
    from mplug2_jax.training.config import RunConfig


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "plan", run, config=True,
        summary="Predict memory, time and traffic of a recipe on any machine",
        details="Says whether the recipe fits machines that need not exist, how long a step takes and what it sends; "
        "or searches for the best mesh. Exit status 1: it does not fit.",
        example="mplug2 plan --config pretrain:large --topology v5p:8x8x8 --html plan.html",
    )  # fmt: skip
    parser.add_argument("--config", help="recipe: a file, or the name of a shipped one; FILE:ARG passes ARG")
    parser.add_argument("--topology", help="chips: v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, h100:64, cpu:8, ...")
    parser.add_argument("--slices", type=int, default=1, help="of the topology, over the network (default: 1)")
    parser.add_argument("--evaluation", help="plan what this evaluation of the recipe does with a batch, not training")
    parser.add_argument(
        "--effort", type=float, help="of the compiler: -1 compiles fast, 0 (default) is what train has, 1 runs fast; a "
        "search has -1",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the plan as plain data, too")
    parser.add_argument("--html", type=Path, help="and as a page to look at")
    parser.add_argument(
        "--save-executable", type=Path, metavar="FOLDER", help="keep the compiled program, for train with "
        "--config.compilation_cache=FOLDER on such machines; compiles with training's effort",
    )  # fmt: skip
    parser.add_argument("--search", action="store_true", help="try meshes, recomputation, accumulation and kernels")
    parser.add_argument("--minutes", type=float, default=30.0, help="that a search may take (default: 30)")
    parser.add_argument("--out", type=Path, default=Path("plan.json"), help="what a search writes (default: plan.json)")
    parser.add_argument(
        "--ledger", choices=("check", "quick", "update"),
        help="compile all shipped recipes for their machines, or a quick few, and compare with "
        "configs/cost_goldens.json, or write it; status 1: more memory or traffic than there",
    )  # fmt: skip
    parser.add_argument("--shardings", action="store_true", help="where every parameter lives, and why some stay whole")
    parser.add_argument("--devices", type=int, help="for --shardings: so many devices (default: those that JAX sees)")


def run(args: argparse.Namespace) -> int:
    """Prints what was asked for."""
    if args.ledger or args.topology is not None:  # whatever is here is not what is planned for
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax, which reads it then
    from mplug2_jax.config import build, load_recipe
    from mplug2_jax.errors import UserError, check_range
    from mplug2_jax.parallel.accelerators import parse_topology
    from mplug2_jax.training.config import RunConfig

    if args.ledger:
        return _ledger(args.ledger)
    if args.config is None:
        raise UserError("--config is missing: name the recipe to plan, as pretrain:large")
    config = build(RunConfig, load_recipe(args.config, args.overrides))
    if args.effort is None:
        args.effort = -1.0 if args.search else 0.0
    check_range("--effort", args.effort, -1, 1)
    check_range("--minutes", args.minutes, 0)
    if args.topology is None and not args.shardings:
        raise UserError("plan needs --topology, as v5p:8x8x8, or --shardings")
    topology = parse_topology(args.topology, args.slices) if args.topology else None
    for option, path in (("--json", args.json), ("--html", args.html), ("--out", args.out if args.search else None)):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{option} {path}: there is no folder {path.absolute().parent}; make it first")
    if args.shardings:
        print("\n".join(shardings(config, _mesh(args, config, topology))))
    if topology is None:
        return 0
    return _search(args, config, topology) if args.search else _report(args, config, topology)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _trace(args: argparse.Namespace, config: "RunConfig", topology: "Topology") -> "Program":
    from mplug2_jax.planning.programs import evaluation_program, training_program

    if args.evaluation:
        return evaluation_program(config, topology, args.evaluation)
    return training_program(config, topology)


def _report(args: argparse.Namespace, config: "RunConfig", topology: "Topology") -> int:
    from data_pipelines.sources.files import write_atomically
    from mplug2_jax.errors import UserError
    from mplug2_jax.planning import remedies
    from mplug2_jax.planning.html import write_page
    from mplug2_jax.planning.programs import Compiled
    from mplug2_jax.planning.report import make_report
    from mplug2_jax.planning.text import text_report

    def trace(config: "RunConfig", topology: "Topology") -> "Program":
        return _trace(args, config, topology)

    if args.save_executable and args.evaluation:
        raise UserError("--save-executable keeps what train runs: leave --evaluation out")
    program = trace(config, topology)
    _say(f"traced in {program.seconds:.1f} s; compiling for {topology}, which can take minutes")
    kept = args.save_executable
    compiled = remedies.try_compile(program, 0.0 if kept else args.effort, kept)
    status = 0
    if not isinstance(compiled, Compiled):
        largest = compiled.largest or remedies.largest_if_there_were_room(config, topology, trace, args.effort)
        print("\n".join(remedies.oom_lines(compiled, topology, largest)))
        nearest = remedies.nearest_that_fits(config, topology, trace, args.effort, _say)
        if nearest is None:
            print("no smaller micro-batch or heavier recomputation that was tried fits: use more chips, or more fsdp")
            return 1
        change, compiled = nearest
        config, status = change.config, 1
        print(f"the nearest change that fits: {' '.join(change.overrides)}\n\nwith it:\n")
    report = make_report(compiled, config)
    print(text_report(report))
    if args.json:
        write_atomically(str(args.json), f"{json.dumps(report.as_json(), indent=2)}\n".encode())
    if kept and not status:
        print(f"executable: {kept}; mplug2 train ... --config.compilation_cache={kept}")
    if args.html:
        print(f"page: {write_page(report, args.html)}")
    return status


def _search(args: argparse.Namespace, config: "RunConfig", topology: "Topology") -> int:
    from mplug2_jax.errors import UserError
    from mplug2_jax.planning.plan_file import PlanFile
    from mplug2_jax.planning.search import search

    if args.evaluation:
        raise UserError("--search is for training: leave --evaluation out")
    if args.out.exists():
        raise UserError(f"--out {args.out} exists: remove it, or name another file")
    cache = Path("~/.cache/mplug2_jax/plans").expanduser()
    tried = search(config, topology, seconds=60 * args.minutes, effort=args.effort, say=_say, cache=cache)
    rows = [
        (
            str(t.candidate) + (" *" if not t.candidate.overrides else ""),
            t.time,
            f"{t.memory / 2**30:.2f}", f"{t.overhead:.1%}", f"{t.exposed:.1%}", f"{t.compile_seconds:.0f}",
        )
        for t in tried
    ]  # fmt: skip
    header = (
        "layout (* the recipe's own)",
        "a step",
        "GiB a device",
        "computed twice",
        "not hidden",
        "compiled in s",
    )
    print(table(rows, header, right=(1, 2, 3, 4, 5)))
    best = tried[0]
    if not best.fits:
        print(f"none of the {len(tried)} layouts that were tried fits {topology}")
        return 1
    figures = {"seconds": list(best.seconds), "memory": best.memory, "exposed": best.exposed, "tried": len(tried)}
    overrides = (*args.overrides, *best.candidate.overrides)
    plan = PlanFile(
        config=args.config, overrides=overrides, topology=topology.name, slices=topology.slices, report=figures
    )
    plan.write(args.out)
    print(f"\n{args.out}: {' '.join(best.candidate.overrides) or 'the recipe as it is'}")
    return 0


def _ledger(what: str) -> int:
    from mplug2_jax.planning import cost_goldens

    path = cost_goldens.ledger_path()
    entries, rows, grown = cost_goldens.read_ledger(path), [], []
    for i, entry in enumerate(entries):
        if what == "quick" and not entry.quick:
            continue
        _say(f"compiling {entry}")
        figures = cost_goldens.figures_of(cost_goldens.measure(entry))
        rows.append(cost_goldens.row(entry, figures))
        if what == "update":
            entries[i] = cost_goldens.with_figures(entry, figures)
            cost_goldens.write_ledger(entries, path)  # entry by entry: some take minutes
        elif entry.figures is None:
            grown.append(f"{entry}: has no figures yet")
        else:
            grown += [f"{entry}: {line}" for line in cost_goldens.growth(entry.figures, figures)]
    print(table(rows, ("program", "GiB a device", "GB sent", "PFLOP", "compiled in s"), right=(1, 2, 3, 4)))
    if grown:
        print("\n" + "\n".join(grown) + "\nif that is meant: mplug2 plan --ledger update, in the same commit")
    return 1 if grown else 0


def _mesh(args: argparse.Namespace, config: "RunConfig", topology: "Topology | None") -> "Mesh | AbstractMesh":
    from mplug2_jax.errors import check_range
    from mplug2_jax.parallel.mesh import abstract_mesh, make_mesh

    if topology is not None:
        return abstract_mesh(config.mesh, topology.devices)
    if args.devices is not None:
        check_range("--devices", args.devices, 1)
        return abstract_mesh(config.mesh, args.devices)
    return make_mesh(config.mesh)


def shardings(config: "RunConfig", mesh: "Mesh | AbstractMesh") -> "Iterator[str]":
    """The mesh, the two tables of rules, every parameter with its place, and the reasons where a rule could not act."""
    import jax

    from mplug2_jax.model.mplug2 import define_model
    from mplug2_jax.parallel.placement import make_param_shardings
    from mplug2_jax.parallel.sharding import ACTIVATION_RULES, PARAMETER_RULES

    definition = define_model(config.model, config.parts())
    placement = make_param_shardings(definition.shapes, definition.axes, mesh)
    yield f"mesh of {mesh.size} devices: {', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}"
    yield f"\n{_rules('parameters', PARAMETER_RULES)}\n\n{_rules('activations', ACTIVATION_RULES)}\n"

    rows, held = [], 0
    shapes, _ = jax.tree_util.tree_flatten_with_path(definition.shapes)
    names = jax.tree.leaves(definition.axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, shape), axes, sharding in zip(shapes, names, jax.tree.leaves(placement.shardings), strict=True):
        name, part = "/".join(key.key for key in path), sharding.shard_shape(shape.shape)
        size = math.prod(part)
        held += size
        mark = " *" if name in placement.skipped_rules else ""
        rows.append((name, _listed(shape.shape), _listed(axes), _listed(sharding.spec) + mark, f"{size:,}"))
    yield table(rows, ("parameter", "shape", "logical axes", "split over", "numbers per device"), right=(4,))
    yield f"\n{definition.num_params():,} parameters; a device holds {held:,}"
    if placement.skipped_rules:
        yield "\n* rules that could not act:"
        yield from (f"  {name}: {why}" for name, why in placement.skipped_rules.items())


def _rules(what: str, rules: "Mapping[str, MeshAxes]") -> str:
    rows = [(name, axes if isinstance(axes, str) else " x ".join(axes or ("-",))) for name, axes in rules.items()]
    return table(rows, (f"{what}: logical axis", "mesh axes"))


def _listed(items: Any) -> str:
    return ", ".join("-" if item is None else str(item) for item in items) or "-"
