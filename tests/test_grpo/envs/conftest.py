"""What tests of environments share."""

import pytest
from paths import FIXTURES

from grpo.sandbox.pool import Sandbox
from models.chat.tokenizer import Tokenizer


@pytest.fixture(scope="package")
def tokenizer():
    return Tokenizer.load(FIXTURES / "tokenizer_compact")


@pytest.fixture(scope="module")
def sandbox():
    opened = Sandbox("auto", num_zygotes=1)
    yield opened
    opened.close()
