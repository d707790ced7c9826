"""Log-probability of chosen tokens and entropy of the whole distribution, from hidden states, without keeping logits.

z = W h / temperature; log p(y) = z_y - logsumexp_{i in kept} z_i; entropy = -sum_i p_i log p_i over the full vocabulary.
`kept` is the set a sampling filter left (empty: the whole vocabulary), so that the trainer scores under the distribution that was
sampled from. Logits are fp32; tokens are processed in chunks and logits recomputed in the backward:
  dz_i += g_logp (1[i = y] - p_i^kept),  dz_i += -g_entropy p_i (log p_i + entropy).

Shapes: N tokens, D model width, V vocabulary.
"""
import torch

from kernels.linear import linear

# logits held at once, in elements
_MAX_LOGITS = 1 << 27


def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [N, D], weight [V, D] -> logits [N, V] fp32, with fp32 products and sums."""
    if weight.dtype == torch.float32:
        return linear(hidden.float(), weight, None)
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float32, device=hidden.device)
    rows = 1 << 14  # an fp32 copy of the head is made piece by piece
    for start in range(0, weight.shape[0], rows):
        logits[:, start:start + rows] = linear(hidden.float(), weight[start:start + rows].float(), None)
    return logits


def _kept_mask(z: torch.Tensor, kept_ids: torch.Tensor, kept_offsets: torch.Tensor) -> torch.Tensor:
    """Mask [n, V]: true for the kept ids of each row, and everywhere in rows without a filter."""
    counts = kept_offsets[1:] - kept_offsets[:-1]
    mask = (counts == 0).unsqueeze(1).expand_as(z).clone()
    rows = torch.repeat_interleave(torch.arange(len(counts), device=z.device), counts)
    mask[rows, kept_ids[kept_offsets[0]:kept_offsets[-1]].long()] = True
    return mask


def _kept_log_probs(z: torch.Tensor, log_p: torch.Tensor, kept_ids: torch.Tensor | None, kept_offsets: torch.Tensor | None,
                    part: slice) -> torch.Tensor:
    """log p [n, V] of rows `part`, renormalised over what each row keeps; log_p itself where nothing is filtered."""
    if kept_ids is None:
        return log_p
    mask = _kept_mask(z, kept_ids, kept_offsets[part.start:part.start + z.shape[0] + 1])
    return torch.log_softmax(z.masked_fill(~mask, float("-inf")), dim=-1)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, kept_ids, kept_offsets):
        chunk = max(1, _MAX_LOGITS // weight.shape[0])
        log_probs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_probs)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            z = head_logits(hidden[part], weight).div_(temperature)
            # rounds as the sampler does: the maximum is taken off before the logarithm
            log_p = torch.log_softmax(z, dim=-1)
            kept_log_p = _kept_log_probs(z, log_p, kept_ids, kept_offsets, part)
            log_probs[part] = kept_log_p.gather(1, targets[part].unsqueeze(1)).squeeze(1)
            entropy[part] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, entropy, kept_ids, kept_offsets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # an output nobody differentiates costs nothing
        return log_probs, entropy

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy):
        hidden, weight, targets, entropy, kept_ids, kept_offsets = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            z = head_logits(hidden[part], weight).div_(ctx.temperature)
            log_p = torch.log_softmax(z, dim=-1)
            grad_z = torch.zeros_like(z)
            if grad_entropy is not None:
                grad_z -= log_p.exp() * (log_p + entropy[part].unsqueeze(1)) * grad_entropy[part].unsqueeze(1)
            if grad_log_probs is not None:
                kept_log_p = _kept_log_probs(z, log_p, kept_ids, kept_offsets, part)
                grad_z -= kept_log_p.exp() * grad_log_probs[part].unsqueeze(1)
                grad_z.scatter_add_(1, targets[part].unsqueeze(1), grad_log_probs[part].unsqueeze(1))
            grad_z /= ctx.temperature
            if needs_hidden:
                grad_hidden[part] = (grad_z.to(weight.dtype) @ weight).to(hidden.dtype)
            if needs_weight:
                grad_weight += grad_z.T @ hidden[part].float()
        return (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None)


def log_probs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, temperature: float,
              kept_ids: torch.Tensor | None = None, kept_offsets: torch.Tensor | None = None,
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [N, D], weight [V, D], targets [N] int64; kept_ids int32 with kept_offsets [N + 1] int64 (row n keeps
    kept_ids[kept_offsets[n]:kept_offsets[n + 1]]). Returns log-probs [N] and entropy [N], fp32 nats, both differentiable."""
    return _LogProbs.apply(hidden, weight, targets, temperature, kept_ids, kept_offsets)
