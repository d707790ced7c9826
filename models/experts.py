"""The routed experts of a layer, in any format of kernels/packed/weights.py.

Parameters and buffers are named as in the checkpoint. Each expert has its own A and B of LoRA, which are never merged, whatever
the base's format.

Experts of some layers may lie in host memory (models/expert_store.py); there the parameters and buffers are, and for a forward or
backward they arrive on the GPU.

Shapes: E experts, T tokens, A experts per token, R routed rows, D model width, F expert width.
"""
import torch
from torch import nn

from kernels.device import is_few, is_triton
from kernels.experts.few_rows import few_rows_forward
from kernels.experts.forward import MoeKept, local_backward, local_forward
from kernels.experts.gemm import grouped_linear
from kernels.experts.sorting import Routing
from kernels.experts.transport import combine, copy_rows
from kernels.linear import Gradients
from kernels.packed.weights import Dense, ExpertWeights, Mxfp4, Nf4
from kernels.swiglu import swiglu
from models.config import GptOssConfig
from models.expert_share import ExpertShare
from models.expert_store import ExpertStore, views
from models.offload import SCRATCH_BYTES, Kept

PROJECTIONS = ("gate_up_proj", "down_proj")
MOST_ROUTED = 0.8  # share of the experts: above it, copying all of them ahead is faster
FORMATS: dict[str, type[ExpertWeights]] = {weights.name: weights for weights in (Dense, Mxfp4, Nf4)}


def stored_format(quantization: dict, config: GptOssConfig) -> type[ExpertWeights]:
    """The format that a config.json with this quantization_config ({}: none) names; models/formats/hugging_face.py may find
    another in the files. Raises ValueError if there is no such format, or if it does not support the model's sizes."""
    method = quantization.get("quant_method")
    found = next((weights for weights in FORMATS.values() if weights.quant_method == method), None)
    if found is None:
        known = {weights.name: weights.quant_method for weights in FORMATS.values() if weights.quant_method is not None}
        listed = ", ".join(method if method == name else f"{method} ({name.upper()})" for name, method in known.items())
        raise ValueError(f"config.json: quantization_config.quant_method={method!r}; supported: {listed}, or none")
    found.check(quantization, config.hidden_size, config.intermediate_size)
    return found


class RoutedExperts(nn.Module):
    """Weights, biases, LoRA and activation. weight_format: as in the checkpoint. layout: how the weights are in memory now;
    arrange() may change it. weights_device: where the weights are made; "meta" for those that place() puts elsewhere. share:
    which experts have their weights, biases and adapters here; None: all."""

    def __init__(self, config: GptOssConfig, weight_format: type[ExpertWeights], *, device: torch.device | str,
                 dtype: torch.dtype, weights_device: torch.device | str | None = None, share: ExpertShare | None = None) -> None:
        super().__init__()
        num, width, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.share, self.own = share, range(num) if share is None else range(num)[share.of(num)]
        num = len(self.own)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.sizes = {"gate_up_proj": (width, 2 * inner), "down_proj": (inner, width)}  # (in, out)
        self.gate_up_proj_bias = nn.Parameter(torch.empty(num, 2 * inner, device=device, dtype=dtype), False)
        self.down_proj_bias = nn.Parameter(torch.empty(num, width, device=device, dtype=dtype), False)
        for name in PROJECTIONS:
            self.register_parameter(f"{name}_lora_A", None)  # [E, r, in] fp32
            self.register_parameter(f"{name}_lora_B", None)  # [E, out, r] fp32
        self.lora_scale, self.adapter_enabled = 0.0, True
        self.low_rank_ready: torch.Tensor | None = None  # [2] int32: few_rows_forward's `ready`
        self.weight_format = self.layout = weight_format
        self._layout_settings: tuple[bool, ...] = ()
        self._store: ExpertStore | None = None  # of weights that stream, and the number of this layer in it
        self._layer, self._routed = -1, config.num_experts_per_tok / config.num_local_experts  # part that a token goes to
        for name, sizes in self.sizes.items():
            self._hold(name, [torch.empty(shape, device=weights_device or device, dtype=own or dtype)
                              for shape, own in weight_format.stored(num, *sizes)])

    def forward(self, x: torch.Tensor, weights: torch.Tensor, routing: Routing, residual: torch.Tensor,
                kept: Kept | None = None) -> torch.Tensor:
        """residual [T, D] plus the experts' outputs for x [T, D] with gate weights [T, A] fp32. On a GPU without gradient;
        kept: gets the tensors that backward() needs."""
        rows = self.local_forward(routing, x, residual.dtype, kept)
        return combine(rows, weights, routing, residual)

    def local_forward(self, routing: Routing, x: torch.Tensor, dtype: torch.dtype, kept: Kept | None) -> torch.Tensor:
        """The experts' outputs [R, D], in expert order. dtype: of the result on a GPU; the CPU keeps x's."""
        if not is_triton(x):
            # autograd would keep weights that arrived until the backward, when others are in their place
            gate_up, down = [self.weights(name) for name in PROJECTIONS] if torch.is_grad_enabled() else self.arrived(1)
            rows, offsets = copy_rows(x, routing), routing.offsets
            if self.share is not None:
                rows, offsets = self.share.dispatch(rows, offsets)
            h = self.project("gate_up_proj", gate_up, rows, offsets)  # [R, 2F], gate, up interleaved
            rows = self.project("down_proj", down, swiglu(h, alpha=self.alpha, limit=self.limit), offsets)
            return rows if self.share is None else self.share.gather(rows, routing.offsets)
        projections = self.arrived(1, routing if kept is None and self.copies_routed(x) else None)
        here = routing if self.share is None else self.share.routing(routing)
        if kept is None and is_few(x) and self.layout.serves_few_rows:
            few = (projection.few_rows(x, here.offsets_device) for projection in projections)
            rows = few_rows_forward(x, here, *few, ready=self.low_rank_ready, **self._settings())
        else:
            rows, moe = local_forward(x, here, *projections, dtype=dtype,
                                      scratch_bytes=SCRATCH_BYTES if kept is None else kept.scratch_bytes,
                                      keeps_h=kept is not None and not kept.recomputes("h"), **self._settings())
            if kept is not None:
                kept.keep({"h": moe.h, "low_rank_x": moe.low_rank_x, "low_rank_act": moe.low_rank_act})
        if self.share is not None:
            self.share.fill_in(rows)
        return rows

    def backward(self, grad: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, routing: Routing, kept: Kept,
                 grads: Gradients) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the gradients of x [T, D] and of the gate weights [T, A]; puts those of trainable parameters into `grads`. grad
        [T, D]: of forward's result, and so also of the residual."""
        moe = MoeKept(*(kept.take(name) for name in ("h", "low_rank_x", "low_rank_act")))
        here = routing if self.share is None else self.share.routing(routing)
        grad_rows, grad_weights, lora_grads, base_grads = local_backward(
            grad, x, weights, here, *self.arrived(-1), moe, scratch_bytes=kept.scratch_bytes, needs_base=self.trains_base(),
            **self._settings())
        if self.share is not None:
            self.share.fill_in(grad_rows)
            self.share.fill_in(grad_weights)
        if lora_grads is not None:
            grads.update(zip(self._adapters(), lora_grads))
        if base_grads is not None:
            names = (f"{name}{suffix}" for suffix in ("", "_bias") for name in PROJECTIONS)
            grads.update((self._parameters[name], grad) for name, grad in zip(names, base_grads) if grad is not None)
        return combine(grad_rows, None, routing, None), grad_weights

    def _settings(self) -> dict:
        return {"lora": self.lora_tensors(), "lora_scale": self.lora_scale, "alpha": self.alpha, "limit": self.limit}

    def _adapters(self) -> list[torch.Tensor]:
        return [self._parameters[f"{name}_lora_{side}"] for name in PROJECTIONS for side in "AB"]

    def lora_tensors(self) -> list[torch.Tensor] | None:
        """A and B of gate_up, A and B of down; None without an enabled adapter."""
        if self.gate_up_proj_lora_A is None or not self.adapter_enabled:
            return None
        return self._adapters()

    def trains_base(self) -> bool:
        return any(parameter.requires_grad for name, parameter in self._parameters.items()
                   if parameter is not None and "lora" not in name)

    def project(self, name: str, weights: ExpertWeights, x: torch.Tensor, offsets: list[int]) -> torch.Tensor:
        """The reference: rows x [R, in] in expert order, offsets [E + 1] -> [R, out]."""
        lora, first = self.lora_tensors(), 2 * PROJECTIONS.index(name)
        lora_A, lora_B = (None, None) if lora is None else lora[first:first + 2]
        return grouped_linear(x, weights, offsets, lora_A=lora_A, lora_B=lora_B, lora_scale=self.lora_scale)

    def _hold(self, name: str, tensors: list[torch.Tensor]) -> None:
        for suffix, tensor in zip(self.layout.suffixes, tensors, strict=True):
            if self.layout.is_packed:
                self.register_buffer(name + suffix, tensor)
            else:
                self.register_parameter(name + suffix, nn.Parameter(tensor, requires_grad=False))

    def held(self, name: str) -> list[str]:
        """The names of the parameters or buffers that hold a projection's weights."""
        return [name + suffix for suffix in self.layout.suffixes]

    def weights(self, name: str, arrived: dict[str, torch.Tensor] | None = None) -> ExpertWeights:
        """A projection as the kernels take it: with the parameters or buffers, which may be in host memory, or with tensors that
        arrived on the GPU."""
        held = arrived or (self._buffers if self.layout.is_packed else self._parameters)
        return self.layout(*(held[full] for full in self.held(name)), self._parameters[f"{name}_bias"], *self._layout_settings)

    def place(self, store: ExpertStore, layer: int) -> None:
        """Makes the weights, which are not loaded yet, in the host memory that the store has for this layer, if it has some."""
        home = store.home(layer)
        if home is None:
            return
        self._store, self._layer = store, layer
        made = [self.weights(name).tensors() for name in PROJECTIONS]
        parts = iter(views(home, [tensor for tensors in made for tensor in tensors]))
        for name, tensors in zip(PROJECTIONS, made):
            self._hold(name, [next(parts) for _ in tensors])

    def copies_routed(self, x: torch.Tensor) -> bool:
        """Whether a forward of x [T, D] without gradient copies only experts that have rows, if the weights stream: they are
        expected to be few enough to pay for copies that nothing overlaps with."""
        touched = 1 - (1 - self._routed) ** len(x)
        return self._store is not None and touched < MOST_ROUTED and is_few(x) and self.layout.serves_few_rows

    def arrived(self, step: int, routing: Routing | None = None) -> list[ExpertWeights]:
        """Both projections on the GPU, or of each its experts that have rows by `routing`. If they stream, they are there until
        the next layer that streams arrives; step as of ExpertStore.arrive."""
        if self._store is None:
            return [self.weights(name) for name in PROJECTIONS]
        held = [tensor for name in PROJECTIONS for tensor in self.weights(name).tensors()]
        names = [full for name in PROJECTIONS for full in self.held(name)]
        if routing is None:
            memory = self._store.arrive(self._layer, step)
        else:
            memory = self._store.arrive_routed(self._layer, routing.offsets_device, held)
        arrived = dict(zip(names, views(memory, held), strict=True))
        return [self.weights(name, arrived) for name in PROJECTIONS]

    def arrange(self) -> None:
        """Permutes packed weights in place into the layout that the Triton kernels take, if possible. May wait for the device."""
        arranged = self.layout.arranged(self.arrived(0))
        if type(arranged[0]) is self.layout:
            return
        if self._store is not None:
            self._store.write_back(self._layer)
        held = [self.weights(name).tensors() for name in PROJECTIONS]
        for name in PROJECTIONS:
            for full in self.held(name):
                del self._buffers[full]
        self.layout, self._layout_settings = type(arranged[0]), arranged[0].settings()
        for name, tensors in zip(PROJECTIONS, held):
            self._hold(name, tensors)

    def as_stored(self, name: str, expert: int) -> tuple[torch.Tensor, ...]:
        """One expert's tensors, on the model's device, as a checkpoint of the format stores them; new tensors or views."""
        weights = self.weights(name)
        of_expert = (tensor[expert:expert + 1].to(weights.bias.device) for tensor in weights.tensors())
        return type(weights)(*of_expert, weights.bias, *weights.settings()).as_stored(0)

    def dense(self, name: str, expert: int) -> torch.Tensor:
        """[out, in] fp32 of one expert."""
        return self.weight_format.unpack(*self.as_stored(name, expert), dtype=torch.float32)
