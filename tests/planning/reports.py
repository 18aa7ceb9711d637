"""Plan reports with a row of everything."""

import dataclasses
from typing import Any

from mplug2_jax.planning.costs import Costs
from mplug2_jax.planning.hbm_traffic import ScopeTraffic
from mplug2_jax.planning.memory import Memory
from mplug2_jax.planning.oom import Buffer
from mplug2_jax.planning.report import AxisTraffic, PlanReport
from mplug2_jax.planning.timing import Timing
from mplug2_jax.planning.traffic import Collective

GIB = 2.0**30
GATHER = Collective(
    kind="all-gather", axes=("fsdp",), network="ici", group_size=4, bytes_sent=1e9, count=24, scope="vision/layers",
    shape="bf16[64,128]", overlapped=True,
)  # fmt: skip


def make_report(**fields: Any) -> PlanReport:
    """Return the report of a training step on v5p:2x2x2."""
    values: dict[str, Any] = {
        "name": "mine", "program": "train", "topology": "v5p:2x2x2", "chips": 8, "mesh": "data=2, fsdp=4",
        "examples": {"clips": 48, "text": 16}, "parameters": 123_456,
        "memory": Memory(
            breakdown={
                "parameters": 2 * GIB, "optimizer": 4 * GIB, "batch": GIB, "layout padding": 0.0,
                "temporaries": 2.5 * GIB, "generated code": GIB / 2,
            },
            peak=10 * GIB, capacity=40 * GIB,
        ),
        "costs": Costs(
            towers={"clips": {"vision": 3 * 10**15, "text": 10**15}, "text": {"text": 10**15}},
            objectives={"clips": {"vlc": 4 * 10**15}, "text": {"mlm": 10**15}}, recomputed_flops=10**15,
        ),
        "hbm_traffic": (
            ScopeTraffic(
                scope="vision/attention (backward)", bytes=3e9, minimum_bytes=1e9,
                operations={"dot_general": 2e9, "copy": 1e9},
            ),
            ScopeTraffic(scope="text/mlp", bytes=1e9, minimum_bytes=1e9, operations={"dot_general": 1e9}),
        ),
        "traffic": (
            AxisTraffic(
                kind="all-gather", axes="fsdp", network="ici", bytes=24e9, count=24, seconds=0.06, exposed_seconds=0.0
            ),
            AxisTraffic(
                kind="all-reduce", axes="data", network="ici", bytes=1e9, count=2, seconds=0.02, exposed_seconds=0.02
            ),
        ),
        "largest_collectives": (GATHER,),
        "largest_buffers": (Buffer(1.5 * GIB, "bf16[8,1024]", "vision/layers/mlp", 3),),
        "unknown_loops": ("decoder/search",),
        "timing": Timing(
            compute_seconds=1.0, hbm_seconds=0.5, communication_seconds=0.08, exposed_seconds=0.02
        ),
        "mfu": (0.41, 0.72), "steps": 86_400, "trace_seconds": 1.5, "compile_seconds": 61.0, "simulated": False,
    }  # fmt: skip
    return PlanReport(**(values | fields))


def make_hostile_report(text: str) -> PlanReport:
    """Return a report in which every name is ``text``."""
    return make_report(
        name=text, program=text, topology=text, mesh=text, examples={text: 48}, unknown_loops=(text,),
        hbm_traffic=(ScopeTraffic(scope=text, bytes=2.0, minimum_bytes=1.0, operations={text: 2.0}),),
        costs=Costs(towers={text: {text: 10**15}}, objectives={text: {text: 10**15}}, recomputed_flops=0),
        traffic=(
            AxisTraffic(kind=text, axes=text, network=text, bytes=1.0, count=1, seconds=1.0, exposed_seconds=1.0),
        ),
        largest_collectives=(dataclasses.replace(GATHER, scope=text, shape=text),),
        largest_buffers=(Buffer(1.0, text, text),),
        memory=Memory(breakdown={text: GIB}, peak=GIB, capacity=2 * GIB),
    )  # fmt: skip
