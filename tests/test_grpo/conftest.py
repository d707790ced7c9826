"""Files of configs/ are composed once for all tests."""

import os
import sys

import pytest
from paths import FIXTURES
from shared_compositions import share

from models.chat.tokenizer import Tokenizer

share()


@pytest.fixture
def leave_readers(monkeypatch):
    """`leave_readers()`: from then on nobody reads what this process prints, as in a closed terminal."""
    def leave():
        for name in ("stdout", "stderr"):
            reader, writer = os.pipe()
            os.close(reader)
            monkeypatch.setattr(sys, name, open(writer, "w", encoding="utf-8"))  # noqa: SIM115  (until the process ends)
        monkeypatch.setattr("grpo.evaluate.PROGRESS_SECONDS", 0.0)

    return leave


@pytest.fixture
def compact() -> Tokenizer:
    return Tokenizer.load(FIXTURES / "tokenizer_compact")
