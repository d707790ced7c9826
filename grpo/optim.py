"""AdamW, learning-rate schedule, global clipping, gradient buffers and a guard against non-finite numbers.

The update of a parameter is that of kernels/adamw.py, its state that of models/adam_state.py: with fp32 moments, fp32 parameters
agree with torch.optim.AdamW bit for bit. A parameter that is not fp32 gets an fp32 master copy that the update acts on and fp32
accumulation of its gradient over micro-batches; it is rounded from the master after each update. Without master (stochastic or
compensated weights) its gradients add up in its own dtype, rounded after each micro-batch: the error is below 2^-9 of the sum for
each micro-batch, as large as that of the bf16 gradients themselves.

Gradients lie in one flat buffer a dtype, which exists from the first micro-batch of an update to its end. The backward adds each
layer's gradients to it before it goes on, so those of one layer at most exist twice.

Activation gradients of a float16 model are float16, whose smallest number is 6e-8: at a loss of 1 / tokens they would underflow.
The loss therefore carries a constant power of two, the loss scale, through the backward, and `gradients()` takes it off again,
exactly, from gradients that are fp32 by then (mixed precision training, arXiv 1710.03740, section 3.2, with a constant scale).

Departures: weight decay applies to every trained parameter, as torch.optim.AdamW has it by default.
"""
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from models.adam_state import AdamState, gradient_dtype

# at 1e4 tokens an update, a token's gradient of 1e-4 becomes 100 at its logits: 600 times below float16's largest number, a
# million times above the smallest that has all its digits
FLOAT16_LOSS_SCALE = 2.0**20
_ALIGNMENT = 128  # elements between the starts of gradients in their buffer


def loss_scale_for(dtype: torch.dtype, configured: float | None) -> float:
    """The loss scale of a model of this dtype, unless one is configured."""
    if configured is not None:
        return configured
    return FLOAT16_LOSS_SCALE if dtype == torch.float16 else 1.0


class NonFiniteError(RuntimeError):
    """A NaN or infinity; raised before any weight moves, except by an update in the backward."""

    def __init__(self, step: int, what: str, name: str, detail: str, *, num_changed: int = 0) -> None:
        """num_changed: parameters that an update in the backward has changed before."""
        changed = f"{num_changed} parameters were changed before: the newest checkpoint stands" if num_changed else (
            "no weight was changed")
        super().__init__(f"{what} of {name} is not finite at update {step} ({detail}); {changed}. Lower optim.lr or "
                         "optim.max_grad_norm, or look at this step's rewards and completions")
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
    the place of the next one in the learning-rate schedule, and may be set further on where updates were left out."""

    def __init__(self, params: dict[str, torch.nn.Parameter], learning_rate: LearningRate, *, betas: tuple[float, float],
                 eps: float, weight_decay: float, max_grad_norm: float, loss_scale: float = 1.0, moments: str = "fp32",
                 weights: str = "master", state_on_host: bool = False, in_backward: bool = False, seed: int = 0,
                 starts: dict[str, int] | None = None,
                 whole: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, part: part) -> None:
        """loss_scale: the power of two that `backward` multiplies losses by; gradients() are free of it.
        max_grad_norm: the global L2 norm that gradients are scaled down to; math.inf turns clipping off.
        moments, weights: how the state is kept, and how updates of bf16 parameters add up; among MOMENTS and WEIGHTS of
        models/adam_state.py. state_on_host: a GPU's state lies in pinned host memory; changes no bit. in_backward: whether
        backward() may update. seed: of stochastic rounding. starts: name -> element that a part of a parameter begins with, of
        those that are parts; whole: makes a part's gradient the whole one's (grpo/distributed/shards.py). The rest as in
        torch.optim.AdamW."""
        if not params:
            raise ValueError("no trainable parameters: nothing to optimize; check model.train and model.lora.targets")
        frozen = [name for name, param in params.items() if not param.requires_grad]
        if frozen:
            raise ValueError(f"parameters without requires_grad given to the optimizer: {', '.join(frozen[:5])}")
        self.params, self.learning_rate = dict(params), learning_rate
        self.max_grad_norm, self.loss_scale, self.in_backward = max_grad_norm, loss_scale, in_backward
        self._whole = whole
        self.num_updates = self.position = 0
        self._state = AdamState(self.params, moments, weights, betas=betas, eps=eps, weight_decay=weight_decay, seed=seed,
                                on_host=state_on_host, in_order=not in_backward, starts=starts or {})
        self._gradients: dict[str, torch.Tensor] = {}  # the buffer's parts; empty between updates
        self.buffers: list[torch.Tensor] = []  # [elements] of each dtype, which hold the gradients; empty between updates
        self.received: set[str] = set()  # parameters that got a gradient since zero_grad()
        self._unfinished: _Unfinished | None = None  # the update that step() has begun
        self._norms: list[float] | None = None  # of the gradients that an update in the backward had so far
        self._hooks = [param.register_post_accumulate_grad_hook(self._receiver(name)) for name, param in self.params.items()]

    def close(self) -> None:
        """Leaves the parameters to another optimizer: takes the hooks off them and drops the gradients."""
        for hook in self._hooks:
            hook.remove()
        self.zero_grad()

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self.learning_rate.at(self.position)

    def allocate_gradients(self) -> None:
        """Makes the buffer of the gradients, if there is none. Called before an update's first forward, so that the forward sees
        how much memory is left; else the first gradient does it. A parameter's `.grad` is its part, if it has the same dtype."""
        if self._gradients:
            return
        dtypes = {name: gradient_dtype(param.dtype, self._state.weights) for name, param in self.params.items()}
        for dtype in sorted(set(dtypes.values()), key=str):
            names = [name for name, own in dtypes.items() if own == dtype]
            starts, total = {}, 0
            for name in names:
                starts[name] = total
                total += -(-self.params[name].numel() // _ALIGNMENT) * _ALIGNMENT
            flat = torch.zeros(total, dtype=dtype, device=self._state.device)
            self.buffers.append(flat)
            self._gradients |= {name: flat[start:start + self.params[name].numel()].view(self.params[name].shape)
                                for name, start in starts.items()}
        for name, param in self.params.items():
            param.grad = self._gradients[name] if param.dtype == dtypes[name] else None

    def add(self, name: str, gradients: Iterable[torch.Tensor]) -> None:
        """Adds gradients [elements] of a parameter, one after the other, to those accumulated since `zero_grad()`."""
        self.allocate_gradients()
        total = self._gradients[name].view(-1)
        for gradient in gradients:
            total += gradient
        self.received.add(name)

    def _receiver(self, name: str) -> Callable[[torch.Tensor], None]:
        """A hook that brings a parameter's new gradient into the buffer, if autograd did not add it there."""
        reference = weakref.ref(self)  # parameters must not keep the state alive

        def receive(param: torch.Tensor) -> None:
            self, gradient = reference(), param.grad
            if self is None:
                return
            if self._norms is not None:
                param.grad = None
                self._update_now(name, gradient)
                return
            if not self._gradients:
                param.grad = None
                self.allocate_gradients()
            part = self._gradients[name]
            if gradient.data_ptr() != part.data_ptr():
                part += gradient
                param.grad = part if part.dtype == param.dtype else None
            self.received.add(name)

        return receive

    def backward(self, loss: torch.Tensor, *, updates: bool = False) -> None:
        """Adds the gradients of a loss to those accumulated since `zero_grad()`. updates: instead updates each parameter as soon
        as it has its gradient, which then is dropped; step() only counts. For an update from one loss, without clipping; after an
        error some parameters are updated and others are not."""
        assert not updates or (self.in_backward and math.isinf(self.max_grad_norm) and not self.received), (
            "updates need one loss and no clipping")
        self._norms = [] if updates else None
        (loss if self.loss_scale == 1.0 else loss * self.loss_scale).backward()

    @torch.no_grad()
    def _update_now(self, name: str, gradient: torch.Tensor) -> None:
        assert name not in self.received, f"a second gradient of {name}"
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float32)) / self.loss_scale
        if not math.isfinite(norm):
            raise NonFiniteError(self.num_updates, "gradient", name, _describe(gradient), num_changed=len(self._norms))
        gradient = gradient.contiguous().to(gradient_dtype(gradient.dtype, self._state.weights))
        self._state.begin()
        self.received.add(name)
        self._norms.append(norm)
        for index in self._state.pieces_of[name]:
            self._state.update(index, gradient, lr=self.lr, scale=1 / self.loss_scale, num_updates=self.num_updates + 1)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Name -> gradient accumulated so far, without the loss scale; raises ValueError for a parameter that got none."""
        self._check_received()
        if self.loss_scale != 1.0:
            return {name: gradient / self.loss_scale for name, gradient in self._gradients.items()}
        return dict(self._gradients)

    def _check_received(self) -> None:
        missing = [name for name in self.params if name not in self.received]
        if missing:
            raise ValueError(f"{len(missing)} trainable parameters got no gradient, so they cannot learn: "
                             f"{', '.join(missing[:5])}; run backward first, and train only what the loss depends on")

    def zero_grad(self) -> None:
        """Drops the gradients and frees their buffer."""
        assert not self.is_updating, "zero_grad() after a part of an update: call step() again first"
        self._gradients, self.buffers, self.received, self._unfinished = {}, [], set(), None
        for param in self.params.values():
            param.grad = None

    @torch.no_grad()
    def step(self) -> float:
        """Clips, updates every parameter, counts; returns the global gradient norm before clipping.

        Raises NonFiniteError, with the first parameter whose gradient is to blame, before anything changes. After any other error
        (out of memory, say) step() may be called again and goes on where it was, with the same result."""
        if self._unfinished is None:
            self._unfinished = self._begin_update()
        update = self._unfinished
        self._state.begin()
        for index in range(update.num_done, len(self._state.pieces)):
            self._state.update(index, self._gradients[self._state.pieces[index].name], lr=update.lr, scale=update.scale,
                               num_updates=self.num_updates + 1)
            update.num_done = index + 1
        self._state.end()
        self.num_updates, self.position = self.num_updates + 1, self.position + 1
        self._unfinished = self._norms = None
        return update.grad_norm

    @property
    def is_updating(self) -> bool:
        """Whether an update has changed some weights and not all: step() was left by an error, and must be called again, or a
        backward that updates was, which cannot be repeated."""
        return bool(self._norms) or (self._unfinished is not None and self._unfinished.num_done > 0)

    def _begin_update(self) -> "_Unfinished":
        self._check_received()
        if self._norms is not None:  # the backward has made it
            return _Unfinished(math.hypot(*self._norms), self.lr, 1.0, num_done=len(self._state.pieces))
        norms = torch.stack([torch.linalg.vector_norm(self._whole(name, self._gradients[name]), dtype=torch.float32)
                             for name in self.params])
        norms = norms if self.loss_scale == 1.0 else norms / self.loss_scale
        total_norm = torch.linalg.vector_norm(norms)
        grad_norm = float(total_norm)
        if not math.isfinite(grad_norm):
            hint = "" if self.loss_scale == 1.0 else (
                f"; the loss was scaled by {self.loss_scale:g}: if float16 gradients overflowed, lower optim.loss_scale")
            for name, norm in zip(self.params, norms.tolist()):
                if not math.isfinite(norm):
                    gradient = self._whole(name, self._gradients[name])
                    raise NonFiniteError(self.num_updates, "gradient", name, _describe(gradient) + hint)
            raise NonFiniteError(self.num_updates, "gradient norm", "all parameters together", _describe(norms) + hint)
        # the same operations as torch.nn.utils.clip_grad_norm_, so that clipping agrees with it bit for bit
        scale = float(torch.clamp(self.max_grad_norm / (total_norm + 1e-6), max=1.0)) / self.loss_scale
        return _Unfinished(grad_norm, self.lr, scale)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Moments, masters and the update count: a flat dict of tensors (not copies), ready for safetensors.

        Parameters are not in it; gradients neither: save between `step()` and the next backward."""
        self._state.wait()
        return {"num_updates": torch.tensor(self.num_updates, dtype=torch.int64), **self._state.tensors}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores what `state_dict` gave, exactly; parameters with a master are rounded from it, all others are the caller's to
        restore. Raises ValueError naming what is missing, unexpected or misshapen, with nothing changed."""
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
        for name, tensor in self._state.tensors.items():
            tensor.copy_(state[name])
        self._state.round_masters()
        self._state.wait()


@dataclass
class _Unfinished:
    """An update that step() has begun."""

    grad_norm: float
    lr: float
    scale: float  # of the gradients
    num_done: int = 0  # pieces of the state
