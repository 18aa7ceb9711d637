"""Small random models of the PyTorch runtime; without PyTorch nothing here is collected."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

try:
    import torch
except ModuleNotFoundError:  # the extra 'dev' installs it only on Python 3.11
    collect_ignore_glob = ["test_*.py"]
else:
    torch.set_num_threads(1)  # operations are tiny: more threads are slower

if TYPE_CHECKING:
    from mplug2_jax.conversion.torch_runtime import Config
    from mplug2_jax.conversion.torch_runtime.model import Mplug2


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Seed the random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def small() -> "Callable[..., Config]":
    """Return a function that makes a small config, with overrides."""
    from mplug2_jax.conversion.torch_runtime import Config

    def make(**overrides: Any) -> Config:
        sizes: dict[str, Any] = {
            "vision_width": 32, "vision_layers": 2, "vision_heads": 2, "patch_size": 8, "image_size": 16, "width": 24,
            "heads": 2, "mlp_width": 48, "text_layers": 2, "num_latents": 5, "fusion_start": 1, "fusion_layers": 2,
            "decoder_layers": 2, "vocab_size": 40, "max_positions": 12,
        }  # fmt: skip
        return Config(**(sizes | overrides))

    return make


@pytest.fixture(scope="session")
def lively() -> "Callable[[Mplug2], Mplug2]":
    """Return a function that draws weights with a visible effect: no uniform predictions, no zero temporal units."""

    def fill(model: "Mplug2") -> "Mplug2":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.4)
        return model.eval()

    return fill
