"""Small programs as HLO text, one for each syntax of the compiler."""

HEAD = "HloModule jit_step, is_scheduled=true, entry_computation_layout={()->f32[]}, num_partitions=8\n\n"


def program(entry: str, *computations: str, partitions: int = 8) -> str:
    """Return a module of some computations, and an entry computation of some lines."""
    head = HEAD.replace("num_partitions=8", f"num_partitions={partitions}")
    lines = "\n".join(f"  {line.strip()}" for line in entry.strip().splitlines())
    return head + "\n\n".join(computations) + "\n\nENTRY %main (p: f32[8]) -> f32[] {\n" + lines + "\n}\n"


def loop(start: int, bound: str, step: int = 1, direction: str = "LT", inside: str = "") -> tuple[str, str, str]:
    """Return the body and the condition of a loop over (counter, bound, data), and the lines that run it.

    ``bound`` is a literal, or empty for the one in the carry, which the entry computation sets to 5.
    """
    carry = "(s32[]{:T(128)}, s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)})"
    body = f"""%body (arg: (s32[], s32[], f32[8,128])) -> (s32[], s32[], f32[8,128]) {{
  %arg = {carry} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%arg), index=0
  %copy.i = s32[]{{:T(128)S(6)}} copy(%i)
  %one = s32[]{{:T(128)}} constant({step})
  %next = s32[]{{:T(128)}} add(%copy.i, %one)
  %limit = s32[]{{:T(128)}} get-tuple-element(%arg), index=1
  %data = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%arg), index=2
  {inside or "%sum = f32[8,128]{1,0:T(8,128)} " + REDUCE.format("%data")}
  ROOT %out = {carry} tuple(%next, %limit, %sum)
}}"""
    limit = f"s32[] constant({bound})" if bound else "s32[] get-tuple-element(%arg.1), index=1"
    condition = f"""%cond (arg.1: (s32[], s32[], f32[8,128])) -> pred[] {{
  %arg.1 = {carry} parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%arg.1), index=0
  %limit.1 = {limit}
  ROOT %lt = pred[]{{:T(512)}} compare(%i.1, %limit.1), direction={direction}, metadata={{op_name="while/cond/lt"}}
}}"""
    entry = f"""
  %p = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  %start = s32[]{{:T(128)}} constant({start})
  %copied = s32[]{{:T(128)}} copy(%start)
  %five = s32[]{{:T(128)}} constant(5)
  %init = {carry} tuple(%copied, %five, /*index=2*/%p)
  ROOT %loop = {carry} while(%init), condition=%cond, body=%body, metadata={{op_name="jit(step)/vision/while"}}
"""
    return body, condition, entry


REDUCE = "all-reduce({}), channel_id=1, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%add"

FUSED_REDUCE_SCATTER = program(
    """
  %p = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %fusion.1 = bf16[128,4096]{1,0:T(8,128)(2,1)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter, """
    """metadata={op_name="jit(f)/transpose(jvp(text))/dot_general" stack_frame_id=6}
""",
    """%all-reduce-scatter (input: bf16[1024,4096]) -> bf16[128,4096] {
  %input = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.2 = bf16[1024,4096]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, """
    """replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add.clone
  %partition-id = u32[]{:T(128)} partition-id()
  %convert = s32[]{:T(128)} convert(%partition-id)
  %constant.22 = s32[]{:T(128)} constant(128)
  %multiply.3 = s32[]{:T(128)} multiply(%convert, %constant.22)
  %constant.23 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.9 = bf16[128,4096]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.2, %multiply.3, """
    """%constant.23), dynamic_slice_sizes={128,4096}
}""",
)

_GATHER = (
    "bf16[64,128]{{1,0:T(8,128)(2,1)}} all-gather({}), channel_id=2, replica_groups=[1,8]<=[8], dimensions={{0}}, "
    'use_global_device_ids=true, frontend_attributes={{chain_id="0"}}, metadata={{op_name="jit(f)/vision/dot_general"}}'
)
_STATE = "(bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)})"


def piecewise_gather(between: str) -> str:
    """Return a gather that overlaps with compute: started, continued in ``between``, and ended."""
    return program(
        f"""
  %p = bf16[8,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  %start = {_STATE} fusion(%p), kind=kCustom, calls=%starting
  {between}
  ROOT %done = bf16[64,128]{{1,0:T(8,128)(2,1)}} fusion(%start), kind=kCustom, calls=%ending
""",
        f"""%starting (p0: bf16[8,128]) -> (bf16[8,128], bf16[64,128], u32[]) {{
  %p0 = bf16[8,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  %all-gather.1 = {_GATHER.format("%p0")}
  ROOT %custom-call.1 = {_STATE} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}""",
        f"""%step (p1: bf16[8,128]) -> bf16[64,128] {{
  %p1 = bf16[8,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %all-gather.2 = {_GATHER.format("%p1")}
}}""",
        f"""%ending (p2: bf16[8,128]) -> bf16[64,128] {{
  %p2 = bf16[8,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  %all-gather.3 = {_GATHER.format("%p2")}
  ROOT %custom-call.3 = bf16[64,128]{{1,0}} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}}""",
    )


OVERLAPPED_MATMUL = "%fusion.9 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%p), kind=kOutput, calls=%step"
