"""HBM bytes of small programs, computed by hand."""

import pytest

from mplug2_jax.planning.hbm_traffic import count_hbm_bytes
from tests.planning.programs import loop, program

BLOCK = 8 * 128 * 4  # bytes of f32[8,128]
ADD = """%add (a: f32[8,128], b: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f32[8,128]{1,0} parameter(1)
  %twice = f32[8,128]{1,0} multiply(%a, %a)
  ROOT %sum = f32[8,128]{1,0} add(%twice, %b)
}"""
TAKE = """%take (stack: f32[12,8,128], i: s32[]) -> f32[8,128] {
  %stack = f32[12,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,128]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %flat = f32[8,128]{1,0} bitcast(%slice)
}"""
PUT = """%put (stack: f32[12,8,128], new: f32[8,128], i: s32[]) -> f32[12,8,128] {
  %stack = f32[12,8,128]{2,1,0} parameter(0)
  %new = f32[8,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %one = f32[1,8,128]{2,1,0} bitcast(%new)
  ROOT %update = f32[12,8,128]{2,1,0} dynamic-update-slice(%stack, %one, %i, %zero, %zero)
}"""
ARGUMENTS = """
  %p = f32[8,128]{1,0} parameter(0)
  %q = f32[8,128]{1,0} parameter(1)
  %stack = f32[12,8,128]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
"""


def traffic(*lines: str, computations: tuple[str, ...] = ()) -> float:
    return count_hbm_bytes(program(ARGUMENTS + "\n".join(f"  {line}" for line in lines), *computations))


@pytest.mark.parametrize(
    ("line", "computation", "size"),
    [
        ("ROOT %f = f32[8,128]{1,0} fusion(%p, %q), kind=kLoop, calls=%add", ADD, 3 * BLOCK),
        ("ROOT %f = f32[8,128]{1,0} fusion(%stack, %i), kind=kLoop, calls=%take", TAKE, 2 * BLOCK + 4),
        ("ROOT %f = f32[12,8,128]{2,1,0} fusion(%stack, %p, %i), kind=kLoop, calls=%put", PUT, 2 * BLOCK + 4),
        ("ROOT %d = f32[8,8]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={1}", "",
         2 * BLOCK + 8 * 8 * 4),
        ("ROOT %s = f32[1,8,128]{2,1,0} dynamic-slice(%stack, %i, %i, %i), dynamic_slice_sizes={1,8,128}", "",
         2 * BLOCK),
        ("ROOT %u = f32[12,8,128]{2,1,0} dynamic-update-slice(%stack, %p, %i, %i, %i)", "", 2 * BLOCK),
        ("ROOT %b = f32[1024]{0} bitcast(%p)", "", 0),
        ("ROOT %t = (f32[8,128], f32[8,128]) tuple(%p, %q)", "", 0),
        ("ROOT %c = f32[8,128]{1,0} copy(%p)", "", 2 * BLOCK),
        ("ROOT %h = bf16[8,128]{1,0} convert(%p)", "", 1.5 * BLOCK),
    ],
)  # fmt: skip
def test_bytes_of_one_instruction(line: str, computation: str, size: float) -> None:
    assert traffic(line, computations=(computation,) if computation else ()) == size


def test_intermediates_of_a_fusion_stay_on_the_chip() -> None:
    """Check that neither further operations nor further uses of an operand count."""
    more = ADD.replace("add(%twice, %b)", "add(%again, %b)").replace(
        "  ROOT", "  %again = f32[8,128]{1,0} multiply(%twice, %a)\n  ROOT"
    )
    line = "ROOT %f = f32[8,128]{1,0} fusion(%p, %q), kind=kLoop, calls=%add"
    assert traffic(line, computations=(more,)) == traffic(line, computations=(ADD,)) == 3 * BLOCK


def test_an_operand_used_both_sliced_and_whole_is_read_whole() -> None:
    line = "ROOT %f = f32[8,128]{1,0} fusion(%stack, %i), kind=kLoop, calls=%take"
    whole = TAKE.replace("  ROOT", "  %all = f32[12,8,128]{2,1,0} negate(%stack)\n  ROOT")
    assert traffic(line, computations=(whole,)) == 12 * BLOCK + 4 + BLOCK


def test_a_loop_counts_trip_count_times() -> None:
    body, condition, entry = loop(0, "7", inside="%sum = f32[8,128]{1,0:T(8,128)} negate(%data)")
    once = count_hbm_bytes(program("\n".join(["%p = f32[8,128]{1,0} parameter(0)", "ROOT %n = f32[8,128] negate(%p)"])))
    assert once == 2 * BLOCK
    total = count_hbm_bytes(program(entry, body, condition))
    counter = 4 + 4 + 4  # its copy to the chip, and its addition, which has one operand on the chip
    assert total == 7 * (once + counter) + 8  # and the copy of its initial value


def test_a_loop_of_unknown_trip_count_runs_as_often_as_the_caller_says() -> None:
    body, condition, entry = loop(0, "7", inside="%sum = f32[8,128]{1,0:T(8,128)} negate(%data)")
    unknown = condition.replace("constant(7)", 'custom-call(%i.1), custom_call_target="ask"')
    text = program(entry, body, unknown)
    assert count_hbm_bytes(text, default_trips=3) - count_hbm_bytes(text, default_trips=2) == 2 * BLOCK + 12
