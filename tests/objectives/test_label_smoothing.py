"""Label smoothing: torch's numbers, and every objective over words and classes takes the setting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.objectives.forward import ForwardPass, label_cross_entropy
from mplug2_jax.tasks.base import TaskContext
from mplug2_jax.tasks.config import TaskSettings
from mplug2_jax.tasks.table import TASKS
from tests.close import assert_close, max_magnitude
from tests.objectives.test_language import Prepared as Decoded
from tests.objectives.test_language import case
from tests.objectives.test_mlm import TOKENS, sentences
from tests.objectives.test_mlm import Prepared as Masked
from tests.objectives.test_vlm import Prepared as Matched
from tests.objectives.test_vlm import pairs_to_match


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 50), st.floats(0, 0.999))
def test_it_is_torch_s(seed: int, rows: int, classes: int, smoothing: float) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(rows, classes)) * 5, rng.integers(0, classes, rows)
    theirs = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")(
        torch.tensor(logits), torch.tensor(labels)
    )
    log_probs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    ours = label_cross_entropy(log_probs, jnp.asarray(labels, jnp.int32), smoothing)
    assert_close(ours, theirs, scale=max_magnitude(logits))


def test_it_is_the_formula_by_hand() -> None:
    log_probs = jnp.log(jnp.asarray([0.5, 0.25, 0.125, 0.125]))
    nats = np.log(2.0)
    found = label_cross_entropy(log_probs, jnp.asarray(1, jnp.int32), 0.2)
    assert_close(found, (0.8 * 2 + 0.2 * (1 + 2 + 3 + 3) / 4) * nats)


class Classed(ForwardPass):
    """A forward pass whose classifier says what it is told to; no model runs."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.batch = {"label": jnp.asarray(rng.integers(0, 5, 8), jnp.int32)}
        self.class_logits = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)


def forward_of(objective: str) -> ForwardPass:
    if "classifier" in TASKS[objective].parts:
        return Classed()
    if objective == "mlm":
        return Masked(sentences(4, 12))
    if objective in ("vlm", "rerank"):
        return Matched(*pairs_to_match(0, batch=16))
    logits, target, weights, _ = case(1)
    prepared = Decoded({"target": target, "target_weights": weights}, logits)
    prepared.model.parts = ()
    return prepared


def loss(objective: str, smoothing: float) -> float:
    context = TaskContext(settings=TaskSettings(label_smoothing=smoothing), tokens=TOKENS)
    return float(TASKS[objective].loss(forward_of(objective), context).loss)


@pytest.mark.parametrize("objective", sorted(TASKS.keys() - {"vlc", "scst", "zero_shot"}))  # which it is not for
def test_every_objective_moves_in_proportion_to_it(objective: str) -> None:
    plain, some, more = (loss(objective, smoothing) for smoothing in (0.0, 0.1, 0.4))
    assert abs(some - plain) > 1e-4
    assert_close(more - plain, 4 * (some - plain), scale=plain)


def test_a_caption_s_mean_is_of_smoothed_tokens() -> None:
    logits, target, weights, _ = case(1)
    log_probs = np.asarray(jax.nn.log_softmax(logits[:, :-1]), np.float64)
    true = np.take_along_axis(log_probs, np.asarray(target)[:, 1:, None], -1)[..., 0]
    losses = -0.9 * true - 0.1 * log_probs.mean(-1)
    counted = np.asarray(weights)[:, 1:]
    assert_close(loss("caption", 0.1), (losses * counted).sum() / counted.sum())


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_what_is_no_share_is_refused(smoothing: float) -> None:
    with pytest.raises(UserError, match=rf"config\.tasks\.label_smoothing={smoothing} must be between 0 and 1"):
        TaskSettings(label_smoothing=smoothing)
