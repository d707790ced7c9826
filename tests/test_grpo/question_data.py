"""Small data sets of questions and answers, their environment, and completions of their prompts."""

import json

import pytest
from harmony import encode_with_special
from paths import FIXTURES

from grpo.batch import Completion, Segment
from grpo.envs.data_files import DataError
from grpo.envs.dataset import Dataset

ARITHMETIC = FIXTURES / "arithmetic.jsonl"
SETTINGS = {"path": str(ARITHMETIC), "prompt_key": "question", "answer_key": "answer", "match": "numeric",
            "held_out_fraction": 0.25, "current_date": "2025-06-28", "reasoning_effort": "low", "max_prompt_tokens": 600}
GOOD = json.dumps({"question": "a", "answer": "1"})  # a line


def make(tokenizer, **changes):
    settings = {"seed": 0, **SETTINGS, **changes}
    if settings.get("eval_path"):
        settings["held_out_fraction"] = None
    return Dataset(tokenizer=tokenizer, **settings)


def write(folder, rows, name="data.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def rows(num=20, start=0):
    return [{"question": f"What is {n} + 1?", "answer": n + 1} for n in range(start, start + num)]


def complete(env, prompt, text, finish_reason="stop"):
    ids = encode_with_special(env.tokenizer, text)
    return Completion(prompt, 0, [Segment(prompt.token_ids, "prompt"), Segment(ids, "policy")], finish_reason)


def final(text):
    return f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>{text}<|return|>"


def questions(prompts):
    return [prompt.row["question"] for prompt in prompts]


def problem(tokenizer, path, **changes):
    """What is wrong with the data at the path."""
    with pytest.raises(DataError) as caught:
        make(tokenizer, path=str(path), **changes)
    return str(caught.value)
