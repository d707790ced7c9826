"""Turns on a CUDA device: the sampler's log-probs are the trainer's bit for bit through results of tools and turns of a user,
whatever happened to the rows in between."""

import json
import time
from types import SimpleNamespace

import pytest
from harmony import encode_with_special
from scripted_turns import TOKENIZER, Env, Tools
from test_gpu import adapted_model, assert_trainers_bits, segments_of

import grpo.rollout.turns
from grpo.batch import Prompt
from grpo.config import TurnsConfig
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from grpo.rollout.turns import Turns
from models.chat.parse import parse_completion
from models.chat.render import Message
from models.kv_cache import page_bytes, slot_bytes

pytestmark = pytest.mark.gpu

MAX_NEW_TOKENS = 700


class Talk(Tools):
    delay = 0.0  # seconds of a call

    def echo(self, text: str, times: int = 1) -> str:
        """Repeats."""
        time.sleep(self.delay)
        return text * times

    def user_turn(self, answer: str) -> str:
        return "go on " * (1 + self.sample)

    def get_reward(self) -> float:
        return 0.0


class TalkEnv(Env):
    has_user_turns = True

    def episode(self, prompt, sample):
        return Talk(prompt, sample)


def play_noise(model, *, shares_prompts, **settings):
    """Completions of an untrained model, which draws <|call|> and <|return|> by chance. Any <|call|> is read as a call, whose
    result has up to 150 tokens, and any <|return|> as an answer."""
    sampler = Sampler(model, [TOKENIZER.return_], seed=7, shares_prompts=shares_prompts,
                      **{"max_batch": 64} | settings)
    turns = Turns(TalkEnv(), TOKENIZER, TurnsConfig(max_turns=8, max_result_tokens=150))
    turns.read_call = lambda ids: (Message("assistant", json.dumps({"text": "ab", "times": 1 + 40 * len(ids) % 97}), "commentary",
                                           "functions.echo"), "")
    opening = encode_with_special(TOKENIZER, "<|start|>assistant")
    prompts = [Prompt(i, [*(5 + (7 * k + 3 * i) % 200 for k in range(length)), *opening], {"row": i})
               for i, length in enumerate([61, 62, 128, 18, 30, 200])]
    completions = turns.generate(sampler, prompts, SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0.7), step=3,
                                 num_samples=4)
    return completions, sampler.last_stats


@pytest.fixture
def answers(monkeypatch):
    """Whatever ends in <|return|> is an answer."""
    def read(ids, tokenizer, **settings):
        if settings or ids[-1] != tokenizer.return_:
            return parse_completion(ids, tokenizer, **settings)
        return SimpleNamespace(fault=None, final="an answer")

    monkeypatch.setattr(grpo.rollout.turns, "parse_completion", read)


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_episodes_have_the_trainers_log_probs_bit_for_bit_however_their_rows_are_run(answers, monkeypatch, shares_prompts):
    model = adapted_model()
    expected, stats = play_noise(model, shares_prompts=shares_prompts)
    assert_trainers_bits(model, expected, shares_prompts=shares_prompts)
    assert_trainers_bits(model, expected, shares_prompts=shares_prompts, max_tokens=2000)
    results = [len(part.token_ids) for one in expected for part in one.segments if part.source == "env"]
    assert len(results) >= 8 and max(results) > 100 and sum(len(one.sequences) > 1 for one in expected) >= 4
    num_bytes = 13 * slot_bytes(model.config, model.dtype, max_len=1024) + 40 * page_bytes(model.config, model.dtype)
    for changes, delay in (({"max_batch": 5}, 0.0), ({"max_prefill_tokens": 64}, 0.0), ({"cache_gb": num_bytes / 1e9}, 0.02),
                           ({"cache_gb": num_bytes / 1e9, "max_prefill_tokens": 100}, 0.0), ({}, 0.1)):
        monkeypatch.setattr(Talk, "delay", delay)
        found, stats = play_noise(model, shares_prompts=shares_prompts, **changes)
        assert [segments_of(one) for one in found] == [segments_of(one) for one in expected], changes
        assert stats.num_preemptions > 0 or "cache_gb" not in changes
