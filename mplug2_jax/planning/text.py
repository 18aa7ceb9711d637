"""A plan for people who read terminals."""

from collections.abc import Iterator, Sequence

from mplug2_jax.planning.report import Report

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float | int, unit: str = "") -> str:
    """Three digits and a prefix: ``12.4 TFLOP``."""
    scale, prefix = next(((s, p) for s, p in UNITS if abs(value) >= s), (1.0, ""))
    return f"{value / scale:.3g} {prefix}{unit}".rstrip()


def size_of(value: float) -> str:
    """Bytes as GiB, or MiB where those are few."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**28 else f"{value / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds where those are few."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def span(pair: Sequence[float]) -> str:
    """Two numbers as ``3.1 to 4.2``."""
    return " to ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in pair)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = (1, 2, 3, 4, 5)) -> Iterator[str]:
    """Rows as columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        yield ("  " + "  ".join(cells)).rstrip()


def text_report(report: Report) -> str:
    """The whole plan."""
    return "\n".join(_lines(report))


def _lines(r: Report) -> Iterator[str]:
    batch = ", ".join(f"{name} {size:,}" for name, size in r.examples.items())
    yield f"{r.name}, {r.program}: {r.parameters:,} parameters on {r.topology} ({r.chips:,} chips), mesh {r.mesh}"
    yield f"examples a step: {batch}"
    if r.simulated:
        yield "compiled for simulated CPUs in place of these chips: memory and traffic are those of XLA's CPU compiler"

    yield f"\nmemory of a device: {size_of(r.memory.peak)} of {size_of(r.memory.capacity)} ({r.memory.share:.0%})"
    yield from aligned([(name, size_of(size), f"{size / r.memory.peak:.0%}") for name, size in r.memory.parts.items()])
    if r.memory.host:
        yield f"  and in its host's memory: {size_of(r.memory.host)}"

    examples = sum(r.examples.values())
    yield (
        f"\noperations a step: {quantity(r.costs.step, 'FLOP')}, {quantity(r.costs.step / examples, 'FLOP')} an example"
        f"; computed twice: {r.costs.overhead:.1%}"
    )
    rows = [
        (f"{stream} / {tower}", quantity(count, "FLOP"), f"{count / r.costs.step:.1%}",
         quantity(count / r.examples[stream], "FLOP") + " each")
        for stream, towers in r.costs.towers.items() for tower, count in towers.items()
    ]  # fmt: skip
    rows += [
        (f"{stream} / {objective} alone", quantity(count, "FLOP"), f"{count / r.costs.step:.1%}",
         quantity(count / r.examples[stream], "FLOP") + " each")
        for stream, objectives in r.costs.objectives.items() for objective, count in objectives.items()
    ]  # fmt: skip
    yield from aligned(rows)

    sent = sum(t.bytes for t in r.traffic)
    yield f"\nsent by a device: {quantity(sent, 'B')} a step"
    if r.traffic:
        table = [("collective", "along", "network", "bytes", "times", "time", "not hidden")]
        table += [
            (
                t.kind,
                t.axes,
                t.network,
                quantity(t.bytes, "B"),
                f"{t.count:,}",
                duration(t.seconds),
                duration(t.exposed),
            )
            for t in r.traffic
        ]
        yield from aligned(table, right=(3, 4, 5, 6))
        yield "  the largest:"
        most = [(c.kind, c.shape, f"x {c.times:,}", quantity(c.total, "B"), c.name) for c in r.largest_collectives]
        yield from aligned(most, right=(2, 3))
    for loop in r.unknown_loops:
        yield f"  a loop in {loop} is counted to its greatest length"

    t = r.timing
    yield "\ntime of a step"
    yield from aligned([
        ("compute", duration(t.compute), "at the chips' peak"),
        ("memory", duration(t.memory), "at the memories' peak"),
        ("network", duration(t.network), f"{duration(t.exposed)} not hidden: {t.exposed_share:.1%} of compute"),
    ], right=(1,))  # fmt: skip
    yield f"  predicted  {duration(r.seconds[0])} to {duration(r.seconds[1])}, MFU {r.mfu[0]:.0%} to {r.mfu[1]:.0%}, "\
        f"{span(r.examples_per_second)} examples/s"  # fmt: skip
    if r.program == "train":
        yield f"  {r.steps:,} steps: {span(r.days)} days, {span(r.chip_hours)} chip-hours"

    yield "\nlargest arrays of a device"
    yield from aligned([(size_of(b.bytes), f"{b.count} x {b.shape}", b.name) for b in r.largest_arrays], right=(0,))
    yield f"\ntraced in {r.trace_seconds:.1f} s, compiled in {r.compile_seconds:.1f} s"
    yield "it fits" if r.memory.fits else f"it does not fit, by {size_of(r.memory.peak - r.memory.capacity)}"
