"""Supervised warm-up on an environment's demonstrations, before GRPO: next-token cross-entropy on completions.

A small model trained from scratch must first learn the format: before that no completion earns a reward. The result is cached
under a hash of everything that it depends on, so a rerun starts at GRPO.
"""
import dataclasses
import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from grpo.batch import Completion, Prompt, RolloutBatch, Segment, pack
from grpo.config import TrainConfig, to_dict
from grpo.environment import Environment, checked_demonstrations
from grpo.optim import LearningRate, Optimizer, check_finite, loss_scale_for
from grpo.record.metrics import Metrics
from grpo.rollout.session import Interrupted
from grpo.run.identity import digest_code
from models.formats.atomic import new_file
from models.gpt_oss import GptOss


def warm_up(policy: GptOss, env: Environment, config: TrainConfig, metrics: Metrics, should_stop: Callable[[], bool]) -> None:
    """Trains the policy in place, or loads the result of an equal warm-up. Raises grpo.rollout.session.Interrupted if should_stop
    returns true."""
    settings = config.warmup
    cached = None
    if settings.cache_dir is not None:
        cached = Path(settings.cache_dir) / f"warmup_{_digest(policy, env, config)}.safetensors"
        if (history := _load(policy, cached)) is not None:
            metrics.print(f"warm-up: loaded {cached}")
            for line in history:
                metrics.log_warmup(line.pop("step"), line, num_steps=settings.steps, prints_line=False)
            return
    history = _train(policy, env, config, metrics, should_stop)
    if cached is not None:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in policy.trainable_parameters().items()}
            with new_file(cached, suffix=f".tmp-{os.getpid()}") as partial:
                save_file(tensors, partial, metadata={"history": json.dumps(history)})
        except (OSError, SafetensorError) as error:
            metrics.print(f"warning: the warm-up is not kept in {cached} ({error}); the run goes on")


def _train(policy: GptOss, env: Environment, config: TrainConfig, metrics: Metrics,
           should_stop: Callable[[], bool]) -> list[dict]:
    settings = config.warmup
    num_decay = round(settings.steps * settings.decay_fraction)
    learning_rate = LearningRate(
        settings.lr, settings.warmup_steps, "linear" if num_decay else "constant", num_decay or None, settings.final_lr_ratio,
        total_steps=settings.steps)
    optimizer = Optimizer(
        policy.trainable_parameters(), learning_rate, betas=tuple(settings.betas), eps=1e-8, weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm, loss_scale=loss_scale_for(policy.dtype, config.optim.loss_scale))
    history = []
    for step in range(settings.steps):
        if should_stop():
            raise Interrupted(f"warm-up stopped at step {step} of {settings.steps}, it starts again")
        started = time.perf_counter()
        pairs = checked_demonstrations(env, step, settings.batch_size, vocab_size=policy.config.vocab_size)
        batch = pack_demonstrations(pairs).to(policy.device)
        log_probs, _ = policy.log_probs(batch.tokens, batch.cu_seqlens, temperature=1.0, mask=batch.host_mask)
        loss = -log_probs.sum() / batch.num_policy_tokens
        check_finite(loss, step=step, what="loss", name="warm-up")
        optimizer.backward(loss)
        lr = optimizer.lr
        grad_norm = optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == settings.steps - 1:
            line = {"loss": loss.item(), "grad_norm": grad_norm, "lr": lr}
            history.append({"step": step + 1, **line})
            metrics.log_warmup(step + 1, {**line, "time/step": time.perf_counter() - started}, num_steps=settings.steps,
                               prints_line=step % 50 == 0 or step == settings.steps - 1)
    optimizer.close()
    return history


def pack_demonstrations(pairs: list[tuple[list[int], list[int]]]) -> RolloutBatch:
    """Packs (prompt ids, completion ids) pairs into a batch that trains on the completions."""
    completions = [
        Completion(Prompt(i, prompt, {}), 0, [Segment(prompt, "prompt"), Segment(target, "policy", [0.0] * len(target))], "stop")
        for i, (prompt, target) in enumerate(pairs)]
    return pack(completions, [0.0] * len(completions))


def _digest(policy: GptOss, env: Environment, config: TrainConfig) -> str:
    """A hash of settings, code, torch's version and the number of threads: equal hashes mean equal bits."""
    settings = {name: value for name, value in dataclasses.asdict(config.warmup).items() if name != "cache_dir"}
    code = [digest_code(), Path(inspect.getsourcefile(type(env))).read_text(encoding="utf-8")]
    plain = to_dict(config)
    shaped = [settings, plain["model"], plain["env"], config.seed, str(policy.dtype), str(policy.device),
              torch.__version__, torch.get_num_threads(), code]
    return hashlib.sha256(json.dumps(shaped, sort_keys=True, default=str).encode()).hexdigest()[:16]


@torch.no_grad()
def _load(policy: GptOss, path: Path) -> list[dict] | None:
    """Loads a cached warm-up's weights into the policy. Returns its history, or None if no readable cache exists."""
    if not path.is_file():
        return None
    parameters = policy.trainable_parameters()
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(parameters):
                return None
            tensors = {name: file.get_tensor(name) for name in parameters}
            history = json.loads(file.metadata()["history"])
    except SafetensorError:
        return None  # a damaged file, as a kill can leave it: train again
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
    return history
