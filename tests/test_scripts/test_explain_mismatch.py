"""scripts/explain_mismatch.py: silent where sampler and trainer agree, and right about where they part."""


import sys
from dataclasses import replace

import pytest
import torch
from paths import FIXTURES, ROOT

import models.keys
from grpo.batch import Prompt, pack
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from models.formats.hugging_face import load_model
from models.lora import LoraConfig, attach_lora

PARAMS = SamplingParams(max_new_tokens=10, temperature=0.7)
PROMPTS = [Prompt(0, [5, 6, 7, 8], {}), Prompt(1, list(range(20, 31)), {})]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


def adapted_model(folder="tiny_mxfp4"):
    model = load_model(FIXTURES / folder, device="cpu", dtype=torch.float32)
    attach_lora(model, LoraConfig(rank=2, alpha=4.0, targets=["q_proj", "v_proj", "o_proj", "router", "experts"]), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=generator)
    return model


def settings(**changes):
    from explain_mismatch import Settings

    values = {"num_samples": 2, "params": PARAMS, "max_batch": 3, "max_tokens": 100, "shares_prompts": False, "seed": 3}
    return Settings(**(values | changes))


def sample(model, settings):
    sampler = Sampler(model, settings.stop_ids, max_batch=settings.max_batch, seed=settings.seed,
                      shares_prompts=settings.shares_prompts)
    completions = sampler.generate(PROMPTS, settings.params, step=0, num_samples=settings.num_samples)
    return completions, pack(completions, [0.0] * len(completions))


@pytest.mark.parametrize("folder", ["tiny_mxfp4", "tiny_bf16"])
def test_a_checkpoint_whose_paths_agree_shows_no_difference(scripts, monkeypatch, capsys, folder):
    import explain_mismatch

    monkeypatch.setattr(sys, "argv", ["explain_mismatch.py", "--checkpoint", str(FIXTURES / folder), "--lora-rank", "2",
                                      "--prompt-lens", "3", "20", "--max-new-tokens", "12", "--max-batch", "3", "--device", "cpu",
                                      "--dtype", "float32", "--shares-prompts"])
    assert explain_mismatch.main() == 0
    assert capsys.readouterr().out.startswith("no difference: the log-probs of 48 tokens of 4 completions")


@pytest.mark.parametrize("changes", [{}, {"shares_prompts": True}, {"params": replace(PARAMS, top_k=5)}])
@pytest.mark.parametrize("index", [0, 2, 3])
def test_every_operation_of_a_token_is_seen_on_both_paths(scripts, changes, index):
    from explain_mismatch import Recorder, compare, run_sampler, run_trainer

    model, chosen = adapted_model(), settings(**changes)
    completions, batch = sample(model, chosen)
    trainer, sampler = Recorder(model), Recorder(model)
    prompt_len = len(completions[index].prompt.token_ids)
    run_trainer(model, batch, chosen, trainer, start=int(batch.cu_seqlens[index]), prompt_len=prompt_len,
                num_positions=prompt_len + 6)
    run_sampler(model, completions, chosen, sampler, index=index, num_positions=prompt_len + 6)
    # 4 layers of 16 operations each, the last norm and the log-probs
    assert len(trainer.found) == 4 * 16 + 2
    assert {sum(map(len, parts)) for (_, name), parts in sampler.found.items() if "log-prob" not in name} == {prompt_len + 6}
    recorded = torch.cat(sampler.found[4, "log-prob of the next token"]).tolist()
    assert recorded == completions[index].segments[1].log_probs[:7]
    assert compare(trainer, sampler, prompt_len + 6) is None


def test_a_changed_decode_attention_is_named(scripts, monkeypatch, capsys):
    from explain_mismatch import check

    original = models.keys.decode_attention

    def changed(q, *arguments, window, positions, **others):
        out = original(q, *arguments, window=window, positions=positions, **others)
        if window == 0:  # the layers 1 and 3
            out[positions >= 15, 2, 3] += 1e-3
        return out

    monkeypatch.setattr(models.keys, "decode_attention", changed)
    assert check(adapted_model(), PROMPTS, settings()) == 1
    shown = capsys.readouterr().out
    # the first prompt's completions end before position 15
    assert "first: prompt 1, sample 0, position 16 (the prompt has 11 tokens)" in shown
    assert "first operation: position 15, layer 1, attention: 1 of 128 elements differ, by 0.001 at most" in shown
    table = {line[:32].strip(): line[32:41].strip() for line in shown.splitlines() if line[32:39].strip() in ("equal", "differs")}
    assert table["rotated keys"] == "equal" and table["attention"] == table["o_proj"] == table["block output"] == "differs"


def test_a_projection_that_changes_in_decode_alone_is_named(scripts, capsys):
    from explain_mismatch import check

    model = adapted_model()
    o_proj = model.model.layers[2].self_attn.o_proj
    # decode steps of at most 3 rows
    o_proj.register_forward_hook(lambda _, arguments, out: out * 1.001 if len(arguments[0]) <= 3 else out)
    assert check(model, PROMPTS, settings()) == 1
    assert "first operation: position 4, layer 2, o_proj: " in capsys.readouterr().out


def test_a_change_around_the_model_is_told_from_one_in_it(scripts, monkeypatch, capsys):
    from explain_mismatch import check

    generate = Sampler.generate

    def disturbed(*arguments, **others):
        completions = generate(*arguments, **others)
        completions[2].segments[1].log_probs[4] += 1e-3
        return completions

    monkeypatch.setattr(Sampler, "generate", disturbed)
    assert check(adapted_model(), PROMPTS, settings()) == 1
    shown = capsys.readouterr().out
    assert "1 of 40 tokens of 4 completions differ, by 0.001 nats at most" in shown
    assert "both paths agree in every operation" in shown and "CUDA graphs" in shown
