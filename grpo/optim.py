"""AdamW with fp32 masters, learning-rate schedule, global clipping and a guard against non-finite numbers.

AdamW is Loshchilov and Hutter's (arXiv 1711.05101) with the operations in the order of torch.optim.AdamW, so that fp32
parameters agree with it bit for bit. A parameter that is not fp32 gets an fp32 master copy that the update acts on (at
lr 1e-6 a bf16 weight of 0.02 would lose the whole step to rounding) and fp32 accumulation of its gradient over
micro-batches; it is rounded from the master after each update.

Activation gradients of a float16 model are float16, whose smallest number is 6e-8: at a loss of 1 / tokens they would underflow.
The loss therefore carries a constant power of two, the loss scale, through the backward, and `gradients()` takes it off again,
exactly, from gradients that are fp32 by then (mixed precision training, arXiv 1710.03740, section 3.2, with a constant scale).

Departures: weight decay applies to every trained parameter, as torch.optim.AdamW has it by default.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

# at 1e4 tokens an update, a token's gradient of 1e-4 becomes 100 at its logits: 600 times below float16's largest number, a
# million times above the smallest that has all its digits
FLOAT16_LOSS_SCALE = 2.0**20


def loss_scale_for(dtype: torch.dtype, configured: float | None) -> float:
    """The loss scale of a model of this dtype, unless one is configured."""
    if configured is not None:
        return configured
    return FLOAT16_LOSS_SCALE if dtype == torch.float16 else 1.0


class NonFiniteError(RuntimeError):
    """A NaN or infinity; raised before any weight moves."""

    def __init__(self, step: int, what: str, name: str, detail: str) -> None:
        super().__init__(f"{what} of {name} is not finite at update {step} ({detail}); no weight was changed. Lower "
                         "optim.lr or optim.max_grad_norm, or look at this step's rewards and completions")
        self.step, self.what, self.name = step, what, name


def check_finite(value: torch.Tensor, *, step: int, what: str, name: str) -> None:
    """Raises NonFiniteError if `value` (a loss, log-probs, any shape) holds a NaN or an infinity."""
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(step, what, name, _describe(value))


def _describe(value: torch.Tensor) -> str:
    num_nan, num_inf = int(value.isnan().sum()), int(value.isinf().sum())
    if num_nan + num_inf == 0:
        return "its squares overflow fp32"
    return f"{num_nan} NaN and {num_inf} infinite of {value.numel()} values"


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of each update of a run, numbered from 0.

    It rises linearly, lr/warmup_steps to lr, over the first `warmup_steps` updates. "constant" stays there; "linear" and "cosine"
    fall over the last `decay_steps` updates (None, or more than there are: all after the warm-up) so that the last of
    `total_steps` updates has lr * final_lr_ratio; updates beyond keep that."""

    lr: float
    warmup_steps: int
    schedule: str
    decay_steps: int | None
    final_lr_ratio: float
    total_steps: int

    def at(self, update: int) -> float:
        if update < self.warmup_steps:
            return self.lr * (update + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        num_after_warmup = self.total_steps - self.warmup_steps
        num_decay = num_after_warmup if self.decay_steps is None else min(self.decay_steps, num_after_warmup)
        num_decayed = update + 1 - (self.total_steps - num_decay)
        progress = min(max(num_decayed / num_decay, 0.0), 1.0) if num_decay > 0 else float(num_decayed >= 0)
        remaining = 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.lr * (self.final_lr_ratio + (1 - self.final_lr_ratio) * remaining)


class Optimizer:
    """AdamW over named parameters.

    `step()` makes one update from the gradients accumulated since `zero_grad()`. `num_updates` counts the updates; `position` is
    the place of the next one in the learning-rate schedule, and may be set further on where updates were left out. Gradients of
    parameters that are not fp32 move from `.grad` into fp32 buffers as soon as backward has made them: `gradients()` has all."""

    def __init__(self, params: dict[str, torch.nn.Parameter], learning_rate: LearningRate, *, betas: tuple[float, float],
                 eps: float, weight_decay: float, max_grad_norm: float, loss_scale: float = 1.0) -> None:
        """loss_scale: the power of two that `backward` multiplies losses by; gradients() are free of it.
        max_grad_norm: the global L2 norm that gradients are scaled down to; math.inf turns clipping off.
        The rest as in torch.optim.AdamW."""
        if not params:
            raise ValueError("no trainable parameters: nothing to optimize; check model.train and model.lora.targets")
        frozen = [name for name, param in params.items() if not param.requires_grad]
        if frozen:
            raise ValueError(f"parameters without requires_grad given to the optimizer: {', '.join(frozen[:5])}")
        self.params, self.learning_rate = dict(params), learning_rate
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.max_grad_norm, self.loss_scale = max_grad_norm, loss_scale
        self.num_updates = self.position = 0
        # What an update acts on and where an fp32 gradient accumulates: the parameter, or the master of one that is not fp32.
        self._targets = {name: param if param.dtype == torch.float32 else param.detach().float()
                         for name, param in self.params.items()}
        masters = {name: target for name, target in self._targets.items() if target is not self.params[name]}
        self._state = {f"{moment}.{name}": torch.zeros_like(target)
                       for moment in ("exp_avg", "exp_avg_sq") for name, target in self._targets.items()}
        self._state |= {f"master.{name}": master for name, master in masters.items()}
        self._hooks = [self.params[name].register_post_accumulate_grad_hook(_gradient_mover(master))
                       for name, master in masters.items()]

    def close(self) -> None:
        """Leaves the parameters to another optimizer: takes the hooks off them and drops the gradients."""
        for hook in self._hooks:
            hook.remove()
        self.zero_grad()

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self.learning_rate.at(self.position)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a loss to those accumulated since `zero_grad()`."""
        (loss if self.loss_scale == 1.0 else loss * self.loss_scale).backward()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Name -> fp32 gradient accumulated so far, without the loss scale; raises ValueError for a parameter that got none."""
        gradients = {name: target.grad for name, target in self._targets.items()}
        missing = [name for name, gradient in gradients.items() if gradient is None]
        if missing:
            raise ValueError(f"{len(missing)} trainable parameters got no gradient, so they cannot learn: "
                             f"{', '.join(missing[:5])}; run backward first, and train only what the loss depends on")
        if self.loss_scale != 1.0:
            return {name: gradient / self.loss_scale for name, gradient in gradients.items()}
        return gradients

    def zero_grad(self) -> None:
        """Drops the gradients."""
        for tensor in (*self.params.values(), *self._targets.values()):
            tensor.grad = None

    @torch.no_grad()
    def step(self) -> float:
        """Clips, updates every parameter, counts; returns the global gradient norm before clipping.

        Raises NonFiniteError, with the first parameter whose gradient is to blame, before anything changes."""
        gradients = self.gradients()
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients.values()])
        total_norm = torch.linalg.vector_norm(norms)
        grad_norm = float(total_norm)
        if not math.isfinite(grad_norm):
            hint = "" if self.loss_scale == 1.0 else (
                f"; the loss was scaled by {self.loss_scale:g}: if float16 gradients overflowed, lower optim.loss_scale")
            for (name, gradient), norm in zip(gradients.items(), norms.tolist()):
                if not math.isfinite(norm):
                    raise NonFiniteError(self.num_updates, "gradient", name, _describe(gradient) + hint)
            raise NonFiniteError(self.num_updates, "gradient norm", "all parameters together", _describe(norms) + hint)
        # the same operations as torch.nn.utils.clip_grad_norm_, so that clipping agrees with it bit for bit
        scale = torch.clamp(self.max_grad_norm / (total_norm + 1e-6), max=1.0)
        lr = self.lr
        self.num_updates += 1
        self.position += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1 ** self.num_updates, 1 - beta2 ** self.num_updates
        for name, param in self.params.items():
            target, gradient = self._targets[name], gradients[name].mul_(scale)
            exp_avg, exp_avg_sq = self._state[f"exp_avg.{name}"], self._state[f"exp_avg_sq.{name}"]
            target.mul_(1 - lr * self.weight_decay)
            exp_avg.lerp_(gradient, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            target.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / correction2 ** 0.5).add_(self.eps), value=-lr / correction1)
            if target is not param:
                param.copy_(target)
        return grad_norm

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Moments, masters and the update count: a flat dict of tensors (not copies), ready for safetensors.

        Parameters are not in it; gradients neither: save between `step()` and the next backward."""
        return {"num_updates": torch.tensor(self.num_updates, dtype=torch.int64), **self._state}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores what `state_dict` gave, exactly; parameters with a master are rounded from it, fp32 parameters are
        the caller's to restore. Raises ValueError naming what is missing, unexpected or misshapen, with nothing
        changed."""
        expected = self.state_dict()
        problems = [f"missing {name}" for name in expected if name not in state]
        problems += [f"unexpected {name}" for name in state if name not in expected]
        problems += [f"{name} is {state[name].dtype} {tuple(state[name].shape)}, expected {value.dtype} "
                     f"{tuple(value.shape)}" for name, value in expected.items() if name in state
                     and (state[name].shape != value.shape or state[name].dtype != value.dtype)]
        if problems:
            raise ValueError(f"optimizer state does not fit the trained parameters ({len(problems)} problems): "
                             + "; ".join(problems[:10]))
        self.num_updates = self.position = int(state["num_updates"])
        for name, tensor in self._state.items():
            tensor.copy_(state[name])
        for name, param in self.params.items():
            if self._targets[name] is not param:
                param.copy_(self._targets[name])


def _gradient_mover(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that adds a parameter's new gradient to its master's."""
    def move(param: torch.Tensor) -> None:
        if master.grad is None:
            master.grad = param.grad.float()
        else:
            master.grad += param.grad
        param.grad = None

    return move
