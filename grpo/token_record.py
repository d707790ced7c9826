"""What an update computes for each token that it trains on, taken while it runs and without changing a bit of it.

A token's part of the gradient is c_t = dL / d log pi_t, the loss's derivative by the token's log-prob, as the backward has it:
with the policy loss's weight, clip and normaliser, and the KL penalty's where that is an estimate. Its `gradient` is
|c_t| (1 - pi_t): within a factor of the square root of 2 the norm of c_t's part of the gradient by the token's logits, since
|1[y] - p| lies between 1 - p_y and sqrt(2) (1 - p_y). A `share` is a gradient over the sum of all of the step's (of one epoch's).
What the loss has from entropy and from the full KL is beside it, as dL/dH and dL/dKL.

Shapes: T packed tokens of a micro-batch, n trained tokens of an epoch, L layers, A experts per token.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from grpo.batch import RolloutBatch
from grpo.losses import LossInputs
from grpo.optim import Optimizer
from models.config import GptOssConfig
from models.gpt_oss import previous_rows
from models.routing_record import RoutingRecord, RoutingReplay


class WatchedRouting:
    """The experts of a forward [T, L, A], chosen as without it: by the router, or by a replay."""

    def __init__(self, record: RoutingRecord, replay: RoutingReplay | None) -> None:
        self.record, self.replay = record, replay

    def choose(self, layer: int, logits: torch.Tensor, rows: slice) -> torch.Tensor | None:
        self.record.choose(layer, logits.detach(), rows)
        if self.replay is None:
            return None  # the router's own
        chosen = self.replay.choose(layer, logits, rows)
        self.record.indices[rows, layer] = chosen.to(self.record.indices.dtype)
        return chosen


@dataclass
class TokenRecord:
    """The n trained tokens of an epoch, on the host, in the order of the packed batch."""

    sequence_ids: torch.Tensor  # [n] the completion
    tokens: torch.Tensor  # [n]
    columns: dict[str, torch.Tensor]  # [n] fp32 by name: see above and _columns
    experts: torch.Tensor  # [n, L, A], of the row whose state predicted the token

    def of(self, sequence: int) -> "TokenRecord":
        """The tokens of one completion."""
        mine = self.sequence_ids == sequence
        return TokenRecord(self.sequence_ids[mine], self.tokens[mine],
                           {name: values[mine] for name, values in self.columns.items()}, self.experts[mine])


class UpdateObserver:
    """Records the updates of a step (grpo/run/start.py: Run.observer)."""

    def __init__(self, config: GptOssConfig, optimizer: Optimizer) -> None:
        self._config, self._optimizer, self._before = config, optimizer, optimizer.num_updates
        self._routing: RoutingRecord | None = None
        self._found: dict[int, list[dict[str, torch.Tensor]]] = {}  # by update of the step

    def watch_routing(self, micro: RolloutBatch, replay: RoutingReplay | None) -> WatchedRouting:
        self._routing = RoutingRecord(len(micro.tokens), self._config, micro.tokens.device)
        return WatchedRouting(self._routing, replay)

    def watch_loss(self, micro: RolloutBatch, inputs: LossInputs) -> None:
        """Notes the inputs of the loss, and later their gradients."""
        part = {"token_index": micro.token_index, "mask": micro.loss_mask, "tokens": micro.tokens,
                "sequence_ids": micro.sequence_ids, "experts": self._routing.indices}
        part |= {f"column {name}": values.detach() for name, values in _columns(inputs).items()}
        part["rows"] = previous_rows(micro.cu_seqlens.tolist(), micro.prefixes)  # of the token before each
        for name, values in (("c", inputs.log_probs), ("dL/dH", inputs.entropy), ("dL/dKL", inputs.full_kl)):
            if values is not None and values.requires_grad:
                values.register_hook(self._note(part, f"column {name}"))
        self._found.setdefault(self._optimizer.num_updates - self._before, []).append(part)

    def _note(self, part: dict[str, torch.Tensor], name: str) -> Callable[[torch.Tensor], None]:
        def note(gradient: torch.Tensor) -> None:
            part[name] = gradient.detach() / self._optimizer.loss_scale
        return note

    def record(self, epoch: int, *, num_epochs: int) -> TokenRecord:
        """What was noted in an epoch, counted from 0, of a step that is over. A micro-batch that did not fit into memory is made
        again: the last counts."""
        num_updates = (self._optimizer.num_updates - self._before) // num_epochs
        parts = [part for update in range(num_updates) for part in self._found[epoch * num_updates + update]]
        names = sorted({name for part in parts for name in part if name.startswith("column ")})
        rows: dict[int, tuple[int, int]] = {}  # a token's place in the batch -> where its last record is
        for number, part in enumerate(parts):
            places = part["mask"].nonzero().squeeze(1)
            rows |= {index: (number, place) for index, place in zip(part["token_index"][places].tolist(), places.tolist())}
        order = [rows[index] for index in sorted(rows)]

        def gathered(name: str) -> torch.Tensor:
            host = [part[name].cpu() if name in part else torch.zeros(len(part["mask"])) for part in parts]
            return torch.stack([host[number][place] for number, place in order])

        before = gathered("rows").tolist()
        experts = [part["experts"].cpu() for part in parts]
        columns = {name.removeprefix("column "): gathered(name) for name in names}
        gradient = columns["c"].abs() * -torch.expm1(columns["log_prob"])
        columns |= {"gradient": gradient, "share": gradient / gradient.sum().clamp(min=torch.finfo(torch.float32).tiny)}
        return TokenRecord(gathered("sequence_ids"), gathered("tokens"), columns,
                           torch.stack([experts[number][row] for (number, _), row in zip(order, before)]))


def _columns(inputs: LossInputs) -> dict[str, torch.Tensor]:
    """log_prob and sampler (nats), entropy (nats), advantage, ratio = exp(log pi - log pi_old), and kl (nats): of the full
    distributions, or log pi - log pi_ref."""
    columns = {"log_prob": inputs.log_probs, "sampler": inputs.sampler_log_probs, "entropy": inputs.entropy,
               "advantage": inputs.advantages, "ratio": (inputs.log_probs - inputs.old_log_probs).exp()}
    if inputs.full_kl is not None:
        columns["kl"] = inputs.full_kl
    elif inputs.ref_log_probs is not None:
        columns["kl"] = inputs.log_probs - inputs.ref_log_probs
    return columns

