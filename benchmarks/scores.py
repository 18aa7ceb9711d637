"""Compare metrics with reference implementations, over all examples and over one bootstrap sample.

    python benchmarks/scores.py                    # 1,000 random examples per metric

The column "difference" compares over all examples. "resampled" compares our metric, weighted by bootstrap counts, with
the reference implementation on the resampled examples. "by hand" is a plain loop in this file.
"""

import argparse
import collections
import dataclasses
import random
import re
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.stats
import sklearn.metrics
from nltk.stem.porter import PorterStemmer

from mplug2_jax.metrics.classification import average_views, confusion_matrix, top_k_accuracy
from mplug2_jax.metrics.glue import NUM_CLASSES, glue_metrics
from mplug2_jax.metrics.grounding import box_accuracy, box_iou, mean_iou
from mplug2_jax.metrics.metric import Metric
from mplug2_jax.metrics.retrieval import compute_ranks, median_rank, recall_at
from mplug2_jax.metrics.rouge import rouge_scores
from mplug2_jax.metrics.vqa import vqa_accuracy

Rows = np.ndarray  # indices of examples


@dataclasses.dataclass(frozen=True)
class Case:
    """Our metric, and the reference implementation as a function of example indices."""

    name: str
    metric: Metric
    source: str
    reference: Callable[[Rows], float]


def main() -> None:
    """Score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="examples per metric (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    drawn = rng.integers(args.examples, size=args.examples)
    counts = np.bincount(drawn, minlength=args.examples).astype(np.float64)
    print(f"{'metric':<24}{'ours':>12}{'reference':>12}  {'source':<14}{'difference':>11}{'resampled':>11}")
    for make_cases in (vqa, classification, grounding, glue_tasks, summaries, retrieval):
        for case in make_cases(rng, args.examples):
            ours, reference = case.metric.value, case.reference(np.arange(args.examples))
            resampled = abs(case.metric.weighted(counts) - case.reference(drawn))
            columns = f"{ours:12.6f}{reference:12.6f}  {case.source:<14}{abs(ours - reference):11.1e}{resampled:11.1e}"
            print(f"{case.name:<24}{columns}", flush=True)


def vqa(rng: np.random.Generator, examples: int) -> Iterator[Case]:
    words = ["two", "2", "the dog", "dog.", "a dog", "Dog", "t-shirt", "t shirt", "dont know", "don't know", "1,000",
             "1000", "2.5", "none", "0", "yes", "yes!", "yes, it is", "Yes it is"]  # fmt: skip
    generator = random.Random(int(rng.integers(2**32)))
    answers: list[list[str]] = []
    for _ in range(examples):
        start, spread = generator.randrange(len(words)), generator.randrange(4)
        answers.append([words[(start + generator.randint(0, spread)) % len(words)] for _ in range(10)])
    predictions = [generator.choice([*row, generator.choice(words)]) for row in answers]
    hits = np.asarray([vqa_by_hand(*pair) for pair in zip(predictions, answers, strict=True)])
    yield Case("VQA v2 accuracy", vqa_accuracy(predictions, answers), "by hand", lambda rows: hits[rows].mean())


def vqa_by_hand(prediction: str, answers: Sequence[str]) -> float:
    def normalize(text: str) -> str:
        letters = ""
        for i, letter in enumerate(text):
            if letter == "." and not text[i + 1 : i + 2].isdigit():
                continue
            if letter not in "-,!":
                letters += letter
            elif not (re.search("[0-9],[0-9]", text) or f"{letter} " in text or f" {letter}" in text):
                letters += " "
        words = [word for word in letters.lower().split() if word not in ("a", "an", "the")]
        known = {"dont": "don't", "none": "0", "two": "2"}
        return " ".join(known.get(word, word) for word in words)

    if any(answer != answers[0] for answer in answers):
        prediction, answers = normalize(prediction), [normalize(answer) for answer in answers]
    total = 0.0
    for excluded in range(10):
        agree = sum(answers[i] == prediction for i in range(10) if i != excluded)
        total += 1 if agree >= 3 else agree / 3
    return total / 10


def classification(rng: np.random.Generator, examples: int) -> Iterator[Case]:
    classes = 20
    labels = rng.integers(classes, size=examples)
    scores = rng.normal(size=(examples, classes)) + 1.5 * np.eye(classes)[labels]
    every = np.arange(classes)
    for k in (1, 5):

        def reference(rows: Rows, scores: np.ndarray = scores, k: int = k) -> float:
            return float(sklearn.metrics.top_k_accuracy_score(labels[rows], scores[rows], k=k, labels=every))

        yield Case(f"top-{k} accuracy", top_k_accuracy(scores, labels, k), "scikit-learn", reference)

    ids = rng.permutation(np.repeat(np.arange(examples), 3))
    probabilities = rng.dirichlet(np.ones(classes), size=len(ids)) + 0.05 * np.eye(classes)[labels[ids]]
    means = average_views(probabilities, ids, np.arange(examples))
    views = np.asarray([probabilities[ids == i].mean(0).argmax() for i in range(examples)])
    yield Case(
        "top-1 of 3 views", top_k_accuracy(means, labels, 1), "by hand",
        lambda rows: float((views == labels)[rows].mean()),
    )  # fmt: skip
    predictions = scores.argmax(1)
    ours, reference = (
        confusion_matrix(predictions, labels, classes),
        sklearn.metrics.confusion_matrix(labels, predictions, labels=every),
    )
    print(f"{'confusion, on diagonal':<24}{ours.trace():12}{reference.trace():12}  {'scikit-learn':<14}", end="")
    print(f"{np.abs(ours - reference).max():11.1e}")


def grounding(rng: np.random.Generator, examples: int) -> Iterator[Case]:
    boxes = np.sort(rng.integers(33, size=(examples, 2, 2)), axis=1).reshape(-1, 4)
    predictions = np.clip(boxes + rng.integers(-5, 6, size=boxes.shape), 0, 32)  # some of both are degenerate

    def cells(box: np.ndarray) -> set[tuple[int, int]]:
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    pairs = [(cells(one), cells(other)) for one, other in zip(predictions, boxes, strict=True)]
    ious = np.asarray([len(one & other) / max(len(one | other), 1) for one, other in pairs])
    iou = box_iou(predictions / 32, boxes / 32)
    yield Case("accuracy at IoU 0.5", box_accuracy(iou), "by hand", lambda rows: float((ious[rows] >= 0.5).mean()))
    yield Case("mean IoU", mean_iou(iou), "by hand", lambda rows: float(ious[rows].mean()))


def glue_tasks(rng: np.random.Generator, examples: int) -> Iterator[Case]:
    references: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], float]]] = {
        "accuracy": ("scikit-learn", sklearn.metrics.accuracy_score),
        "f1": ("scikit-learn", sklearn.metrics.f1_score),
        "matthews": ("scikit-learn", sklearn.metrics.matthews_corrcoef),
        "pearson": ("scipy", lambda labels, predictions: scipy.stats.pearsonr(predictions, labels).statistic),
        "spearman": ("scipy", lambda labels, predictions: scipy.stats.spearmanr(predictions, labels).statistic),
    }
    for task in (*NUM_CLASSES, "stsb"):
        if task == "stsb":
            labels = np.round(rng.random(examples) * 25) / 5  # ties, as there
            predictions = np.round(labels + rng.normal(size=examples), 1)
        else:
            labels = rng.integers(NUM_CLASSES[task], size=examples)
            predictions = np.where(rng.random(examples) < 0.8, labels, rng.integers(NUM_CLASSES[task], size=examples))
        for name, metric in glue_metrics(task, predictions, labels).items():
            source, score = references[name]

            def reference(
                rows: Rows,
                labels: np.ndarray = labels,
                predictions: np.ndarray = predictions,
                score: Callable[[np.ndarray, np.ndarray], float] = score,
            ) -> float:
                return float(score(labels[rows], predictions[rows]))

            yield Case(f"{task} {name}", metric, source, reference)


def summaries(rng: np.random.Generator, examples: int) -> Iterator[Case]:
    words = ["markets", "market", "fall", "falling", "falls", "oil", "prices", "price", "rise", "U.S.", "u.s", "says",
             "said", "bank", "banks", "banking", "in", "the", "of", "##.#", "-", "minister"]  # fmt: skip
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 15))) + " news" for _ in range(2 * examples)]
    predictions, references = texts[:examples], texts[examples:]
    for name, metric in rouge_scores(predictions, references).items():
        each = np.asarray([rouge_by_hand(name, *pair) for pair in zip(predictions, references, strict=True)])
        yield Case(name, metric, "by hand", lambda rows, each=each: float(each[rows].mean()))


def rouge_by_hand(name: str, prediction: str, reference: str) -> float:
    stem = PorterStemmer().stem
    predicted, expected = (
        [stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower())]
        for text in (prediction, reference)
    )
    if name == "rouge_l":
        longest = collections.Counter[tuple[int, int]]()
        for i, left in enumerate(predicted):
            for j, right in enumerate(expected):
                length = longest[i - 1, j - 1] + 1 if left == right else 0
                longest[i, j] = max(length, longest[i - 1, j], longest[i, j - 1])
        shared, total = longest[len(predicted) - 1, len(expected) - 1], len(predicted) + len(expected)
    else:
        size = int(name[-1])
        left, right = (
            collections.Counter(tuple(row[i : i + size]) for i in range(len(row) - size + 1))
            for row in (predicted, expected)
        )
        shared, total = (left & right).total(), left.total() + right.total()
    return 100 * 2 * shared / total if total else 0.0


def retrieval(rng: np.random.Generator, examples: int) -> Iterator[Case]:
    texts, images = np.arange(examples) // 5, np.arange((examples + 4) // 5)
    similarity = rng.normal(size=(examples, len(images))) + 2 * (texts[:, None] == images)
    ranks = compute_ranks(similarity, texts, images)
    places = np.asarray(
        [sorted(row, reverse=True).index(row[text]) for row, text in zip(similarity, texts, strict=True)]
    )
    for k in (1, 5, 10):
        yield Case(f"R@{k}", recall_at(ranks, k), "by hand", lambda rows, k=k: float((places[rows] < k).mean()))
    yield Case("MedR", median_rank(ranks), "statistics", lambda rows: statistics.median(places[rows].tolist()) + 1)


if __name__ == "__main__":
    main()
