"""Tests call our packages with their types and shapes checked."""

import os

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from data_pipelines.config import VisualConfig
from mplug2_jax.errors import did_you_mean
from mplug2_jax.model.kernels import xla

pytestmark = pytest.mark.skipif(os.environ.get("CHECK_TYPES") == "0", reason="CHECK_TYPES=0 turns the checks off")


def test_a_value_of_a_wrong_type_is_an_error() -> None:
    with pytest.raises(TypeCheckError, match="name"):
        did_you_mean(3, ["text"])  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError, match="image_size"):
        VisualConfig(image_size="224")  # type: ignore[arg-type]


def test_axes_of_different_sizes_with_one_name_are_an_error() -> None:
    query, key = jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 3, 1, 4))
    xla(query, key, key, None)
    with pytest.raises(TypeCheckError, match="value"):
        xla(query, key, query, None)
