"""The update of a step: a batch of scored completions to losses, gradients and optimizer steps, with their metrics."""
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from grpo.advantages import whitened
from grpo.batch import RolloutBatch, even_rows_of_micro_batches, halves, minibatches, pack, rows_of_micro_batches
from grpo.channels import channel_metrics, channel_stats, channels_of
from grpo.config import OldLogProbs
from grpo.configuration.algorithm import KlPlace, Whiten
from grpo.corrections import correct
from grpo.distributed.gradients import train_together
from grpo.distributed.settings import Reduction
from grpo.distributed.shards import train_sharded
from grpo.entropy import entropy_loss
from grpo.exactness import allowed_difference, describe_mismatch, differences
from grpo.groups import Groups, advantages_of
from grpo.kl import k1_to_go, kl_penalty
from grpo.loss_contract import call_loss, checked_loss, takes_step
from grpo.losses import LossInputs, StepTokens, reduce_stats, token_stats, top_entropy
from grpo.optim import check_finite
from grpo.out_of_memory import StillOutOfMemory, attempt, attempt_twice
from grpo.recorded import held_out, held_out_metrics, pack_recorded, sums_of
from grpo.rollout.session import Interrupted
from grpo.run.start import Run, divides_weights
from models.decoder import CAPTURES
from models.gpt_oss import HeadStates, Scores
from models.routing_record import RoutingRecord, RoutingReplay, zero_routing

T = TypeVar("T")
PATIENCE = 5  # a warning comes after this many steps in a row without an update


def update(run: Run, groups: Groups, *, staleness: int = 0) -> dict[str, float]:
    """Packs the live groups and makes the step's updates. Returns the metrics of the update. staleness: how many steps older than
    the policy is the one that sampled."""
    optim = run.config.optim
    # the learning rate follows the step number, even if earlier steps made no update
    run.optimizer.position = run.step * optim.minibatches * optim.epochs
    run.steps_without_update = 0 if groups.completions else run.steps_without_update + 1
    if not groups.completions:
        if run.steps_without_update == PATIENCE:
            run.metrics.warn(f"nothing was learnt in the last {PATIENCE} steps: the rewards of each group were equal or missing "
                             "(or its completions cut off, with optim.mask_truncated); look at completions.jsonl")
        return {"loss": math.nan, "grad_norm": math.nan, "lr": run.optimizer.lr, "update/tokens": 0, "update/trained_tokens": 0}
    batch = attempt_twice(lambda: packed(run, groups))
    num_updates = min(optim.minibatches, batch.num_prompts if optim.whole_prompts else batch.num_sequences) * optim.epochs
    if num_updates > 1 and (optim.old_log_probs == OldLogProbs.trainer or optim.replay_routing):
        routing = zero_routing(len(batch.tokens), run.policy.config, run.policy.device) if optim.replay_routing else None
        batch.old_log_probs = score_batch(run, batch, replays_routing=True, routing=routing).log_probs
        batch.routing = batch.routing if routing is None else routing
    if run.reference is not None:
        attempt_twice(lambda: score_by_reference(run, batch))
        if run.config.kl.is_in_reward:
            batch.advantages = advantages_with_kl(run, batch, groups)
    if run.config.advantage.whiten == Whiten.tokens:
        batch.advantages = whitened(batch.advantages, batch.loss_mask)
    if optim.sums_log_probs:
        old_log_probs = score_batch(run, batch, replays_routing=True).log_probs
        batch.old_sums, batch.ref_sums = (sums_of(batch, log_probs).to(run.policy.device)
                                          for log_probs in (old_log_probs, batch.ref_log_probs))
    allowed = allowed_difference(run.policy) if staleness == 0 else math.inf
    trained, grad_norms, num_whole, num_trained = [], [], 0, 0
    for epoch in range(optim.epochs):
        seed = hash((run.config.seed, run.step, epoch))  # of integers: the same in every process
        for part in minibatches(batch, optim.minibatches, seed=seed, whole_prompts=optim.whole_prompts):
            num_whole, num_trained = num_whole + len(part.tokens), num_trained + part.num_policy_tokens
            chosen = step_tokens(run, part, batch, num_updates=num_updates, seed=hash((seed, len(trained))))
            trained.append(train_minibatch(run, part, num_updates=num_updates, allowed=allowed, step=chosen))
            lr = run.optimizer.lr
            grad_norms.append(make_update(run))
    # after an update the policy is no longer the one that sampled
    sampling = reduce_stats([micro.sampling_stats for micro in trained[0]], num_updates=1)
    warning = None if run.has_warned else describe_mismatch(
        [micro.differences for micro in trained[0]], batch, groups.completions, step=run.step + 1, run_dir=run.run_dir,
        allowed=allowed, largest=sampling["sampling/log_prob_diff/max"])
    if warning is not None:
        run.metrics.warn(warning)
        run.has_warned = True
    if batch.channels is not None:
        means = {name: sampling.pop(name) for name in list(sampling) if name.startswith("channels/")}
        sampling |= channel_metrics(means, num_tokens=batch.num_policy_tokens, num_completions=batch.num_sequences)
    if groups.is_recorded:
        sampling = {name: value for name, value in sampling.items() if not name.startswith("sampling/")}
    of_updates = {} if num_updates == 1 else {
        f"update_{number}/{name}": value for number, (part, grad_norm) in enumerate(zip(trained, grad_norms), start=1)
        for name, value in {**reduce_stats([micro.stats for micro in part], num_updates=1), "grad_norm": grad_norm}.items()}
    stats, num_packed = zip(*((micro.stats, micro.num_tokens) for part in trained for micro in part))
    if run.entropy is not None:
        run.entropy.observe(sampling["entropy"])
    of_loss = reduce_stats(stats, num_updates=num_updates)
    if of_loss.get("corrections/masked_tokens") == 1 and not run.has_warned_of_weights:
        run.metrics.warn(f"step {run.step + 1}: corrections give every token the weight 0, so nothing was learnt; look at "
                         "corrections/ratio/max and inverse_ratio/max, and widen the bounds (low, high, geometric, max_k3)")
        run.has_warned_of_weights = True
    elif max(grad_norms) == 0 and not run.has_warned_of_weights:
        run.metrics.warn(f"step {run.step + 1}: the gradient is 0, so nothing was learnt: the advantage of every trained "
                         "completion is 0 (with advantage.baseline=best_of_others only the best one has any, and "
                         "optim.mask_truncated leaves it out if it was cut off), or the loss leaves out every token")
        run.has_warned_of_weights = True
    return {**of_updates, **of_loss, **sampling,
            "grad_norm": max(grad_norms), "lr": lr, "update/tokens": sum(num_packed), "update/trained_tokens": num_trained,
            "update/frac_tokens_shared": 1 - sum(num_packed) / num_whole, **routing_metrics(micro.replay for micro in trained[0])}


def make_update(run: Run) -> float:
    """Updates the weights by the gradients in the optimizer, which it drops. Returns the gradient's norm before clipping."""
    def step() -> float:
        with CAPTURES.computing():
            return run.optimizer.step() if run.shards is None else run.shards.step()

    grad_norm = attempt_twice(step) if run.shards is None else step()
    run.is_between_steps = False
    run.optimizer.zero_grad()
    if run.shards is not None:
        run.shards.gather()
    return grad_norm


def packed(run: Run, groups: Groups) -> RolloutBatch:
    """What a step trains on, on the policy's device."""
    batch = pack(groups.completions, groups.advantages)
    channels = None if run.tokenizer is None else channels_of(batch.tokens, batch.cu_seqlens, run.tokenizer)
    return replace(batch, channels=channels, is_recorded=groups.is_recorded).to(run.policy.device)


class FlipCounts(NamedTuple):
    """What another rank learns of a replay."""

    num_flips: int
    num_choices: int


@dataclass
class TrainedMicroBatch:
    """What is left of a micro-batch after its backward."""

    num_tokens: int
    stats: dict[str, torch.Tensor]  # of the loss
    sampling_stats: dict[str, torch.Tensor]  # of sampler and trainer
    differences: torch.Tensor
    replay: RoutingReplay | FlipCounts | None

    def on_host(self) -> "TrainedMicroBatch":
        """The same, as another rank can read it."""
        host = [{name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in stats.items()}
                for stats in (self.stats, self.sampling_stats)]
        flips = None if self.replay is None else FlipCounts(int(self.replay.num_flips), int(self.replay.num_choices))
        return TrainedMicroBatch(self.num_tokens, *host, self.differences.cpu(), flips)


def advantages_with_kl(run: Run, batch: RolloutBatch, groups: Groups) -> torch.Tensor:
    """Advantages [T] of rewards that k1 to the reference has lowered. The KL of a completion is the sum over its tokens."""
    coefficient, place = run.config.kl.coefficient, run.config.kl.place
    to_go, totals = k1_to_go(batch)
    rewards = [completion.reward - coefficient * total for completion, total in zip(groups.completions, totals.tolist())]
    advantages = advantages_of(groups.completions, rewards, run.config.advantage, groups.greedy_rewards)
    owners = batch.sequence_ids.cpu()
    result = torch.tensor(advantages, dtype=torch.float64)[owners]
    if place == KlPlace.reward_to_go:
        result += coefficient * (totals[owners] - to_go)  # what came before a token is not its doing
    return result.float().to(batch.advantages.device)


def step_tokens(run: Run, part: RolloutBatch, batch: RolloutBatch, *, num_updates: int, seed: int) -> StepTokens | None:
    """The tokens of the optimizer step `part` of a GRPO step's batch; None if nothing needs them."""
    if not takes_step(run.loss_fn) and run.config.entropy.top_fraction == 1:
        return None
    scores = score_batch(run, part, replays_routing=True, num_tokens=len(batch.tokens))
    old_log_probs = batch.sampler_log_probs
    if run.config.optim.old_log_probs != OldLogProbs.sampler:
        old_log_probs = scores.log_probs if num_updates == 1 else batch.old_log_probs
    loss_mask = torch.zeros_like(batch.loss_mask).index_copy(0, part.token_index, part.loss_mask)
    return StepTokens(scores.log_probs, scores.entropy, old_log_probs, batch.advantages, loss_mask, part.num_policy_tokens, seed)


def train_minibatch(run: Run, part: RolloutBatch, *, num_updates: int, allowed: float,
                    step: StepTokens | None = None) -> list[TrainedMicroBatch]:
    """Leaves the gradient of a minibatch's loss in the optimizer.

    A micro-batch that does not fit into memory may have added the gradients of some layers. So the minibatch begins again with
    its first micro-batch: no gradient counts twice, and none needs a second buffer. First the memory plan becomes tighter, which
    changes no bit. Where the tightest does not fit, the micro-batch is split by sequences: log-probs and each token's loss keep
    their bits, since losses divide by the minibatch's counts, and the gradient is the same sum in fp32 in another order (it
    differs by a few 1e-7 of its norm). Later steps keep tighter plans and smaller micro-batches; a resumed run finds them
    again.

    With optim.in_backward, the backward of a minibatch's only micro-batch also makes the update."""
    work, changes, is_between_steps = divide(run, part), [], run.is_between_steps
    if divides_weights(run):
        run.shards.release()
        run.sampler.forget()  # its graphs have addresses of weights; now the weights' memory is back with the GPU
    while True:
        updates = run.config.optim.in_backward and len(work) == 1
        run.is_between_steps = is_between_steps and not updates
        train = partial(train_micro_batch, run, part, step=step, num_updates=num_updates, allowed=allowed, updates=updates)
        trained, refusal, is_stopped = train_all(run, work, train)
        if is_stopped:
            run.optimizer.zero_grad()
            raise Interrupted(f"step {run.step + 1} abandoned before its update")
        if refusal is None:
            for text in (*changes[-1:], *run.policy.memory.take_notes()):
                run.metrics.warn(text)
            return trained
        if run.optimizer.is_updating:
            raise StillOutOfMemory(f"{refusal}, within an update in the backward, which cannot be done again; lower "
                                   "optim.max_tokens, or set optim.in_backward=false")
        run.optimizer.zero_grad()
        run.sampler.forget()  # memory of graphs
        change = retreat(run)
        if change is None:
            work[len(trained):len(trained) + 1] = split(run, part, work[len(trained)], refusal)
            change = f"a micro-batch has at most {run.most_tokens:,} tokens"
        changes.append(f"out of memory in the update of step {run.step + 1} ({refusal}): it was done again; from now on {change}")


def train_all(run: Run, work: list[list[int]],
              train: Callable[[list[int]], TrainedMicroBatch]) -> tuple[list[TrainedMicroBatch], str | None, bool]:
    """Trains on the micro-batches, with those of other ranks. Returns what is left of those before the first that memory was
    refused to; that refusal, or None; and whether the run is to stop before the update."""
    def should_stop() -> bool:
        return run.is_between_steps and run.should_stop()

    if divides_weights(run):
        # no second attempt where memory was refused: the others wait for this rank in the middle of the same pass
        trained, is_stopped = train_sharded(run.shards, work, lambda rows: train(rows).on_host(), should_stop=should_stop)
        return trained, None, is_stopped
    if run.ranks is not None and run.ranks.num_parts > 1:
        def train_own(rows: list[int]) -> tuple[TrainedMicroBatch | None, str | None]:
            micro, refusal = attempt_here(run, partial(train, rows))
            return micro and micro.on_host(), refusal
        return train_together(run.ranks, run.optimizer, work, train_own, reduction=run.config.distributed.reduction,
                              should_stop=should_stop)
    trained = []
    for rows in work:
        micro, refusal = attempt_here(run, partial(train, rows))
        if refusal is not None:
            return trained, refusal, False
        trained.append(micro)
        if should_stop():
            return trained, None, True
    return trained, None, False


def attempt_here(run: Run, function: Callable[[], T]) -> tuple[T | None, str | None]:
    """attempt(), but where ranks share experts a refusal ends the run: the others are in the middle of the same pass."""
    result, refusal = attempt(function)
    if refusal is not None and run.policy.share is not None:
        raise StillOutOfMemory(f"{refusal}. Ranks that share experts (distributed.expert_parallel) do not try again with less "
                               "memory: lower optim.max_tokens")
    return result, refusal


def retreat(run: Run) -> str | None:
    """Makes the memory plan tighter, on all ranks. Returns what changed, None if one of them has the tightest already."""
    with CAPTURES.computing():
        change = run.policy.retreat()
    changes = [change] if run.ranks is None else run.ranks.exchange("a tighter memory plan", change)
    return None if None in changes else change


def divide(run: Run, batch: RolloutBatch) -> list[list[int]]:
    """The rows of each micro-batch, as large as optim.max_tokens and what did not fit so far allow."""
    optim, distributed = run.config.optim, run.config.distributed
    most_tokens, multiple = min(optim.max_tokens, run.most_tokens), distributed.micro_batches
    if run.ranks is not None and distributed.reduction == Reduction.fast:
        multiple = multiple or run.ranks.num_parts
    if multiple:
        return even_rows_of_micro_batches(batch, most_tokens, share_prompts=optim.share_prompts, multiple=multiple)
    return rows_of_micro_batches(batch, most_tokens, share_prompts=optim.share_prompts)


def split(run: Run, batch: RolloutBatch, rows: list[int], refusal: str) -> list[list[int]]:
    """A micro-batch that does not fit, in two; later ones are as small. Raises StillOutOfMemory for a single sequence."""
    if len(rows) == 1:
        raise StillOutOfMemory(f"{refusal}. The least that was tried is a micro-batch of one sequence of "
                               f"{batch.lengths[rows[0]]:,} tokens whose layers are computed again")
    parts = halves(batch, rows)
    run.most_tokens = max(batch.num_tokens_of(half, share_prompts=run.config.optim.share_prompts) for half in parts)
    return parts


def train_micro_batch(run: Run, part: RolloutBatch, rows: list[int], *, step: StepTokens | None, num_updates: int,
                      allowed: float, updates: bool) -> TrainedMicroBatch:
    """Adds the gradient of some sequences of a minibatch to the optimizer's, or updates by it."""
    with CAPTURES.computing():
        return train_now(run, part.select(rows, share_prompts=run.config.optim.share_prompts), step, num_updates=num_updates,
                         allowed=allowed, updates=updates)


def train_now(run: Run, micro: RolloutBatch, step: StepTokens | None, *, num_updates: int, allowed: float,
              updates: bool) -> TrainedMicroBatch:
    run.policy.memory.keeps_gradients = not (updates or divides_weights(run))  # else a layer's at a time, and parts of the others
    if not updates:
        run.optimizer.allocate_gradients()  # first, so that the forward's memory plan sees them
    replay = make_replay(micro)
    scores = policy_scores(run, micro, replay if run.observer is None else run.observer.watch_routing(micro, replay),
                           has_entropy_loss=run.entropy is not None and run.entropy.coefficient > 0)
    if micro.is_recorded:
        micro.sampler_log_probs = scores.log_probs.detach()  # as if the policy had sampled them
    inputs = loss_inputs(run, micro, scores, num_updates)
    if run.observer is not None:
        run.observer.watch_loss(micro, inputs)
    loss, stats = loss_and_stats(run, inputs, step)
    check_finite(loss, step=run.step, what="loss", name="the policy")
    run.optimizer.backward(loss, updates=updates)
    found = differences(scores.log_probs, micro, allowed=allowed)
    sampling = token_stats(inputs)
    if micro.channels is not None:
        sampling |= channel_stats(inputs.entropy, inputs.loss_mask, micro.channels)
    return TrainedMicroBatch(len(micro.tokens), stats, sampling, found, replay)


def policy_scores(run: Run, micro: RolloutBatch, record: RoutingReplay | RoutingRecord | None, *,
                  keeps_hidden: bool = False, has_entropy_loss: bool = False) -> Scores:
    """Log-probs [T] of the sampled tokens, entropy [T] and, if the batch has the reference's states, KL [T] of the policy as
    it is now, in nats."""
    reference = None
    if micro.ref_hidden is not None:
        head = run.policy.lm_head.weight if micro.ref_head is None else micro.ref_head
        reference = HeadStates(micro.ref_hidden, head)
    return run.policy.scores(micro.tokens, micro.cu_seqlens, mask=micro.host_mask, kept=micro.kept, prefixes=micro.prefixes,
                             record=record, temperature=run.config.rollout.temperature, reference=reference,
                             keeps_hidden=keeps_hidden, has_entropy_loss=has_entropy_loss)


def make_replay(micro: RolloutBatch) -> RoutingReplay | None:
    """A replay of the recorded choices of experts, for one forward and its backward; None if they are not recorded."""
    return None if micro.routing is None else RoutingReplay(micro.routing)


def routing_metrics(replays: Iterable[RoutingReplay | FlipCounts | None]) -> dict[str, float]:
    """The share of the recorded choices of an expert that the trainer's router would not have made; {} without a record."""
    counts = [(int(replay.num_flips), int(replay.num_choices)) for replay in replays if replay is not None]
    return {"routing/flips": sum(flips for flips, _ in counts) / sum(choices for _, choices in counts)} if counts else {}


def loss_inputs(run: Run, micro: RolloutBatch, scores: Scores, num_updates: int) -> LossInputs:
    """The inputs of the loss for a micro-batch. If the step makes one update, the policy is as the step began: its
    own log-probs are the old ones, and the ratio is exactly 1."""
    if run.config.optim.old_log_probs == OldLogProbs.sampler:
        old_log_probs = micro.sampler_log_probs
    else:
        old_log_probs = scores.log_probs.detach() if num_updates == 1 else micro.old_log_probs
    return LossInputs.of(micro, scores.log_probs, scores.entropy, full_kl=scores.kl, old_log_probs=old_log_probs,
                         max_new_tokens=run.config.rollout.max_new_tokens)


def loss_and_stats(run: Run, inputs: LossInputs, step: StepTokens | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy loss of one micro-batch, plus the KL penalty and minus the entropy bonus if they are on, and the statistics."""
    kl, share = run.config.kl, run.config.entropy.top_fraction
    inputs, corrections = correct(inputs, run.config.corrections)
    if share < 1:
        inputs.advantages = inputs.advantages * top_entropy(step, share)[inputs.token_index]
    path = run.config.loss["_target_"]
    try:
        returned = call_loss(run.loss_fn, inputs, step)
    except Exception as error:
        error.add_note(f"raised in loss._target_ = {path}")
        raise
    loss, stats = checked_loss(returned, path)
    stats = stats | corrections
    if kl.is_in_loss:
        penalty, kl_stats = kl_penalty(inputs, coefficient=kl.coefficient, estimator=kl.estimator)
        loss, stats = loss + penalty, stats | kl_stats
    elif kl.is_in_reward:
        stats["kl"] = torch.where(inputs.loss_mask, inputs.sampler_log_probs - inputs.ref_log_probs, 0.0).sum()
    if run.entropy is not None and run.entropy.coefficient > 0:
        loss = loss + entropy_loss(inputs, run.entropy.coefficient)
        stats["entropy/coefficient"] = run.entropy.coefficient * inputs.loss_mask.sum()
    return loss, stats | {"loss": loss.detach(), "num_tokens": inputs.loss_mask.sum()}


@dataclass
class BatchScores:
    """Of a packed batch under the policy as it is, without gradients."""

    log_probs: torch.Tensor  # [T] nats
    entropy: torch.Tensor  # [T] nats
    states: torch.Tensor | None  # [n, D] hidden states of the n trained tokens, on the host


@torch.no_grad()
def score_batch(run: Run, batch: RolloutBatch, *, replays_routing: bool, keeps_states: bool = False,
                num_tokens: int | None = None, routing: torch.Tensor | None = None) -> BatchScores:
    """The scores of a batch, with `states` if keeps_states. Micro-batches that do not fit into memory are split. num_tokens: T
    where `batch` is a part of a larger one, in which its tokens have their places. routing: of zeros, gets the experts of all
    tokens."""
    work, states = divide(run, batch), None
    log_probs, entropy = (batch.sampler_log_probs.new_zeros(num_tokens or len(batch.tokens)) for _ in range(2))
    if keeps_states:
        states = torch.zeros(int(batch.host_mask.sum()), run.policy.config.hidden_size, dtype=run.policy.dtype)
        rank = batch.host_mask.cumsum(0) - 1  # of a trained token among them
    if run.ranks is not None:
        work = work[run.ranks.part::run.ranks.num_parts]

    def score(rows: list[int]) -> None:
        micro = batch.select(rows, share_prompts=run.config.optim.share_prompts)
        record = make_replay(micro) if replays_routing else None
        if routing is not None:
            record = RoutingRecord(len(micro.tokens), run.policy.config, run.policy.device)
        with CAPTURES.computing():
            scores = policy_scores(run, micro, record, keeps_hidden=keeps_states)
        log_probs[micro.token_index], entropy[micro.token_index] = scores.log_probs, scores.entropy
        if routing is not None:
            routing[micro.token_index] = record.indices
        if keeps_states:
            states[rank[micro.token_index.cpu()[micro.host_mask]]] = scores.hidden.cpu()

    while work:
        _, refusal = attempt_here(run, partial(score, work[0]))
        if refusal is not None:
            run.sampler.forget()  # memory of graphs
            _, refusal = attempt_here(run, partial(score, work[0]))
        if refusal is None:
            work.pop(0)
        else:
            work[:1] = split(run, batch, work[0], refusal)
            run.metrics.warn(f"out of memory while step {run.step + 1} computed log-probs ({refusal}): from now on a micro-batch "
                             f"has at most {run.most_tokens:,} tokens")
    if run.ranks is not None:
        run.most_tokens = min(run.ranks.exchange("the log-probs", run.most_tokens))
        for tensor in (log_probs, entropy, states, routing):
            if tensor is not None:
                run.ranks.fill_in(tensor)
    if routing is not None:
        copy_to_equal_prompts(routing, batch)
    return BatchScores(log_probs, entropy, states)


def copy_to_equal_prompts(values: torch.Tensor, batch: RolloutBatch) -> None:
    """Gives every sequence the values [T, ...] of the first one with its prompt, at the prompt's tokens: where micro-batches
    share prompts, others have none."""
    first: dict[tuple[int, int], int] = {}
    for prompt, start in zip(batch.prompts, batch.cu_seqlens.tolist()):
        source = first.setdefault(prompt, start)
        values[start:start + prompt[1]] = values[source:source + prompt[1]]


def score_by_reference(run: Run, batch: RolloutBatch) -> None:
    """Gives a packed batch what the KL penalty needs of its reference: log-probs, and for the full KL hidden states."""
    is_full = run.config.kl.is_full
    with run.reference.in_place_of(run.policy):  # another policy: it uses its own routing
        scores = score_batch(run, batch, replays_routing=False, keeps_states=is_full)
    batch.ref_log_probs, batch.ref_hidden = scores.log_probs, scores.states
    batch.ref_head = run.reference.head(run.policy) if is_full else None


def evaluate_recorded(run: Run) -> dict[str, float]:
    """How likely the policy finds the rows that its environment holds out; {} if there are none."""
    completions = held_out(run.env, most=run.config.eval.max_prompts)
    if not completions:
        return {}
    run.memory.for_update(run.policy, run.sampler)
    batch = attempt_twice(lambda: pack_recorded(completions).to(run.policy.device))
    log_probs = score_batch(run, batch, replays_routing=False).log_probs
    if run.reference is not None:
        score_by_reference(run, batch)
    metrics = held_out_metrics(batch, log_probs, batch.ref_log_probs)
    run.memory.for_sampling(run.policy)
    return metrics
