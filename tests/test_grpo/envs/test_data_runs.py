"""Runs on data of one's own: the experiments `tiny_lora` and `gsm8k_20b`, and long prompts, through the real entry point."""

import json

import datasets
import pytest
from harmony import encode_with_special
from paths import FIXTURES

from grpo.batch import Completion, Segment
from grpo.configuration.launch import load_config
from grpo.configuration.targets import bind
from grpo.envs.data_files import DataError
from models.chat.tokenizer import Tokenizer, build_byte_tokenizer

QUIET = ("wandb.mode=disabled", "eval.at_start=false", "eval.at_end=false", "name=run")
# made up, in the form of GSM8K: reasoning with <<calculations>>, then the answer
GSM8K = [
    {"question": f"Ada picks {n} apples a day and sells half of them. How many does she keep in {n} days?",
     "answer": f"She keeps {n}/2 = <<{n}/2={n / 2:g}>>{n / 2:g} a day.\nThat is {n * n / 2:g} in all.\n#### {n * n // 2:,}"}
    for n in range(20, 60, 2)
]
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: main/train-*
---
"""


@pytest.fixture
def gsm8k_folder(tmp_path):
    """A copy of a repository of the hub with two subsets and two splits."""
    folder = tmp_path / "gsm8k"
    (folder / "main").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for split, rows in (("train", GSM8K[:14]), ("test", GSM8K[14:])):
        datasets.Dataset.from_list(rows).to_parquet(folder / "main" / f"{split}-00000-of-00001.parquet")
    return folder


def test_gsm8k_as_shipped_reads_answers_after_the_marker_and_evaluates_on_the_test_split(gsm8k_folder, tmp_path, monkeypatch):
    real, asked = datasets.load_dataset, []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return real(str(gsm8k_folder), subset, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = load_config("train", ["+experiment=gsm8k_20b"])
    tokenizer = Tokenizer.load(FIXTURES / "tokenizer_brief")
    env = bind(config.env, "env")(tokenizer=tokenizer, seed=0)
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert len(env.train_rows) == 14
    assert {prompt.row["question"] for prompt in env.eval_prompts()} == {row["question"] for row in GSM8K[14:]}
    prompt = next(prompt for prompt in env.eval_prompts() if prompt.row["question"].startswith("Ada picks 58 "))
    text = tokenizer.decode(prompt.token_ids, keep_special=True)
    assert "Reasoning: low" in text and "# Instructions\n\nPut the final answer, a single number, in \\boxed{}.\n\n" in text
    scores = []
    for final in ("It is \\boxed{1,682}.", "\\boxed{1682}", "Half of 58 is 29, so \\boxed{841}", "1,682 of 58"):
        ids = encode_with_special(tokenizer, f"<|channel|>final<|message|>{final}<|return|>")
        completion = Completion(prompt, 0, [Segment(prompt.token_ids, "prompt"), Segment(ids, "policy")], "stop")
        scores += [verdict.reward for verdict in env.score([completion])]
    assert scores == [1.0, 1.0, 0.0, 0.0]  # 58 * 58 / 2 = 1,682; two numbers without a box are a hedge


def test_gsm8k_as_shipped_trains_within_512_tokens_at_low_effort():
    config = load_config("train", ["+experiment=gsm8k_20b"])
    assert (config.rollout.max_new_tokens, config.rollout.temperature, config.env["reasoning_effort"]) == (512, 1.0, "low")
    assert (config.rollout.prompts_per_step, config.rollout.group_size, config.optim.lr) == (32, 16, 2e-5)
    assert config.advantage.scale == "none" and config.kl.coefficient == 0
    assert config.optim.max_tokens >= config.env["max_prompt_tokens"] + config.rollout.max_new_tokens


def test_gsm8k_runs_from_a_local_copy(entry_points, gsm8k_folder, tmp_path):
    result = entry_points.run(
        "grpo.train", "experiment=gsm8k_20b", *QUIET, "device=cpu", "dtype=float32", "threads=1", "steps=1",
        f"model.path={FIXTURES}/tiny_bf16", f"model.tokenizer={FIXTURES}/tokenizer_brief", "model.lora.rank=2",
        f"env.path={gsm8k_folder}", "env.max_prompt_tokens=2000", "rollout.prompts_per_step=2", "rollout.group_size=2",
        "rollout.max_new_tokens=4", "rollout.refill_rounds=0", f"output_dir={tmp_path}", "checkpoint.every=0",
        writes_report=False, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    assert result.code == 0, result.err
    logged = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert logged and all(line["source"].startswith(f"{gsm8k_folder}/train[") for line in logged)


def test_tiny_lora_trains_on_rows_and_rewards_of_ones_own(entry_points, tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(
        json.dumps({"question": f"Grüße Nr. {n} ☃", "answer": "né" * (1 + n % 3)}, ensure_ascii=False) + "\n"
        for n in range(20)))
    (tmp_path / "my_rewards.py").write_text(
        "def tokens(completions, completion_ids, **columns):\n    return [sum(ids) % 7 / 7 for ids in completion_ids]\n")
    result = entry_points.run(
        "grpo.train", "experiment=tiny_lora", *QUIET, "env.path=mine.jsonl", "env.match=exact",
        "env.rewards=[{fn: my_rewards.py:tokens}]", "steps=2", "warmup.steps=2", "warmup.batch_size=2",
        "rollout.prompts_per_step=2", "rollout.group_size=4", "rollout.max_new_tokens=8", folder=tmp_path, writes_report=False)
    assert result.code == 0, result.err
    assert " training and " in next(line for line in result.out.splitlines() if line.startswith("env "))
    steps = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    updated = [line for line in steps if line.get("grad_norm", 0) > 0 and "rewards/tokens/mean" in line]
    assert [line["step"] for line in updated] == [1, 2]
    assert (tmp_path / "runs" / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_prompt_longer_than_the_model_s_sequences_ends_a_run_before_it_starts(entry_points, tmp_path):
    rows = [{"question": f"What is {n} + 1? {'Think carefully. ' * (40 if n == 5 else 0)}", "answer": n + 1} for n in range(12)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "other.jsonl").write_text(json.dumps({"question": "0 + 0?", "answer": 0}))
    result = entry_points.run("grpo.train", "experiment=tiny_lora", *QUIET, "env.path=mine.jsonl",
                              "model.architecture.max_position_embeddings=300", "env.max_prompt_tokens=5000",
                              "env.eval_path=other.jsonl", "env.held_out_fraction=null", folder=tmp_path, writes_report=False)
    assert result.code == 3, result.err
    assert "mine.jsonl:6: a prompt has" in result.err and "the model's sequences end at 300" in result.err
    assert "warm-up" not in result.out


def test_demonstrations_are_the_answers_as_final_messages(tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    node = {**load_config("train", ["experiment=tiny_lora"]).env, "path": str(tmp_path / "d.jsonl"), "answer_after": "####"}
    make = bind(node, "env")
    tokenizer = make.func.build_tokenizer()
    env = make(tokenizer=tokenizer, seed=3)
    known = {tuple(row.token_ids): row.answer for row in env.train_rows}
    pairs = env.demonstrations(0, 8)
    for prompt, completion in pairs:
        assert tokenizer.decode(completion, keep_special=True) == f"<|channel|>final<|message|>{known[tuple(prompt)]}<|return|>"
    assert pairs == env.demonstrations(0, 8) != env.demonstrations(1, 8)


def test_a_demonstration_shows_the_first_accepted_answer_and_needs_one(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(
        json.dumps({"question": f"{n}?", "answer": [str(n), "none"]}) + "\n" for n in range(12)))
    node = {**load_config("train", ["experiment=tiny_lora"]).env, "path": str(tmp_path / "d.jsonl"), "match": "exact"}
    tokenizer = bind(node, "env").func.build_tokenizer()
    env = bind(node, "env")(tokenizer=tokenizer, seed=0)
    for prompt, completion in env.demonstrations(0, 4):
        number = tokenizer.decode(prompt).removesuffix("?assistant").rpartition("user")[2]
        assert tokenizer.decode(completion, keep_special=True) == f"<|channel|>final<|message|>{number}<|return|>"
    node |= {"match": "none", "format_reward": 1.0}
    env = bind(node, "env")(tokenizer=tokenizer, seed=0)
    with pytest.raises(DataError, match=r"d.jsonl:\d+: the answer is a list, and a demonstration for the warm-up needs text"):
        env.demonstrations(0, 4)


def test_a_byte_tokenizer_reads_any_text_and_keeps_its_words_whole():
    tokenizer = build_byte_tokenizer(["You are ChatGPT.", "Reasoning: low"])
    for text in ("Grüße ☃ 漢字 \x00\x1f\r\n\t 👩‍👩‍👧 |<|end|>", "", "usersystem", " final"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("You are ChatGPT.")) == len(tokenizer.encode("assistant")) == 1
    assert len(tokenizer.encode("é")) == 2 and len(tokenizer.encode("analysis of")) == 4
    assert not any(tokenizer.is_special(id) for id in tokenizer.encode("<|end|><|start|>"))
    assert tokenizer.vocab_size == 256 + 7 + 2 + 9  # bytes, header words, the two lines, control tokens
