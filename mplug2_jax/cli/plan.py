"""``mplug2 plan``: predict a run on machines that need not exist."""

import argparse
import dataclasses
import functools
import json
import math
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from mplug2_jax.cli.common import add_command, table
from mplug2_jax.cli.parsing import check_output, output_path
from mplug2_jax.errors import UserError, check_range

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from jax.sharding import AbstractMesh, Mesh

    from mplug2_jax.parallel.accelerators import Topology
    from mplug2_jax.parallel.sharding import MeshAxes
    from mplug2_jax.training.config import RunConfig


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "plan", run, accepts_overrides=True,
        summary="Predict memory, step time and communication of a recipe on any machine",
        details="Compiles the recipe ahead of time for machines that need not exist and reports whether it fits, or "
        "searches for the best layout. Exit status 1: it does not fit.",
        example="mplug2 plan --config pretrain:large --topology v5p:8x8x8 --html plan.html",
    )  # fmt: skip
    parser.add_argument("--config", help="recipe: a file, or the name of a shipped one; FILE:ARG passes ARG")
    parser.add_argument("--topology", help="chips: v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, h100:64, cpu:8, ...")
    parser.add_argument("--slices", type=int, default=1, help="number of slices of the topology (default: 1)")
    parser.add_argument("--evaluation", help="plan this evaluation of the recipe instead of training")
    parser.add_argument(
        "--effort", type=float, help="compiler effort: -1 compiles fast, 0 (default) is what train uses, 1 optimizes "
        "most; a search uses -1",
    )  # fmt: skip
    parser.add_argument("--json", type=output_path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--html", type=output_path, metavar="FILE", help="write the plan as an HTML page")
    parser.add_argument(
        "--save-executable", type=output_path, metavar="DIR", help="save the compiled program, for train with "
        "--config.compilation_cache=DIR on such machines; compiles with training's effort",
    )  # fmt: skip
    parser.add_argument(
        "--search", action="store_true", help="search over meshes, rematerialization, gradient accumulation and kernels"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="time limit of the search (default: 30)")
    parser.add_argument(
        "--out", type=output_path, metavar="FILE", default=Path("plan.json"),
        help="output of the search (default: plan.json)",
    )  # fmt: skip
    parser.add_argument(
        "--cost-goldens", choices=("check", "quick", "update"),
        help="compile all shipped recipes for their target machines (quick: a few) and compare with "
        "configs/cost_goldens.json, or update it; exit status 1: memory or traffic increased",
    )  # fmt: skip
    parser.add_argument("--ledger", dest="cost_goldens", choices=("check", "quick", "update"), help=argparse.SUPPRESS)
    parser.add_argument("--shardings", action="store_true", help="print the sharding of every parameter, and why")
    parser.add_argument("--devices", type=int, help="for --shardings: number of devices (default: those that JAX sees)")


def run(args: argparse.Namespace) -> int:
    """Print the plan, the result of the search, the comparison with the cost goldens, or the shardings."""
    if args.cost_goldens or args.topology is not None:  # the accelerators of this machine are not needed
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported, which reads it then
    from mplug2_jax.parallel.accelerators import parse_topology
    from mplug2_jax.training.durations import load_run_config

    if args.cost_goldens:
        return _run_cost_goldens(args.cost_goldens)
    if args.config is None:
        raise UserError("--config is missing: name the recipe to plan, as pretrain:large")
    config = load_run_config(args.config, args.overrides)
    if args.effort is None:
        args.effort = -1.0 if args.search else 0.0
    check_range("--effort", args.effort, -1, 1)
    check_range("--minutes", args.minutes, 0)
    if args.topology is None and not args.shardings:
        raise UserError("plan needs --topology, as v5p:8x8x8, or --shardings")
    topology = parse_topology(args.topology, args.slices) if args.topology else None
    for option, path in (("--json", args.json), ("--html", args.html)):
        check_output(option, path, new=False, parent=True)
    check_output("--save-executable", args.save_executable, new=False)
    if args.search:
        check_output("--out", args.out, parent=True)
    if args.shardings:
        print("\n".join(format_shardings(config, _make_mesh(args, config, topology))))
    if topology is None:
        return 0
    return _run_search(args, config, topology) if args.search else _run_plan(args, config, topology)


def _run_plan(args: argparse.Namespace, config: "RunConfig", topology: "Topology") -> int:
    from data_pipelines.storage.file_system import write_atomically
    from mplug2_jax.planning import remedies
    from mplug2_jax.planning.html import write_html
    from mplug2_jax.planning.programs import CompiledProgram, trace_program
    from mplug2_jax.planning.report import make_report
    from mplug2_jax.planning.text import format_report

    trace = functools.partial(trace_program, evaluation=args.evaluation)
    executable_dir = args.save_executable
    if executable_dir and args.evaluation:
        raise UserError("--save-executable saves the program that train runs: remove --evaluation")
    program = trace(config, topology)
    logging.info("traced in %.1f s; compiling for %s, which can take minutes", program.trace_seconds, topology)
    compiled = remedies.try_compile(program, 0.0 if executable_dir else args.effort, executable_dir)
    fits = isinstance(compiled, CompiledProgram)
    if not isinstance(compiled, CompiledProgram):
        buffers = compiled.largest or remedies.largest_buffers_on_bigger_chip(config, topology, trace, args.effort)
        print("\n".join(remedies.format_oom(compiled, topology, buffers)))
        nearest = remedies.find_nearest_fit(config, topology, trace, args.effort)
        if nearest is None:
            print("no smaller microbatch or further rematerialization that was tried fits: use more chips or more fsdp")
            return 1
        change, compiled = nearest
        config = change.config
        print(f"nearest change that fits: {' '.join(change.overrides)}\n\nwith it:\n")
    report = make_report(compiled, config)
    print(format_report(report))
    if args.json:
        write_atomically(str(args.json), f"{json.dumps(report.to_json(), indent=2)}\n".encode())
    if executable_dir and fits:
        word = shlex.quote(f"--config.compilation_cache={executable_dir}")
        print(f"executable: {executable_dir}; mplug2 train ... {word}")
    if args.html:
        print(f"page: {write_html(report, args.html)}")
    return 0 if fits else 1


def _run_search(args: argparse.Namespace, config: "RunConfig", topology: "Topology") -> int:
    from mplug2_jax.planning.plan_file import PlanFile
    from mplug2_jax.planning.search import search

    if args.evaluation:
        raise UserError("--search is for training: remove --evaluation")
    cache_dir = Path("~/.cache/mplug2_jax/plans").expanduser()
    trials = search(config, topology, seconds=60 * args.minutes, effort=args.effort, cache_dir=cache_dir)
    rows = [
        (
            str(t.candidate) + (" *" if not t.candidate.overrides else ""), t.outcome, f"{t.memory_bytes / 2**30:.2f}",
            f"{t.recompute_overhead:.1%}", f"{t.exposed_fraction:.1%}", f"{t.compile_seconds:.0f}",
        )
        for t in trials
    ]  # fmt: skip
    header = ("layout (* the recipe's own)", "step time", "GiB/device", "recomputed", "exposed", "compile (s)")
    print(table(rows, header, right=(1, 2, 3, 4, 5)))
    best = trials[0]
    if not best.fits:
        print(f"none of the {len(trials)} layouts that were tried fits {topology}")
        return 1
    plan = PlanFile(
        config=args.config,
        overrides=(*args.overrides, *best.candidate.overrides),
        topology=topology.name,
        slices=topology.slices,
        predictions={
            "step_seconds": list(best.step_seconds), "memory_bytes": best.memory_bytes,
            "exposed_fraction": best.exposed_fraction, "num_trials": len(trials),
        },
    )  # fmt: skip
    plan.write(args.out)
    print(f"\n{args.out}: {' '.join(best.candidate.overrides) or 'the recipe unchanged'}")
    return 0


def _run_cost_goldens(action: str) -> int:
    from mplug2_jax.planning import cost_goldens

    path = cost_goldens.goldens_path()
    goldens, rows, regressions = cost_goldens.read_goldens(path), [], []
    for i, golden in enumerate(goldens):
        if action == "quick" and not golden.quick:
            continue
        logging.info("compiling %s", golden)
        costs = cost_goldens.measure_costs(golden)
        rows.append(cost_goldens.format_row(golden, costs))
        if action == "update":
            goldens[i] = dataclasses.replace(golden, costs=costs)
            cost_goldens.write_goldens(goldens, path)  # after each, as some take minutes
        elif golden.costs is None:
            regressions.append(f"{golden}: has no golden costs yet")
        else:
            regressions += [f"{golden}: {line}" for line in cost_goldens.find_regressions(golden.costs, costs)]
    columns = ("program", "GiB/device", "GB in HBM", "GB sent", "PFLOP", "compile (s)")
    print(table(rows, columns, right=range(1, len(columns))))
    if regressions:
        print("\n".join(["", *regressions, "if intended: mplug2 plan --cost-goldens update, in the same commit"]))
    return 1 if regressions else 0


def _make_mesh(args: argparse.Namespace, config: "RunConfig", topology: "Topology | None") -> "Mesh | AbstractMesh":
    from mplug2_jax.parallel.mesh import abstract_mesh, make_mesh

    if topology is None:
        check_range("--devices", args.devices, 1)
    devices = args.devices if topology is None else topology.devices
    return make_mesh(config.mesh) if devices is None else abstract_mesh(config.mesh, devices)


def format_shardings(config: "RunConfig", mesh: "Mesh | AbstractMesh") -> "Iterator[str]":
    """Yield the mesh, both tables of sharding rules, the sharding of every parameter, and skipped rules."""
    import jax

    from mplug2_jax.model.mplug2 import define_model
    from mplug2_jax.parallel.placement import make_param_shardings
    from mplug2_jax.parallel.sharding import ACTIVATION_RULES, PARAMETER_RULES

    model_def = define_model(config.model, config.parts())
    placement = make_param_shardings(model_def.shapes, model_def.logical_axes, mesh)
    yield f"mesh of {mesh.size} devices: {', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}"
    yield f"\n{_format_rules('parameters', PARAMETER_RULES)}\n\n{_format_rules('activations', ACTIVATION_RULES)}\n"

    rows, num_local = [], 0
    shapes, _ = jax.tree_util.tree_flatten_with_path(model_def.shapes)
    names = jax.tree.leaves(model_def.logical_axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, shape), axes, sharding in zip(shapes, names, jax.tree.leaves(placement.shardings), strict=True):
        name = "/".join(key.key for key in path)
        size = math.prod(sharding.shard_shape(shape.shape))
        num_local += size
        mark = " *" if name in placement.skipped_rules else ""
        rows.append((name, _join(shape.shape), _join(axes), _join(sharding.spec) + mark, f"{size:,}"))
    yield table(rows, ("parameter", "shape", "logical axes", "sharded over", "elements per device"), right=(4,))
    yield f"\n{model_def.num_params():,} parameters; {num_local:,} per device"
    if placement.skipped_rules:
        yield "\n* skipped rules:"
        yield from (f"  {name}: {reason}" for name, reason in placement.skipped_rules.items())


def _format_rules(title: str, rules: "Mapping[str, MeshAxes]") -> str:
    rows = [(name, axes if isinstance(axes, str) else " x ".join(axes or ("-",))) for name, axes in rules.items()]
    return table(rows, (f"{title}: logical axis", "mesh axes"))


def _join(items: Any) -> str:
    return ", ".join("-" if item is None else str(item) for item in items) or "-"
