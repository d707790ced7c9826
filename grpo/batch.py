"""Records of a rollout and their packed form.

A completion is an append-only list of segments; what the policy sampled is what gets trained on, so the loss mask follows
from the segments' source and token ids are never rendered or tokenised a second time. Where a user's turn drops earlier analysis
from the context, the completion goes on with another prompt: it then has two sequences, and is still one of its group.

`pack` lays out whole sequences, each with its prompt. A micro-batch may share prompts: a group then stands as its prompt, once,
and a sequence per completion that continues it (models/gpt_oss.py: log_probs, `prefixes`). Same numbers, fewer tokens.

Shapes: T packed tokens, S sequences.
"""
import itertools
import math
import random
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F

from models.gpt_oss import KeptSets
from models.routing_record import no_record


@dataclass
class Prompt:
    id: int  # unique within a step: the group's identity and part of the sampling key
    token_ids: list[int]
    row: dict  # the environment's data: question, answer, columns


@dataclass
class Segment:
    token_ids: list[int]
    source: str  # "prompt" | "policy" | "env"; only policy tokens are trained on
    log_probs: list[float] | None = None  # nats, under the distribution really sampled from; policy segments only
    kept_ids: list[torch.Tensor] | None = None  # per token, the ids a filter (top-k, top-p, min-p) kept: [n] int32 on the host
    routing: torch.Tensor | None = None  # [tokens, L, A] on the host: experts of each layer (models/routing_record.py)
    num_repeated: int = 0  # of a later sequence's prompt: its first tokens, which the completion has had before
    # per token, the policy that drew it: the number of steps finished then; None: one policy drew the whole rollout
    versions: list[int] | None = None


@dataclass
class ToolCall:
    name: str  # the recipient that the model wrote
    arguments: str
    result: str  # what the model was told
    is_failed: bool  # that was an error
    raised: str | None = None  # what the tool raised, and where, if it was no ValueError


@dataclass
class Episode:
    """What happened beside a completion's tokens, in an environment with tools."""

    calls: list[ToolCall] = field(default_factory=list)
    failure: str | None = None  # why it ended early and has no reward of its own
    may_be_models: bool = False  # the failure came in a call that the model made, or after one had raised
    failure_reward: float | None = None  # what it gets nevertheless; None: it drops out of its group
    seconds: float = 0.0  # in the environment's code
    reward: object = None  # what its get_reward() returned


@dataclass
class Completion:
    prompt: Prompt
    sample: int  # index within the group
    segments: list[Segment]
    finish_reason: str  # "stop" (a stop token was sampled) | "length" | with tools "turns" (the limit of turns) or "failed"
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    episode: Episode | None = None  # None without tools

    @property
    def is_truncated(self) -> bool:
        """Whether a limit on tokens or turns cut it off."""
        return self.finish_reason in ("length", "turns")

    @property
    def completion_ids(self) -> list[int]:
        """Everything after the prompt, policy and environment tokens alike, once."""
        return [token for segment in self.segments[1:] for token in segment.token_ids[segment.num_repeated:]]

    @property
    def is_policy(self) -> list[bool]:
        """For each of `completion_ids`, whether the policy sampled it."""
        return [segment.source == "policy" for segment in self.segments[1:] for _ in segment.token_ids[segment.num_repeated:]]

    @property
    def sequences(self) -> list[list[Segment]]:
        """The segments of each sequence that is trained on: each begins with its prompt."""
        starts = [0, *(place for place, segment in enumerate(self.segments) if place and segment.source == "prompt")]
        return [self.segments[start:end] for start, end in zip(starts, [*starts[1:], None])]

    @property
    def num_policy_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments if segment.source == "policy")

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)


_ON_HOST = ("cu_seqlens", "host_mask", "ref_hidden")
_PER_TOKEN = ("tokens", "loss_mask", "advantages", "sampler_log_probs", "old_log_probs", "ref_log_probs", "token_index",
              "sequence_ids", "routing", "channels")


@dataclass
class RolloutBatch:
    """Sequences end to end: all that a GRPO step trains on, a minibatch (one optimizer step), or a micro-batch.

    Tensors [N] describe all completions that were packed, in every part too; `sequence_ids` are places in them. The counts are
    those of the optimizer step in each of its micro-batches: a loss divides by them, so that its value and gradient do not depend
    on the split."""

    tokens: torch.Tensor  # [T] int64
    cu_seqlens: torch.Tensor  # [S + 1] int32, on the host wherever the others are
    loss_mask: torch.Tensor  # [T] bool, true for the tokens that the policy sampled
    host_mask: torch.Tensor  # [T] bool, loss_mask on the host: so the host can plan a forward without waiting for the GPU
    sampler_log_probs: torch.Tensor  # [T] fp32 nats, 0 where the mask is false
    advantages: torch.Tensor  # [T] fp32
    token_index: torch.Tensor  # [T] int64, a token's index in the whole packed batch
    sequence_ids: torch.Tensor  # [T] int64, the completion that a token belongs to; of a shared prompt, the first
    sequence_lengths: torch.Tensor  # [N] int64, policy tokens of each completion
    rewards: torch.Tensor  # [N] fp32, NaN without
    group_ids: torch.Tensor  # [N] int64, equal within a group
    group_lengths: torch.Tensor  # [N] int64, policy tokens in the optimizer step of all completions of the group
    prompts: list[tuple[int, int]]  # [S] the prompt's number (equal prompts have equal numbers), and its tokens in the sequence
    owners: list[int]  # [S] the completion, as in sequence_ids; one with user turns has several sequences, which are neighbours
    num_policy_tokens: int  # of the optimizer step, like the next two
    num_sequences: int  # completions
    num_prompts: int
    prefixes: list[int] | None = None  # [S] index of the shared prompt that each sequence continues, -1 for none; None: all whole
    kept: KeptSets | None = None
    routing: torch.Tensor | None = None  # [T, L, A] uint8 or int16: the experts that the sampler chose, for a replay
    old_log_probs: torch.Tensor | None = None  # [T] fp32 nats: the policy at the start of the update
    ref_log_probs: torch.Tensor | None = None  # [T] fp32 nats: the reference of the KL penalty (grpo/kl.py)
    # for the KL over the full vocabulary: the reference's hidden states of the n trained tokens [n, D], on the host, and its head
    # if that is not the policy's [V, D]
    ref_hidden: torch.Tensor | None = None
    ref_head: torch.Tensor | None = None
    # [N] float64 nats: the log-prob of each completion before the update, and the reference's (optim.sums_log_probs)
    old_sums: torch.Tensor | None = None
    ref_sums: torch.Tensor | None = None
    channels: torch.Tensor | None = None  # [T] uint8 (grpo/channels.py)
    is_recorded: bool = False  # of data: `sampler_log_probs` are no sampler's

    @property
    def num_rows(self) -> int:
        """Sequences in this (micro-)batch."""
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> list[int]:
        """The tokens of each sequence."""
        return self.cu_seqlens.diff().tolist()

    def num_tokens_of(self, rows: list[int], *, share_prompts: bool) -> int:
        """The tokens of a micro-batch of these sequences."""
        lengths = self.lengths
        shared = {self.prompts[row]: self.prompts[row][1] for row in rows} if share_prompts else {}
        return sum(shared.values()) + sum(lengths[row] - shared.get(self.prompts[row], 0) for row in rows)

    def to(self, device: torch.device) -> "RolloutBatch":
        """The batch with every tensor on `device`, except those that stay on the host."""
        moved = {f.name: value.to(device) for f in fields(self)
                 if isinstance(value := getattr(self, f.name), torch.Tensor) and f.name not in _ON_HOST}
        if self.kept is not None:
            moved["kept"] = KeptSets(self.kept.ids.to(device), self.kept.offsets.to(device))
        return replace(self, **moved)

    def select(self, rows: list[int], *, share_prompts: bool = False) -> "RolloutBatch":
        """The given sequences, in the given order; the counts stay those of the step. With `share_prompts`, neighbouring
        completions of one prompt have one copy of it: it is a sequence of its own, which each completion continues."""
        assert self.prefixes is None, "select takes a batch of whole sequences"
        bounds = self.cu_seqlens.tolist()
        spans: list[tuple[int, int]] = []  # of this batch's tokens
        prompts, owners, prefixes = [], [], []  # of each span
        for (prompt, length), neighbours in itertools.groupby(rows, key=self.prompts.__getitem__):
            members, prefix, shared = list(neighbours), -1, 0
            if share_prompts:  # even for one completion: attention then rounds in the same way in any micro-batch
                prefix, shared = len(spans), length
                spans.append((bounds[members[0]], bounds[members[0]] + length))
                prompts.append((prompt, length))
                owners.append(self.owners[members[0]])
                prefixes.append(-1)
            spans += [(bounds[row] + shared, bounds[row + 1]) for row in members]
            prompts += [(prompt, length - shared)] * len(members)
            owners += [self.owners[row] for row in members]
            prefixes += [prefix] * len(members)
        host_index = torch.cat([torch.arange(start, end) for start, end in spans])  # [T']
        index = host_index.to(self.tokens.device)
        lengths = torch.tensor([end - start for start, end in spans])
        per_token = {name: value[index] for name in _PER_TOKEN if (value := getattr(self, name)) is not None}
        if self.ref_hidden is not None:
            chosen = host_index[self.host_mask[host_index]]  # trained tokens
            per_token["ref_hidden"] = self.ref_hidden[self.host_mask.cumsum(0)[chosen] - 1]
        return replace(
            self, **per_token,
            cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(), host_mask=self.host_mask[host_index],
            prompts=prompts, owners=owners, prefixes=prefixes if max(prefixes) >= 0 else None,
            kept=None if self.kept is None else self.kept.select(index))


def pack(completions: list[Completion], advantages: list[float]) -> RolloutBatch:
    """Packs completions, each with its advantage, end to end, and counts what losses divide by."""
    if len(completions) != len(advantages):
        raise ValueError(f"pack: {len(completions)} completions but {len(advantages)} advantages")
    if not completions:
        raise ValueError("pack: no completions to train on; skip the update instead")
    tokens, mask, log_probs, kept_ids, kept_counts, prompts, owners, numbers = [], [], [], [], [], [], [], {}
    for index, completion in enumerate(completions):
        for sequence in completion.sequences:
            prompt_ids = sequence[0].token_ids if sequence[0].source == "prompt" else []
            # id and tokens: equal ids alone do not make prompts equal
            number = numbers.setdefault((completion.prompt.id, *prompt_ids), len(numbers))
            prompts.append((number, len(prompt_ids)))
            owners.append(index)
        for segment in completion.segments:
            length = len(segment.token_ids)
            _check_segment(segment)
            is_policy = segment.source == "policy"
            tokens += segment.token_ids
            mask += [is_policy] * length
            log_probs += segment.log_probs if is_policy else [0.0] * length
            if is_policy and segment.kept_ids is not None:
                kept_counts += [len(ids) for ids in segment.kept_ids]
                kept_ids += segment.kept_ids
            else:
                kept_counts += [0] * length
    totals = torch.tensor([completion.num_tokens for completion in completions])
    lengths = torch.tensor([sum(len(segment.token_ids) for segment in sequence)
                            for completion in completions for sequence in completion.sequences])
    policy_lengths = torch.tensor([completion.num_policy_tokens for completion in completions])
    loss_mask = torch.tensor(mask)
    return RolloutBatch(
        tokens=torch.tensor(tokens), cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(), loss_mask=loss_mask, host_mask=loss_mask,
        sampler_log_probs=torch.tensor(log_probs, dtype=torch.float32),
        advantages=torch.repeat_interleave(torch.tensor(advantages, dtype=torch.float32), totals),
        token_index=torch.arange(len(tokens)), prompts=prompts, owners=owners,
        sequence_ids=torch.repeat_interleave(torch.arange(len(completions)), totals), sequence_lengths=policy_lengths,
        rewards=torch.tensor([math.nan if completion.reward is None else completion.reward for completion in completions],
                             dtype=torch.float32),
        group_ids=torch.tensor([completion.prompt.id for completion in completions]),
        group_lengths=_lengths_of_groups([completion.prompt.id for completion in completions], policy_lengths, set(owners)),
        num_policy_tokens=int(policy_lengths.sum()), num_sequences=len(completions), num_prompts=_num_prompts(prompts, owners),
        routing=_packed_routing(completions),
        kept=KeptSets.of_counts(torch.cat(kept_ids), torch.tensor(kept_counts)) if kept_ids else None)


def _num_prompts(prompts: list[tuple[int, int]], owners: list[int]) -> int:
    """How many prompts completions begin with; those of their later sequences do not count."""
    return len({number for (number, _), owner, before in zip(prompts, owners, [None, *owners]) if owner != before})


def _lengths_of_groups(group_ids: list[int], lengths: torch.Tensor, owners: set[int]) -> torch.Tensor:
    """[N]: for each completion the sum of the lengths of those of its group among `owners`."""
    totals, host_lengths = dict[int, int](), lengths.tolist()
    for owner in owners:
        totals[group_ids[owner]] = totals.get(group_ids[owner], 0) + host_lengths[owner]
    return torch.tensor([totals.get(group_id, 0) for group_id in group_ids]).to(lengths.device)


def _packed_routing(completions: list[Completion]) -> torch.Tensor | None:
    """The records of all segments end to end, with empty ones for segments that have none; None if no segment has one."""
    segments = [segment for completion in completions for segment in completion.segments]
    known = next((segment.routing for segment in segments if segment.routing is not None), None)
    if known is None:
        return None
    return torch.cat([
        known.new_full((len(segment.token_ids), *known.shape[1:]), no_record(known.dtype)) if segment.routing is None
        else segment.routing for segment in segments])


def _check_segment(segment: Segment) -> None:
    if segment.source not in ("prompt", "policy", "env"):
        raise ValueError(f"a segment's source is {segment.source!r}; allowed: prompt, policy, env")
    length, records = len(segment.token_ids), {"rows of routing": segment.routing}
    if segment.source == "policy":
        records |= {"log_probs": [] if segment.log_probs is None else segment.log_probs, "kept_ids": segment.kept_ids,
                    "versions": segment.versions}
    for name, record in records.items():
        if record is not None and len(record) != length:
            raise ValueError(f"a {segment.source} segment of {length} tokens has {len(record)} {name}; each token needs its own")


def check_ids(what: str, token_ids: object, *, vocab_size: int) -> None:
    if not isinstance(token_ids, (list, tuple)):
        raise ValueError(f"token ids for {what}: expected a list of integers, found {type(token_ids).__name__}")
    if wrong := [token for token in token_ids if type(token) is not int or not 0 <= token < vocab_size]:
        raise ValueError(f"token ids {wrong[:5]} for {what}: must be integers and must lie in [0, {vocab_size})")


def check_prompts(prompts: list[Prompt], *, max_len: int, taken: set[int]) -> None:
    seen = set(taken)
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"prompt id {prompt.id} occurs twice: ids must be unique within a rollout, since equal "
                             "ids would draw equal completions and merge two groups")
        seen.add(prompt.id)
        length = len(prompt.token_ids)
        if length == 0:
            raise ValueError(f"prompt {prompt.id} has no tokens: a prompt needs at least one")
        if length >= max_len:
            raise ValueError(f"prompt {prompt.id} has {length} tokens, but a sequence may have {max_len} at most (max_len, "
                             "by default the model's max_position_embeddings) and needs one for the completion: shorten "
                             "the prompt or drop it")


def micro_batches(batch: RolloutBatch, max_tokens: int, *, share_prompts: bool = False) -> list[RolloutBatch]:
    """Splits into micro-batches of whole sequences with at most `max_tokens` tokens each (first fit, longest first). A longer
    sequence is a micro-batch of its own.

    The sequences of a completion stay together. With `share_prompts` a prompt's completions stay together, behind one copy of it,
    where they fit; a group too long for one micro-batch repeats its prompt in each that it needs."""
    return [batch.select(rows, share_prompts=share_prompts)
            for rows in rows_of_micro_batches(batch, max_tokens, share_prompts=share_prompts)]


def rows_of_micro_batches(batch: RolloutBatch, max_tokens: int, *, share_prompts: bool) -> list[list[int]]:
    """The rows of the batch that each of its micro-batches has, in the order for `select`."""
    lengths = batch.lengths
    owned = _rows_by_owner(batch)
    bundles = [(rows, sum(lengths[row] for row in rows)) for rows in owned]  # rows that stay together, with their tokens
    if share_prompts:
        bundles, owned_of_prompt = [], dict[tuple[int, int], list[list[int]]]()
        for rows in owned:
            owned_of_prompt.setdefault(batch.prompts[rows[0]], []).append(rows)
        for (_, prompt_len), members in owned_of_prompt.items():
            own = [(rows, sum(lengths[row] for row in rows) - prompt_len) for rows in members]
            bundles += [(part, prompt_len + load) for part, load in _first_fit(own, max_tokens - prompt_len)]
    # neighbours share, so the completions of a prompt must stand together, wherever the batch has them
    return [sorted(rows, key=lambda row: (batch.prompts[row][0], row)) for rows, _ in _first_fit(bundles, max_tokens)]


def even_rows_of_micro_batches(batch: RolloutBatch, max_tokens: int, *, share_prompts: bool, multiple: int) -> list[list[int]]:
    """As rows_of_micro_batches, but of about equal length, and as many as a multiple of `multiple`, where there are enough
    completions (longest first, each to the shortest)."""
    lengths, owned = batch.lengths, _rows_by_owner(batch)
    whole = [(rows, sum(lengths[row] for row in rows)) for rows in owned]
    shared: dict[tuple[int, int], list[int]] = {}
    for rows in owned if share_prompts else ():
        shared.setdefault(batch.prompts[rows[0]], []).extend(rows)
    groups = [(rows, batch.num_tokens_of(rows, share_prompts=True)) for rows in shared.values()]
    for num in range(multiple, len(owned) + multiple, multiple):
        for bundles in (groups, whole):  # with groups together if that suffices
            bins = _longest_first(bundles, min(num, len(owned)))
            if bins and (max(load for _, load in bins) <= max_tokens or num >= len(owned) and bundles is whole):
                return [sorted(rows, key=lambda row: (batch.prompts[row][0], row)) for rows, _ in bins]
    raise AssertionError(f"{len(owned)} completions do not fill micro-batches")


def _longest_first(bundles: list[tuple[list[int], int]], num: int) -> list[tuple[list[int], int]]:
    """The bundles in `num` bins, the longest first, each into the bin with the least; [] if there are fewer bundles."""
    bins: list[tuple[list[int], int]] = [([], 0) for _ in range(num)] if len(bundles) >= num else []
    for rows, length in sorted(bundles, key=lambda bundle: -bundle[1]) if bins else ():
        place = min(range(num), key=lambda place: bins[place][1])
        bins[place] = (bins[place][0] + rows, bins[place][1] + length)
    return bins


def _rows_by_owner(batch: RolloutBatch) -> list[list[int]]:
    """The rows of each completion, which are neighbours."""
    return [list(rows) for _, rows in itertools.groupby(range(batch.num_rows), key=batch.owners.__getitem__)]


def halves(batch: RolloutBatch, rows: list[int]) -> list[list[int]]:
    """At least two rows of a batch, in the same order, in two parts of about as many tokens; a completion is split only alone."""
    ends = list(itertools.accumulate(batch.lengths[row] for row in rows))
    cuts = range(1, len(rows))
    between = [cut for cut in cuts if batch.owners[rows[cut]] != batch.owners[rows[cut - 1]]]
    first = min(between or cuts, key=lambda count: abs(2 * ends[count - 1] - ends[-1]))
    return [rows[:first], rows[first:]]


def _first_fit(bundles: list[tuple[list[int], int]], capacity: int) -> list[tuple[list[int], int]]:
    """Puts bundles into bins of `capacity` tokens: the longest first, each into the first bin with room; a longer bundle alone
    into one."""
    bins: list[tuple[list[int], int]] = []
    for rows, length in sorted(bundles, key=lambda bundle: -bundle[1]):
        slot = next((i for i, (_, load) in enumerate(bins) if load + length <= capacity), None)
        if slot is None:
            bins.append((rows, length))
        else:
            bins[slot] = (bins[slot][0] + rows, bins[slot][1] + length)
    return bins


def minibatches(batch: RolloutBatch, num: int, *, seed: int, whole_prompts: bool = False) -> list[RolloutBatch]:
    """Shuffles the completions, or with whole_prompts the groups, and splits them into `num` optimizer steps, each with counts of
    its own."""
    if num == 1:
        return [batch]
    units = _rows_by_owner(batch)
    if whole_prompts:
        by_prompt = dict[tuple[int, int], list[int]]()
        for rows in units:
            by_prompt.setdefault(batch.prompts[rows[0]], []).extend(rows)
        units = list(by_prompt.values())
    random.Random(seed).shuffle(units)
    parts = [batch.select(sorted(itertools.chain(*chosen))) for i in range(num) if (chosen := units[i::num])]
    return [replace(part, num_sequences=len(set(part.owners)), num_policy_tokens=int(part.host_mask.sum()),
                    num_prompts=_num_prompts(part.prompts, part.owners),
                    group_lengths=_lengths_of_groups(batch.group_ids.tolist(), batch.sequence_lengths, set(part.owners)))
            for part in parts]
