"""What the compiler says of memory, and what its programs hold."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning.oom import Buffer, largest_arrays, parse_oom
from tests.planning.programs import program
from tests.tpu import topology_mesh

GIB = 2.0**30

AHEAD = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.05G) exceeds "
    "available HBM (15.75G)."
)
ON_MACHINES = (
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


def test_two_numbers_are_read():
    found = parse_oom(AHEAD)
    assert found is not None
    assert (found.needed, found.capacity, found.largest) == (17.05 * GIB, 15.75 * GIB, [])
    assert found.exceeded_by == pytest.approx(1.3 * GIB)


@pytest.mark.parametrize(
    ("written", "size"), [("80.00G", 80 * GIB), ("512.5M", 512.5 * 2**20), ("3K", 3072), ("7B", 7)]
)
def test_units(written, size):
    found = parse_oom(AHEAD.replace("17.05G", written))
    assert found is not None
    assert found.needed == size


def test_allocations_are_listed_by_size_under_the_models_names():
    found = parse_oom(ON_MACHINES)
    assert found is not None
    assert (found.needed, found.capacity) == (63.80 * GIB, 30.75 * GIB)
    assert found.exceeded_by == pytest.approx(33.05 * GIB)
    assert found.largest == [
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
    """The gradient of a deep stack, whose activations of every layer are kept: 512 MiB a layer and device."""
    mesh = topology_mesh(topology, MeshConfig())
    rows = mesh.size * 2**16
    weights = jax.ShapeDtypeStruct((depth, 4096, 4096), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec()))
    x = jax.ShapeDtypeStruct((rows, 4096), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    return jax.jit(jax.grad(layers)).lower(weights, x)


@pytest.mark.usefixtures("optimized")
def test_the_compilers_refusal_is_understood():
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        stack("v5e:2x2", 40).compile()
    found = parse_oom(str(refusal.value))
    assert found is not None
    assert found.capacity == 15.75 * GIB
    assert 40 * 0.5 * GIB < found.needed < 4 * 40 * 0.5 * GIB


@pytest.mark.usefixtures("optimized")
def test_the_largest_arrays_are_what_every_layer_leaves():
    found = largest_arrays(stack("v5p:2x2x1", 40).compile().as_text(), 3)
    assert (found[0].bytes, found[0].shape) == (40 * 0.5 * GIB, "bf16[40,65536,4096]")
    assert found[0].name == "vision"
    assert [each.bytes for each in found] == sorted((each.bytes for each in found), reverse=True)
    assert len(found) == 3


def test_arrays_elsewhere_and_those_that_are_there_already_are_left_out():
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
    assert largest_arrays(text) == [first, second]
    assert largest_arrays(text, 1) == [first]
