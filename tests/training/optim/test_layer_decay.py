"""Layer-wise decay: the exact factor of every layer of every stack, and that it scales the whole update."""

import dataclasses

import jax
import numpy as np
import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import PARTS, SpecialTokens, model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.training.config import AdamWConfig
from mplug2_jax.training.optim.layer_decay import depth_from_head, lr_scales
from mplug2_jax.training.state import make_run_spec
from tests.close import assert_close
from tests.runs import small_model, small_run

MODEL = model_config(
    "tiny", vision_layers=3, text_layers=2, universal_layers=2, fusion_layers=3, decoder_layers=4, vision_width=64,
    num_classes=2,
)  # fmt: skip


def above(path: str, parts: frozenset[str], **changed: int) -> int | list[int]:
    found: int | list[int] = depth_from_head(
        tuple(path.split("/")), dataclasses.replace(MODEL, **changed), parts
    ).tolist()
    return found


def test_a_caption_model_is_counted_from_patches_to_the_word_head() -> None:
    parts = frozenset({"vision", "universal", "decoder"})  # 3 + 2 + 4 layers below a head
    assert above("decoder/head/dense/kernel", parts) == 0
    assert above("decoder/layers/mlp/up/kernel", parts) == [4, 3, 2, 1]
    assert above("decoder/embeddings/words", parts) == 5
    assert above("universal/visual_norm/scale", parts) == 5
    assert above("universal/layers/self_norm/scale", parts) == [6, 5]
    assert above("universal/latents", parts) == 7
    for end in ("vision/norm_post/scale", "vision_projection/dense/kernel"):
        assert above(end, parts) == 7
    assert above("vision/blocks/temporal_1/kernel", parts) == [9, 8, 7]
    for start in ("patch/kernel", "positions", "class_token", "norm_pre/bias"):
        assert above(f"vision/{start}", parts) == 10


def test_text_alone_is_counted_as_for_bert() -> None:
    parts = frozenset({"text", "universal", "mlm"})
    assert above("mlm/dense/kernel", parts) == 0
    assert above("universal/layers/mlp/up/bias", parts) == [2, 1]
    assert above("text/layers/mlp/up/bias", parts) == [4, 3]
    assert above("text/embeddings/norm/scale", parts) == 5


def test_the_longest_way_counts_and_parts_that_are_not_there_do_not() -> None:
    every = frozenset(PARTS)
    for head in ("contrastive/temperature", "matching/dense/bias", "classifier/dense/bias"):
        assert above(head, every) == 0
    assert above("fusion/layers/cross_norm/scale", every) == [7, 6, 5]
    assert above("universal/layers/cross_norm/scale", every) == [9, 8]
    assert above("text/layers/mlp/up/bias", every) == above("vision/blocks/mlp/up/bias", every)[1:]  # type: ignore[index]
    assert above("vision/blocks/mlp/up/bias", frozenset({"vision", "classifier"})) == [3, 2, 1]


def test_fusion_layers_that_mix_keep_their_place_between_those_that_read() -> None:
    parts = frozenset({"vision", "text", "fusion", "matching"})
    assert above("fusion/layers/mlp/up/bias", parts, fusion_layers=5, fusion_stride=2) == [5, 4, 2]
    assert above("fusion/mixing/mlp/up/bias", parts, fusion_layers=5, fusion_stride=2) == [3, 1]


@pytest.mark.parametrize("stride", [0, 1, 2])
def test_every_parameter_has_a_factor_that_broadcasts(stride: int) -> None:
    """None is left out or shaped otherwise, whatever is built; heads take all."""
    model = dataclasses.replace(MODEL, fusion_stride=stride)
    shapes = define_model(model, tuple(PARTS)).shapes
    factors = lr_scales(shapes, model, 0.5)

    def check(shape: jax.ShapeDtypeStruct, factor: np.ndarray) -> None:
        assert factor.dtype == np.float32
        assert np.broadcast_shapes(shape.shape, factor.shape) == shape.shape

    jax.tree.map(check, shapes, factors)
    assert float(factors["mlm"]["bias"][0]) == 1.0
    assert factors["decoder"]["layers"]["mlp"]["up"]["kernel"].ravel().tolist() == [1 / 16, 1 / 8, 1 / 4, 1 / 2]


@pytest.mark.slow
def test_the_factor_scales_adams_step_and_the_decay() -> None:
    """The updates of a run with decay are those of one without, layer by layer times the factor."""

    def updates(decay: float) -> dict:
        optimizer = AdamWConfig(learning_rate=1.0, vision_learning_rate=0.5, weight_decay=0.1, layer_decay=decay)
        config = small_run(model=small_model(vision_layers=3), optimizer=optimizer)
        spec = make_run_spec(config, SpecialTokens(), make_mesh(MeshConfig(), jax.devices()[:1]))
        params = spec.init()["params"]
        gradients = jax.tree.map(lambda p: p + 0.5, params)
        opt = spec.optimizer.update(gradients, spec.optimizer.init(params), params)[1]
        return spec.optimizer.update(gradients, opt, params)[0]  # the first step's rate is 0

    plain, decayed = updates(1.0), updates(0.5)
    kernels = [tree["vision"]["blocks"]["mlp"]["up"]["kernel"] for tree in (plain, decayed)]
    # Above the tower: 1 universal layer, 1 of fusion, 1 of the decoder and its head.
    assert_close(kernels[1], kernels[0] * 0.5 ** np.array([6, 5, 4]).reshape(3, 1, 1))
    assert_close(decayed["vision"]["positions"], plain["vision"]["positions"] * 0.5**7)
    np.testing.assert_array_equal(decayed["matching"]["dense"]["bias"], plain["matching"]["dense"]["bias"])
    assert float(abs(plain["vision"]["positions"]).max()) > 0


@pytest.mark.parametrize("decay", [0.0, 1.1, -0.5])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match=rf"config\.optimizer\.layer_decay={decay} must be between 0.001 and 1"):
        AdamWConfig(layer_decay=decay)
