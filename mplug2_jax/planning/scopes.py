"""Module scopes of a model, from the names that JAX gives to traced operations."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator

from mplug2_jax.planning.hlo import Computation, HloModule, Instruction

_WRAPPER = re.compile(r"(\w+)\((.*)\)$")
# Scopes that JAX inserts between those of a model.
_JAX_SCOPE = re.compile(
    r"^(while|body|cond|closed_call|checkpoint|remat\d?|rematted_computation|pjit|core_call|scan|shard_map|"
    r"custom_[jv][vj]p_call\w*|branch_\d+_fun|main|.*->.*|)$"  # a->b: of an einsum
)


def pretty_scope(op_name: str) -> str:
    """Return the model's scope of an operation.

    Names of jitted functions, loops and transformations are removed; the operation's own name is kept only where
    nothing else would remain. Operations of the backward pass and recomputed ones are marked.

    Example:
        >>> pretty_scope("jit(step)/transpose(jvp(vision))/while/body/closed_call/mlp/dot_general")
        'vision/mlp (backward)'
    """
    if op_name.startswith("(") and op_name.endswith(")"):  # several operations, which CPU programs join by colons
        op_name = op_name[1:-1].rpartition(":")[2]
    backward, recomputed, scopes = False, "rematted_computation" in op_name, []
    parts = _split_scopes(op_name)
    for position, part in enumerate(parts):
        while match := _WRAPPER.match(part):
            wrapper, part = match.groups()
            backward |= wrapper == "transpose"
            if wrapper in ("jit", "pjit", "pmap"):
                part = ""
        if position < len(parts) - 1 or (len(parts) == 1 and "(" not in op_name):
            scopes += [scope for scope in part.split("/") if not _JAX_SCOPE.match(scope)]
    name = "/".join(scopes) or _WRAPPER.sub(r"\2", parts[-1])
    return name + (" (recomputed)" if recomputed else " (backward)" if backward else "")


def source_scope(instruction: Instruction, computation: Computation, module: HloModule) -> str:
    """Return the traced operation of an instruction, or of its nearest neighbor where the compiler dropped it.

    Users come first for a gather, operands for everything else.
    """
    operands = _neighbors(instruction, lambda i: i.operands, computation)
    users = _neighbors(instruction, lambda i: computation.users.get(i.name, ()), computation)
    neighbors = (users, operands) if "gather" in instruction.name else (operands, users)
    for candidate in itertools.chain([instruction], *neighbors):
        inner = (i.op_name for callee in module.callees(candidate) for i in reversed(callee.order))
        for name in (candidate.op_name, *inner):
            if "/" in name:
                return name
    return instruction.op_name


def _neighbors(
    instruction: Instruction, next_names: Callable[[Instruction], Iterable[str]], computation: Computation
) -> Iterator[Instruction]:
    """Yield instructions before or after one, nearest first."""
    visited: set[str] = set()
    front = [instruction]
    for _ in range(6):
        names = dict.fromkeys(name for i in front[:8] for name in next_names(i) if name not in visited)
        front = [computation.instructions[name] for name in names if name in computation.instructions]
        front = [i for i in front if i.opcode not in ("parameter", "tuple", "while", "partition-id")]
        visited |= {i.name for i in front}
        yield from front


def _split_scopes(op_name: str) -> list[str]:
    """Split at the slashes outside all parentheses."""
    parts, depth = [""], 0
    for character in op_name:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "/" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
