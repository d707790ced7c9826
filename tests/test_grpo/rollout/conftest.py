"""A model that plays scripts of turns (scripted_turns.py)."""
import pytest
from scripted_turns import Player, make_model


@pytest.fixture(scope="module")
def model(lively_model):
    return make_model(lively_model)


@pytest.fixture
def play(model, monkeypatch):
    return Player(model, monkeypatch)
