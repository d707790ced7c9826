"""Losses on completions of data (grpo/envs/conversations.py): supervised fine-tuning, and preferences.

    sft   -1/N sum_t log pi                                            over the N trained tokens of the optimizer step
    dpo   -1/P sum_pairs log sigmoid(beta (gain(chosen) - gain(rejected))),   gain(y) = log pi(y) - log pi_ref(y)
          (Rafailov et al., arXiv 2305.18290, eq. 7; label_smoothing e: (1 - e) and e weigh the term and the one of the swapped
          pair, arXiv 2305.18290's conservative form)

Shapes as in grpo/losses.py.
"""
import torch
import torch.nn.functional as F

from grpo.config import ConfigError
from grpo.losses import LossInputs


def sft(inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean of -log pi over the trained tokens of the step, in nats."""
    return -torch.where(inputs.loss_mask, inputs.log_probs, 0.0).sum() / inputs.num_policy_tokens, {}


def dpo(inputs: LossInputs, *, beta: float, label_smoothing: float = 0.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """DPO over groups of two, of which one has the reward 1.

    The loss of a pair is a function of one number, its margin, which is a sum over the tokens of both completions. A pass before
    the update gives the margins of all pairs (optim.sums_log_probs); so each token knows its share of the gradient, and it does
    not matter which micro-batch has which completion.

    Returns the scalar loss and, as means over the trained tokens, `preference/accuracy` (margin > 0) and `preference/margin` (in
    units of beta nats)."""
    if not beta > 0 or not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"loss.beta = {beta}, loss.label_smoothing = {label_smoothing}: beta must be > 0 (0.1 is usual), and "
                          "label_smoothing in [0, 0.5)")
    if inputs.old_sums is None or inputs.ref_sums is None:
        raise ConfigError("loss: dpo needs the log-probs of whole completions, and of the reference: set "
                          "optim.sums_log_probs=true")
    sign = torch.where(inputs.rewards > 0.5, 1.0, -1.0)  # [N]
    _, pair = inputs.group_ids.unique(return_inverse=True)  # [N]
    gains = beta * sign * (inputs.old_sums - inputs.ref_sums).to(sign)  # [N]
    margin = torch.zeros_like(gains).index_add(0, pair, gains)[pair]  # [N], equal within a pair
    slope = label_smoothing * margin.sigmoid() - (1 - label_smoothing) * (-margin).sigmoid()  # [N] of the loss of a pair
    value = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)  # [N]
    num_pairs = inputs.num_sequences / 2
    mask, owner = inputs.loss_mask, inputs.sequence_ids
    linear = torch.where(mask, (slope * beta * sign)[owner] * inputs.log_probs, 0.0).sum() / num_pairs
    here = owner[mask].unique()  # the completions of this micro-batch: each stands for half a pair
    loss = linear - linear.detach() + value[here].sum() / (2 * num_pairs)
    stats = {"preference/accuracy": torch.where(mask, (margin > 0).to(sign)[owner], 0.0).sum(),
             "preference/margin": torch.where(mask, margin[owner], 0.0).sum()}
    return loss, stats
