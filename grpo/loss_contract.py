"""What a loss must return, checked: for a loss of the user's own above all, before a run and at each call."""
import inspect
import numbers
from collections.abc import Callable

import torch

from grpo.batch import Completion, Prompt, Segment, pack
from grpo.config import ConfigError
from grpo.losses import LossInputs, StepTokens

CONTRACT = (
    "A loss is called as loss(inputs), a grpo.losses.LossInputs, with the other keys of its YAML as keywords, and with step=, a "
    "grpo.losses.StepTokens, if it has a parameter of that name. It returns (loss, stats): a scalar tensor that depends on "
    "inputs.log_probs, and a dict of scalars to log, each a sum over the micro-batch's trained tokens (a maximum where the name "
    "ends in /max), {} for none. It changes no tensor of inputs or step in place")
TAKEN = frozenset({"step", "loss", "num_tokens", "entropy", "kl", "reward", "grad_norm", "lr"})  # names that the run logs itself


def takes_step(loss_fn: Callable) -> bool:
    """Whether a loss has a parameter `step`, for a StepTokens."""
    return "step" in inspect.signature(loss_fn).parameters


def call_loss(loss_fn: Callable, inputs: LossInputs, step: StepTokens | None) -> object:
    return loss_fn(inputs, step=step) if takes_step(loss_fn) else loss_fn(inputs)


def try_loss(loss_fn: Callable, path: str, *, group_size: int, max_new_tokens: int, has_reference: bool,
             has_full_kl: bool = False, has_sums: bool = False) -> None:
    """Calls the loss that `path` names on two made-up groups. Raises ConfigError if it fails or breaks CONTRACT."""
    segments = [Segment([1, 2], "prompt"), Segment([3, 4], "policy", [-1.0, -2.0])]
    completions = [Completion(Prompt(group, [1, 2], {}), sample, segments, "stop", reward=float(sample))
                   for group in range(2) for sample in range(group_size)]
    batch = pack(completions, [sample - (group_size - 1) / 2 for _ in range(2) for sample in range(group_size)])
    batch.ref_log_probs = 1.2 * batch.sampler_log_probs if has_reference else None
    if has_sums:
        batch.old_sums = torch.full((2 * group_size,), -3.0, dtype=torch.float64)
        batch.ref_sums = 1.2 * batch.old_sums
    log_probs = (1.1 * batch.sampler_log_probs).requires_grad_()
    try:
        inputs = LossInputs.of(batch, log_probs, torch.ones_like(log_probs), old_log_probs=batch.sampler_log_probs,
                               full_kl=torch.ones_like(log_probs) if has_full_kl else None, max_new_tokens=max_new_tokens)
        step = StepTokens(log_probs.detach(), torch.ones_like(log_probs), batch.sampler_log_probs, batch.advantages,
                          batch.loss_mask, batch.num_policy_tokens, seed=0)
        tensors = {f"{kind}.{name}": (value, value._version) for kind, record in (("inputs", inputs), ("step", step))
                   for name, value in vars(record).items() if isinstance(value, torch.Tensor)}
        checked_loss(call_loss(loss_fn, inputs, step), path)
        changed = [name for name, (value, version) in tensors.items() if value._version != version]
        if changed:  # micro-batches and epochs share them
            raise ConfigError(f"loss._target_ = {path!r}: it changed {', '.join(changed)} in place. {CONTRACT}")
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"loss._target_ = {path!r}: raised {type(error).__name__}: {error}. {CONTRACT}") from error


def checked_loss(returned: object, path: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns what a loss returned, unchanged. Raises ConfigError if it breaks CONTRACT."""
    is_pair = isinstance(returned, tuple) and len(returned) == 2
    loss, stats = returned if is_pair else (None, None)
    wrong = "" if is_pair else f"what it returned is {_kind(returned)}, no pair"
    is_scalar = isinstance(loss, torch.Tensor) and loss.ndim == 0
    if is_pair and not (is_scalar and loss.requires_grad):
        wrong = f"its loss is {'a scalar that does not depend on inputs.log_probs' if is_scalar else _kind(loss)}"
    elif is_pair and not isinstance(stats, dict):
        wrong = f"its stats are {_kind(stats)}"
    elif is_pair:
        bad = [(name, value) for name, value in stats.items() if not isinstance(name, str) or not (
            isinstance(value, numbers.Real) or isinstance(value, torch.Tensor) and value.ndim == 0)]
        taken = sorted(TAKEN & stats.keys())
        wrong = (f"stats[{bad[0][0]!r}] is {_kind(bad[0][1])}" if bad else
                 f"stats[{taken[0]!r}] has a name that the run logs itself; choose another" if taken else "")
    if wrong:
        raise ConfigError(f"loss._target_ = {path!r}: {wrong}. {CONTRACT}")
    return loss, stats


def _kind(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"of type {type(value).__name__}"
