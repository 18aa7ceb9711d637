"""Caption metrics equal the COCO toolkit's, and its Java metrics are present or absent."""

import json
import shutil
import stat
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from mplug2_jax.metrics import java_metrics
from mplug2_jax.metrics.caption import caption_scores, tokenize_captions
from mplug2_jax.metrics.java_metrics import meteor, spice
from mplug2_jax.metrics.metric import bootstrap_ci
from tests.close import FLOAT64, assert_close

EXAMPLES = Path(__file__).parent / "captions"
needs_java = pytest.mark.skipif(not shutil.which("java"), reason="needs java on the path")
Texts = dict[int, list[str]]


def examples() -> tuple[Texts, Texts]:
    """Return references and captions by image, as the toolkit takes them."""
    references: Texts = {}
    for row in json.loads((EXAMPLES / "references.json").read_text(encoding="utf-8"))["annotations"]:
        references.setdefault(row["image_id"], []).append(row["caption"])
    results = json.loads((EXAMPLES / "results.json").read_text(encoding="utf-8"))
    return references, {row["image_id"]: [row["caption"]] for row in results}


def toolkit_tokens(texts: Texts) -> Texts:
    return PTBTokenizer().tokenize({i: [{"caption": text} for text in each] for i, each in texts.items()})


def toolkit_scores(references: Texts, captions: Texts) -> dict[str, float]:
    bleu = Bleu(4).compute_score(references, captions, verbose=0)[0]
    scores = {f"bleu_{order}": 100 * bleu[order - 1] for order in range(1, 5)}
    cider, rouge = (
        Cider().compute_score(references, captions)[0] * 100,
        Rouge().compute_score(references, captions)[0] * 100,
    )
    return {"cider": cider, **scores, "rouge_l": rouge}


@pytest.mark.parametrize("tokenizer", ["ours", pytest.param("java", marks=needs_java)])
def test_every_metric_equals_the_toolkit(tokenizer: str) -> None:
    references, captions = examples()
    split = (
        toolkit_tokens
        if tokenizer == "java"
        else (lambda texts: {i: tokenize_captions(each) for i, each in texts.items()})
    )
    expected = toolkit_scores(split(references), split(captions))
    result = caption_scores(
        tokenize_captions([text for (text,) in captions.values()]), [tokenize_captions(references[i]) for i in captions]
    )
    assert_close({name: metric.value for name, metric in result.items()}, expected, FLOAT64, scale=100)


@needs_java
@pytest.mark.slow
def test_meteor_equals_the_toolkit_for_all_captions_and_for_each() -> None:
    references, captions = ({i: tokenize_captions(each) for i, each in texts.items()} for texts in examples())
    captions[3] = [references[3][0]]  # equal to a reference, so its score is 1
    scorer = Meteor()
    whole, each = scorer.compute_score(references, captions)
    result = meteor([text for (text,) in captions.values()], list(references.values()))
    assert result is not None
    assert_close(result.value, 100 * whole, FLOAT64)
    assert_close([result.weighted(one) / 100 for one in np.eye(len(result))], each, FLOAT64)
    low, high = bootstrap_ci({"meteor": result})["meteor"]
    assert low < 100 * whole < high


def program(folder: Path, text: str) -> None:
    path = folder / "java"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def test_a_metric_is_absent_if_java_fails_is_slow_or_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions, references = ["a dog"], [["a dog", "the dog"]]
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for text in ("exit 1", "echo no counts", "cat > /dev/null"):
        program(tmp_path, text)
        assert meteor(captions, references) is None
    program(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    start = time.monotonic()
    assert meteor(captions, references, timeout=0.5) is None
    assert time.monotonic() - start < 30
    done = subprocess.run(["ps", "-p", (tmp_path / "pid").read_text().strip()], capture_output=True)
    assert done.returncode != 0  # the process is gone
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert meteor(captions, references) is None


def test_spice_is_absent_without_its_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions, references = ["a dog", "a cat"], [["a dog"], ["a bird"]]
    lib = tmp_path / "spice" / "lib"
    lib.mkdir(parents=True)
    monkeypatch.setattr(java_metrics, "_TOOLKIT", tmp_path)
    assert spice(captions, references) is None
    (lib / "stanford-corenlp-3.6.0-models.jar").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    scores = [{"image_id": i, "scores": {"All": {"f": f}}} for i, f in ((1, 0.0), (0, 1.0))]
    # java -Xmx8G -jar spice-1.0.jar REQUESTS -out SCORES
    program(tmp_path, f"grep -q '\"test\": \"a cat\"' $4 || exit 1\ncat > $6 <<'END'\n{json.dumps(scores)}\nEND")
    result = spice(captions, references)
    assert result is not None
    assert result.values.tolist() == [100.0, 0.0]
    program(tmp_path, "exit 1")
    assert spice(captions, references) is None
