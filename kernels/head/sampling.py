"""Draws of tokens from softmax(logits / temperature) by the Gumbel-max trick, as grpo/rollout/sampling.py defines them.

  token_b = argmax_v (s_bv - max_v s_bv) + noise_bv,  s = logits / temperature,  noise = -log(-log1p(-w)),  w = (h + 1/2) / 2^31
where h is the lower 31 bits of a hash (multiply and xorshift, Chris Wellons' lowbias32) of v and of the row's RNG key, taken as
two numbers of 32 bits.

The logits are read once. The first kernel finds the winner of each chunk of a row, with scores relative to the chunk's largest s,
and stores winner and largest s. The second kernel scores the winners of a row again, in the order of the chunks, relative to the
row's largest s. Subtraction rounds, so the result depends on what is subtracted. The second kernel's scores equal the reference's
to the bit, and so do the first kernel's in the chunk with the row's largest s. In other chunks a smaller number is subtracted,
which rounds finer: their winner can differ from the reference's only if the two scores are equal up to their last bits.

The first kernel takes the exact noise of few ids. As -log1p(-w) >= w, a score is at most (s - largest) + 31 log(2) - log(h), and
the hardware's approximate logarithm is enough for such a bound. Each thread scores the id with the highest bound among its own,
and the next ones only as long as any id of the chunk may still win, which is rare.

On a GPU all other roundings are PyTorch's too: it divides by multiplying with the fp32 reciprocal, its log and log1p are
libdevice's, and nothing becomes a fused multiply-add. On the CPU PyTorch really divides and has other logarithms.

The RNG key of a row: seed, step, prompt id, sample and position, each times an odd number of its own, are summed modulo 2^64 and
mixed by the finaliser of SplitMix (Steele, Lea, Flood, OOPSLA 2014).

Shapes: B rows, V vocabulary, C chunks of a row.
"""
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from kernels.device import cdiv, check_served, is_gpu, is_interpreted, is_triton, launch, next_power_of_2

_ID_MULTIPLIER, _MULTIPLIER_1, _MULTIPLIER_2 = tl.constexpr(0x9E3779B9), tl.constexpr(0x7FEB352D), tl.constexpr(0x846CA68B)
_LARGEST_W = tl.constexpr(1 - 2.0**-24)  # keeps the logarithm finite where h + 1/2 rounds up to 2^31
# one for each column of a key; the last is the position's
_KEY_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xABC98388FB8FAC03, 0x8CB92BA72F3D8DD7, 0xF1357AEA2E62A9C5)
POSITION_MULTIPLIER = tl.constexpr(_KEY_MULTIPLIERS[4])
_MIX_1, _MIX_2 = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
_CHUNK, _THREADS = {"gpu": 4096, "interpreter": 512}, {"gpu": 128, "interpreter": 16}  # of a program: logits it compares, threads
# An id may win only if its key plus the best score is at most _MOST: in exact arithmetic, where a key is log(h) - (s - largest),
# 31 log(2); 2^-10 is for errors. Key and score have the same rounded s - largest, so large logits add none. When the loop ends,
# best > -3: the id with the largest s, whose score is its noise, has been scored, or its key, at most 31 log(2), is above the
# limit. So only keys up to 31 log(2) + 3 < 32 must be right. For these the approximate log(h) is off by less than 2^-17, the
# noise by 2^-18, each of four sums by 2^-20, and an id's place, in the key's last 5 bits, by 31 / 2^19: together less than 2^-13.
_MOST = tl.constexpr(31 * 0.6931471805599453 + 2.0**-10)


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >= 1 << (bits - 1) else value


def key_sums(keys: torch.Tensor) -> torch.Tensor:
    """[B] int64: the weighted sums, modulo 2^64, of keys [B, n] int64: the first n of seed, step, prompt id, sample, position.
    The sums of parts of a key add up to the sum of the key."""
    sums = keys.new_zeros(keys.shape[0])
    for column, multiplier in zip(keys.unbind(1), _KEY_MULTIPLIERS):
        sums += column * signed(multiplier, 64)
    return sums


def mix_sums(sums: torch.Tensor) -> torch.Tensor:
    """[B] int64: the RNG keys whose sums [B] are given."""
    keys = (sums ^ _shift_right(sums, 30)) * signed(_MIX_1.value, 64)
    keys = (keys ^ _shift_right(keys, 27)) * signed(_MIX_2.value, 64)
    return keys ^ _shift_right(keys, 31)


def _shift_right(keys: torch.Tensor, bits: int) -> torch.Tensor:
    return (keys >> bits) & ((1 << (64 - bits)) - 1)  # >> repeats the sign bit of an int64


def as_pairs(rng_keys: torch.Tensor) -> torch.Tensor:
    """RNG keys [B] int64 as halves [B, 2] int32, the lower one first; a view if they are contiguous."""
    return rng_keys.contiguous().view(torch.int32).view(-1, 2)


@triton.jit
def mix_sum(key):
    """mix_sums for uint64."""
    key = (key ^ (key >> 30)) * _MIX_1
    key = (key ^ (key >> 27)) * _MIX_2
    return key ^ (key >> 31)


def gumbel_noise_reference(rng_keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise [B, V] fp32 of RNG keys [B, 2] int32."""
    ids = torch.arange(vocab_size, dtype=torch.int32, device=rng_keys.device) * signed(_ID_MULTIPLIER.value)  # [V]
    first, second = rng_keys[:, :1], rng_keys[:, 1:]
    bits = ids ^ first  # [B, V] int32, whose >> repeats the sign bit
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * signed(_MULTIPLIER_1.value) + second
    bits = (bits ^ (bits >> 15 & 0x1FFFF)) * signed(_MULTIPLIER_2.value)
    w = ((bits ^ bits >> 16) & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=_LARGEST_W.value)
    return w.neg_().log1p_().neg_().log_().neg_()


def draw_tokens_reference(logits: torch.Tensor, rng_keys: torch.Tensor, temperature: float) -> torch.Tensor:
    scores = logits / temperature  # [B, V]
    largest = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(dim=-1, keepdim=True)
    scores -= largest.masked_fill_(largest == -torch.inf, 0.0)
    return scores.add_(gumbel_noise_reference(rng_keys, logits.shape[1])).argmax(dim=-1)  # NaN counts as the largest


@triton.jit
def _hash(ids, first, second):
    """h, as int32, of vocabulary ids int32, for both halves int32 of their row's RNG key."""
    bits = ids.to(tl.uint32, bitcast=True) * _ID_MULTIPLIER ^ first.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 16)) * _MULTIPLIER_1 + second.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 15)) * _MULTIPLIER_2
    signed = bits.to(tl.int32, bitcast=True)
    return (signed ^ (signed >> 16)) & 0x7FFFFFFF  # the shift repeats the sign bit


@triton.jit
def _noise(ids, first, second, HAS_LIBDEVICE: tl.constexpr):
    """Noise of vocabulary ids [N] int32, for both halves int32 of their row's RNG key."""
    w = tl.minimum((_hash(ids, first, second).to(tl.float32) + 0.5) * (2.0**-31), _LARGEST_W)
    if HAS_LIBDEVICE:
        return -libdevice.log(-libdevice.log1p(-w))
    # without libdevice: 1 - w rounds, and the quotient corrects that (Kahan)
    rest = 1.0 - w
    is_one = rest == 1.0
    return -tl.log(tl.where(is_one, w, tl.log(rest) * (w / tl.where(is_one, 1.0, rest - 1.0))))


@triton.jit
def _scores(s, largest, ids, first, second, HAS_LIBDEVICE: tl.constexpr):
    """The scores that a draw compares, relative to the `largest` s. NaN (also infinity minus infinity) counts as the largest."""
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # all logits are -inf or NaN
    scores = (s - largest) + _noise(ids, first, second, HAS_LIBDEVICE)
    return tl.where(scores != scores, float("inf"), scores)


@triton.jit
def _chunk_kernel(logits_ptr, rng_keys_ptr, largest_ptr, winners_ptr, temperature, vocab_size, num_chunks, stride_logits,
                  CHUNK: tl.constexpr, THREADS: tl.constexpr, HAS_LIBDEVICE: tl.constexpr):
    PER_THREAD: tl.constexpr = CHUNK // THREADS  # as ids of a thread lie: [PER_THREAD / 4, THREADS, 4], four are loaded at a time
    program = tl.program_id(0)
    row, start = (program // num_chunks).to(tl.int64), program % num_chunks * CHUNK
    logits_ptr += row * stride_logits
    first, second = tl.load(rng_keys_ptr + 2 * row), tl.load(rng_keys_ptr + 2 * row + 1)
    ids = start + tl.arange(0, CHUNK)
    s = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf")) * tl.div_rn(1.0, temperature)
    s = tl.reshape(s, (PER_THREAD // 4, THREADS, 4))
    largest = tl.max(s)  # passes over NaN
    largest = tl.where(largest == largest, largest, float("-inf"))
    tl.store(largest_ptr + program.to(tl.int64), largest)
    # The lower a key, the higher the bound. Positive floats are ordered as the integers of the same bits. A NaN's key, or that of
    # h = 0, becomes 0, the lowest; no other is negative.
    threads = start + 4 * tl.arange(0, THREADS)
    blocks, fours = tl.arange(0, PER_THREAD // 4)[:, None, None], tl.arange(0, 4)[None, None, :]
    h = _hash(threads[None, :, None] + blocks * (4 * THREADS) + fours, first, second).to(tl.float32)
    log2 = libdevice.fast_log2f(h) if HAS_LIBDEVICE else tl.log2(h)
    keys = tl.fma(log2, 0.6931472, tl.where(largest == float("-inf"), 0.0, largest) - s)
    # the last bits are the id's place in its thread: no two keys of a thread are equal
    keys = tl.where(keys > 0, keys, 0.0).to(tl.int32, bitcast=True) & -PER_THREAD | (blocks * 4 + fours)
    next_keys = tl.min(tl.min(keys, 2), 0)  # [THREADS]
    # a score of -inf wins nothing from the chunk's first id
    best, winners = tl.full((THREADS,), float("-inf"), tl.float32), tl.zeros((THREADS,), tl.int32) + start
    highest, next_key, limit = float("-inf"), 0, 1
    while next_key < limit:
        place = next_keys & (PER_THREAD - 1)
        candidates = threads + place // 4 * (4 * THREADS) + place % 4
        logits = tl.load(logits_ptr + candidates, mask=candidates < vocab_size, other=float("-inf"))
        scores = _scores(logits * tl.div_rn(1.0, temperature), largest, candidates, first, second, HAS_LIBDEVICE)
        is_better = (scores > best) | (scores == best) & (candidates < winners)
        best, winners = tl.where(is_better, scores, best), tl.where(is_better, candidates, winners)
        highest = tl.max(best, 0)
        limit = tl.maximum(-highest + _MOST, 1e-30).to(tl.int32, bitcast=True)  # above a key of 0 and its place
        # each thread's next higher key, if there is one: modulo 2^32 the others are 2^31 and more ahead
        steps = (keys - (next_keys + 1)[None, :, None]).to(tl.uint32, bitcast=True)
        steps = tl.min(tl.min(steps, 2), 0).to(tl.int32, bitcast=True)
        next_keys = tl.where(steps >= 0, next_keys + 1 + steps, 0x7FFFFFFF)
        next_key = tl.min(next_keys, 0)
    tl.store(winners_ptr + program.to(tl.int64), tl.min(tl.where(best == highest, winners, 0x7FFFFFFF), 0))


@triton.jit
def _row_kernel(logits_ptr, rng_keys_ptr, largest_ptr, winners_ptr, tokens_ptr, temperature, num_chunks, stride_logits,
                BLOCK: tl.constexpr, HAS_LIBDEVICE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, BLOCK)
    is_chunk = chunks < num_chunks
    ids = tl.load(winners_ptr + row * num_chunks + chunks, mask=is_chunk, other=0)
    largest = tl.max(tl.load(largest_ptr + row * num_chunks + chunks, mask=is_chunk, other=float("-inf")), 0)
    logits = tl.load(logits_ptr + row * stride_logits + ids, mask=is_chunk, other=float("-inf"))
    first, second = tl.load(rng_keys_ptr + 2 * row), tl.load(rng_keys_ptr + 2 * row + 1)
    scores = _scores(logits * tl.div_rn(1.0, temperature), largest, ids, first, second, HAS_LIBDEVICE)
    best = tl.argmax(scores, 0)  # the first among equals: ids rise from chunk to chunk
    tl.store(tokens_ptr + row, tl.sum(tl.where(chunks == best, ids, 0), 0).to(tl.int64))


def draw_tokens(logits: torch.Tensor, rng_keys: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Tokens [B] int64 drawn from softmax(logits / temperature), the lowest id among equal scores; a function of each row alone.

    logits [B, V] fp32, rows may be strided; rng_keys [B, 2] int32: a row's RNG key, its lower half first. If all logits of a row
    are -inf, its token is 0; if some are NaN or +inf, the first of those. Nothing waits for the host and grids depend on shapes
    alone, so a CUDA graph can capture it. No gradient. Raises ValueError for a temperature that is not above 0 and for logits
    that are not fp32."""
    (num_rows, vocab_size), operation = logits.shape, "draw_tokens"
    if not temperature > 0:
        raise ValueError(f"{operation}: temperature={temperature}; must be above 0")
    check_served(operation, {"logits": logits}, dtypes=(torch.float32,), tensor_cores=False)
    assert vocab_size > 0, f"{operation}: logits are {tuple(logits.shape)}"
    given, expected = (rng_keys.shape, rng_keys.dtype, rng_keys.device), ((num_rows, 2), torch.int32, logits.device)
    assert given == expected, f"{given} {expected}"
    logits, rng_keys = logits.detach(), rng_keys.contiguous()
    if not is_triton(logits):
        return draw_tokens_reference(logits, rng_keys, temperature)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    chunk, threads = (sizes["gpu" if is_gpu(logits) else "interpreter"] for sizes in (_CHUNK, _THREADS))
    num_chunks = cdiv(vocab_size, chunk)
    largest = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=logits.device)
    winners = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=logits.device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return tokens
    constants = {"HAS_LIBDEVICE": not is_interpreted(), "enable_fp_fusion": False}
    launch(_chunk_kernel, (num_rows * num_chunks,), logits, rng_keys, largest, winners, float(temperature), vocab_size,
           num_chunks, logits.stride(0), CHUNK=chunk, THREADS=threads, num_warps=_THREADS["gpu"] // 32, **constants)
    launch(_row_kernel, (num_rows,), logits, rng_keys, largest, winners, tokens, float(temperature), num_chunks, logits.stride(0),
           BLOCK=next_power_of_2(num_chunks), num_warps=1, **constants)
    return tokens
