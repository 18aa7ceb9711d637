"""Fixtures for tests of training."""

import pytest

from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.tokenizers import Tokenizer, train_wordpiece


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_wordpiece(vocabulary_texts(100), 200)
