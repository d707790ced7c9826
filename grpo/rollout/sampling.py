"""Sampling parameters, and draws from logits: tokens, each with its log-prob under the distribution that it was drawn from.

The draws here serve the CPU, and filters on a GPU; all other draws on a GPU are kernels/head/draw.py's (Session decides).

A draw is the Gumbel-max trick: token = argmax(logits / temperature + noise). The noise is a pure integer hash of
(seed, step, prompt id, sample, position) and the vocabulary id, so a draw needs no generator state: it does not
depend on the other rows of the batch, on the order of admission, on the device or on a restart.

Filters apply to the tempered distribution in this order, each to the tokens that the one before it kept:
  1. top-k: the k largest logits (ties with the k-th are all kept);
  2. top-p: the shortest prefix, by falling probability, whose mass reaches top_p; the masses are those of the
     distribution renormalised after top-k (equal probabilities count in order of vocabulary id);
  3. min-p: every token with at least min_p times the largest probability.
Hugging Face `generate` uses this order (temperature, top-k, top-p, min-p). vLLM applies min-p first: its top-p works on the mass
that min-p kept, so with both active its kept set can be smaller.

B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config import EvalConfig, EvaluateConfig, GenerateConfig, RolloutConfig
from models.decoder import PlainDraw
from models.draw_key import gumbel_noise
from models.gpt_oss import GptOss, KeptSets

# Rows are handled in blocks of at most this many logits, which bounds the temporaries (4 bytes per element each).
_MAX_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the completions of a rollout are drawn. The defaults are the model's own distribution. A value out of range raises
    ValueError that names it."""

    max_new_tokens: int  # most tokens after the prompt
    temperature: float = 1.0
    top_k: int = 0  # the number of tokens to keep; 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off
    greedy: bool = False  # takes the most likely token; the four above do not apply, and log-probs are at temperature 1
    # a row parks when it draws one of these, even a stop id (grpo/rollout/session.py)
    park_ids: tuple[int, ...] = ()
    records_routing: bool = False  # segments record the experts of their tokens

    def __post_init__(self) -> None:
        for name, value, is_allowed, allowed in (
                ("max_new_tokens", self.max_new_tokens, type(self.max_new_tokens) is int and self.max_new_tokens >= 1,
                 "an integer of at least 1"),
                ("temperature", self.temperature, 0 < self.temperature < math.inf, "above 0; greedy takes the likeliest token"),
                ("top_k", self.top_k, self.top_k >= 0, "at least 0, which is off"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]; 1 is off"),
                ("min_p", self.min_p, 0 <= self.min_p < 1, "in [0, 1); 0 is off")):
            if not is_allowed:
                raise ValueError(f"{name}={value}: must be {allowed}")

    @property
    def plain(self) -> PlainDraw | None:
        """How tokens are drawn from the whole vocabulary; None if a filter is active."""
        if self.greedy:
            return PlainDraw(1.0, True)
        return None if self.top_k or self.top_p < 1 or self.min_p > 0 else PlainDraw(self.temperature, False)

    @staticmethod
    def of(node: RolloutConfig | EvaluateConfig | GenerateConfig, evaluation: EvalConfig | None = None) -> "SamplingParams":
        """The parameters of a part of the configuration; values that `evaluation` sets replace them."""
        names = ("temperature", "top_k", "top_p", "min_p")
        values = {name: getattr(node, name) for name in names}
        if evaluation is not None:
            values |= {name: value for name in names if (value := getattr(evaluation, name)) is not None}
        return SamplingParams(max_new_tokens=node.max_new_tokens, **values)


@dataclass
class Draw:
    """One token per row. log_probs in nats; `kept_ids` is set when a filter was active: the kept vocabulary ids of
    all rows one after the other, ascending within a row, `kept_counts[b]` of them for row b."""

    tokens: Tensor  # [B] int64
    log_probs: Tensor  # [B] fp32
    kept_ids: Tensor | None = None  # [N] int32
    kept_counts: Tensor | None = None  # [B] int64

    @property
    def kept(self) -> list[Tensor] | None:
        """Kept vocabulary ids of each row, int32 on the host, or None when no filter was active."""
        if self.kept_ids is None or self.kept_counts is None:
            return None
        return list(self.kept_ids.cpu().split(self.kept_counts.tolist()))


def choose(logits: Tensor, keys: Tensor, params: SamplingParams) -> Draw:
    """One token per row, greedy or drawn, as the parameters say; shapes as in draw()."""
    if params.greedy:
        return greedy(logits)
    return draw(logits, keys, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)


def draw(logits: Tensor, keys: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Draw:
    """Draws one token per row from softmax(logits / temperature) restricted to the kept set.

    logits [B, V] fp32; keys [B, 5] int64: seed, step, prompt id, sample, position of the drawn token in its sequence
    (the prompt's first token is position 0). The log-probs are natural logs, renormalised over the kept set when a
    filter is active. Two rows with the same key and logits draw the same token. A row with a NaN logit gives a NaN
    log-prob.
    """
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}, expected torch.float32"
    assert keys.shape == (logits.shape[0], 5), f"keys are {tuple(keys.shape)}, expected {(logits.shape[0], 5)}"
    num_rows = max(1, _MAX_BLOCK_ELEMENTS // logits.shape[1])
    blocks = [
        _draw_block(block, block_keys, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for block, block_keys in zip(logits.split(num_rows), keys.split(num_rows), strict=True)
    ]
    columns = zip(*((block.tokens, block.log_probs, block.kept_ids, block.kept_counts) for block in blocks))
    return blocks[0] if len(blocks) == 1 else Draw(*(None if column[0] is None else torch.cat(column) for column in columns))


def greedy(logits: Tensor) -> Draw:
    """The most likely token of each row (the lowest id among equals) and its log-prob at temperature 1, in nats.

    logits [B, V] fp32.
    """
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}, expected torch.float32"
    best, tokens = logits.max(dim=-1)  # [B], [B]
    return Draw(tokens=tokens, log_probs=best - logits.logsumexp(dim=-1))


def _draw_block(logits: Tensor, keys: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float) -> Draw:
    tempered = logits / temperature  # [B, V]
    scores = tempered - tempered.amax(dim=-1, keepdim=True)
    kept = _kept_mask(scores, top_k=top_k, top_p=top_p, min_p=min_p)
    if kept is not None:
        scores.masked_fill_(~kept, -math.inf)
        tempered.masked_fill_(~kept, -math.inf)
    noise = gumbel_noise(keys, logits.shape[1])
    tokens = noise.add_(scores).argmax(dim=-1)  # [B]
    # the same operations as in training (kernels/head/log_probs.py), so the same bits
    log_probs = torch.log_softmax(tempered, dim=-1).gather(1, tokens[:, None]).squeeze(1)
    if kept is None:
        return Draw(tokens=tokens, log_probs=log_probs)
    kept_ids = kept.nonzero()[:, 1].int()
    return Draw(tokens=tokens, log_probs=log_probs, kept_ids=kept_ids, kept_counts=kept.sum(dim=-1))


def _kept_mask(scores: Tensor, *, top_k: int, top_p: float, min_p: float) -> Tensor | None:
    """[B, V] bool, or None when no filter is active; scores are logits / temperature minus their row's maximum."""
    if top_k == 0 and top_p == 1.0 and min_p == 0.0:
        return None
    kept = torch.ones_like(scores, dtype=torch.bool)
    if 0 < top_k < scores.shape[1]:
        kept = scores >= scores.topk(top_k, dim=-1).values[:, -1:]
    if top_p < 1.0:
        ordered, ids = scores.masked_fill(~kept, -math.inf).sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(dim=-1).cumsum(dim=-1)  # [B, V]: mass up to and including each token
        is_inside = torch.ones_like(kept)
        is_inside[:, 1:] = mass[:, :-1] < top_p
        kept &= torch.zeros_like(kept).scatter_(1, ids, is_inside)
    if min_p > 0.0:
        kept &= scores >= math.log(min_p)
    return kept


def filtered_log_probs(model: GptOss, hidden: Tensor, result: Draw, *, temperature: float) -> Tensor:
    """The log-probs [B] of a filtered draw after hidden [B, D], by the function that training computes them with."""
    sets = KeptSets.of_counts(result.kept_ids, result.kept_counts)
    return model.score(hidden, result.tokens, temperature=temperature, kept=sets)
