import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import PARTS, check_parts, model_config
from mplug2_jax.model.fusion import joint_attention_layers


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"visoin_width": 64}, "model.visoin_width is not a field of the model: did you mean 'vision_width'?"),
        ({"heads": 5}, "config.model.width=128 does not divide into config.model.heads=5"),
        ({"image_size": 30}, "not a multiple of config.model.patch_size=8; the nearest sizes are 24 and 32"),
        ({"text_layers": -1}, "config.model.text_layers=-1 must be at least 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?").replace("(", r"\(")):
        model_config("tiny", **overrides)


def test_an_unknown_size_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'large'"):
        model_config("larg")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("vision", "universel"), "did you mean 'universal'"),
        (("vision", "fusion"), "part 'fusion' needs text"),
        (("text", "mlm", "matching"), "part 'matching' needs fusion"),
        (("text", "classifier"), "num_classes >= 2"),
        (("decoder",), "needs 'vision' or 'text'"),
        ((), "needs 'vision' or 'text'"),
    ],
)
def test_parts_without_prerequisites_are_refused(parts, message):
    with pytest.raises(UserError, match=message):
        check_parts(parts, model_config("tiny"))


def test_every_part_has_a_description():
    assert all(PARTS.values())


def test_token_counts():
    large = model_config("large")
    assert large.num_visual_tokens(16) == 4097
    assert large.num_visual_tokens(1) == 257
    assert large.num_visual_tokens(4, image_size=448) == 1 + 4 * 1024
    halved = model_config("large", temporal_downsampling=True)
    assert [halved.num_tubelets(t) for t in (1, 2, 5, 16)] == [1, 1, 3, 8]


def test_joint_attention_layers_are_every_stride_th_except_the_first():
    assert joint_attention_layers(6, 0) == ()
    assert joint_attention_layers(6, 3) == (3,)
    assert joint_attention_layers(3, 1) == (1, 2)
