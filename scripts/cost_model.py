"""Predicts a GRPO step on N GPUs from what was measured on one. A model: nothing that it prints was measured on several GPUs.

    python scripts/cost_model.py                                              the tables of scripts/EXPERIMENTS.md
    python scripts/cost_model.py --gpus 1,2 --prompts 16 --rows 128 --mean none               one batch of 20b, divided

A step on `parts` parts of the work (a part is a rank, or a group of ranks that share experts):

    rollout     each part prefills its prompts and decodes their completions, at most `rows` at once, each decode step as long as
                measured for so many live rows; then all wait for the slowest. Lengths are random, so the slowest is an expected
                maximum: the mean over `TRIALS` seeded draws of all lengths
    completions all ranks get those of all (pickled Python lists, gathered between hosts), and meet in the store
    update      micro-batches in rounds, one a part and round; after each round the gradients of all are added in their order
                (`distributed.reduction=ordered`), at last all get the sum; the optimizer's step is whole on each rank

Layouts of experts over E ranks: `shared`, as grpo/distributed does it (all ranks of a group do the same rows, each its own
experts), and `divided` (each rank has rows of its own and sends them to the experts and back; in slot order, so all outputs
travel), which does not exist. Units: seconds, bytes, tokens.
"""
import argparse
import heapq
import math
import random
import statistics
from typing import NamedTuple

WIDTH_BYTES = 2 * 2880  # of a row of hidden states, bf16
EXPERTS_PER_TOKEN = 4
KEY_BYTES = 2 * 2 * 8 * 64  # keys and values of a token in a layer, bf16; half of the layers see all tokens
EXCHANGE_BYTES = 1 << 25  # of gradients in one all-to-all (half of models/memory_plan.py's buffers)
TRIALS = 8
PASSES = 3  # over a layer in training: forward, again in the backward, backward


class Gpu(NamedTuple):
    """A model on one NVIDIA H200, LoRA r = 16 on attention and experts. Sources: scripts/EXPERIMENTS.md."""

    decode: dict[int, float]  # tokens/s by live rows, at a context of CONTEXT tokens
    prefill: float  # tokens/s
    train: float  # tokens/s
    least_micro_batch: float  # seconds: the host's launches
    optimizer: float  # seconds a step
    num_layers: int
    num_experts: int
    expert_bytes: float  # of one expert, MXFP4
    dense_bytes: float  # that a decode step reads beside experts: attention, head
    expert_share: float  # of a token's products
    gradient_bytes: float  # fp32
    state_bytes: float  # of a checkpoint: weights and moments of what trains
    copy: float  # bytes/s of device memory


CONTEXT = 620  # tokens a row has, on average, while the decode rates are measured
GPUS = {
    # 293968f; training as 4 x 2048 and 1 x 2048 with nothing recomputed; the optimizer with the rollout's figures
    "20b": Gpu({1: 448, 8: 2038, 32: 6242, 128: 18161, 512: 33930}, 78865, 28607, 0.125, 0.03, 24, 32, 13.22e6, 2.43e9,
               0.64, 0.74e9, 2.22e9, 4.26e12),
    # 1 and 64 rows and training measured within 80 GB (86bbaf1, README); 8 rows from the whole step of 8 x 2,048 there; 128 and
    # 512 rows scaled from 20b: the experts not yet read at 64, then 1.43 times 20b's seconds a row; prefill by a token's products
    "120b": Gpu({1: 280, 8: 1140, 64: 4600, 128: 7750, 512: 17800}, 55000, 10800, 0.19, 0.06, 36, 128, 13.22e6, 3.07e9,
                0.70, 4.29e9, 12.9e9, 4.26e12),
}


class Links(NamedTuple):
    """Assumptions, none of them measured here but the last two (on a CPU): bytes/s of each GPU, seconds."""

    nvlink: float = 350e9  # of collectives inside a node
    network: float = 45e9  # a port of 400 Gb/s for each GPU
    node: int = 8  # GPUs of a node
    launch: float = 20e-6  # of a collective
    peer: float = 2e-6  # of each peer of an all-to-all, and of each broadcast beside its launch
    host: float = 1.5e9  # gloo, bytes/s through each rank
    disk: float = 2e9
    load: float = 5e9  # checkpoint files of a node; the ranks of a node read them once
    store: float = 2.5e-6  # seconds of the store's server for a key that a rank reads
    pickled: float = 13.4  # bytes of a token and its log-prob
    pickle: float = 3.2e-7  # seconds to write and read one


class Batch(NamedTuple):
    prompts: int
    group: int = 16
    prompt_len: int = 512
    max_new: int = 1024
    mean: float | None = 512  # of an exponential distribution of lengths, cut off at max_new; None: all have max_new
    rows: int = 128  # that a part decodes at once (rollout.max_batch)
    micro_batch: int = 16384  # tokens (optim.max_tokens)
    is_even: bool = True  # distributed.micro_batches = the number of parts


class Layout(NamedTuple):
    gpus: int
    sharers: int = 1  # ranks that hold the experts together
    is_divided: bool = False  # each of them has rows of its own

    @property
    def parts(self) -> int:
        return self.gpus // self.sharers


class Step(NamedTuple):
    rollout: float  # of the slowest part
    mean_rollout: float  # of the parts
    completions: float
    update: float  # products, of the slowest part
    gradients: float
    optimizer: float
    tokens: float  # sampled, of all completions

    @property
    def exchange(self) -> float:
        return self.completions + self.gradients

    @property
    def seconds(self) -> float:
        return self.rollout + self.update + self.exchange + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


# ---- the rollout


def step_seconds(rates: dict[int, float], rows: int) -> float:
    """Of a decode step, between the measured numbers of rows along a straight line."""
    known = sorted((number, number / rate) for number, rate in rates.items())
    assert 1 <= rows <= known[-1][0], f"{rows} rows: measured are 1 to {known[-1][0]}"
    for (low, first), (high, last) in zip(known, known[1:]):
        if rows <= high:
            return first + (last - first) * (rows - low) / (high - low)
    return known[0][1]


def remote_ranks(num_experts: int, sharers: int) -> float:
    """Of the other sharers, how many have at least one of a token's experts, where all experts are equally likely."""
    elsewhere = num_experts - num_experts // sharers
    return (sharers - 1) * (1 - math.comb(elsewhere, EXPERTS_PER_TOKEN) / math.comb(num_experts, EXPERTS_PER_TOKEN))


def expert_traffic(gpu: Gpu, layout: Layout) -> float:
    """Bytes that a rank sends in one layer's pass for each of its rows: a row to its experts and their outputs back, or where all
    have the row, the all-reduce of the outputs."""
    others = (layout.sharers - 1) / layout.sharers
    if layout.is_divided:
        return WIDTH_BYTES * (remote_ranks(gpu.num_experts, layout.sharers) + EXPERTS_PER_TOKEN * others)
    return 2 * WIDTH_BYTES * EXPERTS_PER_TOKEN * others


def decode_step(gpu: Gpu, layout: Layout, links: Links, rows: int, context: float) -> float:
    """Seconds of a decode step of a part's live rows. Experts take the share of the measured time that their bytes have."""
    own = -(-rows // layout.sharers) if layout.is_divided else rows
    keys = own * max(0.0, context - CONTEXT) * KEY_BYTES * gpu.num_layers / 2 / gpu.copy
    if layout.sharers == 1:
        return step_seconds(gpu.decode, rows) + keys
    dense = step_seconds(gpu.decode, own) * (1 - share_of_experts(gpu, own))
    experts = step_seconds(gpu.decode, rows) * share_of_experts(gpu, rows) / layout.sharers
    collectives = 2 if layout.is_divided else 1
    return dense + experts + keys + gpu.num_layers * (
        collectives * links.launch + own * expert_traffic(gpu, layout) / links.nvlink)


def share_of_experts(gpu: Gpu, rows: int) -> float:
    """Of the bytes that a decode step reads."""
    touched = 1 - (1 - EXPERTS_PER_TOKEN / gpu.num_experts) ** rows
    experts = touched * gpu.num_experts * gpu.num_layers * gpu.expert_bytes
    return experts / (experts + gpu.dense_bytes)


def draw_lengths(batch: Batch, number: int, draw: random.Random) -> list[int]:
    if batch.mean is None:
        return [batch.max_new] * number
    return [min(batch.max_new, math.ceil(draw.expovariate(1 / batch.mean))) for _ in range(number)]


def decode_seconds(lengths: list[int], rows: int, seconds_of: dict[int, float]) -> float:
    """Of all completions, at most `rows` at once; one that ends makes room for the next. seconds_of: a decode step, by live
    rows."""
    live, waiting = sorted(lengths[:rows]), lengths[:rows - 1:-1] if rows < len(lengths) else []
    now, seconds = 0, 0.0
    while live:
        end = live[0]
        seconds += (end - now) * seconds_of[len(live)]
        now = end
        if waiting:
            heapq.heapreplace(live, now + waiting.pop())
        else:
            heapq.heappop(live)
    return seconds


def predict_rollout(gpu: Gpu, layout: Layout, links: Links, batch: Batch) -> tuple[float, float, float, float]:
    """Seconds of the slowest part and of the mean one, tokens of all completions, and of the part that has most."""
    draw = random.Random(0)
    own = [len(range(part, batch.prompts, layout.parts)) for part in range(layout.parts)]  # dealt out in turn
    most_rows = min(batch.rows, max(own) * batch.group)
    context = batch.prompt_len + statistics.fmean(draw_lengths(batch, 4096, draw)) / 2
    seconds_of = {rows: decode_step(gpu, layout, links, rows, context) for rows in range(1, most_rows + 1)}
    slowest, means, tokens, longest = [], [], [], []
    for _ in range(TRIALS):
        lengths = [draw_lengths(batch, prompts * batch.group, draw) for prompts in own]
        seconds = [prompts * batch.prompt_len / gpu.prefill + decode_seconds(part, most_rows, seconds_of)
                   for prompts, part in zip(own, lengths)]
        slowest.append(max(seconds))
        means.append(statistics.fmean(seconds))
        tokens.append(sum(map(sum, lengths)))
        longest.append(max(map(sum, lengths)))
    return tuple(map(statistics.fmean, (slowest, means, tokens, longest)))


# ---- exchanges and the update


def meeting(gpus: int, links: Links) -> float:
    """All ranks read a value of each from the store, which has one thread."""
    return 0.0 if gpus == 1 else gpus**2 * links.store


def gather_completions(gpus: int, most_tokens: float, tokens: float, links: Links) -> float:
    """All ranks get the completions of all: values as long as the longest, through every rank; each reads them all."""
    if gpus == 1:
        return 0.0
    return meeting(gpus, links) + (gpus - 1) * most_tokens * links.pickled / links.host + tokens * links.pickle


def all_to_all(size: float, layout: Layout, links: Links) -> float:
    """Each part sends a part's share of `size` bytes to each other: the slower of what stays in a node and what leaves it."""
    if layout.parts == 1:
        return 0.0
    near = min(layout.parts, max(1, links.node // layout.sharers))  # parts of a node
    times = size * (near - 1) / layout.parts / links.nvlink, size * (layout.parts - near) / layout.parts / links.network
    return max(times) + math.ceil(size / EXCHANGE_BYTES) * (links.launch + layout.parts * links.peer)


def spread(size: float, layout: Layout, links: Links) -> float:
    """Each part sends its share of the sum to all others, one after the other."""
    if layout.parts == 1:
        return 0.0
    rate = links.nvlink if layout.gpus <= links.node else links.network
    return size / rate + layout.parts * (links.launch + links.peer)


def share_gradients(size: float, layout: Layout, links: Links) -> float:
    """The ranks that share experts give each other their gradients, for the norm, once an update."""
    return 2 * size * (layout.sharers - 1) / layout.sharers / links.nvlink


def predict_update(gpu: Gpu, layout: Layout, links: Links, batch: Batch, tokens: float) -> tuple[float, float]:
    """(seconds of products, of gradients' exchange) for sampled tokens and one copy of each prompt."""
    trained = tokens + batch.prompts * batch.prompt_len
    number = math.ceil(trained / batch.micro_batch)
    if batch.is_even:
        number = -(-number // layout.parts) * layout.parts
    rounds = -(-number // layout.parts)
    dense = (1 - gpu.expert_share) / (layout.sharers if layout.is_divided else 1)
    own_rows = 1 / layout.sharers if layout.is_divided else 1.0
    per_token = (dense + gpu.expert_share / layout.sharers) / gpu.train
    if layout.sharers > 1:
        per_token += PASSES * gpu.num_layers * own_rows * expert_traffic(gpu, layout) / links.nvlink
    seconds = rounds * max(gpu.least_micro_batch, trained / number * per_token)
    size = gpu.gradient_bytes / layout.sharers  # of the experts that a rank has
    gradients = rounds * (all_to_all(size, layout, links) + meeting(layout.gpus, links)) + spread(size, layout, links)
    return seconds, gradients + (0.0 if layout.is_divided else share_gradients(size, layout, links))


def predict(gpu: Gpu, layout: Layout, batch: Batch, links: Links) -> Step:
    """A step with one update."""
    assert layout.gpus % layout.sharers == 0 and layout.parts <= batch.prompts, (layout, batch)
    rollout, mean_rollout, tokens, most_tokens = predict_rollout(gpu, layout, links, batch)
    update, gradients = predict_update(gpu, layout, links, batch, tokens)
    completions = gather_completions(layout.gpus, most_tokens, tokens, links)
    return Step(rollout, mean_rollout, completions, update, gradients, gpu.optimizer, tokens)


# ---- what comes now and then


def evaluation_seconds(gpu: Gpu, layout: Layout, batch: Batch, links: Links, prompts: int) -> float:
    """Greedy completions, then one drawn completion of each prompt."""
    part = Layout(min(layout.gpus, prompts * layout.sharers), layout.sharers, layout.is_divided)
    slowest, _, tokens, most = predict_rollout(gpu, part, links, batch._replace(prompts=prompts, group=1))
    return 2 * (slowest + gather_completions(layout.gpus, most, tokens, links))


def load_seconds(gpu: Gpu, layout: Layout, links: Links) -> float:
    """A node reads each byte once that one of its ranks needs."""
    experts = gpu.num_layers * gpu.num_experts * gpu.expert_bytes
    ranks = min(layout.gpus, links.node)
    return (experts * min(1.0, ranks / layout.sharers) + gpu.dense_bytes) / links.load


def checkpoint_seconds(gpu: Gpu, links: Links) -> float:
    """Rank 0 writes it, and the others wait."""
    return gpu.state_bytes / links.disk


# ---- tables


def layout_name(layout: Layout) -> str:
    if layout.sharers == 1:
        return "replicas"
    return f"EP{layout.sharers} x {layout.parts}{', divided' if layout.is_divided else ''}"


def table(gpu: Gpu, cases: list[tuple[Layout, Batch]], links: Links) -> str:
    """A line for each case; the first is what the others are compared with, by tokens/s."""
    lines = ["| GPUs | layout | rollout (idle) | update | completions | gradients | step | tokens/s | times one | evaluation |",
             "|" + "---|" * 10]
    first = None
    for layout, batch in cases:
        step = predict(gpu, layout, batch, links)
        first = first or step.tokens_per_second
        idle = 1 - step.mean_rollout / step.rollout
        cells = (layout.gpus, layout_name(layout), f"{step.rollout:.1f} ({idle:.0%})", f"{step.update:.1f}",
                 f"{step.completions:.2f}", f"{step.gradients:.2f}", f"{step.seconds:.1f}", f"{step.tokens_per_second:,.0f}",
                 f"{step.tokens_per_second / first:.2f}", f"{evaluation_seconds(gpu, layout, batch, links, 64):.1f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def all_tables(links: Links) -> str:
    small, large = GPUS["20b"], GPUS["120b"]
    found = []
    for mean, lengths in ((None, "1,024 tokens each"), (512, "random lengths")):
        cases = [(Layout(number), Batch(16, mean=mean)) for number in (1, 2, 4, 8, 16)]
        found += [f"20b, 16 prompts x 16 completions of {lengths}", table(small, cases, links)]
    numbers = (1, 2, 4, 8, 16, 64, 512)
    found += ["20b, 8 prompts for each GPU", table(small, [(Layout(number), Batch(8 * number)) for number in numbers], links)]
    cases = [(Layout(number), Batch(8 * number, micro_batch=8192)) for number in numbers]
    for is_divided in (False, True):
        layouts = [Layout(number, min(number, 8), is_divided) for number in numbers[1:]]
        cases += [(layout, Batch(8 * layout.gpus, rows=512, micro_batch=8192 * (layout.sharers if is_divided else 1)))
                  for layout in layouts]
    found += ["120b, 8 prompts for each GPU", table(large, cases, links)]
    for size, gpu in GPUS.items():
        seconds = load_seconds(gpu, Layout(8), links), checkpoint_seconds(gpu, links)
        found.append("{}: {:.1f} s to load, {:.1f} s a checkpoint".format(size, *seconds))
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(GPUS), default="20b")
    parser.add_argument("--gpus", help="numbers, divided by commas; without: the tables of EXPERIMENTS.md")
    parser.add_argument("--sharers", type=int, default=1, help="ranks that hold the experts together")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--max-new", type=int, default=1024)
    parser.add_argument("--mean", default="512", help="of the lengths; none: all as long as --max-new")
    parser.add_argument("--rows", type=int, default=128, help="rollout.max_batch")
    args = parser.parse_args()
    if args.gpus is None:
        print(all_tables(Links()))
        return
    batch = Batch(args.prompts, args.group, args.prompt_len, args.max_new, None if args.mean == "none" else float(args.mean),
                  args.rows)
    cases = [(Layout(int(number), min(args.sharers, int(number))), batch) for number in args.gpus.split(",")]
    print(table(GPUS[args.size], cases, Links()))


if __name__ == "__main__":
    main()
