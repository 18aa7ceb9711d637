"""Names for people, out of the names that a traced program gives its operations."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator

from mplug2_jax.planning.hlo import Computation, Instruction, Program

_WRAPPER = re.compile(r"(\w+)\((.*)\)$")
# What JAX's own machinery puts between the scopes of a model.
_MACHINERY = re.compile(
    r"^(while|body|cond|closed_call|checkpoint|remat\d?|rematted_computation|pjit|core_call|scan|shard_map|"
    r"custom_[jv][vj]p_call\w*|branch_\d+_fun|main|.*->.*|)$"  # a->b: of an einsum
)


def readable(op_name: str) -> str:
    """The model's own scope of an operation.

    Names of jitted functions, loops and transformations go; the operation's own name stays only where nothing else
    would be left. What differentiation made is marked, and so is what rematerialisation computes again.

    Example:
        >>> readable("jit(step)/transpose(jvp(vision))/while/body/closed_call/mlp/dot_general")
        'vision/mlp (backward)'
    """
    if op_name.startswith("(") and op_name.endswith(")"):  # of several operations, which CPU programs join by colons
        op_name = op_name[1:-1].rpartition(":")[2]
    backward, again, kept = False, "rematted_computation" in op_name, []
    parts = _parts(op_name)
    for position, part in enumerate(parts):
        while match := _WRAPPER.match(part):
            wrapper, part = match.groups()
            backward |= wrapper == "transpose"
            if wrapper in ("jit", "pjit", "pmap"):
                part = ""
        inner = [p for p in part.split("/") if not _MACHINERY.match(p)]
        if position < len(parts) - 1 or (len(parts) == 1 and "(" not in op_name):
            kept += inner
    name = "/".join(kept) or _WRAPPER.sub(r"\2", parts[-1])
    return name + (" (recomputed)" if again else " (backward)" if backward else "")


def origin(instruction: Instruction, inside: Computation, program: Program) -> str:
    """Where an instruction comes from; where the compiler forgot, what is next to it: of a gather, what it is for."""
    makers = _neighbours(instruction, lambda each: each.operands, inside)
    users = _neighbours(instruction, lambda each: inside.users.get(each.name, ()), inside)
    near = (users, makers) if "gather" in instruction.name else (makers, users)
    for each in itertools.chain([instruction], *near):
        inner = (i.op_name for called in program.called(each) for i in reversed(called.order))
        for name in (each.op_name, *inner):
            if "/" in name:
                return name
    return instruction.op_name


def _neighbours(
    instruction: Instruction, following: Callable[[Instruction], Iterable[str]], inside: Computation
) -> Iterator[Instruction]:
    """Some instructions before or after one, nearest first."""
    found: set[str] = set()
    front = [instruction]
    for _ in range(6):
        names = dict.fromkeys(name for each in front[:8] for name in following(each) if name not in found)
        front = [inside.instructions[name] for name in names if name in inside.instructions]
        front = [each for each in front if each.opcode not in ("parameter", "tuple", "while", "partition-id")]
        found |= {each.name for each in front}
        yield from front


def _parts(op_name: str) -> list[str]:
    """Parts between slashes that no parenthesis encloses."""
    parts, depth = [""], 0
    for character in op_name:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "/" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
