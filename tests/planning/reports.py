"""A report with a row of everything, made by hand."""

import dataclasses
from typing import Any

from mplug2_jax.planning.costs import Costs
from mplug2_jax.planning.memory import Memory
from mplug2_jax.planning.oom import Buffer
from mplug2_jax.planning.report import Report, Traffic
from mplug2_jax.planning.timing import Timing
from mplug2_jax.planning.traffic import Collective

GIB = 2.0**30
GATHER = Collective(
    kind="all-gather", axes=("fsdp",), network="ici", size=4, bytes=1e9, times=24, name="vision/layers",
    shape="bf16[64,128]", overlapped=True,
)  # fmt: skip


def report(**fields: Any) -> Report:
    """A training step on v5p:2x2x2."""
    values: dict[str, Any] = {
        "name": "mine", "program": "train", "topology": "v5p:2x2x2", "chips": 8, "mesh": "data=2, fsdp=4",
        "examples": {"clips": 48, "text": 16}, "parameters": 123_456,
        "memory": Memory(
            parts={
                "parameters": 2 * GIB, "optimiser": 4 * GIB, "batch": GIB, "layout": 0.0, "temporaries": 2.5 * GIB,
                "machine code": GIB / 2,
            },
            peak=10 * GIB, capacity=40 * GIB,
        ),
        "costs": Costs(
            towers={"clips": {"vision": 3 * 10**15, "text": 10**15}, "text": {"text": 10**15}},
            objectives={"clips": {"vlc": 4 * 10**15}, "text": {"mlm": 10**15}}, recomputed=10**15,
        ),
        "traffic": (
            Traffic(kind="all-gather", axes="fsdp", network="ici", bytes=24e9, count=24, seconds=0.06, exposed=0.0),
            Traffic(kind="all-reduce", axes="data", network="ici", bytes=1e9, count=2, seconds=0.02, exposed=0.02),
        ),
        "largest_collectives": (GATHER,),
        "largest_arrays": (Buffer(1.5 * GIB, "bf16[8,1024]", "vision/layers/mlp", 3),),
        "unknown_loops": ("decoder/search",),
        "timing": Timing(compute=1.0, memory=0.5, network=0.08, exposed=0.02),
        "mfu": (0.41, 0.72), "steps": 86_400, "trace_seconds": 1.5, "compile_seconds": 61.0, "simulated": False,
    }  # fmt: skip
    return Report(**(values | fields))


def hostile(words: str) -> Report:
    """A report whose every name is the same words."""
    return report(
        name=words, program=words, topology=words, mesh=words, examples={words: 48}, unknown_loops=(words,),
        costs=Costs(towers={words: {words: 10**15}}, objectives={words: {words: 10**15}}, recomputed=0),
        traffic=(Traffic(kind=words, axes=words, network=words, bytes=1.0, count=1, seconds=1.0, exposed=1.0),),
        largest_collectives=(dataclasses.replace(GATHER, name=words, shape=words),),
        largest_arrays=(Buffer(1.0, words, words),),
        memory=Memory(parts={words: GIB}, peak=GIB, capacity=2 * GIB),
    )  # fmt: skip
