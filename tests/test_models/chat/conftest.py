"""The fixtures' tokenizers: one with the published control ids, one without holes between its ids."""

import pytest
from paths import FIXTURES

from models.chat.tokenizer import Tokenizer


@pytest.fixture(scope="session", params=["tokenizer_real_ids", "tokenizer_compact"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer.load(FIXTURES / request.param)
