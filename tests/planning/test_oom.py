"""Out-of-memory errors of the compiler, and the largest buffers of programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning.oom import Buffer, largest_buffers, parse_oom
from tests.planning.programs import program
from tests.tpu import topology_mesh

GIB = 2.0**30

AHEAD_OF_TIME = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.05G) exceeds "
    "available HBM (15.75G)."
)
ON_DEVICE = (
    """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. """
    """\
Used 63.80G of 30.75G hbm. Exceeded hbm capacity by 33.05G.

Total hbm usage >= 65.05G:
    reserved          1.25G
    program          63.80G
    arguments            0B

Output size 0B; shares 0B with arguments.

Program hbm requirement 63.80G:
    global            1.14M
    scoped            4.56M
    HLO temp         63.79G (100.0% utilization: Unpadded (63.58G) Padded (63.58G), 0.3% fragmentation (210.89M))

  Largest program allocations in hbm:

  1. Size: 512.50M
     Operator: op_name="jit(step)/jit(main)/while/body/closed_call/vision/mlp/dot_general[precision=None]" """
    """\
source_file="model.py" source_line=10
     Shape: bf16[32,4096,1024]{1,2,0:T(8,128)(2,1)}
     Unpadded size: 512.50M
     XLA label: fusion.12 = fusion(custom-call.224), kind=kOutput, calls=fused_computation.957.clone
     Allocation type: HLO temp
     ==========================

  2. Size: 2.00G
     Operator: op_name="jit(step)/transpose(jvp(decoder))/attention/dot_general" source_file="model.py" source_line=9
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     XLA label: fusion.1265.remat3 = fusion(custom-call.224), kind=kOutput, calls=fused_computation.957
     Allocation type: HLO temp
     ==========================

  3. Size: 128.0K
     Shape: f32[32,1024]{1,0:T(8,128)}
     XLA label: %copy.9 = copy(fusion.3)
     Allocation type: scoped
     ==========================
"""
)


def test_ahead_of_time_errors_have_two_numbers():
    oom = parse_oom(AHEAD_OF_TIME)
    assert oom is not None
    assert (oom.required, oom.capacity, oom.largest) == (17.05 * GIB, 15.75 * GIB, [])
    assert oom.exceeded_by == pytest.approx(1.3 * GIB)


@pytest.mark.parametrize(
    ("written", "size"), [("80.00G", 80 * GIB), ("512.5M", 512.5 * 2**20), ("3K", 3072), ("7B", 7)]
)
def test_units(written, size):
    oom = parse_oom(AHEAD_OF_TIME.replace("17.05G", written))
    assert oom is not None
    assert oom.required == size


def test_allocations_are_listed_by_size_under_the_models_names():
    oom = parse_oom(ON_DEVICE)
    assert oom is not None
    assert (oom.required, oom.capacity) == (63.80 * GIB, 30.75 * GIB)
    assert oom.exceeded_by == pytest.approx(33.05 * GIB)
    assert oom.largest == [
        Buffer(2 * GIB, "f32[32,4096,4096]", "decoder/attention (backward)"),
        Buffer(512.5 * 2**20, "bf16[32,4096,1024]", "vision/mlp"),
        Buffer(128.0 * 2**10, "f32[32,1024]", "copy.9"),
    ]


@pytest.mark.parametrize(
    "message", ["", "INVALID_ARGUMENT: Used 3 of 4 arguments", "RESOURCE_EXHAUSTED: too many files"]
)
def test_other_errors_are_not_about_memory(message):
    assert parse_oom(message) is None


def layers(weights, x):
    with jax.named_scope("vision"):
        y, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, weights)
    return jnp.sum(y.astype(jnp.float32) ** 2)


def stack(topology: str, depth: int) -> jax.stages.Lowered:
    """Lower the gradient of a deep stack that saves all activations: 512 MiB per layer and device."""
    mesh = topology_mesh(topology, MeshConfig())
    rows = mesh.size * 2**16
    weights = jax.ShapeDtypeStruct((depth, 4096, 4096), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec()))
    x = jax.ShapeDtypeStruct((rows, 4096), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    return jax.jit(jax.grad(layers)).lower(weights, x)


@pytest.mark.usefixtures("optimized")
def test_a_real_error_is_parsed():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        stack("v5e:2x2", 40).compile()
    oom = parse_oom(str(caught.value))
    assert oom is not None
    assert oom.capacity == 15.75 * GIB
    assert 40 * 0.5 * GIB < oom.required < 4 * 40 * 0.5 * GIB


@pytest.mark.usefixtures("optimized")
def test_the_largest_buffers_are_the_saved_activations():
    buffers = largest_buffers(stack("v5p:2x2x1", 40).compile().as_text(), 3)
    assert (buffers[0].bytes, buffers[0].shape) == (40 * 0.5 * GIB, "bf16[40,65536,4096]")
    assert buffers[0].scope == "vision"
    assert [b.bytes for b in buffers] == sorted((b.bytes for b in buffers), reverse=True)
    assert len(buffers) == 3


def test_on_chip_arrays_and_existing_ones_are_excluded():
    text = program(
        """
        %p = f32[1024]{0:T(1024)} parameter(0)
        %place = f32[7,1024]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
        %in = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%p)
        %here = f32[1024]{0:T(1024)S(1)} copy-done(%in)
        %x = f32[512]{0:T(512)} fusion(%here), kind=kLoop, calls=%f, metadata={op_name="jit(f)/vision/tanh"}
        %y = f32[512]{0:T(512)} fusion(%here), kind=kLoop, calls=%f, metadata={op_name="jit(f)/vision/sin"}
        %z = bf16[64]{0:T(64)} fusion(%here), kind=kLoop, calls=%f, metadata={op_name="jit(f)/text/sin"}
        ROOT %t = (f32[512]{0:T(512)}, bf16[64]{0:T(64)}) tuple(%x, %z)
        """,
        "%f (a: f32[1024]) -> f32[1024] {\n  %a = f32[1024]{0} parameter(0)\n  ROOT %n = f32[1024]{0} negate(%a)\n}",
    )
    first, second = Buffer(2048.0, "f32[512]", "vision", 2), Buffer(128.0, "bf16[64]", "text")
    assert largest_buffers(text) == [first, second]
    assert largest_buffers(text, 1) == [first]
