"""The ranks of a run: processes that each hold the whole run, and do the work of a step together.

Every rank runs the same program. Where they need each other's results they meet: `exchange` gives each the values of all. Nothing
waits without a limit. A rank that fails says so in the store, where all that wait look; so a failure on one rank ends the run on
all, with one message that names it. A rank that was killed is found by the ranks of its node, and one that hangs by the time
limit (distributed.timeout). Tensors travel by collectives of torch.distributed (NCCL between GPUs, gloo between CPUs), which
start only after an exchange: then every rank has come, and none waits for one that failed before.

Rank 0 speaks for all, and alone writes the run's folder.
"""
import contextlib
import gc
import json
import os
import pickle
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from grpo.config import ConfigError, Device, EvaluateConfig, GenerateConfig, TrainConfig, flatten, to_dict
from grpo.distributed.place import RankPlace, find_place
from grpo.rollout.session import Interrupted
from grpo.run.identity import digest_code

MAIN, ROLLOUT = "main", "rollout"  # channels of exchanges: those of one do not wait for those of the other
KILLED = "ended without a word: it was killed, or crashed"
INLINE_BYTES = 1 << 16  # larger values do not pass through the store
LONGEST_PAUSE = 0.02  # seconds between two looks at the store
LOOK_SECONDS = 0.5  # between two looks at what is rare: stop signals, failures, dead processes
GRACE_SECONDS = 20.0  # for a rank to end by itself after a failure or a stop signal; torchrun kills after 30
LEAVE_SECONDS = 5.0  # for rank 0's process to end
START_SECONDS = 300.0  # most for all ranks to start


class RankFault(RuntimeError):
    """A rank failed. reason, code: as in grpo.run.failures.Failure. rank: which. is_lost: it ended without a word, or hangs."""

    def __init__(self, message: str, *, reason: str, code: int, rank: int, is_lost: bool) -> None:
        super().__init__(message)
        self.reason, self.code, self.rank, self.is_lost = reason, code, rank, is_lost


class Ranks:
    """This process among the others. rank, num_ranks, local_rank: its number, how many there are, its number on this node."""

    def __init__(self, place: RankPlace, store: dist.Store) -> None:
        self.place, self.rank, self.num_ranks, self.local_rank = place, place.rank, place.num_ranks, place.local_rank
        self.part, self.num_parts = place.rank, place.num_ranks  # of the work
        self.sharer, self.num_sharers = 0, 1  # of the experts: ranks that share them do the same part of the work
        self.timeout, self.seconds_waited = START_SECONDS, 0.0  # for others
        self.notes: list[str] = []  # warnings that rank 0 will show for this one, from the next exchange on
        self.show: Callable[[str], None] | None = None  # of rank 0
        self.is_leaving = False
        self._store, self._peers = store, []
        self._num_exchanges: dict[str, int] = {}  # by channel
        self._groups: dict[str, dist.ProcessGroup] = {}  # by channel, between CPUs
        self.parts: dist.ProcessGroup | None = None  # ranks that do other parts, one of each; None: all ranks
        self._sharers: dist.ProcessGroup | None = None  # ranks that share experts with this one
        self._host_parts: dist.ProcessGroup | None = None  # the same ranks, between CPUs
        self._host_sharers: dist.ProcessGroup | None = None
        self._stop: Callable[[], bool] = lambda: False
        self._looked, self._seen_stop, self._stopped_at = 0.0, False, None
        self._met = 0, "", 0.0  # of meetings of ranks that share experts: how many, the last one's place and time

    # ---- meeting

    def exchange(self, what: str, value: object = None, *, channel: str = MAIN) -> list:
        """The values of all ranks, by rank. what: names the place in the program, the same on all ranks. channel: ROLLOUT in what
        may run beside an update, in a thread of its own. Raises RankFault if another rank failed or does not come in time, and
        Interrupted if it was stopped."""
        number = self._num_exchanges.get(channel, 0)
        self._num_exchanges[channel] = number + 1
        payload = pickle.dumps((self.notes, value))
        self.notes.clear()
        is_large = len(payload) > INLINE_BYTES
        self._store.set(f"{channel}/{number}/{self.rank}", pickle.dumps((what, len(payload), None if is_large else payload)))
        keys = [f"{channel}/{number}/{rank}" for rank in range(self.num_ranks)]
        self._await(keys, what)
        heads = [pickle.loads(head) for head in self._store.multi_get(keys)]  # one request
        if any(head[0] != what for head in heads):
            raise AssertionError(f"ranks are at different places: {[head[0] for head in heads]}")
        if number:
            self._store.delete_key(f"{channel}/{number - 1}/{self.rank}")  # all have read it: they have come here
        payloads = [head[2] for head in heads]
        if None in payloads:
            payloads = self._gather(payload, [head[1] for head in heads], what, channel)
        found = [pickle.loads(item) for item in payloads]
        for rank, (notes, _) in enumerate(found):
            for note in notes if self.show is not None else ():
                self.show(f"rank {rank}: {note}")
        return [value for _, value in found]

    def _gather(self, payload: bytes, sizes: list[int], what: str, channel: str) -> list[bytes]:
        sent = torch.zeros(max(sizes), dtype=torch.uint8)
        sent[:len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in sizes]
        with self.collective(what):
            dist.all_gather(received, sent, group=self._groups[channel])
        return [tensor[:size].numpy().tobytes() for tensor, size in zip(received, sizes)]

    @contextlib.contextmanager
    def collective(self, what: str):
        """A context for collectives of torch.distributed: an error in it is one of the ranks that did not finish it."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            deadline = time.monotonic() + 2 * LOOK_SECONDS
            while time.monotonic() < deadline:  # whoever broke it off may have said why
                self._check(self._others(), what)
                time.sleep(LONGEST_PAUSE)
            raise

    def take_seconds_waited(self) -> float:
        """The seconds that this rank has waited for others since the last call."""
        seconds, self.seconds_waited = self.seconds_waited, 0.0
        return seconds

    def fill_in(self, tensor: torch.Tensor) -> None:
        """Writes into a contiguous tensor, of the same shape on all ranks, what others have there: each element is zero on all
        ranks but one. After an exchange."""
        with self.collective("filling in a tensor"):
            group = self.parts if tensor.is_cuda else self._host_parts or self._groups[MAIN]
            dist.all_reduce(_as_integers(tensor), group=group)

    def fill_in_experts(self, tensor: torch.Tensor) -> None:
        """fill_in() by the ranks that share experts, which come here by the same way, without an exchange."""
        with self._meeting("the experts' rows"):
            dist.all_reduce(_as_integers(tensor), group=self._sharers if tensor.is_cuda else self._host_sharers)

    def _meeting(self, what: str):
        """collective() of ranks that share experts, which come without an exchange: _find_late_sharer() watches them."""
        self._met = self._met[0] + 1, what, time.monotonic()
        return self.collective(what)

    def _find_late_sharer(self) -> RankFault | None:
        """The fault of a rank that hangs while others wait for it where they share experts: it has come to fewer meetings."""
        if self._host_sharers is None:
            return None
        count, what, since = self._met
        self._store.set(f"met/{self.rank}", str(count))
        if time.monotonic() - since < self.timeout + 2 * LOOK_SECONDS:  # until the others' numbers are up to date
            return None
        first = self.part * self.num_sharers
        counts = {rank: int(self._store.get(f"met/{rank}")) if self._has(f"met/{rank}") else 0
                  for rank in range(first, first + self.num_sharers)}
        last = min(counts, key=counts.get)
        return self._blame(last, _late(what, f"{self.timeout:g} s (distributed.timeout)")) if counts[last] < count else None

    def _others(self) -> list[int]:
        return [rank for rank in range(self.num_ranks) if rank != self.rank]

    def _await(self, keys: list[str], what: str) -> None:
        """Returns when the store has all keys, one of each rank."""
        started, pause, looked = time.monotonic(), 1e-4, time.monotonic()
        while not self._has(*keys):
            now = time.monotonic()
            if now - looked > LOOK_SECONDS:
                looked = now
                missing = [rank for rank, key in enumerate(keys) if not self._has(key)]
                self._check(missing, what)
                if self._stop():
                    self._spread_stop()
                is_late = now - started > self.timeout
                if missing and (is_late or self._is_out_of_grace(now, missing)):
                    limit = (f"{self.timeout:g} s{' (distributed.timeout)' if self._groups else ''}" if is_late
                             else f"{GRACE_SECONDS:g} s after the stop signal")
                    raise self._blame(missing[0], _late(what, limit))
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self.seconds_waited += time.monotonic() - started

    def _is_out_of_grace(self, now: float, missing: list[int]) -> bool:
        """Whether these ranks had long enough after a stop signal. Rank 0 may be saving, and srun, unlike torchrun, does not kill
        it soon."""
        return (self._stopped_at is not None and now - self._stopped_at > GRACE_SECONDS
                and (self.place.is_torchrun or 0 not in missing))

    def _has(self, *keys: str) -> bool:
        try:
            return self._store.check(list(keys))
        except RuntimeError as error:  # the server is gone: torchrun ended, or rank 0 of a run under srun
            raise RankFault(f"{self.place.name}: the store at {self.place.address}:{self.place.port}, by which the ranks meet, "
                            f"is gone ({str(error).splitlines()[0]}); its process was killed", reason="failed", code=1, rank=0,
                            is_lost=True) from error

    def _check(self, missing: list[int], what: str) -> None:
        """Raises if a rank has failed, or one of those that are missing can no longer come."""
        if (fault := self.fault()) is not None:
            raise fault
        for rank in missing:
            if self._has(f"stopped/{rank}"):
                raise Interrupted(f"at {what!r}, since rank {rank} was stopped")
            if self._is_dead(rank):
                raise self._blame(rank, KILLED)

    def _is_beside(self, rank: int) -> bool:
        """Whether it is another rank, on this node."""
        return rank != self.rank and bool(self._peers) and self._peers[rank]["processes"] == self._peers[self.rank]["processes"]

    def _is_dead(self, rank: int) -> bool:
        """Whether it is another rank of this node, whose process has ended."""
        return self._is_beside(rank) and _is_gone(self._peers[rank]["pid"])

    # ---- failures and stop signals

    def fault(self) -> RankFault | None:
        """The first failure of a rank, if there is one."""
        return RankFault(**json.loads(self._store.get("fault"))) if self._has("fault") else None

    def report(self, message: str, *, reason: str, code: int, rank: int | None = None, is_lost: bool = False) -> RankFault:
        """Tells all ranks of a failure, of this rank if none is given. Returns the first one that was told."""
        fault = {"message": message, "reason": reason, "code": code, "rank": self.rank if rank is None else rank,
                 "is_lost": is_lost}
        return RankFault(**json.loads(self._store.compare_set("fault", "", json.dumps(fault))))

    def _blame(self, rank: int, what: str) -> RankFault:
        peer = self._peers[rank]["name"] if self._peers else f"rank {rank}"
        return self.report(f"{peer} {what}", reason="failed", code=1, rank=rank, is_lost=True)

    def watch(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """What replaces `stop`, which says whether this process was told to stop: true if any rank was, or has failed."""
        self._stop = stop
        return self.should_stop

    def should_stop(self) -> bool:
        """Ranks that share experts come here together, and get the same answer: they stop at the same place."""
        if self._host_sharers is None:
            return self.has_heard_stop()
        is_told = torch.tensor([self.has_heard_stop()], dtype=torch.uint8)
        with self._meeting("a stop signal"):
            dist.all_reduce(is_told, dist.ReduceOp.MAX, group=self._host_sharers)
        return bool(is_told)

    def has_heard_stop(self) -> bool:
        """should_stop() for what one rank does alone."""
        if self._stop():
            self._spread_stop()
        elif not self._seen_stop and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            self._seen_stop = self._has("stop") or self._has("fault")
        return self._seen_stop

    def _spread_stop(self) -> None:
        if self._stopped_at is None:
            self._stopped_at, self._seen_stop = time.monotonic(), True
            self._store.set("stop", str(self.rank))

    def leave(self) -> None:
        """Called at the end of a run. Other ranks than 0 return after rank 0's process has ended, so that a launcher, which ends
        all ranks as soon as one has failed, does not interrupt it while it saves; and rank 0, which may serve the store, after
        the others have read it for the last time."""
        self.is_leaving = True
        with contextlib.suppress(RuntimeError):  # a RankFault: the store is gone
            fault = self.fault()
            is_lost = fault is not None and fault.is_lost and fault.rank == 0
            if self.rank == 0:
                self._store.set("left", "")
                others = self._others()
                self._wait(lambda: all(self._has(f"gone/{rank}") or self._is_dead(rank) for rank in others), LEAVE_SECONDS)
            else:
                self._wait(lambda: self._has("left") or self._is_dead(0) or is_lost, self.timeout)
                self._store.set(f"gone/{self.rank}", "")
                if fault is not None:
                    self._wait(lambda: not self._is_beside(0) or self._is_dead(0), LEAVE_SECONDS)
            if fault is None and dist.is_initialized():
                gc.collect()  # CUDA graphs with collectives: NCCL waits for their end
                dist.destroy_process_group()

    def _wait(self, is_over: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_over() and time.monotonic() < deadline:
            time.sleep(LONGEST_PAUSE)

    def settle(self, message: str, *, reason: str, code: int, is_stopped: bool) -> RankFault | None:
        """Tells the others that the run ends here, by an error or a stop signal. Returns the first failure of a rank, None if a
        signal stopped the run."""
        self.is_leaving = True
        with contextlib.suppress(RankFault, RuntimeError):  # nobody is left to tell
            if not is_stopped:
                return self.report(f"{self.place.name}: {message}", reason=reason, code=code)
            self._store.set(f"stopped/{self.rank}", "")
            return self.fault()
        return None

    def all_save(self, can_save: bool) -> bool:
        """Whether all ranks save together what they divide, after settle(). Where one cannot, or is lost, none does: the others
        would wait for it."""
        with contextlib.suppress(RuntimeError):  # the store is gone
            if can_save:
                self._store.set(f"saves/{self.rank}", "")
                keys = [f"saves/{rank}" for rank in range(self.num_ranks)]
                self._wait(lambda: self._has("save") or self._has(*keys) or any(map(self._is_dead, self._others())),
                           GRACE_SECONDS if self.place.is_torchrun else self.timeout)
                can_save = self._has(*keys)
            return self._store.compare_set("save", "", "all" if can_save else "none") == b"all"  # the first one's word
        return False

    def speaks(self) -> bool:
        """Whether this rank prints how the run ended: rank 0, or the first that asks if rank 0 is lost."""
        try:
            fault = self.fault()
        except RankFault as gone:
            fault = gone
        return self._speaks_of(fault)

    def _speaks_of(self, fault: RankFault | None) -> bool:
        if fault is None or not fault.is_lost or fault.rank != 0:
            return self.rank == 0
        if self.rank == 0:
            return False
        try:
            return self._store.compare_set("speaker", "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:  # the store is gone, maybe with rank 0's whole node: one rank of each node
            return self.rank == 1 or self.local_rank == 0

    # ---- the start

    def begin(self, config: TrainConfig | EvaluateConfig | GenerateConfig, device: torch.device) -> None:
        """Meets the others, compares settings and GPUs, and opens the collectives. Raises ConfigError for what differs."""
        about = {"name": self.place.name, "host": os.uname().nodename, "processes": _process_space(), "pid": os.getpid(),
                 "code": digest_code(), "torch": torch.__version__, "device": str(device), "gpu": None}
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            about |= {"device": properties.name, "gpu": str(properties.uuid)}
        found = self.exchange("the start", (about, flatten(to_dict(config))))
        self._peers = [peer for peer, _ in found]
        for rank, (peer, settings) in enumerate(found):
            self._compare(rank, peer, settings, found[0])
            same = [other for other in range(rank) if peer["gpu"] and (found[other][0]["host"], found[other][0]["gpu"]) == (
                peer["host"], peer["gpu"])]
            if same:
                raise ConfigError(f"ranks {same[0]} and {rank} have the same GPU: CUDA_VISIBLE_DEVICES must give each process of "
                                  "a node its own; start as many processes as there are GPUs (--nproc-per-node)")
        limit = timedelta(seconds=max(config.distributed.timeout, START_SECONDS))
        is_gpu = device.type == "cuda"
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # it cannot register memory in expandable segments for CUDA graphs
        dist.init_process_group("nccl" if is_gpu else "gloo", store=dist.PrefixStore("groups", self._store), rank=self.rank,
                                world_size=self.num_ranks, timeout=limit)
        self._groups = {channel: dist.new_group(backend="gloo", timeout=limit) for channel in (MAIN, ROLLOUT)}
        if isinstance(config, TrainConfig) and config.distributed.expert_parallel > 1:
            self._divide(config.distributed.expert_parallel, limit, is_gpu)
        if is_gpu:  # NCCL takes its buffers now, so that the plan of the memory finds them taken
            for group in (self.parts, self._sharers) if self._sharers is not None else (None,):
                sent = torch.zeros(dist.get_world_size(group), device=device)
                dist.all_to_all_single(torch.empty_like(sent), sent, group=group)
                dist.all_reduce(sent, group=group)
                dist.broadcast(sent, group=group, group_src=0)
            torch.cuda.synchronize(device)
        self.timeout = config.distributed.timeout
        threading.Thread(target=self._end_with_the_others, daemon=True).start()

    def _divide(self, num_sharers: int, limit: timedelta, is_gpu: bool) -> None:
        """Lets ranks that stand side by side share experts. Every rank makes all groups."""
        self.part, self.sharer = divmod(self.rank, num_sharers)
        self.num_parts, self.num_sharers = self.num_ranks // num_sharers, num_sharers
        ranks = [list(range(first, first + num_sharers)) for first in range(0, self.num_ranks, num_sharers)]

        def groups(backend: str) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
            parts, sharers = ([dist.new_group(list(group), timeout=limit, backend=backend) for group in division]
                              for division in (zip(*ranks), ranks))
            return parts[self.sharer], sharers[self.part]

        self._host_parts, self._host_sharers = groups("gloo")
        self.parts, self._sharers = groups("nccl") if is_gpu else (self._host_parts, self._host_sharers)

    def _compare(self, rank: int, peer: dict, settings: dict, first: tuple[dict, dict]) -> None:
        keys = [key for key in sorted(settings.keys() | first[1].keys()) if settings.get(key) != first[1].get(key)]
        differing = [f"{key}: {first[1].get(key)!r} on rank 0, {settings.get(key)!r} on rank {rank}" for key in keys]
        differing += [f"{key}: {first[0][key]} on rank 0, {peer[key]} on rank {rank}" for key in ("code", "torch", "device")
                      if peer[key] != first[0][key]]
        if differing:
            raise ConfigError("the ranks do not have the same settings:\n  " + "\n  ".join(differing) + "\nStart all with one "
                              "command, version of this program (code: a digest of its source files) and of torch, and kind of "
                              "GPU")

    def _end_with_the_others(self) -> None:
        """In a thread: ends this process some time after another rank has failed or rank 0 has left, if it does not end by
        itself, since it hangs, or waits for a GPU that waits for another rank."""
        while not self.is_leaving:
            try:
                fault, has_left = self.fault(), self._has("left")
                dead = [rank for rank in self._others() if self._is_dead(rank)]
                if fault is None and not has_left:
                    fault = self._blame(dead[0], KILLED) if dead else self._find_late_sharer()
            except RuntimeError as error:  # the store is gone
                fault, has_left = error if isinstance(error, RankFault) else None, True
            if fault is not None or has_left:
                time.sleep(GRACE_SECONDS)
                if not self.is_leaving:
                    if fault is not None and self._speaks_of(fault):
                        os.write(2, f"error: {fault}\n".encode())
                    os._exit(1 if fault is None else fault.code)
            time.sleep(LOOK_SECONDS)


def _late(what: str, limit: str) -> str:
    return f"did not come to {what!r} within {limit}: it hangs, or is too slow there"


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor of any dtype: their sums with zeros are exact. In words where there are whole ones, which
    NCCL adds faster."""
    flat = tensor.view(-1)
    has_words = all(count * flat.element_size() % 4 == 0 for count in (flat.numel(), flat.storage_offset()))
    return flat.view(torch.int32 if has_words else torch.uint8)


def _process_space() -> tuple[str, str]:
    """Where a process's number means this process. Nodes may have one name, and a node containers with numbers of their own."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip(), os.readlink("/proc/self/ns/pid")


def _is_gone(pid: int) -> bool:
    """Whether a process of this node has ended; one whose end nobody has noted yet counts."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def leads(ranks: Ranks | None) -> bool:
    """Whether this process writes files and speaks: it is alone, or rank 0."""
    return ranks is None or ranks.rank == 0


def join(config: TrainConfig | EvaluateConfig | GenerateConfig, *, is_sweep: bool) -> Ranks | None:
    """This process among the ranks that torchrun or srun started, with its GPU chosen; None if it was started alone. Raises
    ConfigError."""
    place = find_place(os.environ)
    if place is None:
        return None
    if is_sweep:
        raise ConfigError("-m: start a sweep without torchrun; hydra/launcher=processes gives each of its runs a GPU")
    if isinstance(config, TrainConfig):
        check_division(config, place.num_ranks)
    if config.device != Device.cpu and torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if place.local_rank >= num_gpus > 1 or (num_gpus == 1 and place.local_rank and place.is_torchrun):
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
            raise ConfigError(f"{place.name}: this node has {place.num_local} ranks, but they see {num_gpus} GPU"
                              f"{'s' if num_gpus > 1 else ''} (CUDA_VISIBLE_DEVICES: {visible}); set --nproc-per-node to that")
        torch.cuda.set_device(place.local_rank if num_gpus > 1 else 0)
    return Ranks(place, _open_store(place))


def check_division(config: TrainConfig, num_ranks: int) -> None:
    """Raises ConfigError for a run that so many ranks cannot share."""
    num_parts = num_ranks // config.distributed.expert_parallel
    if num_parts > config.rollout.prompts_per_step:
        groups = "ranks" if num_parts == num_ranks else "groups of ranks"
        raise ConfigError(f"rollout.prompts_per_step = {config.rollout.prompts_per_step}: must be at least the number of "
                          f"{groups} ({num_parts}), which share the prompts of a step; a multiple keeps all busy")
    if config.optim.in_backward and num_ranks > 1:
        raise ConfigError("optim.in_backward = True: an update in the backward knows only one rank's gradients; set "
                          "optim.in_backward=false with several ranks")


def _open_store(place: RankPlace) -> dist.Store:
    """The store by which ranks meet: torchrun's own, else rank 0 serves one."""
    is_server = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(place.address, place.port, world_size=None, is_master=is_server,
                              timeout=timedelta(seconds=START_SECONDS), wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        what = "cannot be served there, since another program has it" if is_server else "is not served by rank 0"
        raise ConfigError(f"MASTER_PORT = {place.port} on {place.address}: the port {what} ({reason}); choose another with "
                          "torchrun --master-port PORT, or --rdzv-endpoint HOST:PORT on several nodes; under srun set "
                          "MASTER_PORT") from error
    return dist.PrefixStore(f"grpo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
