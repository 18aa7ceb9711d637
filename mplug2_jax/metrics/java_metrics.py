"""METEOR and SPICE, the COCO toolkit's two Java metrics, times 100; None where they cannot be computed.

Both take tokens separated by spaces. No process outlives a call: a program that exceeds its timeout is killed.
"""

import dataclasses
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pycocoevalcap
from jaxtyping import Float

from mplug2_jax.metrics.metric import MeanMetric, Metric

_TOOLKIT = Path(pycocoevalcap.__path__[0])
# English, as METEOR 1.5 was tuned on rankings (Denkowski and Lavie 2014, table 3): alpha, beta, gamma, delta, and the
# weights of exact, stem, synonym and paraphrase matches.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = np.asarray([1.0, 0.6, 0.8, 0.6])


@dataclasses.dataclass(frozen=True)
class Meteor(Metric):
    """METEOR of all captions together: the counts of their matches are summed, not their scores.

    The counts of a caption, in the program's order: lengths of caption and reference; function words of each; for each
    of four kinds of match, the matched content words of both and function words of both; chunks; matched words of both.
    """

    counts: Float[np.ndarray, "n 23"]

    def __len__(self) -> int:
        return len(self.counts)

    def weighted(self, counts: Float[np.ndarray, " n"]) -> float:
        """Return the score of a resample in which each caption occurs ``counts`` times."""
        total = counts @ self.counts
        lengths, functions, kinds = total[:2], total[2:4], total[4:20].reshape(4, 2, 2)
        weights = np.asarray([_DELTA, 1 - _DELTA])  # of content words and of function words
        matched = np.einsum("k,kws,w->s", _WEIGHTS, kinds, weights)
        total_weight = np.stack([lengths - functions, functions], -1) @ weights
        precision, recall = np.divide(matched, total_weight, out=np.zeros(2), where=total_weight > 0)
        if not precision or not recall:
            return 0.0
        mean = 1 / (_ALPHA / recall + (1 - _ALPHA) / precision)
        chunks, words = total[20], total[21:]
        return float(100 * mean * (1 - _GAMMA * (chunks / words.mean()) ** _BETA))


def meteor(captions: Sequence[str], references: Sequence[Sequence[str]], timeout: float = 600.0) -> Meteor | None:
    """Return METEOR 1.5 as the toolkit runs it, or None without Java, on failure, or after ``timeout`` seconds."""
    lines = [
        " ||| ".join(("SCORE", *texts, caption.replace("|||", "")))
        for caption, texts in zip(captions, references, strict=True)
    ]
    command = ["-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    output = _run_java(command, _TOOLKIT / "meteor", "".join(line.replace("\n", " ") + "\n" for line in lines), timeout)
    rows = [line.split() for line in (output or "").splitlines()]
    if len(rows) != len(captions) or any(len(row) != 23 for row in rows):
        return None
    counts = np.asarray(rows, np.float64).reshape(-1, 23)
    is_exact_match = (counts[:, 20] == 1) & (counts[:, :2] == counts[:, 21:]).all(1)
    counts[is_exact_match, 20] = 0  # a single chunk that covers both texts has no fragmentation penalty
    return Meteor(counts)


def spice(captions: Sequence[str], references: Sequence[Sequence[str]], timeout: float = 3600.0) -> MeanMetric | None:
    """Return SPICE (F of scene graphs), or None without Java or the parser's models, on failure, or after ``timeout``.

    The models are not in the package: `pycocoevalcap.spice.get_stanford_models` fetches them (Stanford CoreNLP 3.6.0).
    """
    if not list((_TOOLKIT / "spice" / "lib").glob("stanford-corenlp-*-models.jar")):
        return None
    pairs = zip(captions, references, strict=True)
    requests = [{"image_id": i, "test": text, "refs": list(texts)} for i, (text, texts) in enumerate(pairs)]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "requests.json"), Path(folder, "scores.json")
        source.write_text(json.dumps(requests))
        command = ["-Xmx8G", "-jar", "spice-1.0.jar", str(source), "-out", str(target), "-subset", "-silent"]
        if _run_java(command, _TOOLKIT / "spice", "", timeout) is None or not target.exists():
            return None
        scores = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(target.read_text())}
    if set(scores) != set(range(len(captions))):
        return None
    return MeanMetric(100 * np.asarray([scores[i] for i in range(len(captions))], np.float64))


def _run_java(arguments: Sequence[str], folder: Path, text: str, timeout: float) -> str | None:
    """Return a Java program's output for a text; None without Java, on failure, or after ``timeout`` seconds."""
    if not shutil.which("java"):
        return None
    try:  # run() kills the program after the timeout
        done = subprocess.run(
            ["java", *arguments], cwd=folder, input=text, capture_output=True, encoding="utf-8", timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None
