"""Features equal those of a direct forward pass, for any batch size and mesh, and after a resume."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig, VisualConfig
from data_pipelines.loader import EvaluationSet
from mplug2_jax.errors import UserError
from mplug2_jax.inference import features as features_module
from mplug2_jax.inference.features import FeatureConfig, FeatureExtractor
from mplug2_jax.model.config import model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.model.taps import Taps
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from tests.close import CHAIN, assert_close
from tests.data_pipelines.worlds import encode_media, records
from tests.evaluation.test_loop import TOKENIZER

MODEL = model_config(
    "tiny", dtype="float32", width=16, heads=2, mlp_width=16, vision_width=16, vision_layers=2, vision_heads=2,
    image_size=16, text_layers=1, universal_layers=2, fusion_layers=1, decoder_layers=1, num_latents=2,
    contrastive_width=8, vocab_size=TOKENIZER.vocab_size,
)  # fmt: skip
PARTS = ("vision", "temporal", "text", "universal", "contrastive")
SIZE, LENGTH = 11, 40


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Limit shards to four examples."""
    monkeypatch.setattr(features_module, "SHARD_ROWS", 4)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape)), define_model(MODEL, PARTS).shapes)


def data(kind, batch_size=3, sources=None):
    return DataConfig(
        sources=sources or {"digits": SourceConfig(kind=kind, split="heldout", max_records=SIZE)},
        visual=VisualConfig(image_size=16, num_frames=2, transform="resize"),
        examples=ExampleConfig(text="sentence", text_length=LENGTH) if kind == "text" else ExampleConfig(),
        batch_size=batch_size,
    )


def make_extractor(kind, name="contrastive", pool="none", *, batch_size=3, mesh=None, sources=None, parts=PARTS):
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    config = FeatureConfig(name=name, pool=pool)
    return FeatureExtractor(
        config, data(kind, batch_size, sources), define_model(MODEL, parts), TOKENIZER, mesh, seed=0
    )


def extract(features, params, start=0):
    """Return all ids and arrays."""
    shards = list(features.shards(params, start))
    ids = [key for shard in shards for key in shard.ids]
    return ids, {name: np.concatenate([shard.arrays[name] for shard in shards]) for name in features.shapes}


def load_all(kind):
    """Return all examples as one batch, and their keys."""
    dataset = EvaluationSet(data(kind), TOKENIZER, name="features", seed=0)
    examples = [dataset[i] for i in range(SIZE)]
    batch = {name: jnp.stack([e.arrays[name] for e in examples]) for name in examples[0].arrays if name != "example_id"}
    return batch, [example.key for example in examples]


def encode(kind, params, batch, taps=None):
    """Encode a batch: return the features for contrast."""
    model = define_model(MODEL, PARTS).bind(params)
    if kind == "text":
        return model.contrastive.text_features(model.encode_text(batch["text"], batch["text_mask"], taps=taps))
    return model.contrastive.visual_features(model.encode_visual(batch["frames"], taps=taps))


def run_tap(kind, params, name):
    @jax.jit
    def run(params, batch):
        taps = Taps([name])
        encode(kind, params, batch, taps)
        return taps[name]

    batch, _ = load_all(kind)
    return np.asarray(run(params, batch)), batch


@pytest.mark.parametrize("kind", ["image", "video", "text"])
def test_contrastive_features_are_those_of_a_direct_pass_in_any_batches_on_any_mesh(kind, params):
    batch, keys = load_all(kind)
    expected = jax.jit(encode, static_argnums=0)(kind, params, batch)
    assert_close(np.linalg.norm(expected, axis=1), np.ones(SIZE))
    assert np.ptp(np.asarray(expected), axis=0).max() > 1e-3  # examples have different features
    eight = make_mesh(MeshConfig(data=2, fsdp=4))
    for batch_size, mesh in ((1, None), (3, None), (8, None), (8, eight)):
        ids, arrays = extract(make_extractor(kind, batch_size=batch_size, mesh=mesh), params)
        assert ids == keys
        assert_close(arrays["features"], expected, CHAIN)


def test_shards_do_not_depend_on_batches_and_start_anywhere(params):
    whole = [(s.first, s.stop, len(s.ids)) for s in make_extractor("image", batch_size=3).shards(params)]
    assert whole == [(0, 4, 4), (4, 8, 4), (8, 11, 3)]
    assert whole == [(s.first, s.stop, len(s.ids)) for s in make_extractor("image", batch_size=8).shards(params)]
    ids, arrays = extract(make_extractor("image", batch_size=3), params)
    later_ids, later = extract(make_extractor("image", batch_size=8), params, start=4)
    assert later_ids == ids[4:]
    assert_close(later["features"], arrays["features"][4:], CHAIN)
    assert list(make_extractor("image").shards(params, start=SIZE)) == []


def test_pooled_is_the_mean_over_the_last_tokens_without_padding(params):
    text, batch = run_tap("text", params, "text/out")
    lengths = np.asarray(batch["text_mask"]).sum(1)
    assert lengths.min() < LENGTH
    expected = np.stack([row[:length].mean(0) for row, length in zip(text, lengths, strict=True)])
    assert_close(extract(make_extractor("text", "pooled"), params)[1]["features"], expected, CHAIN)
    clips, _ = run_tap("video", params, "visual/out")
    assert_close(extract(make_extractor("video", "pooled"), params)[1]["features"], clips.mean(1), CHAIN)


def test_a_tap_keeps_all_tokens_and_texts_have_lengths(params):
    layers, batch = run_tap("text", params, "text/layer")
    arrays = extract(make_extractor("text", "text/layer"), params)[1]
    assert_close(arrays["features"], layers.swapaxes(0, 1), CHAIN)
    np.testing.assert_array_equal(arrays["lengths"], np.asarray(batch["text_mask"]).sum(1))


def test_a_tap_with_a_row_per_frame_keeps_the_frames_of_a_video_together(params):
    blocks, _ = run_tap("video", params, "vision/block")  # layers, clips and frames, tokens, width
    expected = blocks.reshape(2, SIZE, 2, *blocks.shape[2:]).transpose(1, 2, 0, 3, 4)
    features = make_extractor("video", "vision/block")
    assert features.shapes == {"features": (expected.shape[1:], "float32")}
    assert_close(extract(features, params)[1]["features"], expected, CHAIN)
    first = extract(make_extractor("video", "vision/block", "cls"), params)[1]["features"]
    assert_close(first, expected[..., 0, :], CHAIN)
    mean = extract(make_extractor("video", "vision/block", "mean"), params)[1]["features"]
    assert_close(mean, expected.mean(-2), CHAIN)


@pytest.mark.slow
def test_every_listed_tap_works(params):
    with pytest.raises(UserError) as error:
        make_extractor("image", "vision/blocks")
    assert "did you mean 'vision/block'?" in str(error.value)
    valid = str(error.value).partition("(valid: ")[2].rstrip(")").split(", ")
    assert {"contrastive", "pooled", "visual/out", "universal/visual0"} <= set(valid)
    for name in valid:
        assert len(extract(make_extractor("image", name, batch_size=8), params)[0]) == SIZE


def test_bad_records_and_padding_are_skipped(params, tmp_path: Path):
    for i, record in enumerate(records("image", 6)):
        (tmp_path / f"{i}.png").write_bytes(b"no picture" if i in (1, 5) else encode_media(record))
    sources = {"folder": SourceConfig(format="files", path=str(tmp_path))}
    for batch_size in (1, 4):
        shards = list(make_extractor("image", batch_size=batch_size, sources=sources).shards(params))
        assert [shard.ids for shard in shards] == [("0.png", "2.png", "3.png"), ("4.png",)]
        assert [[record.key for record in shard.bad_records] for shard in shards] == [["1.png"], ["5.png"]]
        assert [len(shard.arrays["features"]) for shard in shards] == [3, 1]


def test_ids_of_several_sources_are_prefixed_by_their_names(params, tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(encode_media(records("image", 1)[0]))
    sources = {
        name: SourceConfig(format="files", path=str(tmp_path / path))
        for name, path in (("a", "a"), ("b", "b"), (str(tmp_path / "a/x.png"), "a/x.png"))
    }
    assert extract(make_extractor("image", sources=sources), params)[0] == [
        "a/x.png",
        "b/x.png",
        str(tmp_path / "a/x.png"),
    ]


@pytest.mark.parametrize(
    ("kind", "name", "parts", "expected"),
    [
        ("image", "contrastive", ("text", "universal"), "needs the parts vision, contrastive, which this model lacks"),
        ("text", "contrastive", ("text", "mlm"), r"needs the parts contrastive, which this model lacks \(it has text"),
        ("text", "pooled", ("vision",), "feature 'pooled' of texts needs the parts text"),
        ("video", "visual/out", ("vision",), "needs the parts temporal"),
    ],
)
def test_a_model_without_the_parts_is_an_error(kind, name, parts, expected):
    with pytest.raises(UserError, match=expected):
        make_extractor(kind, name, parts=parts)


def test_vectors_are_not_pooled():
    with pytest.raises(UserError, match="--pool mean is for the tokens of a tap, but feature 'pooled' is one vector"):
        FeatureConfig(name="pooled", pool="mean")
