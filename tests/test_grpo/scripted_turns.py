"""Episodes of several turns that a scripted policy plays on a tiny model, whose log-probs they get; what tests of turns share."""

import json
import os
import random
import subprocess
import threading
from dataclasses import replace

import pytest
import torch
from harmony import encode_with_special
from paths import FIXTURES
from rollout_problem import make_config

from grpo.batch import Completion, Prompt
from grpo.config import TurnsConfig
from grpo.environment import Score
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler, Session
from grpo.rollout.turns import Turns
from models.chat.tokenizer import Tokenizer
from models.gpt_oss import GptOss

TOKENIZER = Tokenizer.load(FIXTURES / "tokenizer_compact")
CALL = "<|channel|>commentary to=functions.echo <|constrain|>json<|message|>{}<|call|>"
FINAL = "<|channel|>final<|message|>{}<|return|>"


HANGS = threading.Event()  # set by a tool that does not come back


class Tools:
    """What answers calls in these tests."""

    def __init__(self, prompt: Prompt, sample: int) -> None:
        self.prompt, self.sample, self.num_calls = prompt, sample, 0
        self.children: list[subprocess.Popen] = []

    def reset(self) -> None:
        """Not a tool."""

    def echo(self, text: str, times: int = 1) -> str:
        """Repeats."""
        self.num_calls += 1
        return text * times

    async def count(self) -> int:
        """Counts the calls."""
        self.num_calls += 1
        return self.num_calls

    def refuse(self) -> None:
        """Tells the model no."""
        raise ValueError("game over")

    def misbehave(self, how: str) -> object:
        """Fails."""
        if how == "raise":
            raise KeyError("lost")
        if how == "exit":
            raise SystemExit(3)
        if how == "hang":
            HANGS.set()
            threading.Event().wait(600)
        if how == "leak":
            self.children.append(subprocess.Popen(["sleep", "600"]))
        if how == "fork" and os.fork() == 0:
            return "in the child"
        return "x" * 10_000_000 if how == "flood" else "fine"

    def get_reward(self) -> float:
        return self.num_calls + self.sample / 8


class Env:
    def episode(self, prompt, sample):
        return Tools(prompt, sample)

    def score(self, completions):
        return [Score(float(completion.episode.reward), {}, {}, None) for completion in completions]


def make_model(lively_model, **settings) -> GptOss:
    config = replace(make_config(), **settings)
    config.vocab_size, config.max_position_embeddings = TOKENIZER.vocab_size, 2048
    return lively_model(config, head_factor=5.0)


class Player:
    """Plays scripts, texts of turns by (prompt id, sample), against an environment; returns completions and statistics."""

    def __init__(self, model: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.monkeypatch, self.warnings = model, monkeypatch, []

    def __call__(self, scripts, *, env=None, limits=None, max_new_tokens=1500, prompt_len=12, records_routing=False,
                 should_stop=None, keeps_finished=False, **settings):
        ids = {key: [id for text in texts for id in encode_with_special(TOKENIZER, text)] for key, texts in scripts.items()}
        num_drawn = dict.fromkeys(ids, 0)
        def scripted(session, hidden, rows):
            """The script's tokens, with the model's own log-probs."""
            tokens = []
            for index in rows.items.tolist():
                key = session.rows[index].prompt.row["row"], session.rows[index].sample
                tokens.append(ids[key][num_drawn[key]])
                num_drawn[key] += 1
            tokens = torch.tensor(tokens)
            log_probs = session._model.head(hidden).log_softmax(-1)
            return tokens, log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)

        self.monkeypatch.setattr(Session, "_draw", scripted)
        rng = random.Random(5)
        prompts = [Prompt(id, self.prompt_ids(rng, prompt_len), {"row": id}) for id in dict.fromkeys(id for id, _ in scripts)]
        sampler = Sampler(self.model, TOKENIZER.stop_ids, **{"max_batch": 64, "seed": 7} | settings)
        sampler.warn = self.warnings.append
        turns = Turns(Env() if env is None else env, TOKENIZER, limits or TurnsConfig())
        params = SamplingParams(max_new_tokens=max_new_tokens, records_routing=records_routing)
        completions = turns.generate(sampler, prompts, params, step=3, num_samples=len(scripts) // len(prompts),
                                     should_stop=should_stop, keeps_finished=keeps_finished)
        return completions, sampler.last_stats

    @staticmethod
    def prompt_ids(rng: random.Random, length: int) -> list[int]:
        opening = encode_with_special(TOKENIZER, "<|start|>assistant")
        return [*(rng.randrange(256) for _ in range(length - len(opening))), *opening]


def call(**arguments) -> str:
    return CALL.replace("{}", json.dumps(arguments))


def misbehave(how: str) -> str:
    return call(how=how).replace("echo", "misbehave")


def text_of(completion: Completion) -> str:
    return TOKENIZER.decode(completion.completion_ids, keep_special=True)


def random_scripts(num_prompts: int, num_samples: int, *, seed: int) -> dict[tuple[int, int], list[str]]:
    """Turns with and without analysis, calls of all kinds, malformed ones among them, and an end."""
    rng = random.Random(seed)
    calls = [
        lambda: call(text="ab", times=rng.randrange(4)), lambda: CALL.replace("echo", "count").replace("{}", "{}"),
        lambda: call(text=rng.randrange(9)), lambda: CALL.replace("echo", "nothing"), lambda: CALL.replace("echo", "refuse"),
        lambda: CALL.replace("{}", '{"text": '), lambda: "<|channel|>commentary<|message|>to whom?<|call|>",
        lambda: "<|channel|>commentary<|channel|>x<|call|>", lambda: call(text="é<|end|>\n")]
    scripts = {}
    for key in [(prompt, sample) for prompt in range(num_prompts) for sample in range(num_samples)]:
        thought = "<|channel|>analysis<|message|>hm {}<|end|><|start|>assistant"
        turns = [rng.choice(["", thought.format(i)]) + rng.choice(calls)() for i in range(rng.randrange(6))]
        scripts[key] = [*turns, FINAL.format(rng.randrange(99))]
    return scripts
