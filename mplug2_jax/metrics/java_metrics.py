"""The COCO toolkit's two Java scores, METEOR and SPICE: figures (times 100), or None where no Java computes them.

Both read tokens with spaces between. Nothing outlives a call: programs that take longer than their time are killed.
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

from mplug2_jax.metrics.metric import MeanMetric

_TOOLKIT = Path(pycocoevalcap.__path__[0])
# English, as METEOR 1.5 was tuned on rankings (Denkowski and Lavie 2014, table 3): alpha, beta, gamma, delta, and the
# weights of exact, stem, synonym and paraphrase matches.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = np.asarray([1.0, 0.6, 0.8, 0.6])


@dataclasses.dataclass(frozen=True)
class Meteor:
    """METEOR of all captions together: their matches are added up, not their scores.

    A caption's counts, in the program's order: lengths of it and its reference; how many of each are function words;
    for each of four kinds of match, content words of both and function words of both; chunks; matched words of both.
    """

    counts: Float[np.ndarray, "n 23"]

    def __len__(self) -> int:
        """How many captions."""
        return len(self.counts)

    @property
    def value(self) -> float:
        """The score, times 100."""
        return self.weighted(np.ones(len(self)))

    def weighted(self, counts: Float[np.ndarray, " n"]) -> float:
        """The score, were each caption there so many times."""
        total = times @ self.counts
        lengths, functions, kinds = total[:2], total[2:4], total[4:20].reshape(4, 2, 2)
        weights = np.asarray([_DELTA, 1 - _DELTA])  # of content words and of function words
        matched = np.einsum("k,kws,w->s", _WEIGHTS, kinds, weights)
        whole = np.stack([lengths - functions, functions], -1) @ weights
        precision, recall = np.divide(matched, whole, out=np.zeros(2), where=whole > 0)
        if not precision or not recall:
            return 0.0
        mean = 1 / (_ALPHA / recall + (1 - _ALPHA) / precision)
        chunks, words = total[20], total[21:]
        return float(100 * mean * (1 - _GAMMA * (chunks / words.mean()) ** _BETA))


def meteor(said: Sequence[str], references: Sequence[Sequence[str]], seconds: float = 600.0) -> Meteor | None:
    """METEOR 1.5 as the toolkit runs it, or None without Java or where the program fails or is too slow."""
    lines = [
        " ||| ".join(("SCORE", *each, text.replace("|||", ""))) for text, each in zip(said, references, strict=True)
    ]
    command = ["-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    out = _java(command, _TOOLKIT / "meteor", "".join(line.replace("\n", " ") + "\n" for line in lines), seconds)
    rows = [line.split() for line in (out or "").splitlines()]
    if len(rows) != len(said) or any(len(row) != 23 for row in rows):
        return None
    counts = np.asarray(rows, np.float64).reshape(-1, 23)
    whole = (counts[:, 20] == 1) & (counts[:, :2] == counts[:, 21:]).all(1)
    counts[whole, 20] = 0  # one chunk that is all of both texts is not broken
    return Meteor(counts)


def spice(said: Sequence[str], references: Sequence[Sequence[str]], seconds: float = 3600.0) -> MeanMetric | None:
    """SPICE (F of scene graphs), or None without Java, without the parser's models, or where it fails or is too slow.

    The models are not in the package: `pycocoevalcap.spice.get_stanford_models` fetches them (Stanford CoreNLP 3.6.0).
    """
    if not list((_TOOLKIT / "spice" / "lib").glob("stanford-corenlp-*-models.jar")):
        return None
    pairs = zip(said, references, strict=True)
    asked = [{"image_id": i, "test": text, "refs": list(each)} for i, (text, each) in enumerate(pairs)]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "asked.json"), Path(folder, "found.json")
        source.write_text(json.dumps(asked))
        command = ["-Xmx8G", "-jar", "spice-1.0.jar", str(source), "-out", str(target), "-subset", "-silent"]
        if _java(command, _TOOLKIT / "spice", "", seconds) is None or not target.exists():
            return None
        found = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(target.read_text())}
    if set(found) != set(range(len(said))):
        return None
    return MeanMetric(100 * np.asarray([found[i] for i in range(len(said))], np.float64))


def _java(words: Sequence[str], folder: Path, text: str, seconds: float) -> str | None:
    """What a Java program prints after reading a text; None where there is none, it fails, or takes too long."""
    if not shutil.which("java"):
        return None
    try:  # run() kills the program when its time is over
        done = subprocess.run(
            ["java", *words], cwd=folder, input=text, capture_output=True, encoding="utf-8", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None
