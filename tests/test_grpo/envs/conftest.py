"""What tests of environments share."""

import pytest
from paths import FIXTURES

from models.chat.tokenizer import Tokenizer


@pytest.fixture(scope="package")
def tokenizer():
    return Tokenizer.load(FIXTURES / "tokenizer_compact")
