"""Collectives of programs: stored texts, one for each syntax, and programs compiled for CPUs and TPUs."""

import collections
import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.config import ExampleConfig
from mplug2_jax.model.config import RematConfig, SpecialTokens, model_config
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import batch_sharding
from mplug2_jax.planning.hlo import parse_hlo, shape_bytes
from mplug2_jax.planning.traffic import Collective, find_unknown_loops, largest_collectives, parse_collectives
from mplug2_jax.training.state import make_run_spec
from mplug2_jax.training.step import jit_train_step
from tests.planning import programs
from tests.planning.programs import REDUCE, loop, program
from tests.runs import small_run, stream
from tests.tpu import LOW_EFFORT, topology_mesh

ROWS = ("replica", "data", "fsdp", "sequence")
NO_WINDOWED_EINSUM = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def fsdp() -> Mesh:
    return make_mesh(MeshConfig())


def parse_one(text: str, mesh: Mesh | None = None) -> Collective:
    (collective,) = parse_collectives(text, mesh or fsdp())
    return collective


def sum_bytes(traffic: Iterable[Collective]) -> collections.Counter[tuple[str, tuple[str, ...], str]]:
    """Return the bytes that one device sends in one run of the program, by kind, mesh axes and network."""
    totals: dict[tuple[str, tuple[str, ...], str], float] = collections.defaultdict(float)
    for each in traffic:
        totals[each.kind, each.axes, each.network] += each.total_bytes
    return collections.Counter({key: round(total) for key, total in totals.items()})


def one_line(shape: str, call: str, attributes: str, operand: str = "bf16[8,128]{1,0:T(8,128)(2,1)}") -> str:
    """Return a program of one collective."""
    return program(f"%p = {operand} parameter(0)\nROOT %x = {shape} {call}(%p), channel_id=1, {attributes}")


# --- Texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("(f32[2,3]{1,0:T(8,128)}, /*index=1*/pred[5]{0}, token[])", 29),
        ("((bf16[4]{0}), (bf16[8]{0}), u32[]{:S(2)})", 28),
        ("s4[3]{0:T(128)}", 1.5),
        ("f8e4m3fn[10]{0}", 10),
        ("c64[2]{0}", 16),
        ("f32[0,4]{1,0}", 0),
        ("f32[<=4,2]{1,0}", 32),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert shape_bytes(shape) == size


GROUPS = "replica_groups=[1,8]<=[8], use_global_device_ids=true"


@pytest.mark.parametrize(
    ("shape", "call", "attributes", "sent"),
    [
        ("bf16[64,128]{1,0:T(8,128)(2,1)}", "all-gather", GROUPS, 7 * 2048),
        ("bf16[1,128]{1,0}", "reduce-scatter", GROUPS, 2048 * 7 / 8),
        ("bf16[8,128]{1,0}", "all-reduce", GROUPS, 2 * 2048 * 7 / 8),
        ("bf16[8,128]{1,0}", "all-to-all", "replica_groups=[1,8]<=[8], dimensions={0}", 2048 * 7 / 8),
        ("bf16[8,128]{1,0}", "collective-permute", "source_target_pairs={{0,1},{1,0}}", 2048),
        ("bf16[8,128]{1,0}", "collective-permute", "source_target_pairs={{0,0},{1,1}}", 0),
        ("(bf16[8,128]{1,0}, bf16[64,128]{1,0})", "all-gather-start", GROUPS, 7 * 2048),
        ("bf16[64,128]{1,0}", "all-gather", "replica_groups=mesh['a'=8,'b'=1] {'a'}", 7 * 2048),
        ("bf16[64,128]{1,0}", "all-gather", "replica_groups={}", 7 * 2048),
    ],
)  # fmt: skip
def test_bytes_sent_of_every_kind(shape, call, attributes, sent):
    collective = parse_one(one_line(shape, call, attributes))
    assert (collective.bytes_sent, collective.count, collective.kind) == (sent, 1, call.removesuffix("-start"))
    assert collective.axes == (("fsdp",) if sent else ())


def test_all_arrays_of_a_combined_collective_count():
    text = program(
        """
        %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
        %q = f32[16]{0:T(128)} parameter(1)
        ROOT %x = (bf16[8,128]{1,0}, f32[16]{0}) all-reduce(%p, /*index=1*/%q), replica_groups={}, to_apply=%add
        """
    )
    collective = parse_one(text)
    assert collective.bytes_sent == 2 * (2048 + 64) * 7 / 8
    assert collective.shape == "bf16[8,128] and 1 more"


def test_a_start_and_its_done_count_once_and_compute_between_them_overlaps():
    def text(between: str) -> str:
        return program(
            f"""
            %p = f32[8]{{0:T(128)}} parameter(0)
            %s = (f32[8]{{0}}, f32[64]{{0}}) all-gather-start(%p), channel_id=1, replica_groups={{}}, dimensions={{0}}
            {between}
            ROOT %d = f32[64]{{0}} all-gather-done(%s)
            """,
            "%work (a: f32[8]) -> f32[8] {\n  ROOT %a = f32[8]{0} parameter(0)\n}",
        )

    assert not parse_one(text("%b = f32[8]{0} bitcast(%p)")).overlapped
    assert parse_one(text("%f = f32[8]{0} fusion(%p), kind=kLoop, calls=%work")).overlapped
    assert parse_one(text('%k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"')).overlapped


def test_a_wrapped_collective_is_found():
    text = program(
        """
        %p = f32[8]{0} parameter(0)
        %s = ((f32[8]{0}), f32[1]{0}, u32[]) async-start(%p), calls=%wrapped
        %u = ((f32[8]{0}), f32[1]{0}, u32[]) async-update(%s), calls=%wrapped
        ROOT %d = f32[1]{0} async-done(%u), calls=%wrapped
        """,
        "%wrapped (a: f32[8]) -> f32[1] {\n  %a = f32[8]{0} parameter(0)\n"
        "  ROOT %r = f32[1]{0} reduce-scatter(%a), replica_groups={}, dimensions={0}, to_apply=%add\n}",
    )
    assert (parse_one(text).kind, parse_one(text).bytes_sent, parse_one(text).count) == ("reduce-scatter", 28, 1)


def test_a_sliced_all_reduce_is_a_reduce_scatter():
    collective = parse_one(programs.FUSED_REDUCE_SCATTER)
    assert (collective.kind, collective.bytes_sent) == ("reduce-scatter", 1024 * 4096 * 2 * 7 / 8)
    assert collective.scope == "text (backward)"  # of the fusion: the collective in it has none


def test_pieces_of_a_collective_count_once():
    overlapped = parse_one(programs.piecewise_gather(programs.OVERLAPPED_MATMUL))
    exposed = parse_one(programs.piecewise_gather(""))
    assert overlapped.bytes_sent == exposed.bytes_sent == 7 * 8 * 128 * 2
    assert (overlapped.overlapped, exposed.overlapped) == (True, False)
    assert overlapped.scope == "vision"


def test_the_branch_with_most_traffic_counts():
    def branch(name: str, width: int) -> str:
        return (
            f"%{name} (a.{name}: f32[{width}]) -> f32[{width}] {{\n  %a.{name} = f32[{width}]{{0}} parameter(0)\n"
            f"  ROOT %r.{name} = f32[{width}]{{0}} {REDUCE.format('%a.' + name)}\n}}"
        )

    text = program(
        """
        %p = f32[8]{0} parameter(0)
        %q = f32[16]{0} parameter(1)
        %c = pred[] parameter(2)
        ROOT %x = f32[8]{0} conditional(%c, %p, %q), branch_computations={%small, %big}
        """,
        branch("small", 8),
        branch("big", 16),
    )
    assert parse_one(text).shape == "f32[16]"


def test_other_text_is_rejected():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_collectives("module @jit_step {}", fsdp())


# --- Loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "bound", "step", "direction", "trip_count"),
    [
        (0, "7", 1, "LT", 7),
        (1, "7", 1, "LT", 6),
        (0, "7", 2, "LT", 4),
        (0, "7", 1, "LE", 8),
        (7, "0", -1, "GT", 7),
        (0, "6", 2, "NE", 3),
        (0, "", 1, "LT", 5),  # the bound is in the carry
        (9, "7", 1, "LT", 0),
    ],
)
def test_trip_counts_follow_from_counters(start, bound, step, direction, trip_count):
    body, condition, entry = loop(start, bound, step, direction)
    text = program(entry, body, condition)
    assert sum(c.count for c in parse_collectives(text, fsdp())) == trip_count
    assert not find_unknown_loops(text, fsdp())


def test_fused_conditions_are_evaluated():
    body, condition, entry = loop(0, "7")
    condition = condition.replace(
        "compare(%i.1, %limit.1), direction=LT", "fusion(%i.1, %limit.1), kind=kLoop, calls=%compared"
    )
    compared = (
        "%compared (a: s32[], b: s32[]) -> pred[] {\n  %b = s32[] parameter(1)\n  %a = s32[] parameter(0)\n"
        "  ROOT %c = pred[] compare(%a, %b), direction=LT\n}"
    )
    assert parse_one(program(entry, compared, body, condition)).count == 7


def test_a_known_trip_count_is_used():
    body, condition, entry = loop(0, "7")
    entry = entry.replace("metadata=", 'backend_config={"known_trip_count":{"n":"3"}}, metadata=')
    assert parse_one(program(entry, body, condition)).count == 3


def test_a_loop_with_a_condition_on_data_is_unknown_and_the_caller_gives_its_trip_count():
    body, condition, entry = loop(0, "")
    # The bound changes in every iteration.
    body = body.replace("tuple(%next, %limit,", "tuple(%next, %moved,").replace(
        "%data =", "%moved = s32[] custom-call(%limit)\n  %data ="
    )
    text = program(entry, body, condition)
    (unknown,) = find_unknown_loops(text, fsdp())
    assert (unknown.name, unknown.scope, unknown.computation) == ("loop", "vision", "main")
    assert (parse_one(text).count, parse_one(text).has_known_count) == (1, False)
    for trip_counts in (9, {"loop": 9}):
        assert [c.count for c in parse_collectives(text, fsdp(), trip_counts=trip_counts)] == [9]


def test_an_endless_loop_is_unknown():
    body, condition, entry = loop(0, "7", step=0)
    assert [each.scope for each in find_unknown_loops(program(entry, body, condition), fsdp())] == ["vision"]


def test_a_bound_in_the_carry_of_an_outer_loop_must_be_invariant():
    inner_body, inner_condition, inner_entry = loop(0, "")
    inner = inner_entry.strip().splitlines()[1:]
    renamed = [
        line.strip().replace("%init", "%init.2").replace("ROOT %loop", "%loop.2").replace("%p)", "%data)")
        .replace("%five", "%limit").replace("%start =", "%start.2 =").replace("%start)", "%start.2)")
        for line in inner if "constant(5)" not in line
    ]  # fmt: skip
    renamed.append("%sum = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop.2), index=2")
    body, condition, entry = loop(0, "4", inside="\n  ".join(renamed))
    outer = [part.replace("%body", "%outer").replace("%cond", "%until") for part in (body, condition, entry)]
    text = program(outer[2], inner_body, inner_condition, outer[0], outer[1])
    fixed = text.replace(
        'condition=%until, body=%outer, metadata={op_name="jit(step)/vision/while"}\n  %sum',
        'condition=%cond, body=%body, metadata={op_name="jit(step)/vision/while"}\n  %sum',
    )
    assert sum(c.count for c in parse_collectives(fixed, fsdp())) == 4 * 5  # the limit is loop-invariant
    moving = fixed.replace("tuple(%next, %limit, %sum)\n}\n\n%until", "tuple(%next, %next, %sum)\n}\n\n%until")
    assert moving != fixed
    assert [each.name for each in find_unknown_loops(moving, fsdp())] == ["loop.2"]


# --- Compiled programs ------------------------------------------------------------------------------------------------


def stack(mesh: Mesh, layers: int, *, width: int = 256, rows: int = 512, options: dict | None = None, **how) -> str:
    """Compile a train step of a scanned stack, two matmuls per layer, parameters sharded over fsdp (and tensor).

    Args:
        mesh: with axes fsdp and tensor.
        layers: of the scan.
        width: of the model; the hidden width is twice as large.
        rows: of the batch.
        options: of the compiler.
        how: ``gradient``, ``accumulate``, ``outer`` (a scan around the scan), ``unroll``, ``pin`` (gather weights
            before their matmuls).
    """
    gradient, accumulate, outer = how.get("gradient", True), how.get("accumulate", 1), how.get("outer", 0)

    def sharding(*axes: object) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    lead = ((outer,) if outer else ()) + (layers,)
    none = (None,) * len(lead)
    params = [
        jax.ShapeDtypeStruct((*lead, width, 2 * width), "float32", sharding=sharding(*none, "fsdp", "tensor")),
        jax.ShapeDtypeStruct((*lead, 2 * width, width), "float32", sharding=sharding(*none, "tensor", "fsdp")),
    ]
    x = jax.ShapeDtypeStruct((accumulate, rows, width), "bfloat16", sharding=sharding(None, ROWS))

    def layer(x, weights):
        up, down = (w.astype(jnp.bfloat16) for w in weights)
        if how.get("pin", True):
            up = jax.lax.with_sharding_constraint(up, sharding(None, "tensor"))
            down = jax.lax.with_sharding_constraint(down, sharding("tensor", None))
        with jax.named_scope("vision"):
            return jax.lax.with_sharding_constraint(x + jnp.tanh(x @ up) @ down, sharding(ROWS)), None

    def loss(weights, x):
        def scan(x, w):
            return jax.lax.scan(layer, x, w, unroll=how.get("unroll", 1))

        return jnp.mean((scan if not outer else lambda x, w: jax.lax.scan(scan, x, w))(x, weights)[0].astype("float32"))

    def step(weights, x):
        if not gradient:
            return jax.lax.map(lambda each: loss(weights, each), x)
        add = lambda total, each: (jax.tree.map(jnp.add, total, jax.grad(loss)(weights, each)), None)  # noqa: E731
        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, weights), x)
        return jax.tree.map(jnp.subtract, weights, total)

    with jax.set_mesh(mesh):
        return jax.jit(step).lower(params, x).compile(compiler_options=options).as_text()


def layer_bytes(width: int, itemsize: int) -> int:
    return 2 * width * 2 * width * itemsize


@pytest.mark.usefixtures("optimized")
def test_on_cpus_every_layer_is_gathered_and_its_gradient_reduced_in_every_microbatch():
    mesh = make_mesh(MeshConfig())
    totals = sum_bytes(parse_collectives(stack(mesh, 3, width=64, rows=16, accumulate=2), mesh))
    whole = layer_bytes(64, 4) * 3 * 2  # CPUs compute in float32
    assert totals["all-gather", ("fsdp",), "ici"] == whole * 7 / 8
    assert totals["all-reduce", ("fsdp",), "ici"] == pytest.approx(2 * whole * 7 / 8, rel=1e-3)  # and the loss


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("options", [NO_WINDOWED_EINSUM, None], ids=["plain", "default"])
@pytest.mark.parametrize("layers", [3, 24])
def test_on_tpus_a_scan_gathers_each_of_its_layers(layers, options):
    mesh = topology_mesh("v5p:2x2x2", MeshConfig())
    collectives = parse_collectives(stack(mesh, layers, gradient=False, options=options), mesh)
    assert sum_bytes(collectives)["all-gather", ("fsdp",), "ici"] == layers * layer_bytes(256, 2) * 7 / 8
    gathers = [each for each in collectives if each.kind == "all-gather"]
    assert {each.count for each in gathers} == {layers}
    assert {each.scope for each in gathers} <= {"vision", "convert_element_type"}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("options", [NO_WINDOWED_EINSUM, None], ids=["plain", "default"])
@pytest.mark.parametrize(
    ("layers", "how"),
    [(7, {}), (3, {"accumulate": 3}), (3, {"outer": 5}), (24, {"unroll": 2}), (7, {"unroll": 2})],
    ids=["backward", "accumulated", "nested", "unrolled", "unrolled unevenly"],
)
def test_on_tpus_trip_counts_of_nested_loops_multiply(layers, how, options):
    mesh = topology_mesh("v5p:2x2x2", MeshConfig())
    collectives = parse_collectives(stack(mesh, layers, options=options, **how), mesh)
    whole = layers * layer_bytes(256, 2) * how.get("accumulate", 1) * how.get("outer", 1)
    totals = sum_bytes(collectives)
    assert totals["all-gather", ("fsdp",), "ici"] == whole * 7 / 8  # saved for the backward pass, so gathered once
    assert totals["all-reduce", ("fsdp",), "ici"] == pytest.approx(2 * whole * 7 / 8, rel=1e-3)
    assert largest_collectives(collectives, 1)[0].kind == "all-reduce"


@pytest.mark.usefixtures("optimized")
def test_on_tpus_axes_and_overlap_are_found():
    mesh = topology_mesh("v5e:4x4", MeshConfig(data=2, fsdp=4, tensor=2))
    collectives = parse_collectives(stack(mesh, 3, width=1024, rows=4096), mesh)
    whole = 3 * layer_bytes(1024, 2) / 2  # half of it per device of the tensor axis
    totals = sum_bytes(collectives)
    assert totals["all-gather", ("fsdp",), "ici"] == whole * 3 / 4
    assert totals["all-reduce", ("data", "fsdp"), "ici"] == pytest.approx(2 * whole * 7 / 8, rel=1e-3)
    one_way = 3 * 512 * 1024 * 2  # the activations of a device, once forward and once backward, over two devices
    assert totals["all-reduce", ("tensor",), "ici"] == 2 * one_way
    assert any(each.overlapped for each in collectives if each.kind == "all-gather")
    assert not any(each.overlapped for each in collectives if each.kind == "all-reduce")


@pytest.mark.usefixtures("optimized")
def test_on_tpus_a_gather_may_be_a_loop_of_permutes():
    mesh = topology_mesh("v5p:2x2x2", MeshConfig())
    text = stack(mesh, 3, width=1024, rows=8 * 4096, pin=False, gradient=False)
    assert "windowed_dot_general" in text
    collectives = parse_collectives(text, mesh)
    permutes = [each for each in collectives if each.kind == "collective-permute"]
    shard = layer_bytes(1024, 2) / 2 / 8
    assert {each.bytes_sent for each in permutes} == {shard}
    # Both directions of the ring, two steps per iteration: one permute before the loop, two iterations of four.
    assert sorted({each.count for each in permutes}) == [3, 3 * 2]
    assert sum(each.total_bytes for each in permutes) == 3 * 2 * 9 * shard
    assert any(each.overlapped for each in permutes)


@pytest.mark.usefixtures("optimized")
def test_on_slices_ici_and_dcn_are_distinguished():
    mesh = topology_mesh("v5e:2x2", MeshConfig(replica=2, fsdp=2, tensor=2), slices=2)
    collectives = parse_collectives(stack(mesh, 3, options=NO_WINDOWED_EINSUM), mesh)
    totals = sum_bytes(collectives)
    whole = 3 * layer_bytes(256, 2) / 2
    assert totals["all-gather", ("fsdp",), "ici"] == whole / 2
    over_dcn = {key: total for key, total in totals.items() if key[2] == "dcn"}
    assert set(over_dcn) == {("all-reduce", ("replica",), "dcn")}
    # Reduced within the slice first: each device's half of the gradients crosses, both ways.
    assert sum(over_dcn.values()) == pytest.approx(2 * whole / 2 / 2, rel=1e-2)
    assert {each.group_size for each in collectives} == {2}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    ("along", "config", "slices"),
    [("data", MeshConfig(data=2, fsdp=2, tensor=2), 1), (("data", "tensor"), MeshConfig(data=2, fsdp=2, tensor=2), 1),
     ("fsdp", MeshConfig(replica=4, fsdp=2), 2)],
    ids=["one axis", "two axes", "within slices"],
)  # fmt: skip
def test_on_tpus_every_kind_is_found_on_its_axes(along, config, slices):
    mesh = topology_mesh("v5e:2x2" if slices > 1 else "v5p:2x2x2", config, slices)
    names = (along,) if isinstance(along, str) else along
    count = 1
    for name in names:
        count *= mesh.shape[name]
    rows = PartitionSpec((*ROWS, "tensor"))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    def program(x):
        gathered = jax.lax.all_gather(x, along, axis=0, tiled=True)
        scattered = jax.lax.psum_scatter(jnp.sin(gathered), along, scatter_dimension=0, tiled=True)
        swapped = jax.lax.all_to_all(jnp.cos(x), along, 0, 0, tiled=True)
        passed = jax.lax.ppermute(jnp.tanh(x), along, [(i, (i + 1) % count) for i in range(count)])
        return jax.lax.psum(x * 2, along) + scattered + swapped + passed

    x = jax.ShapeDtypeStruct((8 * 64, 256), "float32", sharding=NamedSharding(mesh, rows))
    totals = sum_bytes(parse_collectives(jax.jit(program).lower(x).compile().as_text(), mesh))
    operand = 64 * 256 * 4
    assert totals == {
        ("all-gather", names, "ici"): operand * (count - 1),
        ("reduce-scatter", names, "ici"): operand * (count - 1),
        ("all-to-all", names, "ici"): operand * (count - 1) / count,
        ("all-reduce", names, "ici"): 2 * operand * (count - 1) / count,
        ("collective-permute", names, "ici"): operand,
    }


def test_a_program_is_parsed_once():
    text = one_line("bf16[64,128]{1,0}", "all-gather", GROUPS)
    assert parse_hlo(text) is parse_hlo(text)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_train_step_gathers_each_rematerialized_layer_twice():
    mesh = topology_mesh("v5p:2x2x2", MeshConfig())
    captions = dataclasses.replace(stream("video", 16, ExampleConfig(), caption=1.0))

    def gathered(depth: int) -> tuple[float, int]:
        model = model_config(
            "tiny", vision_layers=depth, decoder_layers=1, universal_layers=1, dropout=0.0, attention_dropout=0.0,
            remat=RematConfig(vision="full"),
        )  # fmt: skip
        config = small_run(model=model, streams={"clips": captions}, evaluations={})
        spec = make_run_spec(config, SpecialTokens(), mesh)
        shapes = {
            "frames": ((16, 4, model.image_size, model.image_size, 3), jnp.uint8),
            "target": ((16, 16), jnp.int32),
            "target_weights": ((16, 16), jnp.float32),
        }
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
            for name, (shape, dtype) in shapes.items()
        }
        with jax.set_mesh(mesh):
            text = (
                jit_train_step(spec)
                .lower(spec.shapes, {"clips": batch}, spec.hyperparam_shapes)
                .compile(NO_WINDOWED_EINSUM | LOW_EFFORT)
                .as_text()
            )
        collectives = parse_collectives(text, mesh)
        assert not find_unknown_loops(text, mesh)
        layers = [each for each in collectives if each.count == depth and each.kind == "all-gather"]
        assert {each.scope.partition("/")[0].partition(" ")[0] for each in layers} == {"vision"}
        block = jax.tree.leaves(spec.shapes["params"]["vision"]["blocks"])
        whole = sum(leaf.size for leaf in block if leaf.sharding.spec and "fsdp" in str(leaf.sharding.spec))
        return sum_bytes(collectives)["all-gather", ("fsdp",), "ici"], whole // depth

    (two, layer), (three, _) = gathered(2), gathered(3)
    assert three - two == 2 * layer * 2 * 7 / 8  # forward and recomputed, in bfloat16
