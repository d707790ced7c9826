"""Episodes that a scripted policy plays, on a tiny model; what tests of environments with tools share."""

import json

import torch
from harmony import encode_with_special

from grpo.batch import Completion, Prompt
from grpo.config import TurnsConfig
from grpo.envs.tool_class import ToolClass
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler, Session
from grpo.rollout.turns import Turns
from models.config import GptOssConfig
from models.gpt_oss import GptOss

TOKENIZER = ToolClass.build_tokenizer()
SETTINGS = {"kwargs": None, "path": None, "prompt_key": "prompt", "instructions": None, "reasoning_effort": "low",
            "current_date": "2025-08-05", "held_out_fraction": 0.25, "num_eval_prompts": 4}  # of ToolClass and its kin


def text_of(prompt: Prompt) -> str:
    return TOKENIZER.decode(prompt.token_ids, keep_special=True)


def call(name: str, **arguments) -> str:
    return f" to=functions.{name}<|channel|>commentary json<|message|>{json.dumps(arguments)}<|call|>"


def final(text: object) -> str:
    return f"<|channel|>final<|message|>{text}<|return|>"


def play(env, prompts, monkeypatch, texts, *, max_len: int = 2048, call_seconds: float = 60.0) -> list[Completion]:
    """Completions of one sample for each prompt, whose policy writes `texts(prompt)`."""
    config = GptOssConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
                          sliding_window=16, layer_types=["full_attention"], max_position_embeddings=max_len)
    model = GptOss(config, dtype=torch.float32, device="cpu", experts="bf16")
    model.init_weights(seed=0)
    ids = {prompt.id: iter([id for text in texts(prompt) for id in encode_with_special(TOKENIZER, text)]) for prompt in prompts}

    def scripted(session, hidden, rows):
        drawn = torch.tensor([next(ids[session.rows[index].prompt.id]) for index in rows.items.tolist()])
        return drawn, torch.zeros(len(drawn))

    monkeypatch.setattr(Session, "_draw", scripted)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    params = SamplingParams(max_new_tokens=max_len - longest)
    turns = Turns(env, TOKENIZER, TurnsConfig(max_turns=20, call_seconds=call_seconds))
    return turns.generate(Sampler(model, TOKENIZER.stop_ids, max_batch=8, seed=0), prompts, params, step=0, num_samples=1)
