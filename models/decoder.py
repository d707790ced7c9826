"""Decode steps of one cache, captured as CUDA graphs: one per bucket of batch sizes, replayed with all state on the GPU.

A step of a model has about 600 small launches; replayed as one graph they cost the host nothing. The first step of a bucket
runs as it is (kernels are compiled) and is captured afterwards; later ones copy their inputs into the graph's and replay it.
Rows between the batch and its bucket stand at position -1: they touch no slot and mean nothing. Adapters are read where they
lie, so an update of them shows in the next step.

Shapes: B rows, D model width, V vocabulary.
"""
from __future__ import annotations

import torch

from kernels.launch import product_path
from models.gpt_oss import GptOss
from models.kv_cache import KVCache

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
IDLE = -1  # position of a row that is not there


def bucket_of(num_rows: int) -> int:
    """The smallest bucket that holds so many rows; above the largest, a multiple of 128."""
    return next((bucket for bucket in BUCKETS if bucket >= num_rows), -(-num_rows // 128) * 128)


def can_decode_by_graph(model: GptOss) -> bool:
    """Whether steps of this model can be captured: on a GPU, through Triton, with a frozen base and experts that serve few
    tokens."""
    weight = model.lm_head.weight
    return (weight.is_cuda and product_path(weight) == "triton"
            and all(not block.trains_base() and block.mlp.experts.can_decode() for block in model.model.layers))


class Decoder:
    """Draws the next tokens of up to `max_rows` sequences in a cache. On a GPU only; needs the cache and the model's weights to
    stay where they are. counts_prompts_apart: attention adds up a prompt's keys before the others, as it does in training where
    completions share their prompt; the bits of log-probs are then those of such training, else those of whole sequences."""

    def __init__(self, model: GptOss, cache: KVCache, *, max_rows: int, temperature: float, counts_prompts_apart: bool) -> None:
        self.model, self.cache, self.temperature = model, cache, temperature
        size, device = bucket_of(max_rows), model.device
        self._tokens, self._positions, self._slots, self._prompt_lens = (
            torch.zeros(size, dtype=torch.int64, device=device) for _ in range(4))
        self._counts_prompts_apart = counts_prompts_apart
        self._words = torch.zeros(size, 2, dtype=torch.int32, device=device)
        self._drawn = torch.zeros(size, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(size, dtype=torch.float32, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = None  # of memory that all graphs share: one runs at a time

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, prompt_lens: torch.Tensor,
             words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens [B] at positions [B] of slots [B], whose prompts have prompt_lens [B] tokens, and draws the next ones by
        the noise of words [B, 2] int32 (kernels/sampling.py). Returns them [B] and their log-probs [B] fp32, nats, with the bits
        that training computes."""
        num_rows = len(tokens)
        bucket = bucket_of(num_rows)
        for static, given in ((self._tokens, tokens), (self._positions, positions), (self._slots, slots),
                              (self._prompt_lens, prompt_lens), (self._words, words)):
            static[:num_rows].copy_(given)
        self._positions[num_rows:bucket].fill_(IDLE)
        graph = self._graphs.get(bucket)
        if graph is not None:
            graph.replay()
        else:
            self._run(bucket)
            self._graphs[bucket] = self._capture(bucket)
        return self._drawn[:num_rows].clone(), self._log_probs[:num_rows].clone()

    def _run(self, bucket: int) -> None:
        prefix_lens = self._prompt_lens[:bucket] if self._counts_prompts_apart else None
        hidden = self.model.decode_hidden(self._tokens[:bucket], self._positions[:bucket], self.cache, self._slots[:bucket],
                                          prefix_lens=prefix_lens)
        drawn, log_probs = self.model.draw(hidden, self._words[:bucket], temperature=self.temperature)
        self._drawn[:bucket].copy_(drawn)
        self._log_probs[:bucket].copy_(log_probs)

    def _capture(self, bucket: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run(bucket)
        self._pool = graph.pool()
        return graph
