"""Reranking: grouping of pairs into batches, and results against all pairs scored directly."""

import collections

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig, VisualConfig
from data_pipelines.loader import EvaluationSet
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation import matching
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.evaluation.loop import Evaluation
from mplug2_jax.evaluation.matching import group_pairs
from mplug2_jax.metrics.retrieval import compute_ranks
from mplug2_jax.model.config import SpecialTokens, model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.base import TaskContext
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.tasks.table import TASKS
from tests.evaluation.test_loop import TOKENIZER, random_params

K, SIZE = 3, 12
CONTEXT = TaskContext(
    config=TasksConfig(rerank_k=K),
    tokens=SpecialTokens(begin=TOKENIZER.cls_id, end=TOKENIZER.sep_id, mask=TOKENIZER.mask_id),
)
MODEL = model_config(
    "tiny", dtype="float32", width=16, heads=2, mlp_width=16, vision_width=16, vision_heads=2, vision_layers=1,
    image_size=16, text_layers=1, universal_layers=1, fusion_layers=1, num_latents=2, vocab_size=TOKENIZER.vocab_size,
    contrastive_width=8,
)  # fmt: skip
DEFINITION = define_model(MODEL, TASKS["rerank"].parts)


def data(batch_size=8):
    return DataConfig(
        sources={"digits": SourceConfig(kind="image", split="heldout", max_records=SIZE)},
        visual=VisualConfig(image_size=16),
        examples=ExampleConfig(text_length=24), batch_size=batch_size,
    )  # fmt: skip


def evaluation(batch_size=8, mesh=None, model_def=DEFINITION):
    config = EvaluationConfig(task="rerank", data=data(batch_size), num_samples=1)
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    return Evaluation("held", config, model_def, CONTEXT, TOKENIZER, mesh or one, seed=0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, unique=True), st.integers(1, 5))
def test_every_pair_has_an_index_and_no_visual_has_more_rows_than_it_needs(pairs, max_texts):
    rows = group_pairs(np.asarray(pairs), max_texts)
    width = rows.texts.shape[1]
    assert [(rows.texts.ravel()[i], rows.visuals[i // width]) for i in rows.pairs] == pairs
    counts = collections.Counter(visual for _, visual in pairs)
    assert width == min(max_texts, max(counts.values()))
    assert collections.Counter(rows.visuals.tolist()) == {i: -(-n // width) for i, n in counts.items()}
    assert {(t, v) for v, texts in zip(rows.visuals, rows.texts, strict=True) for t in texts} == set(pairs)


@pytest.fixture(scope="module")
def params():
    return random_params(DEFINITION)


@pytest.fixture(scope="module")
def direct(params):
    """Compute features, and the matching head's log odds of all pairs [texts, visuals], each pair by itself."""
    examples = [example for batch in EvaluationSet(data(SIZE), TOKENIZER, name="held", seed=0).batches()
                for example in batch.examples.values()]  # fmt: skip
    arrays = {name: np.stack([e.arrays[name] for e in examples]) for name in ("frames", "text", "text_mask")}

    @jax.jit
    def compute(params, arrays):
        forward = ForwardPass(DEFINITION.bind(params), arrays)
        model, (visual, text) = forward.model, forward.features

        def of_visual(tokens):
            return model.fusion(forward.text, arrays["text_mask"], jax.numpy.stack([tokens] * SIZE))[1]

        logits = jax.numpy.stack([model.matching(of_visual(forward.visual[i])) for i in range(SIZE)], axis=1)
        return visual, text, jax.nn.log_softmax(logits)

    visual, text, log_probs = (np.asarray(x) for x in compute(params, arrays))
    ids = np.asarray([int(example.arrays["example_id"]) for example in examples])
    return ids, text.astype(np.float64) @ visual.T, log_probs[..., 1] - log_probs[..., 0], examples


def by_hand(similarity, scores, ids):
    """Return ranks after ordering the k nearest by their scores, and leaving the others in place."""
    order = np.argsort(-similarity, axis=1)
    ranks = []
    for i, row in enumerate(order):
        near = row[:K]
        reordered = [*near[np.argsort(-scores[i][near])], *row[K:]]
        ranks.append(ids[reordered].tolist().index(ids[i]))
    return np.asarray(ranks)


def test_reranking_orders_the_nearest_by_their_matching_scores(params, direct, monkeypatch):
    monkeypatch.setattr(matching, "MAX_TEXTS", 2)
    ids, similarity, scores, examples = direct
    assert len(set(ids.tolist())) == SIZE
    held, reranked = evaluation(), {}
    score = held._score
    monkeypatch.setattr(held, "_score", lambda ranks, *rest: reranked.update(ranks) or score(ranks, *rest))
    result = held.run(params, 0)
    changed = 0
    for direction, x, y in (("text_to_visual", similarity, scores), ("visual_to_text", similarity.T, scores.T)):
        before, after = compute_ranks(x, ids, ids), by_hand(x, y, ids)
        changed += (before != after).sum()
        for prefix, ranks in (("", before), ("reranked_", after)):
            queries = np.arange(SIZE) if direction == "text_to_visual" else np.argsort(ids)  # visuals in order of ids
            np.testing.assert_array_equal(reranked[f"{prefix}{direction}"], ranks[queries])
            for k in (1, 5, 10):
                assert result.metrics[f"{prefix}{direction}_r{k}"] == np.mean(ranks < k)
                assert result.baselines[f"{prefix}{direction}_r{k}"] == pytest.approx(min(k / SIZE, 1))
            assert result.metrics[f"{prefix}{direction}_median_rank"] == np.median(ranks) + 1
    assert changed
    nearest = np.argsort(-similarity.T, axis=1)[:, :K]
    found = np.take_along_axis(nearest, np.take_along_axis(scores.T, nearest, 1).argmax(1)[:, None], 1)[:, 0]
    assert [row["prediction"] for row in result.predictions] == [examples[i].text for i in found]
    ranks = by_hand(similarity.T, scores.T, ids)
    assert [row["score"] for row in result.predictions] == [-1 - rank for rank in ranks]


def test_a_sample_has_the_texts_and_images_that_match_best(params, direct):
    _, similarity, scores, examples = direct
    sample = evaluation().run(params, 0).samples[0]
    order = lambda x, y: np.argsort(-x[0])[:K][np.argsort(-y[0][np.argsort(-x[0])[:K]])]  # noqa: E731
    texts, visuals = order(similarity.T, scores.T), order(similarity, scores)
    assert sample.nearest.texts == tuple((examples[i].text, i == 0) for i in texts)
    assert sample.nearest.correct == tuple(i == 0 for i in visuals)
    shown = np.concatenate([examples[i].arrays["frames"][0].repeat(6, 0).repeat(6, 1) for i in visuals], axis=1)
    np.testing.assert_array_equal(sample.nearest.images, shown)


@pytest.mark.parametrize(("batch_size", "devices"), [(5, 1), (16, 8)])
def test_neither_the_batch_size_nor_the_mesh_changes_what_is_found(params, batch_size, devices):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4)) if devices == 8 else None
    whole, ours = evaluation().run(params, 0), evaluation(batch_size, mesh).run(params, 0)
    assert ours.metrics == whole.metrics
    assert ours.predictions == whole.predictions


def test_every_batch_of_pairs_is_reported(params):
    phases = []
    evaluation().run(params, 0, phases.append)
    pairs = [phase for phase in phases if "pairs" in phase]
    assert pairs[0].startswith("batch 1 of ")
    assert pairs[0].endswith(" of pairs of evaluation held")
    assert len(pairs) == int(pairs[0].split()[3])


def test_reranking_needs_the_parts_of_contrast_and_matching():
    parts = TASKS["rerank"].parts
    assert set(parts) == {"vision", "text", "universal", "contrastive", "fusion", "matching"}
    for lacking in ("contrastive", "matching"):
        with pytest.raises(UserError, match=f"task 'rerank' needs the parts {lacking}, which this model lacks"):
            evaluation(model_def=define_model(MODEL, tuple(part for part in parts if part != lacking)))


def test_at_least_one_candidate_is_reranked():
    with pytest.raises(UserError, match=r"config\.tasks\.rerank_k"):
        TasksConfig(rerank_k=0)
