"""Label smoothing matches torch, and applies to every objective over words and classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.objectives.forward import ForwardPass, label_cross_entropy
from mplug2_jax.tasks.base import TaskContext
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.tasks.table import TASKS
from tests.close import assert_close, max_magnitude
from tests.objectives.test_language import FakeForward as FakeDecoding
from tests.objectives.test_language import case
from tests.objectives.test_mlm import TOKENS, sentences
from tests.objectives.test_mlm import FakeForward as FakeMasking
from tests.objectives.test_vlm import FakeForward as FakeMatching
from tests.objectives.test_vlm import pairs_to_match


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 50), st.floats(0, 0.999))
def test_smoothed_cross_entropy_matches_torch(seed: int, rows: int, classes: int, smoothing: float) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(rows, classes)) * 5, rng.integers(0, classes, rows)
    expected = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")(
        torch.tensor(logits), torch.tensor(labels)
    )
    log_probs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    found = label_cross_entropy(log_probs, jnp.asarray(labels, jnp.int32), smoothing)
    assert_close(found, expected, scale=max_magnitude(logits))


def test_a_hand_computed_case() -> None:
    log_probs = jnp.log(jnp.asarray([0.5, 0.25, 0.125, 0.125]))
    nats = np.log(2.0)
    found = label_cross_entropy(log_probs, jnp.asarray(1, jnp.int32), 0.2)
    assert_close(found, (0.8 * 2 + 0.2 * (1 + 2 + 3 + 3) / 4) * nats)


class FakeClassification(ForwardPass):
    """Forward pass with given class logits, without a model."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.batch = {"label": jnp.asarray(rng.integers(0, 5, 8), jnp.int32)}
        self.class_logits = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)


def make_forward(objective: str) -> ForwardPass:
    if "classifier" in TASKS[objective].parts:
        return FakeClassification()
    if objective == "mlm":
        return FakeMasking(sentences(4, 12))
    if objective in ("vlm", "rerank"):
        return FakeMatching(*pairs_to_match(0, batch=16))
    logits, target, weights, _ = case(1)
    forward = FakeDecoding({"target": target, "target_weights": weights}, logits)
    forward.model.parts = ()
    return forward


def loss(objective: str, smoothing: float) -> float:
    context = TaskContext(config=TasksConfig(label_smoothing=smoothing), tokens=TOKENS)
    return float(TASKS[objective].loss(make_forward(objective), context).loss)


@pytest.mark.parametrize("objective", sorted(TASKS.keys() - {"vlc", "scst", "zero_shot"}))  # which do not use it
def test_every_objective_is_linear_in_the_smoothing(objective: str) -> None:
    none, some, more = (loss(objective, smoothing) for smoothing in (0.0, 0.1, 0.4))
    assert abs(some - none) > 1e-4
    assert_close(more - none, 4 * (some - none), scale=none)


def test_caption_loss_is_the_mean_over_smoothed_tokens() -> None:
    logits, target, weights, _ = case(1)
    log_probs = np.asarray(jax.nn.log_softmax(logits[:, :-1]), np.float64)
    true = np.take_along_axis(log_probs, np.asarray(target)[:, 1:, None], -1)[..., 0]
    losses = -0.9 * true - 0.1 * log_probs.mean(-1)
    counted = np.asarray(weights)[:, 1:]
    assert_close(loss("caption", 0.1), (losses * counted).sum() / counted.sum())


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_out_of_range_is_refused(smoothing: float) -> None:
    with pytest.raises(UserError, match=rf"config\.tasks\.label_smoothing={smoothing} must be between 0 and 1"):
        TasksConfig(label_smoothing=smoothing)
