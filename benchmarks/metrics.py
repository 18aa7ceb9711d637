"""Compare caption scores with those of the COCO toolkit, which tokenizes by Java if Java is installed.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --references captions_val2014.json --results captions_val2014_fakecap_results.json

The toolkit's package lacks its example files, so the defaults are small files in the same format.
"""

import argparse
import functools
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from mplug2_jax.metrics.caption import caption_scores, tokenize_captions
from mplug2_jax.metrics.java_metrics import meteor, spice

EXAMPLES = Path(__file__).parents[1] / "tests" / "metrics" / "captions"
Texts = dict[int, list[str]]


def main() -> None:
    """Score with both implementations and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=Path, default=EXAMPLES / "references.json", help="COCO annotations")
    parser.add_argument("--results", type=Path, default=EXAMPLES / "results.json", help="COCO results")
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    predictions: Texts = {row["image_id"]: [row["caption"]] for row in results}
    truths: Texts = {i: [] for i in predictions}
    for row in json.loads(args.references.read_text(encoding="utf-8"))["annotations"]:
        if row["image_id"] in truths:
            truths[row["image_id"]].append(row["caption"])

    texts, references = [text for (text,) in predictions.values()], list(truths.values())
    java = shutil.which("java") is not None
    tokenizers = {"ours": tokenize_here, **({"Java": tokenize_by_java} if java else {})}
    tokenized = {
        name: measure_time(lambda tokenize=tokenize: (tokenize(predictions), tokenize(truths)))
        for name, tokenize in tokenizers.items()
    }
    print(f"{len(texts):,} captions, {sum(map(len, references)):,} references")
    for name, (_, seconds) in tokenized.items():
        print(f"tokens {name:8} {seconds:8.2f} s")
    (ours, our_references), (toolkit, toolkit_references) = tokenized["ours"][0], list(tokenized.values())[-1][0]
    if java:
        same = sum(
            a == b
            for our_tokens, their_tokens in ((ours, toolkit), (our_references, toolkit_references))
            for i in our_tokens
            for a, b in zip(our_tokens[i], their_tokens[i], strict=True)
        )
        print(f"equal tokens    {same:,} of {len(texts) + sum(map(len, references)):,}")

    metrics, seconds = measure_time(
        lambda: caption_scores(tokenize_captions(texts), [tokenize_captions(each) for each in references])
    )
    rows = {name: (metric.value, seconds) for name, metric in metrics.items()}
    for name, score in {"meteor": meteor, "spice": spice}.items():
        metric, seconds = measure_time(
            functools.partial(score, [t for (t,) in ours.values()], list(our_references.values()))
        )
        if metric is not None:
            rows[name] = (metric.value, seconds)
    expected = toolkit_scores(toolkit_references, toolkit, java)
    tokenizer = "its Java tokenizer" if java else "our tokenizer, because Java is missing"
    print(f"\nreference: the toolkit with {tokenizer}; seconds: of all our scores together, METEOR and SPICE apart")
    print(f"{'metric':10}{'ours':>14}{'reference':>14}{'difference':>13}{'seconds':>9}")
    for name in (*metrics, "meteor", "spice"):
        value, seconds = rows.get(name, (None, 0.0))
        if value is None:
            print(f"{name:10}{'absent':>14}")
        elif name not in expected:
            print(f"{name:10}{value:14.8f}{'-':>14}{'-':>13}{seconds:9.2f}")
        else:
            print(f"{name:10}{value:14.8f}{expected[name]:14.8f}{value - expected[name]:13.1e}{seconds:9.2f}")


def measure_time(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a call and its time in seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def tokenize_here(texts: Texts) -> Texts:
    """Tokenize with this project."""
    return {i: tokenize_captions(each) for i, each in texts.items()}


def tokenize_by_java(texts: Texts) -> Texts:
    """Tokenize with the toolkit's Java program."""
    return PTBTokenizer().tokenize({i: [{"caption": text} for text in each] for i, each in texts.items()})


def toolkit_scores(truths: Texts, predictions: Texts, java: bool) -> Mapping[str, float]:
    """Return the toolkit's scores."""
    bleu = Bleu(4).compute_score(truths, predictions, verbose=0)[0]
    scores = {f"bleu_{order}": 100 * bleu[order - 1] for order in range(1, 5)}
    scores["cider"] = Cider().compute_score(truths, predictions)[0] * 100
    scores["rouge_l"] = 100 * Rouge().compute_score(truths, predictions)[0]
    if java:
        scores["meteor"] = 100 * Meteor().compute_score(truths, predictions)[0]
    return scores


if __name__ == "__main__":
    main()
