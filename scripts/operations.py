"""Records what the operations of a model's blocks compute, in the functions that the product itself calls.

Nothing in the product knows of it: module-level functions and methods are replaced while a recording lasts, and forward hooks are
added. On a GPU those are the functions of models/frozen_block.py, elsewhere, and for the gradients of a base that trains, what
Block.compose calls.

Shapes: T rows of a model call, R routed rows, A experts per token.
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels.experts.few_rows  # noqa: E402
import kernels.experts.forward  # noqa: E402
import kernels.linear_few_rows  # noqa: E402
import models.frozen_block  # noqa: E402
import models.gpt_oss  # noqa: E402
from kernels.experts.sorting import Routing  # noqa: E402
from models.experts import Bf16Experts, Mxfp4Experts, Nf4Experts  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402


class Recorder:
    """Rows of the results of operations, by layer (the head counts as one more) and operation, in the order they come in.

    The methods note_... take the arguments, keywords and result of a call of the function that they are named after."""

    def __init__(self, model: GptOss) -> None:
        self.head = len(model.model.layers)
        self.rows: torch.Tensor | None = None  # of the model call under way that are of interest, by position
        self.found: dict[tuple[int, str], list[torch.Tensor]] = {}
        self.layer, self.block, self.routing, self.low_rank = self.head, None, None, None  # of the call under way

    def keep(self, operation: str, value: torch.Tensor) -> None:
        """value [T, ...]"""
        self.keep_rows(operation, value.detach()[self.rows])

    def keep_routed(self, operation: str, value: torch.Tensor) -> None:
        """value [R, ...] in expert order; kept as [rows, A, ...]."""
        self.keep_rows(operation, value.detach()[self.routing.inverse[self.rows].long()])

    def keep_rows(self, operation: str, rows: torch.Tensor) -> None:
        self.found.setdefault((self.layer, operation), []).append(rows.clone())

    def note_add_norm(self, _, __, result: tuple[torch.Tensor, ...]) -> None:
        self.keep("stream after attention", result[1])
        self.keep("post-attention norm", result[0])

    def note_norm(self, arguments: tuple, settings: dict, result: tuple[torch.Tensor, ...]) -> None:
        if len(arguments) == 3:  # of the sum with a residual stream
            self.note_add_norm(arguments, settings, result)
        else:
            self.keep("input norm", result[0])

    def hold_low_rank(self, _, __, result: torch.Tensor) -> None:
        self.low_rank = result

    def note_project(self, arguments: tuple, _, result: torch.Tensor | tuple) -> None:
        is_output = arguments[1] is self.block.self_attn.o_proj.weight
        name = "o_proj" if is_output else "queries, keys and values"
        value, low_rank = result if isinstance(result, tuple) else (result, self.low_rank)
        if low_rank is not None:
            self.keep(f"low-rank rows of {name}", low_rank)
        self.keep(name, value)
        self.low_rank = None

    def note_route_forward(self, _, __, result: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.keep("chosen experts", result[1])
        self.keep("gate weights", result[0])

    def note_make_routing(self, _, __, result: Routing) -> None:
        self.routing = result

    def note_route(self, arguments: tuple, settings: dict, result: tuple[torch.Tensor, Routing]) -> None:
        self.routing = result[1]
        self.note_route_forward(arguments, settings, (result[0], result[1].indices))

    def note_route_few(self, arguments: tuple, settings: dict, result: tuple[torch.Tensor, torch.Tensor, Routing]) -> None:
        self.keep("router logits", result[0])
        self.note_route(arguments, settings, result[1:])

    def note_experts_project(self, arguments: tuple, _, result: torch.Tensor) -> None:
        self.keep_routed({"gate_up_proj": "gate and up", "down_proj": "down"}[arguments[1]], result)

    def note_experts_low_rank(self, _, settings: dict, result: torch.Tensor) -> None:
        if settings.get("scale") is not None:
            self.keep_routed("low-rank rows of " + ("down" if settings.get("gather") is None else "gate_up"), result)

    def note_experts(self, _, settings: dict, result: torch.Tensor) -> None:
        if settings.get("scale") is None:
            self.keep_routed("down" if settings.get("swiglu") is None else "activation of gate_up", result)

    def watched_block(self, compute: Callable) -> Callable:
        """A block's forward that notes its input, its attention and its output."""

        def watched(block, x, cos, sin, attend, *arguments, **settings):
            def watched_attend(layer, q, k, v, sinks):
                for operation, value in (("rotated queries", q), ("rotated keys", k), ("values", v)):
                    self.keep(operation, value)
                attended = attend(layer, q, k, v, sinks)
                self.keep("attention", attended)
                return attended

            self.layer, self.block = block.self_attn.layer, block
            self.keep("input", x)
            result = compute(block, x, cos, sin, watched_attend, *arguments, **settings)
            self.keep("block output", result[0] if isinstance(result, tuple) else result)
            return result

        return watched

    def hook(self, operation: str, *, is_head: bool = False) -> Callable:
        """A forward hook that notes a module's output."""

        def note(_, __, result: torch.Tensor) -> None:
            self.layer = self.head if is_head else self.layer
            self.keep(operation, result)

        return note


def _watched(function: Callable, note: Callable) -> Callable:
    def watched(*arguments, **settings):
        result = function(*arguments, **settings)
        note(arguments, settings, result)
        return result

    return watched


@contextmanager
def observed(model: GptOss, recorder: Recorder) -> Iterator[None]:
    """Inside, what the model computes goes to the recorder."""
    frozen, single = models.frozen_block, models.gpt_oss
    notes = [
        (frozen, "_norm", recorder.note_norm), (frozen, "_project", recorder.note_project),
        (frozen, "_decode_project", recorder.note_project), (frozen, "route_forward", recorder.note_route_forward),
        (frozen, "make_routing", recorder.note_make_routing), (frozen, "route_few", recorder.note_route_few),
        (kernels.linear_few_rows, "low_rank_rows", recorder.hold_low_rank),
        (kernels.experts.forward, "grouped_gemm", recorder.note_experts_low_rank),
        (kernels.experts.forward, "_project", recorder.note_experts),
        (kernels.experts.few_rows, "low_rank_rows", recorder.note_experts_low_rank),
        (kernels.experts.few_rows, "decode_projection", recorder.note_experts),
        (single, "route", recorder.note_route), (single.RMSNorm, "add", recorder.note_add_norm),
        (Bf16Experts, "project", recorder.note_experts_project), (Mxfp4Experts, "project", recorder.note_experts_project),
        (Nf4Experts, "project", recorder.note_experts_project),
    ]  # fmt: skip
    with ExitStack() as stack:
        for owner, name in ((frozen, "_forward"), (frozen, "_decode"), (single.Block, "compose")):
            stack.enter_context(patch.object(owner, name, recorder.watched_block(getattr(owner, name))))
        for owner, name, note in notes:
            stack.enter_context(patch.object(owner, name, _watched(getattr(owner, name), note)))
        modules = [(model.model.norm, recorder.hook("final norm", is_head=True))]
        for block in model.model.layers:
            attn = block.self_attn
            modules += [(block.input_layernorm, recorder.hook("input norm")), (block.mlp.router, recorder.hook("router logits"))]
            modules += [(getattr(attn, name), recorder.hook(name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        for module, note in modules:
            stack.callback(module.register_forward_hook(note).remove)
        yield
