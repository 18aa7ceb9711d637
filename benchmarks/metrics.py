"""Caption scores beside the COCO toolkit's own, with its Java tokeniser where there is Java.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --references captions_val2014.json --results captions_val2014_fakecap_results.json

The toolkit's package leaves out its example files, so the default is a small pair in their format.
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

EXAMPLES = Path(__file__).parents[1] / "tests" / "evaluation" / "captions"
Texts = dict[int, list[str]]


def main() -> None:
    """Scores by both and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=Path, default=EXAMPLES / "references.json", help="COCO annotations")
    parser.add_argument("--results", type=Path, default=EXAMPLES / "results.json", help="COCO results")
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    said: Texts = {row["image_id"]: [row["caption"]] for row in results}
    truth: Texts = {i: [] for i in said}
    for row in json.loads(args.references.read_text(encoding="utf-8"))["annotations"]:
        if row["image_id"] in truth:
            truth[row["image_id"]].append(row["caption"])

    texts, references = [text for (text,) in said.values()], list(truth.values())
    java = shutil.which("java") is not None
    split = {"by us": ours, **({"by Java": toolkit} if java else {})}
    found = {name: timed(functools.partial(both, work, said, truth)) for name, work in split.items()}
    print(f"{len(texts):,} captions, {sum(map(len, references)):,} references")
    for name, (_, seconds) in found.items():
        print(f"tokens {name:8} {seconds:8.2f} s")
    (our_said, our_truth), (their_said, their_truth) = found["by us"][0], list(found.values())[-1][0]
    if java:
        same = sum(
            a == b
            for us, them in ((our_said, their_said), (our_truth, their_truth))
            for i in us
            for a, b in zip(us[i], them[i], strict=True)
        )
        print(f"equal tokens    {same:,} of {len(texts) + sum(map(len, references)):,}")

    figures, seconds = timed(lambda: caption_scores(texts, references))
    rows = {name: (figure.value, seconds) for name, figure in figures.items()}
    for name, score in {"meteor": meteor, "spice": spice}.items():
        figure, seconds = timed(functools.partial(score, [t for (t,) in our_said.values()], list(our_truth.values())))
        if figure is not None:
            rows[name] = (figure.value, seconds)
    expected = reference(their_truth, their_said, java)
    tokeniser = "its Java tokeniser" if java else "our tokeniser, for want of Java"
    print(f"\nreference: the toolkit, with {tokeniser}; ours together in the seconds of any but METEOR and SPICE")
    print(f"{'metric':10}{'ours':>14}{'reference':>14}{'difference':>13}{'seconds':>9}")
    for name in (*figures, "meteor", "spice"):
        value, seconds = rows.get(name, (None, 0.0))
        if value is None:
            print(f"{name:10}{'absent':>14}")
        elif name not in expected:
            print(f"{name:10}{value:14.8f}{'-':>14}{'-':>13}{seconds:9.2f}")
        else:
            print(f"{name:10}{value:14.8f}{expected[name]:14.8f}{value - expected[name]:13.1e}{seconds:9.2f}")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its seconds."""
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def both(tokenize: Callable[[Texts], Texts], said: Texts, truth: Texts) -> tuple[Texts, Texts]:
    """Captions and references as tokens."""
    return tokenize(said), tokenize(truth)


def ours(texts: Texts) -> Texts:
    """Tokens by us."""
    return {i: tokenize_captions(each) for i, each in texts.items()}


def toolkit(texts: Texts) -> Texts:
    """Tokens by the toolkit's Java."""
    return PTBTokenizer().tokenize({i: [{"caption": text} for text in each] for i, each in texts.items()})


def reference(truth: Texts, said: Texts, java: bool) -> Mapping[str, float]:
    """The toolkit's scores."""
    bleu = Bleu(4).compute_score(truth, said, verbose=0)[0]
    scores = {f"bleu_{order}": 100 * bleu[order - 1] for order in range(1, 5)}
    scores["cider"] = Cider().compute_score(truth, said)[0] * 100
    scores["rouge_l"] = 100 * Rouge().compute_score(truth, said)[0]
    if java:
        scores["meteor"] = 100 * Meteor().compute_score(truth, said)[0]
    return scores


if __name__ == "__main__":
    main()
