"""The two models equal ours at sizes that no golden has, and can be trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2_jax.conversion.layouts.official import load_official
from mplug2_jax.conversion.parity.goldens import QUESTION_PARTS
from mplug2_jax.conversion.torch_runtime import (
    Caption,
    Taps,
    VideoQA,
    normalize_pixels,
    parameter_groups,
    update_teacher,
)
from mplug2_jax.conversion.torch_runtime.vision import resize_positions
from mplug2_jax.errors import UserError
from mplug2_jax.model import vision
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.model.taps import Taps as JaxTaps
from tests.close import BFLOAT16, CHAIN, assert_close
from tests.weights import MemorySource

QUESTION = torch.tensor([[1, 7, 9, 4], [1, 5, 0, 0]])
TARGET = torch.tensor([[1, 8, 2, 0], [1, 30, 31, 2]])


def random_frames(frames: int = 2, side: int = 16, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, frames, side, side)


def question_batch(frames: int = 2) -> tuple[torch.Tensor, ...]:
    return random_frames(frames), QUESTION, QUESTION != 0


# No golden has these: three universal layers or one, cross attention after joint attention, tubelets of 3 frames.
@pytest.mark.parametrize(
    "changed",
    [
        {"universal_layers": 3, "text_layers": 1, "temporal_downsampling": True},
        {"universal_layers": 1, "text_layers": 0, "fusion_layers": 4, "fusion_stride": 2, "width": 32},
    ],
)
def test_every_intermediate_equals_ours_under_the_same_name(small, lively, changed) -> None:
    config = small(**changed)
    model, taps = lively(VideoQA(config)), Taps()
    frames = random_frames(frames=5, side=24)  # a larger grid than the table's
    with torch.no_grad():
        logits = model.answer_logits(frames, QUESTION, QUESTION != 0, TARGET, taps=taps)

    ours = {field.name for field in dataclasses.fields(ModelConfig)}
    shared = {name: value for name, value in dataclasses.asdict(config).items() if name in ours}
    model_def = define_model(ModelConfig(**shared, dtype="float32"), QUESTION_PARTS)
    source = MemorySource({name: value.numpy() for name, value in model.state_dict().items()})
    params, _ = load_official(source, model_def, config.fusion_start)

    @jax.jit
    def run(params):
        ours, found = model_def.bind(params), JaxTaps()
        mask = jnp.asarray(QUESTION.numpy() != 0)
        visual = ours.encode_visual(jnp.asarray(frames.numpy().transpose(0, 2, 3, 4, 1)), taps=found)
        text = ours.encode_text(jnp.asarray(QUESTION.numpy(), jnp.int32), mask, taps=found)
        visual, fused = ours.fusion(text, mask, visual, taps=found)
        memory = jnp.concatenate([visual, fused], axis=1)
        seen = jnp.concatenate([jnp.ones(visual.shape[:2], bool), mask], axis=1)
        target = jnp.asarray(TARGET.numpy(), jnp.int32)
        logits = ours.decoder(target, target != 0, memory, seen, taps=found)
        return dict(found), logits

    expected, expected_logits = run(params)
    assert set(taps) == set(expected)
    assert_close(dict(taps), expected, CHAIN)
    assert_close(logits, expected_logits, CHAIN)


def test_only_requested_taps_are_kept(small) -> None:
    model = Caption(small()).eval()
    frames, weights, taps = random_frames(), torch.ones(TARGET.shape), Taps(["vision/block", "visual/out"])
    loss = model(frames, TARGET, weights, taps=taps)
    assert {name: tuple(value.shape) for name, value in taps.items()} == {
        "vision/block": (2, 4, 5, 32), "visual/out": (2, 9, 24)
    }  # fmt: skip
    assert torch.equal(loss, model(frames, TARGET, weights))
    model(random_frames(frames=1), TARGET, weights, taps=taps)  # a second pass overwrites the first
    assert taps["vision/block"].shape == (2, 2, 5, 32)


@pytest.mark.parametrize(("frames", "side"), [(1, 16), (1, 24), (2, 8), (3, 16), (7, 32)])
def test_any_number_of_frames_and_any_square_size(small, frames, side) -> None:
    model = Caption(small(max_positions=20, vocab_size=110)).eval()
    assert model.encode_visual(random_frames(frames, side)).shape == (2, 1 + frames * (side // 8) ** 2, 24)
    found = model.generate(random_frames(frames, side))
    assert found.ids.shape == (2, 5, 21)  # the release's limits
    assert (found.lengths >= 6).all()  # with the begin and the end token


@pytest.mark.parametrize("shape", [(16, 24), (20, 20), (4, 4)])
def test_frames_of_another_shape_are_an_error(small, shape) -> None:
    frames = torch.zeros(1, 3, 1, *shape)
    message = rf"frames are {shape[0]}x{shape[1]} pixels, expected squares .* a multiple of patch_size=8"
    with pytest.raises(UserError, match=message):
        Caption(small()).encode_visual(frames)


def test_one_frame_skips_the_temporal_units(small, lively) -> None:
    model, frames = lively(Caption(small())), random_frames(frames=1)
    before, moving = model.encode_visual(frames), model.encode_visual(random_frames(frames=2))
    assert not torch.equal(moving, before)
    before.sum().backward()
    units = {name: p for name, p in model.named_parameters() if "lmhra" in name}
    assert len(units) == 32
    assert all(p.grad is None for p in units.values())
    with torch.no_grad():
        for parameter in units.values():
            parameter.fill_(torch.nan)
        assert torch.equal(model.encode_visual(frames), before)


def test_a_text_beyond_the_position_table_is_an_error(small) -> None:
    question = torch.ones(2, 13, dtype=torch.long)
    with pytest.raises(UserError, match="a text of 13 tokens exceeds max_positions=12; truncate it"):
        VideoQA(small()).instruction_memory(random_frames(), question, question != 0)


@settings(max_examples=20)
@given(side=st.integers(1, 6), grid=st.integers(1, 6))
def test_position_tables_are_resized_as_in_our_model(side, grid) -> None:
    table = np.random.default_rng(side).normal(size=(1 + side**2, 3)).astype(np.float32)
    ours = vision.resize_positions(jnp.asarray(table), grid)
    assert_close(resize_positions(torch.from_numpy(table), grid), ours)


def test_pixels_are_normalized_as_in_our_model() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), np.uint8)
    ours = np.asarray(vision.normalize_pixels(jnp.asarray(frames))).transpose(0, 4, 1, 2, 3)
    assert_close(normalize_pixels(torch.from_numpy(frames)), ours)


def test_sixteen_bits_are_enough_for_a_loss(small) -> None:
    model, frames = Caption(small()).eval(), random_frames()
    exact = model(frames, TARGET, torch.ones(TARGET.shape))
    rounded = model.bfloat16()(frames, TARGET, torch.ones(TARGET.shape))
    assert rounded.dtype == torch.float32
    assert_close(rounded, exact, BFLOAT16)


# --- training ---------------------------------------------------------------------------------------------------------


def losses(model: Caption | VideoQA, frames: torch.Tensor) -> list[float]:
    """Compute the loss twice."""
    weights = torch.ones(TARGET.shape)
    if isinstance(model, Caption):
        return [model(frames, TARGET, weights).item() for _ in range(2)]
    return [model(frames, QUESTION, QUESTION != 0, TARGET, weights).item() for _ in range(2)]


@pytest.mark.parametrize("kind", [Caption, VideoQA])
@pytest.mark.parametrize("rates", [{"dropout": 0.0}, {"attention_dropout": 0.0}])
def test_both_dropouts_work_only_in_train_mode(small, lively, kind, rates) -> None:
    model, frames = lively(kind(small(**rates))), random_frames()
    first, second = losses(model, frames)
    assert first == second
    model.train()
    noisy = losses(model, frames)
    assert len({first, *noisy}) == 3
    still = kind(small(dropout=0.0, attention_dropout=0.0)).train()
    still.load_state_dict(model.state_dict())
    assert losses(still, frames) == [first, first]


@pytest.mark.parametrize("kind", [Caption, VideoQA])
def test_every_parameter_gets_a_gradient_and_is_in_one_group(small, lively, kind) -> None:
    model = lively(kind(small()))
    weights = torch.ones(TARGET.shape)
    batch = (random_frames(),) if kind is Caption else question_batch()
    model(*batch, TARGET, weights).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []

    groups = parameter_groups(model, learning_rate=1e-3, vision_learning_rate=1e-4, weight_decay=0.02)
    assert sorted((group["lr"], group["weight_decay"]) for group in groups) == [
        (1e-4, 0.0), (1e-4, 0.02), (1e-3, 0.0), (1e-3, 0.02)
    ]  # fmt: skip
    place = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(place) == len(list(model.parameters()))
    expected = {
        "visual_encoder.visual.ln_pre.weight": (1e-4, 0.02),
        "visual_encoder.visual.transformer.resblocks.1.attn.in_proj_bias": (1e-4, 0.0),
        "visn_emb_norm.weight": (1e-3, 0.02),
        "visn_emb_norm.bias": (1e-3, 0.0),
        "text_encoder.encoder.layer.2.latents": (1e-3, 0.02),
        "text_decoder.bert.embeddings.LayerNorm.weight": (1e-3, 0.0),
        "text_decoder.bert.embeddings.word_embeddings.weight": (1e-3, 0.02),
        "text_decoder.cls.predictions.bias": (1e-3, 0.0),
    }
    assert {name: place[id(model.get_parameter(name))] for name in expected} == expected


def test_the_padding_row_gets_gradients_only_from_the_head(small, lively) -> None:
    model = lively(VideoQA(small()))
    question = torch.zeros_like(QUESTION)
    question[:, 0] = 1
    mask = torch.ones_like(question, dtype=torch.bool)
    model(random_frames(), question, mask, TARGET, torch.ones(TARGET.shape)).backward()
    assert not model.text_encoder.embeddings.word_embeddings.weight.grad[0].any()
    assert model.text_decoder.bert.embeddings.word_embeddings.weight.grad[0].any()


def test_captions_without_weights_have_zero_loss(small) -> None:
    loss = Caption(small())(random_frames(), TARGET, torch.zeros(TARGET.shape))
    assert loss.item() == 0.0


def test_answers_of_a_question_are_summed_with_weights(small, lively) -> None:
    model, (frames, question, mask) = lively(VideoQA(small())), question_batch()
    target = torch.tensor([[1, 8, 2, 0], [1, 9, 2, 0], [1, 30, 31, 2]])
    counted, weights = (target != 0).float(), torch.tensor([0.5, 2.0, 0.25])
    together = model(
        frames, question, mask, target, counted, answers_per_question=torch.tensor([2, 1]), answer_weights=weights
    )
    alone = [
        model(frames[i : i + 1], question[i : i + 1], mask[i : i + 1], target[a : a + 1], counted[a : a + 1])
        for i, a in ((0, 0), (0, 1), (1, 2))
    ]
    assert_close(together, (torch.stack(alone) * weights).sum() / 2)


def test_distillation_over_the_vocabulary_moves_towards_the_teacher(small, lively) -> None:
    student, batch = lively(VideoQA(small())), question_batch()
    weights = (TARGET != 0).float()

    def gradient(softmax_axis: str) -> float:
        student.zero_grad()
        student(*batch, TARGET, weights, teacher=student, alpha=1.0, softmax_axis=softmax_axis).backward()
        return max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None)

    # A model as its own teacher has no gradient, but the release's softmax over time has one.
    assert gradient("vocabulary") < 1e-3 * gradient("time")
    inert = student(*batch, TARGET, weights, teacher=student, alpha=0.0)
    assert_close(inert, student(*batch, TARGET, weights))


def test_the_teacher_is_updated_except_for_frozen_modules(small) -> None:
    teacher, student = VideoQA(small()), VideoQA(small())
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    update_teacher(teacher, student, 0.75, frozen=["fusion_encoder"])
    updated = {name: 0.75 * p + 0.25 * student.get_parameter(name) for name, p in before.items()}
    frozen = {name: p for name, p in before.items() if name.startswith("fusion_encoder.")}
    assert_close(dict(teacher.named_parameters()), updated | frozen)
    update_teacher(teacher, student, 0.0)
    assert all(torch.equal(own, student.get_parameter(name)) for name, own in teacher.named_parameters())
