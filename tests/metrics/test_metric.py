"""Metrics on hand-computed cases."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.metrics.caption import Bleu, caption_scores, tokenize_captions
from mplug2_jax.metrics.metric import MeanMetric, Metric, bootstrap_ci
from mplug2_jax.metrics.retrieval import chance_median_rank, chance_recall, compute_ranks, median_rank, recall_at


def tokenized_scores(captions, references):
    return caption_scores(tokenize_captions(captions), [tokenize_captions(texts) for texts in references])


def cider(captions, references):
    return tokenized_scores(captions, references)["cider"]


def test_captions_that_equal_their_references_get_the_toolkits_maximum_of_10_times_100():
    captions = ["a red five at the top", "two blue digits move left", "one green nine stays still"]
    assert cider(captions, [[caption] for caption in captions]).value == pytest.approx(1000)


def test_cider_of_a_hand_computed_case():
    """Every n-gram is in one of two references, so all weights are equal and cancel.

    The first caption's unigrams and bigram match: (1 + 1 + 0 + 0) / 4. Of the second, "c c" for "c d", only one c
    matches (clipped): 1 / (2 sqrt(2)) / 4, for lengths sqrt(2) and 2. Times 10, mean of both, times 100.
    """
    score = cider(["a b", "c c"], [["a b"], ["c d"]]).value
    assert score == pytest.approx(1000 * (2 / 4 + 1 / (2 * np.sqrt(2)) / 4) / 2)


def test_cider_is_the_mean_over_the_references():
    captions = ["a b c d", "e f g h"]
    one, other, both = (
        cider(captions, [references, ["e f g h"]]).value
        for references in (["a b c d"], ["i j k l"], ["a b c d", "i j k l"])
    )
    assert both == pytest.approx((one + other) / 2)


def test_case_and_punctuation_do_not_matter():
    captions, references = (
        ["A dog's tail.", "two cats, asleep"],
        [["a dog ' s tail?", "a Dog's tail"], ["Two cats asleep!"]],
    )
    scores = tokenized_scores(captions, references)
    assert {name: scores[name].value for name in ("bleu_4", "rouge_l")} == pytest.approx(
        {"bleu_4": 100, "rouge_l": 100}
    )
    assert list(scores) == ["cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    untokenized = caption_scores(captions, references)
    assert untokenized["rouge_l"].value < 100


def test_bleu_of_a_hand_computed_case_and_its_interval():
    """The first caption matches 3 of 4 words and 2 of 3 bigrams; its closest reference has 4 words too.

    The second has 2 words and matches none; its reference has 4, so both together have 6 words for 8. Resamples of two
    are the first twice, both, or the second twice, which matches no word.
    """
    scores = caption_scores(["a b c x", "y z"], [["a b c d", "a b c d e"], ["p q r s"]])
    assert scores["bleu_1"].value == pytest.approx(100 * 3 / 6 * np.exp(1 - 8 / 6))
    assert scores["bleu_2"].value == pytest.approx(100 * (3 / 6 * 2 / 4) ** 0.5 * np.exp(1 - 8 / 6))
    first = {"bleu_1": 100 * 3 / 4, "bleu_2": 100 * (3 / 4 * 2 / 3) ** 0.5}
    for name, high in first.items():
        assert scores[name].weighted(np.asarray([2.0, 0.0])) == pytest.approx(high)
        assert bootstrap_ci(scores)[name] == pytest.approx((0, high), abs=1e-4)


def test_bleu_of_a_corpus_is_not_the_mean_of_each_caption():
    scores = caption_scores(["a b c d e f g h", "x"], [["a b c d e f g h"], ["y"]])
    assert scores["bleu_1"].value == pytest.approx(100 * 8 / 9)
    assert np.mean([scores["bleu_1"].weighted(one) for one in np.eye(2)]) == pytest.approx(100 / 2)


def test_all_metrics_share_the_resamples():
    counts = np.asarray([[1.0, 1, 1, 0, 0, 0, right, 0, 0, 0] for right in (1, 0, 1, 1, 0, 1, 0, 0)])
    metrics: dict[str, Metric] = {"bleu": Bleu(counts, 1), "mean": MeanMetric(100 * counts[:, 6])}
    result = bootstrap_ci(metrics)
    assert result["bleu"] == pytest.approx(result["mean"], abs=1e-4)


def recall(similarity, k):
    own = np.arange(len(similarity))
    return recall_at(compute_ranks(similarity, own, own), k).value


def test_recall_counts_rows_whose_column_is_among_the_best():
    similarity = np.asarray([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.2, 0.1]])
    assert [recall(similarity, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert recall(similarity.T, 1) == pytest.approx(2 / 3)


def test_ties_count_as_errors_so_a_collapsed_model_scores_0():
    constant = np.ones((4, 4))
    assert [recall(constant, k) for k in (1, 3, 4)] == [0, 0, 1]
    assert recall(np.asarray([[1.0, 1.0], [0.0, 1.0]]), 1) == 0.5


def test_nan_scores_0():
    assert recall(np.full((4, 4), np.nan), 3) == 0
    similarity = np.eye(3)
    similarity[0, 1] = np.nan
    assert recall(similarity, 1) == pytest.approx(2 / 3)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 12), st.integers(1, 4))
def test_a_rank_counts_the_wrong_candidates_before_the_first_correct_one(seed, queries, candidates, ids):
    rng = np.random.default_rng(seed)
    similarity = rng.normal(size=(queries, candidates))
    names, others = rng.integers(ids, size=queries), rng.integers(ids, size=candidates)
    expected = []
    for row, name in zip(similarity, names, strict=True):
        order = others[np.argsort(-row)]
        expected.append(int(np.argmax(order == name)) if (order == name).any() else np.iinfo(np.int64).max)
    np.testing.assert_array_equal(compute_ranks(similarity, names, others), expected)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=20))
def test_the_median_rank_starts_at_1_and_resampled_equals_the_repeated_data(rows):
    ranks, counts = np.asarray(rows, np.int64).reshape(-1, 2).T
    for repeated, result in (
        (ranks, median_rank(ranks).value),
        (np.repeat(ranks, counts), median_rank(ranks).weighted(counts.astype(np.float64))),
    ):  # fmt: skip
        assert result == (np.median(repeated) + 1 if len(repeated) else 0)


def test_a_collapsed_model_has_the_last_median_rank():
    own = np.arange(5)
    assert median_rank(compute_ranks(np.ones((5, 5)), own, own)).value == 5
    assert median_rank(compute_ranks(np.full((5, 5), np.nan), own, own)).value == 5
    assert median_rank(compute_ranks(np.eye(5), own, own)).value == 1
    assert median_rank(compute_ranks(np.eye(5), own, own + 5)).value > 1e18  # no query has a correct candidate


def test_chance_equals_random_orders():
    visuals, texts = np.arange(4), np.asarray([0, 0, 0, 1, 2, 2])  # the last visual has no text
    rng = np.random.default_rng(0)
    for k in (1, 2, 5, 10):
        tried = [recall_at(compute_ranks(rng.normal(size=(4, 6)), visuals, texts), k).value for _ in range(3000)]
        assert chance_recall(visuals, texts, k) == pytest.approx(np.mean(tried), abs=0.02)
    assert chance_recall(texts, texts, 10) == 1
    assert chance_recall(np.arange(5), np.arange(5), 2) == pytest.approx(2 / 5)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.lists(st.integers(1, 4), min_size=1, max_size=9))
def test_chance_counts_the_draws_without_a_correct_candidate(queries, candidates):
    queries, candidates = np.asarray(queries), np.asarray(candidates)
    counts, size = [(candidates == query).sum() for query in queries], len(candidates)
    by_count = [1.0 - np.mean([math.comb(size - n, k) / math.comb(size, k) for n in counts]) for k in range(size + 1)]
    for k, expected in enumerate(by_count):
        assert chance_recall(queries, candidates, k) == pytest.approx(expected)
    assert chance_recall(queries, candidates, size + 3) == pytest.approx(by_count[-1])
    middle = chance_median_rank(queries, candidates)
    assert middle == 1 + size or by_count[int(middle)] >= 0.5 - 1e-9
    assert middle == 1 or by_count[int(middle) - 1] < 0.5 + 1e-9


def test_each_query_may_have_its_own_candidates():
    similarity = np.asarray([[0.9, 0.5], [0.1, 0.2], [0.1, 0.2]])
    result = compute_ranks(similarity, np.asarray([7, 8, 9]), np.asarray([[5, 7], [8, 6], [5, 6]]))
    assert result.tolist() == [1, 1, np.iinfo(np.int64).max]


def test_a_mean_metric_may_be_weighted():
    values = np.asarray([1.0, 0.0, 2.0])
    assert MeanMetric(values).value == 1
    assert MeanMetric(values, np.asarray([1.0, 1.0, 4.0])).value == 0.5
    assert MeanMetric(values).weighted(np.asarray([2.0, 1.0, 0.0])) == pytest.approx(2 / 3)
    assert MeanMetric(values, np.zeros(3)).value == MeanMetric(np.zeros(0)).value == 0


def test_intervals_are_about_two_standard_errors_to_each_side_and_reproducible():
    rng = np.random.default_rng(0)
    metrics = {
        "share": MeanMetric((rng.random(400) < 0.3).astype(np.float64)),
        "mean": MeanMetric(rng.normal(size=400) * 50),
    }
    result = bootstrap_ci(metrics)
    assert result == bootstrap_ci(metrics)
    for name, metric in metrics.items():
        error = 1.96 * np.std(metric.values) / 20
        assert result[name] == pytest.approx((metric.value - error, metric.value + error), abs=0.15 * error)
    assert bootstrap_ci({"same": MeanMetric(np.ones(5))}) == {"same": (1.0, 1.0)}
    assert bootstrap_ci({"few": MeanMetric(np.arange(5.0)), **metrics})["share"] == result["share"]  # of another size
    assert bootstrap_ci({}) == bootstrap_ci({"none": MeanMetric(np.zeros(0))}) == {}


def test_intervals_of_a_weighted_mean_resample_examples_and_not_weights():
    lone = MeanMetric(
        np.asarray([100.0, 0.0]), np.asarray([100.0, 1.0])
    )  # resamples: the first, both, or the second alone
    assert bootstrap_ci({"lone": lone})["lone"] == (0.0, 1.0)


def test_about_95_percent_of_intervals_contain_the_truth():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(60):
        low, high = bootstrap_ci({"share": MeanMetric((rng.random(100) < 0.4).astype(np.float64))})["share"]
        held += low <= 0.4 <= high
    assert 51 <= held <= 60
