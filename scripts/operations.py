"""Records what the operations of a model's blocks compute, in the functions that the product itself calls.

Nothing in the product knows of it: module-level functions and methods are replaced while a recording lasts, and forward hooks are
added.

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
import kernels.linear  # noqa: E402
import models.block  # noqa: E402
import models.keys  # noqa: E402
from kernels.experts.sorting import Routing  # noqa: E402
from models.experts import RoutedExperts  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402


class Recorder:
    """Rows of the results of operations, by layer (the head counts as one more) and operation, in the order they come in.

    The methods note_... take the arguments, keywords and result of a call of the function that they are named after."""

    def __init__(self, model: GptOss) -> None:
        self.head = len(model.model.layers)
        self.rows: torch.Tensor | None = None  # of the model call under way that are of interest, by position
        self.found: dict[tuple[int, str], list[torch.Tensor]] = {}
        self.layer, self.routing, self.low_rank = self.head, None, None  # of the call under way

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

    def hold_low_rank(self, _, __, result: torch.Tensor) -> None:
        self.low_rank = result

    def note_linear(self, arguments: tuple, _, result: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        name = "o_proj" if len(arguments[0]) == 1 else "queries, keys and values"
        value, low_rank = result
        low_rank = self.low_rank if low_rank is None else low_rank
        if low_rank is not None:
            self.keep(f"low-rank rows of {name}", low_rank)
        self.keep(name, value)
        self.low_rank = None

    def note_rotated(self, _, __, result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        for operation, value in zip(("rotated queries", "rotated keys", "values"), result):
            self.keep(operation, value)

    def note_rotate_and_write(self, arguments: tuple, settings: dict, _) -> None:
        self.note_rotated((), settings, arguments[:3])  # in place

    def note_attend(self, _, __, result: torch.Tensor) -> None:
        self.keep("attention", result)

    def note_route(self, arguments: tuple, settings: dict, result: tuple[torch.Tensor, Routing]) -> None:
        self.routing = result[1]
        self.keep("chosen experts", result[1].indices)
        self.keep("gate weights", result[0])

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

    def watched_block(self, forward: Callable) -> Callable:
        """A block's forward that notes its input and its output."""

        def watched(block, x, *arguments):
            self.layer = block.self_attn.layer
            self.keep("input", x)
            result = forward(block, x, *arguments)
            self.keep("block output", result)
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
    block = models.block
    notes = [
        (block.RMSNorm, "add", recorder.note_add_norm), (block, "linear", recorder.note_linear),
        (block, "route", recorder.note_route), (block, "route_few", recorder.note_route_few),
        (models.keys, "rotated", recorder.note_rotated), (models.keys, "rotate_and_write", recorder.note_rotate_and_write),
        (kernels.linear, "low_rank_rows", recorder.hold_low_rank),
        (kernels.experts.forward, "grouped_gemm", recorder.note_experts_low_rank),
        (kernels.experts.forward, "_project", recorder.note_experts),
        (kernels.experts.few_rows, "low_rank_rows", recorder.note_experts_low_rank),
        (kernels.experts.few_rows, "decode_projection", recorder.note_experts),
        (RoutedExperts, "project", recorder.note_experts_project),
        *((getattr(models.keys, name), "attend", recorder.note_attend)
          for name in ("PackedKeys", "PromptKeys", "ChunkKeys", "CachedKeys")),
    ]  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(patch.object(block.Block, "forward", recorder.watched_block(block.Block.forward)))
        for owner, name, note in notes:
            stack.enter_context(patch.object(owner, name, _watched(getattr(owner, name), note)))
        modules = [(model.model.norm, recorder.hook("final norm", is_head=True))]
        for layer in model.model.layers:
            modules += [(layer.input_layernorm, recorder.hook("input norm")), (layer.mlp.router, recorder.hook("router logits"))]
        for module, note in modules:
            stack.callback(module.register_forward_hook(note).remove)
        yield
