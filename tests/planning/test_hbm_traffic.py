"""HBM bytes of small programs, computed by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2_jax.planning.hbm_traffic import ADDED, OUTSIDE, hbm_traffic, traffic_by_tower
from mplug2_jax.planning.hlo import hbm_bytes
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


def count_hbm_bytes(hlo_text: str, *, default_trips: int = 1) -> float:
    return sum(each.bytes for each in hbm_traffic(hlo_text, default_trips=default_trips))


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


# Where a slice or an update stands in a fusion

STACK, SLICE = 12 * BLOCK, BLOCK
SLICE_LINE = "%s = f32[1,8,128]{2,1,0} dynamic-slice(%x, %i, %zero, %zero), dynamic_slice_sizes={1,8,128}"


def fusion(*lines: str, name: str = "fused") -> str:
    """Return a fused computation of a stack, a block and an index."""
    head = ("%stack = f32[12,8,128]{2,1,0} parameter(0)", "%new = f32[8,128]{1,0} parameter(1)",
            "%i = s32[] parameter(2)", "%zero = s32[] constant(0)")  # fmt: skip
    body = "\n".join(f"  {line}" for line in (*head, *lines))
    return f"%{name} (stack: f32[12,8,128], new: f32[8,128], i: s32[]) -> f32[8,128] {{\n{body}\n}}"


CALL = "fusion(%stack, %p, %i), kind=kLoop, calls=%fused"
PUT_LINES = (
    "%one = f32[1,8,128]{2,1,0} bitcast(%new)",
    "%update = f32[12,8,128]{2,1,0} dynamic-update-slice(%stack, %one, %i, %zero, %zero)",
)
NESTED = """%inner (a: f32[12,8,128], j: s32[]) -> f32[8,128] {
  %a = f32[12,8,128]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %part = f32[1,8,128]{2,1,0} dynamic-slice(%a, %j, %zero.1, %zero.1), dynamic_slice_sizes={1,8,128}
  ROOT %flat.1 = f32[8,128]{1,0} bitcast(%part)
}"""


@pytest.mark.parametrize(
    ("result", "lines", "size"),
    [
        # Read behind a bitcast: the slice, the index and the result; the block is not used.
        ("f32[8,128]{1,0}",
         ("%x = f32[12,8,128]{2,1,0} bitcast(%stack)", SLICE_LINE, "ROOT %r = f32[8,128]{1,0} bitcast(%s)"),
         SLICE + 4 + BLOCK),
        # Read in a nested fusion.
        ("f32[8,128]{1,0}",
         ("%f = f32[8,128]{1,0} fusion(%stack, %i), kind=kLoop, calls=%inner",
          "ROOT %r = f32[8,128]{1,0} add(%f, %new)"),
         SLICE + 4 + 2 * BLOCK),
        # Two slices.
        ("f32[1,8,128]{2,1,0}",
         ("%x = f32[12,8,128]{2,1,0} bitcast(%stack)", SLICE_LINE, SLICE_LINE.replace("%s ", "%s2 "),
          "ROOT %r = f32[1,8,128]{2,1,0} add(%s, %s2)"),
         2 * SLICE + 4 + BLOCK),
        # Written as one of two results, not the root, behind a bitcast.
        ("(f32[8,128]{1,0}, f32[12,8,128]{2,1,0})",
         (*PUT_LINES, "%n = f32[8,128]{1,0} negate(%new)", "%u = f32[12,8,128]{2,1,0} bitcast(%update)",
          "ROOT %r = (f32[8,128], f32[12,8,128]) tuple(%n, %u)"),
         BLOCK + 4 + BLOCK + SLICE),
        # Two updates of one stack.
        ("f32[12,8,128]{2,1,0}",
         (*PUT_LINES, "ROOT %r = f32[12,8,128]{2,1,0} dynamic-update-slice(%update, %one, %zero, %zero, %zero)"),
         BLOCK + 4 + 2 * SLICE),
        # Updated and read in one fusion.
        ("(f32[1,8,128]{2,1,0}, f32[12,8,128]{2,1,0})",
         (*PUT_LINES, SLICE_LINE.replace("%x", "%update"),
          "ROOT %r = (f32[1,8,128], f32[12,8,128]) tuple(%s, %update)"),
         BLOCK + 4 + SLICE + BLOCK + SLICE),
        # An update of what is no operand writes all of it.
        ("f32[12,8,128]{2,1,0}",
         ("%base = f32[12,8,128]{2,1,0} broadcast(%zero), dimensions={}", PUT_LINES[0],
          "ROOT %r = f32[12,8,128]{2,1,0} dynamic-update-slice(%base, %one, %i, %zero, %zero)"),
         BLOCK + 4 + STACK),
        # Used whole beside its slice.
        ("f32[12,8,128]{2,1,0}", ("ROOT %r = f32[12,8,128]{2,1,0} negate(%stack)",), STACK + STACK),
        # On the chip.
        ("f32[8,128]{1,0:T(8,128)S(1)}", ("ROOT %r = f32[8,128]{1,0} negate(%new)",), BLOCK),
    ],
    ids=["bitcast", "nested", "twice", "one of two results", "two updates", "updated and read", "no operand", "whole",
         "on the chip"],
)  # fmt: skip
def test_slices_and_updates_in_a_fusion(result: str, lines: tuple[str, ...], size: float) -> None:
    assert traffic(f"ROOT %f = {result} {CALL}", computations=(NESTED, fusion(*lines))) == size


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[128,16,257,257]{3,2,1,0:T(8,128)}", 128 * 16 * 264 * 384 * 4),
        ("bf16[24,128,257,1024]{3,1,2,0:T(8,128)(2,1)}", 24 * 257 * 128 * 1024 * 2),
        ("bf16[3,5]{0,1:T(8,128)(2,1)}", 8 * 128 * 2), ("f32[5]{0:T(128)}", 128 * 4),
        ("bf16[7]{0:T(1024)(128)(2,1)}", 2048),
        ("f32[3,5]{1,0}", 60), ("f32[]{:T(128)}", 4), ("pred[9,130]{1,0:T(8,128)(4,1)}", 16 * 256),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0), ("s4[16,128]{1,0:T(16,128)(8,1)E(4)}", 1024),
    ],
)  # fmt: skip
def test_sizes_have_the_padding_of_their_layout(shape: str, size: float) -> None:
    assert hbm_bytes(shape) == size


def test_a_kernel_counts_what_it_declares() -> None:
    call = 'ROOT %k = f32[8,128]{1,0} custom-call(%p, %q), custom_call_target="tpu_custom_call"'
    assert traffic(call) == 3 * BLOCK
    config = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"1","bytes_accessed":"99999"}}}'
    assert traffic(call + config) == pytest.approx(99999)
    assert traffic('ROOT %a = f32[12,8,128]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"') == 0


# Scopes


def test_traffic_by_scope_and_what_a_scope_cannot_avoid() -> None:
    """Count two operations of a scope, of which the second reads the first's result, and one of another."""
    lines = (
        '%a = f32[8,128]{1,0} add(%p, %q), metadata={op_name="jit(f)/jvp(vision)/mlp/add"}',
        '%b = f32[8,128]{1,0} multiply(%a, %p), metadata={op_name="jit(f)/jvp(vision)/mlp/mul"}',
        '%v = f32[1024]{0} bitcast(%b)',
        'ROOT %c = f32[1024]{0} negate(%v), metadata={op_name="jit(f)/jvp(text)/neg"}',
    )  # fmt: skip
    text = program(ARGUMENTS + "\n".join(lines))
    vision, other = hbm_traffic(text)
    assert (vision.scope, vision.tower, vision.bytes) == ("vision/mlp", "vision", 6 * BLOCK)
    assert vision.minimum_bytes == 3 * BLOCK  # %p, %q and %b
    assert vision.operations == {"add": 3 * BLOCK, "mul": 3 * BLOCK}
    assert (other.scope, other.bytes, other.minimum_bytes) == ("text", 2 * BLOCK, 2 * BLOCK)
    outside = program(ARGUMENTS + '\nROOT %c = f32[8,128]{1,0} negate(%p), metadata={op_name="jit(f)/neg"}')
    added = program(ARGUMENTS + "\nROOT %c = f32[8,128]{1,0} copy(%p)")
    assert [hbm_traffic(each)[0].tower for each in (outside, added)] == [OUTSIDE, ADDED]
    assert traffic_by_tower([vision, other]) == {"vision": (6 * BLOCK, 3 * BLOCK), "text": (2 * BLOCK, 2 * BLOCK)}


# Random programs


def pad(rows: int, columns: int) -> int:
    return -(-rows // 8) * 8 * -(-columns // 128) * 128


@st.composite
def programs_with_traffic(draw: st.DrawFn) -> tuple[str, float]:
    """Return a loop of random fusions over stacks, and the bytes that it moves."""
    trips, rows, columns = draw(st.integers(1, 30)), draw(st.integers(1, 40)), draw(st.integers(1, 300))
    dtype, width, tile = draw(st.sampled_from([("f32", 4, "T(8,128)"), ("bf16", 2, "T(8,128)(2,1)")]))
    block = f"{dtype}[{rows},{columns}]{{1,0:{tile}}}"
    one, stack = (f"{dtype}[{n},{rows},{columns}]{{2,1,0:{tile}}}" for n in (1, 7))
    size = pad(rows, columns) * width
    computations, lines, expected = [], [], 0.0
    current = "%data"
    for number, kind in enumerate(
        draw(st.lists(st.sampled_from(["take", "put", "both", "map"]), min_size=1, max_size=6))
    ):
        views = draw(st.integers(0, 2))
        source, chain = "%stack", []
        for view in range(views):
            chain.append(f"%v{view} = {stack} bitcast({source})")
            source = f"%v{view}"
        take = [f"%s = {one} dynamic-slice({source}, %i, %zero, %zero), dynamic_slice_sizes={{1,{rows},{columns}}}",
                f"%flat = {block} bitcast(%s)"]  # fmt: skip
        put = [f"%one = {one} bitcast(%x)",
               f"%u = {stack} dynamic-update-slice({source}, %one, %i, %zero, %zero)"]  # fmt: skip
        body, result, moved = {
            "take": ([*take, f"ROOT %r = {block} add(%flat, %x)"], block, 3 * size),
            "put": ([*put, f"%n = {block} negate(%x)", f"ROOT %r = ({block}, {stack}) tuple(%n, %u)"],
                    f"({block}, {stack})", 3 * size),
            "both": ([*take, *put, f"%n = {block} add(%flat, %x)", f"ROOT %r = ({block}, {stack}) tuple(%n, %u)"],
                     f"({block}, {stack})", 4 * size),
            "map": ([f"ROOT %r = {block} negate(%x)"], block, 2 * size),
        }[kind]  # fmt: skip
        head = [f"%stack = {stack} parameter(0)", f"%x = {block} parameter(1)", "%i = s32[]{:T(128)} parameter(2)",
                "%zero = s32[] constant(0)"]  # fmt: skip
        code = "\n".join(f"  {line}" for line in (*head, *chain, *body))
        computations.append(f"%fused.{number} (a: f32[1], b: f32[1], c: s32[]) -> f32[1] {{\n{code}\n}}")
        lines.append(f"%f.{number} = {result} fusion(%stack, {current}, %i), kind=kLoop, calls=%fused.{number}")
        current = f"%f.{number}"
        if result.startswith("("):
            lines.append(f"%e.{number} = {block} get-tuple-element(%f.{number}), index=0")
            current = f"%e.{number}"
        expected += moved + (4 if kind != "map" else 0)
    carry = f"(s32[]{{:T(128)}}, {block}, {stack})"
    counter = 4 + 4  # its addition
    body = "\n".join(f"  {line}" for line in (
        f"%arg = {carry} parameter(0)", "%i = s32[]{:T(128)} get-tuple-element(%arg), index=0",
        f"%data = {block} get-tuple-element(%arg), index=1", f"%stack = {stack} get-tuple-element(%arg), index=2",
        "%step = s32[]{:T(128)} constant(1)", "%next = s32[]{:T(128)} add(%i, %step)", *lines,
        f"ROOT %out = {carry} tuple(%next, {current}, %stack)",
    ))  # fmt: skip
    condition = f"""%cond (arg.1: (s32[])) -> pred[] {{
  %arg.1 = {carry} parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%arg.1), index=0
  %limit = s32[] constant({trips})
  ROOT %lt = pred[]{{:T(512)}} compare(%i.1, %limit), direction=LT
}}"""
    entry = (
        f"%d = {block} parameter(0)\n%st = {stack} parameter(1)\n%start = s32[]{{:T(128)}} constant(0)\n"
        f"%init = {carry} tuple(%start, %d, %st)\nROOT %w = {carry} while(%init), condition=%cond, body=%body"
    )
    text = program(entry, *computations, f"%body (arg: (s32[])) -> (s32[]) {{\n{body}\n}}", condition)
    return text, trips * (expected + counter + 4)


@given(programs_with_traffic())
@settings(max_examples=60, deadline=None)
def test_random_programs(case: tuple[str, float]) -> None:
    text, expected = case
    assert count_hbm_bytes(text) == pytest.approx(expected, rel=0.02, abs=64)
