"""A plan's report as text for terminals."""

from collections.abc import Iterator, Sequence

from mplug2_jax.console import align_columns
from mplug2_jax.planning.hbm_traffic import ScopeTraffic, traffic_by_tower
from mplug2_jax.planning.report import PlanReport
from mplug2_jax.planning.timing import Timing

LARGEST_SCOPES = 10
"""Scopes of HBM traffic that are printed."""
_SI_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_quantity(value: float | int, unit: str = "") -> str:
    """Format with three digits and an SI prefix: ``12.4 TFLOP``."""
    scale, prefix = next(((s, p) for s, p in _SI_PREFIXES if abs(value) >= s), (1.0, ""))
    return f"{value / scale:.3g} {prefix}{unit}".rstrip()


def format_bytes(value: float) -> str:
    """Format bytes as GiB; below 0.25 GiB as MiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**28 else f"{value / 2**20:.1f} MiB"


def format_seconds(seconds: float) -> str:
    """Format a time as s; below 1 s as ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def format_range(ends: Sequence[float]) -> str:
    """Format two numbers as ``3.1 to 4.2``."""
    return " to ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in ends)


def format_operations(traffic: ScopeTraffic, limit: int = 4) -> str:
    """Format the largest operations of a scope, with their shares of its bytes."""
    shares = [(name, size / traffic.bytes) for name, size in list(traffic.operations.items())[:limit]]
    return ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.01)


def format_passes(timing: Timing) -> str:
    """Return how much longer float32 matmuls take than in bfloat16; empty if they do not."""
    return f"float32 matmuls take {timing.matmul_passes} times as long" if timing.matmul_passes > 1 else ""


def format_report(report: PlanReport) -> str:
    """Return the whole report as text."""
    return "\n".join(_lines(report))


def _indent(rows: Sequence[Sequence[str]], right: Sequence[int]) -> Iterator[str]:
    return (f"  {line}" for line in align_columns(rows, right))


def _lines(r: PlanReport) -> Iterator[str]:
    batch = ", ".join(f"{name} {size:,}" for name, size in r.examples.items())
    yield f"{r.name}, {r.program}: {r.parameters:,} parameters on {r.topology} ({r.chips:,} chips), mesh {r.mesh}"
    yield f"global batch: {batch}"
    if r.ramped:
        yield f"for all steps, although the batch_ramp of {', '.join(r.ramped)} sets other sizes at first"
    if r.simulated:
        yield "compiled for simulated CPU devices: memory and collectives are those of XLA's CPU compiler"

    memory = r.memory
    yield f"\nHBM per device: {format_bytes(memory.peak)} of {format_bytes(memory.capacity)} ({memory.utilization:.0%})"
    yield from _indent(
        [(use, format_bytes(size), f"{size / memory.peak:.0%}") for use, size in memory.breakdown.items()], right=(1, 2)
    )
    if memory.host:
        yield f"  offloaded to host memory: {format_bytes(memory.host)}"

    costs, examples = r.costs, sum(r.examples.values())
    yield (
        f"\nFLOPs per step: {format_quantity(costs.model_flops, 'FLOP')}, "
        f"{format_quantity(costs.model_flops / examples, 'FLOP')} per example; "
        f"recomputed: {costs.recompute_overhead:.1%}"
    )
    flops = [
        (f"{stream} / {name}{suffix}", count, r.examples[stream])
        for streams, suffix in ((costs.towers, ""), (costs.objectives, " alone"))
        for stream, counts in streams.items() for name, count in counts.items()
    ]  # fmt: skip
    yield from _indent([
        (label, format_quantity(count, "FLOP"), f"{count / costs.model_flops:.1%}",
         f"{format_quantity(count / batch_size, 'FLOP')} per example")
        for label, count, batch_size in flops
    ], right=(1, 2, 3))  # fmt: skip

    moved, minimum = r.hbm_bytes
    yield (
        f"\nHBM traffic per device: {format_quantity(moved, 'B')} per step; "
        f"{format_quantity(minimum, 'B')} if every scope read its inputs and wrote its outputs once"
    )
    yield from _indent([
        ("scope", "bytes", "inputs and outputs", "share", "operations"),
        *((t.scope, format_quantity(t.bytes, "B"), format_quantity(t.minimum_bytes, "B"), f"{t.bytes / moved:.1%}",
           format_operations(t)) for t in r.hbm_traffic[:LARGEST_SCOPES]),
    ], right=(1, 2, 3))  # fmt: skip
    yield "  by tower: " + ", ".join(
        f"{tower} {format_quantity(size, 'B')}" for tower, (size, _) in traffic_by_tower(r.hbm_traffic).items()
        if size >= moved / 100
    )  # fmt: skip

    yield f"\ncommunication per device: {format_quantity(sum(t.bytes for t in r.traffic), 'B')} per step"
    if r.traffic:
        yield from _indent([
            ("collective", "mesh axes", "network", "bytes", "count", "time", "exposed"),
            *((t.kind, t.axes, t.network, format_quantity(t.bytes, "B"), f"{t.count:,}", format_seconds(t.seconds),
               format_seconds(t.exposed_seconds)) for t in r.traffic),
        ], right=(3, 4, 5, 6))  # fmt: skip
        yield "  largest:"
        yield from _indent(
            [(c.kind, c.shape, f"x {c.count:,}", format_quantity(c.total_bytes, "B"), c.scope)
             for c in r.largest_collectives],
            right=(2, 3),
        )  # fmt: skip
    for loop in r.unknown_loops:
        yield f"  the loop in {loop} counts with its maximum length"

    t = r.timing
    yield "\nstep time"
    yield from _indent([
        ("compute", format_seconds(t.compute_seconds), "; ".join(filter(None, ("at peak FLOP/s", format_passes(t))))),
        ("HBM", format_seconds(t.hbm_seconds), "at peak bandwidth"),
        ("communication", format_seconds(t.communication_seconds),
         f"{format_seconds(t.exposed_seconds)} exposed: {t.exposed_fraction:.1%} of compute"),
    ], right=(1,))  # fmt: skip
    low, high = map(format_seconds, r.step_seconds)
    yield f"  predicted: {low} to {high}, MFU {r.mfu[0]:.0%} to {r.mfu[1]:.0%}, "\
        f"{format_range(r.examples_per_second)} examples/s"  # fmt: skip
    if r.program == "train":
        yield f"  {r.steps:,} steps: {format_range(r.days)} days, {format_range(r.chip_hours)} chip-hours"

    yield "\nlargest buffers per device"
    yield from _indent(
        [(format_bytes(b.bytes), f"{b.count} x {b.shape}", b.scope) for b in r.largest_buffers], right=(0,)
    )
    yield f"\ntraced in {r.trace_seconds:.1f} s, compiled in {r.compile_seconds:.1f} s"
    yield "fits" if memory.fits else f"does not fit: {format_bytes(memory.peak - memory.capacity)} over"
