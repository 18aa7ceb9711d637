"""``mplug2 plan``: what a run would be, before there is any."""

import argparse
import math
from typing import TYPE_CHECKING, Any

from mplug2_jax.cli.common import add_command, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from jax.sharding import AbstractMesh, Mesh

    from mplug2_jax.parallel.logical import MeshAxes
    from mplug2_jax.training.config import RunConfig


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "plan", run, config=True,
        what="Say what a recipe would do on a mesh; nothing is made, and the devices need not exist.",
        example="mplug2 plan --config demo --config.mesh.tensor=2 --shardings --devices 8",
    )  # fmt: skip
    parser.add_argument(
        "--config", required=True, help="recipe: a file, or the name of a shipped one; FILE:ARG passes ARG"
    )
    parser.add_argument("--devices", type=int, help="so many devices, simulated (default: those that JAX sees)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shardings", action="store_true", help="where every parameter lives, and why some stay whole")


def run(args: argparse.Namespace) -> int:
    """Prints what was asked for."""
    from mplug2_jax.config import build, load_recipe
    from mplug2_jax.errors import check_range
    from mplug2_jax.parallel.mesh import abstract_mesh, make_mesh
    from mplug2_jax.training.config import RunConfig

    config = build(RunConfig, load_recipe(args.config, args.overrides))
    if args.devices is not None:
        check_range("--devices", args.devices, 1)
    mesh = make_mesh(config.mesh) if args.devices is None else abstract_mesh(config.mesh, args.devices)
    print("\n".join(shardings(config, mesh)))
    return 0


def shardings(config: "RunConfig", mesh: "Mesh | AbstractMesh") -> "Iterator[str]":
    """The mesh, the two tables of rules, every parameter with its place, and the reasons where a rule could not act."""
    import jax

    from mplug2_jax.model.mplug2 import define
    from mplug2_jax.parallel.logical import ACTIVATION_RULES, PARAMETER_RULES
    from mplug2_jax.parallel.placement import place_parameters

    definition = define(config.model, config.parts())
    placement = place_parameters(definition.shapes, definition.axes, mesh)
    yield f"mesh of {mesh.size} devices: {', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}"
    yield f"\n{_rules('parameters', PARAMETER_RULES)}\n\n{_rules('activations', ACTIVATION_RULES)}\n"

    rows, held = [], 0
    shapes, _ = jax.tree_util.tree_flatten_with_path(definition.shapes)
    names = jax.tree.leaves(definition.axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, shape), axes, sharding in zip(shapes, names, jax.tree.leaves(placement.shardings), strict=True):
        name, part = "/".join(key.key for key in path), sharding.shard_shape(shape.shape)
        size = math.prod(part)
        held += size
        mark = " *" if name in placement.reasons else ""
        rows.append((name, _listed(shape.shape), _listed(axes), _listed(sharding.spec) + mark, f"{size:,}"))
    yield table(rows, ("parameter", "shape", "logical axes", "split over", "numbers per device"), right=(4,))
    yield f"\n{definition.count():,} parameters; a device holds {held:,}"
    if placement.reasons:
        yield "\n* rules that could not act:"
        yield from (f"  {name}: {why}" for name, why in placement.reasons.items())


def _rules(what: str, rules: "Mapping[str, MeshAxes]") -> str:
    rows = [(name, axes if isinstance(axes, str) else " x ".join(axes or ("-",))) for name, axes in rules.items()]
    return table(rows, (f"{what}: logical axis", "mesh axes"))


def _listed(items: Any) -> str:
    return ", ".join("-" if item is None else str(item) for item in items) or "-"
