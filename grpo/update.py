"""The update of a step: a batch of scored completions to losses, gradients and optimizer steps, with their metrics."""
import math
from collections.abc import Iterable

import torch

from grpo.batch import RolloutBatch, micro_batches, minibatches, pack
from grpo.config import OldLogProbs
from grpo.exactness import allowed_difference, describe_mismatch, differences
from grpo.groups import Groups
from grpo.kl import kl_penalty
from grpo.losses import LossInputs, checked_loss, reduce_stats, token_stats
from grpo.optim import check_finite
from grpo.rollout.session import Interrupted
from grpo.run.start import Run
from models.routing_record import RoutingReplay

PATIENCE = 5  # a warning comes after this many steps in a row without an update


def update(run: Run, groups: Groups) -> dict[str, float]:
    """Packs the live groups and makes the step's updates. Returns the metrics of the update."""
    optim = run.config.optim
    # the learning rate follows the step number, even if earlier steps made no update
    run.optimizer.position = run.step * optim.minibatches * optim.epochs
    run.steps_without_update = 0 if groups.completions else run.steps_without_update + 1
    if not groups.completions:
        if run.steps_without_update == PATIENCE:
            run.metrics.warn(f"nothing was learnt in the last {PATIENCE} steps: the rewards of each group were equal or missing "
                             "(or its completions cut off, with optim.mask_truncated); look at completions.jsonl")
        return {"loss": math.nan, "grad_norm": math.nan, "lr": run.optimizer.lr, "update/tokens": 0, "update/trained_tokens": 0}
    batch = pack(groups.completions, groups.advantages).to(run.policy.device)
    num_updates = min(optim.minibatches, batch.num_rows) * optim.epochs
    if num_updates > 1 and optim.old_log_probs == OldLogProbs.trainer:
        batch.old_log_probs = score_batch(run, batch, replays_routing=True)
    if run.reference is not None:
        with run.reference.in_place_of(run.policy):
            # no replay: the reference is another policy and uses its own routing
            batch.ref_log_probs = score_batch(run, batch, replays_routing=False)
    allowed = allowed_difference(run.policy)
    stats, before_update, grad_norms, num_packed, num_whole, num_trained, has_updated = [], [], [], 0, 0, 0, False
    for epoch in range(optim.epochs):
        seed = hash((run.config.seed, run.step, epoch))  # of integers: the same in every process
        for part in minibatches(batch, optim.minibatches, seed=seed):
            num_whole, num_trained = num_whole + len(part.tokens), num_trained + part.num_policy_tokens
            for micro in micro_batches(part, optim.max_tokens, share_prompts=optim.share_prompts):
                num_packed += len(micro.tokens)
                replay = make_replay(micro)
                log_probs, entropy = policy_log_probs(run, micro, replay)
                inputs = loss_inputs(run, micro, log_probs, entropy, num_updates)
                loss, micro_stats = loss_and_stats(run, inputs)
                check_finite(loss, step=run.step, what="loss", name="the policy")
                run.optimizer.backward(loss)
                stats.append(micro_stats)
                if not has_updated:  # after an update the policy is no longer the one that sampled
                    before_update.append((token_stats(inputs), differences(log_probs, micro, allowed=allowed), replay))
                if run.is_between_steps and run.should_stop():
                    run.optimizer.zero_grad()
                    raise Interrupted(f"step {run.step + 1} abandoned before its update")
            lr = run.optimizer.lr
            grad_norms.append(run.optimizer.step())
            has_updated, run.is_between_steps = True, False
            run.optimizer.zero_grad()
    sampling_stats, found, replays = zip(*before_update)
    sampling = reduce_stats(sampling_stats, num_updates=1)
    warning = None if run.has_warned else describe_mismatch(
        found, batch, groups.completions, step=run.step + 1, run_dir=run.run_dir, allowed=allowed,
        largest=sampling["sampling/log_prob_diff/max"])
    if warning is not None:
        run.metrics.warn(warning)
        run.has_warned = True
    return {**reduce_stats(stats, num_updates=num_updates), **sampling,
            "grad_norm": max(grad_norms), "lr": lr, "update/tokens": num_packed, "update/trained_tokens": num_trained,
            "update/frac_tokens_shared": 1 - num_packed / num_whole, **routing_metrics(replays)}


def policy_log_probs(run: Run, micro: RolloutBatch, replay: RoutingReplay | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [T] of the sampled tokens and entropy [T] of the policy as it is now, in nats."""
    return run.policy.log_probs(micro.tokens, micro.cu_seqlens, mask=micro.host_mask, kept=micro.kept, prefixes=micro.prefixes,
                                record=replay, temperature=run.config.rollout.temperature)


def make_replay(micro: RolloutBatch) -> RoutingReplay | None:
    """A replay of the recorded choices of experts, for one forward and its backward; None if they are not recorded."""
    return None if micro.routing is None else RoutingReplay(micro.routing)


def routing_metrics(replays: Iterable[RoutingReplay | None]) -> dict[str, float]:
    """The share of the recorded choices of an expert that the trainer's router would not have made; {} without a record."""
    counts = [(int(replay.num_flips), int(replay.num_choices)) for replay in replays if replay is not None]
    return {"routing/flips": sum(flips for flips, _ in counts) / sum(choices for _, choices in counts)} if counts else {}


def loss_inputs(run: Run, micro: RolloutBatch, log_probs: torch.Tensor, entropy: torch.Tensor, num_updates: int) -> LossInputs:
    """The inputs of the loss for a micro-batch. If the step makes one update, the policy is as the step began: its
    own log-probs are the old ones, and the ratio is exactly 1."""
    if run.config.optim.old_log_probs == OldLogProbs.sampler:
        old_log_probs = micro.sampler_log_probs
    else:
        old_log_probs = log_probs.detach() if num_updates == 1 else micro.old_log_probs
    return LossInputs.of(micro, log_probs, entropy, old_log_probs=old_log_probs,
                         max_new_tokens=run.config.rollout.max_new_tokens)


def loss_and_stats(run: Run, inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy loss of one micro-batch, plus the KL penalty if it is on, and the statistics."""
    loss, stats = checked_loss(run.loss_fn(inputs), run.config.loss["_target_"])
    if inputs.ref_log_probs is not None:
        kl = run.config.kl
        penalty, kl_stats = kl_penalty(inputs, coefficient=kl.coefficient, estimator=kl.estimator)
        loss, stats = loss + penalty, stats | kl_stats
    return loss, stats | {"loss": loss.detach(), "num_tokens": inputs.loss_mask.sum()}


@torch.no_grad()
def score_batch(run: Run, batch: RolloutBatch, *, replays_routing: bool) -> torch.Tensor:
    """Log-probs [T] of a packed batch under the policy as it is now."""
    optim, log_probs = run.config.optim, torch.zeros_like(batch.sampler_log_probs)
    for micro in micro_batches(batch, optim.max_tokens, share_prompts=optim.share_prompts):
        log_probs[micro.token_index] = policy_log_probs(run, micro, make_replay(micro) if replays_routing else None)[0]
    return log_probs
