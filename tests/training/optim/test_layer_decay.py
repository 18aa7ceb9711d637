"""Layer-wise decay: the exact scale of every layer of every stack, which multiplies the whole update."""

import dataclasses

import jax
import numpy as np
import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import PARTS, SpecialTokens, model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.training.config import OptimizerConfig
from mplug2_jax.training.optim.layer_decay import depth_from_head, lr_scales
from mplug2_jax.training.state import make_run_spec
from tests.close import assert_close
from tests.runs import small_model, small_run

MODEL = model_config(
    "tiny", vision_layers=3, text_layers=2, universal_layers=2, fusion_layers=3, decoder_layers=4, vision_width=64,
    num_classes=2,
)  # fmt: skip


def depth(path: str, parts: frozenset[str], **overrides: int) -> int | list[int]:
    found: int | list[int] = depth_from_head(
        tuple(path.split("/")), dataclasses.replace(MODEL, **overrides), parts
    ).tolist()
    return found


def test_depths_of_a_caption_model_from_the_head_to_patches() -> None:
    parts = frozenset({"vision", "universal", "decoder"})  # 3 + 2 + 4 layers below a head
    assert depth("decoder/head/dense/kernel", parts) == 0
    assert depth("decoder/layers/mlp/up/kernel", parts) == [4, 3, 2, 1]
    assert depth("decoder/embeddings/words", parts) == 5
    assert depth("universal/visual_norm/scale", parts) == 5
    assert depth("universal/layers/self_norm/scale", parts) == [6, 5]
    assert depth("universal/latents", parts) == 7
    for path in ("vision/norm_post/scale", "vision_projection/dense/kernel"):
        assert depth(path, parts) == 7
    assert depth("vision/blocks/temporal_1/kernel", parts) == [9, 8, 7]
    for name in ("patch/kernel", "positions", "class_token", "norm_pre/bias"):
        assert depth(f"vision/{name}", parts) == 10


def test_depths_of_a_text_model_are_those_of_bert() -> None:
    parts = frozenset({"text", "universal", "mlm"})
    assert depth("mlm/dense/kernel", parts) == 0
    assert depth("universal/layers/mlp/up/bias", parts) == [2, 1]
    assert depth("text/layers/mlp/up/bias", parts) == [4, 3]
    assert depth("text/embeddings/norm/scale", parts) == 5


def test_the_longest_path_counts_and_missing_parts_do_not() -> None:
    all_parts = frozenset(PARTS)
    for head in ("contrastive/temperature", "matching/dense/bias", "classifier/dense/bias"):
        assert depth(head, all_parts) == 0
    assert depth("fusion/layers/cross_norm/scale", all_parts) == [7, 6, 5]
    assert depth("universal/layers/cross_norm/scale", all_parts) == [9, 8]
    assert depth("text/layers/mlp/up/bias", all_parts) == depth("vision/blocks/mlp/up/bias", all_parts)[1:]  # type: ignore[index]
    assert depth("vision/blocks/mlp/up/bias", frozenset({"vision", "classifier"})) == [3, 2, 1]


def test_joint_attention_layers_of_fusion_keep_their_depth() -> None:
    parts = frozenset({"vision", "text", "fusion", "matching"})
    assert depth("fusion/layers/mlp/up/bias", parts, fusion_layers=5, fusion_stride=2) == [5, 4, 2]
    assert depth("fusion/mixing/mlp/up/bias", parts, fusion_layers=5, fusion_stride=2) == [3, 1]


@pytest.mark.parametrize("stride", [0, 1, 2])
def test_every_parameter_has_a_scale_that_broadcasts(stride: int) -> None:
    model = dataclasses.replace(MODEL, fusion_stride=stride)
    shapes = define_model(model, tuple(PARTS)).shapes
    scales = lr_scales(shapes, model, 0.5)

    def check(shape: jax.ShapeDtypeStruct, scale: np.ndarray) -> None:
        assert scale.dtype == np.float32
        assert np.broadcast_shapes(shape.shape, scale.shape) == shape.shape

    jax.tree.map(check, shapes, scales)
    assert float(scales["mlm"]["bias"][0]) == 1.0
    assert scales["decoder"]["layers"]["mlp"]["up"]["kernel"].ravel().tolist() == [1 / 16, 1 / 8, 1 / 4, 1 / 2]


@pytest.mark.slow
def test_the_scale_multiplies_adam_s_step_and_the_weight_decay() -> None:
    """The updates with decay are those without, layer by layer times the scale."""

    def updates(decay: float) -> dict:
        optimizer = OptimizerConfig(learning_rate=1.0, vision_learning_rate=0.5, weight_decay=0.1, layer_decay=decay)
        config = small_run(model=small_model(vision_layers=3), optimizer=optimizer)
        spec = make_run_spec(config, SpecialTokens(), make_mesh(MeshConfig(), jax.devices()[:1]))
        params = spec.init()["params"]
        grads = jax.tree.map(lambda p: p + 0.5, params)
        opt = spec.optimizer.update(grads, spec.optimizer.init(params), params)[1]
        return spec.optimizer.update(grads, opt, params)[0]  # the first step's learning rate is 0

    without_decay, with_decay = updates(1.0), updates(0.5)
    kernels = [tree["vision"]["blocks"]["mlp"]["up"]["kernel"] for tree in (without_decay, with_decay)]
    # Above the tower: 1 universal layer, 1 of fusion, 1 of the decoder and its head.
    assert_close(kernels[1], kernels[0] * 0.5 ** np.array([6, 5, 4]).reshape(3, 1, 1))
    assert_close(with_decay["vision"]["positions"], without_decay["vision"]["positions"] * 0.5**7)
    np.testing.assert_array_equal(with_decay["matching"]["dense"]["bias"], without_decay["matching"]["dense"]["bias"])
    assert float(abs(without_decay["vision"]["positions"]).max()) > 0


@pytest.mark.parametrize("decay", [0.0, 1.1, -0.5])
def test_an_invalid_decay_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match=rf"config\.optimizer\.layer_decay={decay} must be between 0.001 and 1"):
        OptimizerConfig(layer_decay=decay)
