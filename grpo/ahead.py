"""Rollouts drawn ahead: with rollout.max_staleness = S, step k trains on what the policy of step max(b, k - S) sampled. b is the
step at which the run began, or went on with more steps after its last one: for steps after the last nothing is drawn.

Which policy samples which prompts follows from k and b alone, so a run does not depend on the clock, and a checkpoint
that holds the rollouts drawn so far resumes it exactly. A completion is drawn by one policy from its first token to its last, or
with rollout.in_flight=switch by several (grpo/rollout/in_flight.py). With S = 0 a step samples, then trains.

On a GPU with S > 0, a thread of its own makes the update of step k while this one draws the rollout of step k + S by a copy of
the policy (models/behaviour.py), on another stream. Elsewhere the rollout is drawn first: the numbers are the same.
"""
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch

from grpo.config import InFlight
from grpo.groups import Groups, collect, first_prompts
from grpo.recorded import collect_recorded, is_recorded
from grpo.rollout.in_flight import begin, go_on, stamp, tokens_due
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Interrupted
from grpo.run.rollouts import Rollout, write
from grpo.run.start import Run
from grpo.update import update
from models.decoder import first_served_stream

# Seconds after which a thread lets another one run Python. The sampler's needs it for moments, after every few decode steps, and
# the GPU waits for it; the usual 5 ms would be a good part of those steps.
SWITCH_SECONDS = 5e-4


def draw_and_update(run: Run) -> tuple[Groups, dict[str, float]]:
    """Draws the rollouts that are due, and makes the next step's update. Returns what it trained on, and the metrics of the
    update and of how old it was. The step still counts as unfinished."""
    num_ahead, is_beside = run.config.rollout.max_staleness, run.behaviour is not None
    if is_beside and run.policy.device.type == "cuda":  # an evaluation used the sampler on another stream
        torch.cuda.synchronize(run.policy.device)
    if switches(run):  # the next step's alone, as where the others are drawn beside the update: a CPU rounds by the rows
        fill(run, num_ahead=0, should_stop=run.should_stop)
    if not (switches(run) and is_beside):
        fill(run, num_ahead=num_ahead - is_beside, should_stop=run.should_stop)
    rollout = run.rollouts[0]
    age, ages = staleness(run, rollout), age_metrics(run, rollout)
    run.memory.for_update(run.policy, run.sampler)  # gives it the KV cache's memory, if nothing is sampled meanwhile
    run.metrics.set_status("updating")
    work, started = partial(update, run, rollout.groups, staleness=age), time.perf_counter()
    stats = beside(run, work, partial(fill, run, num_ahead=num_ahead)) if is_beside else work()
    return rollout.groups, stats | ages | {"time/update": time.perf_counter() - started}


def fill(run: Run, *, num_ahead: int, should_stop: Callable[[], bool]) -> None:
    """Draws rollouts, by the policy as it is now, until the next step and `num_ahead` more have theirs. Steps after the run's
    last have none."""
    settings = run.config.rollout
    last = min(run.step + num_ahead, run.config.steps - 1)
    if switches(run):
        return fill_by_parts(run, last=last, should_stop=should_stop)
    for step in range(run.step + len(run.rollouts), last + 1):
        with sampling_stream(run):
            groups = collect_recorded(run.env, run.config, step) if is_recorded(run.env) else collect(
                run.env, run.sampler, run.config, step, should_stop, run.metrics.progress("sampling"), run.turns, run.history,
                run.ranks)
        run.rollouts.append(Rollout(step, run.step, groups))
        if settings.max_staleness and not run.has_stepped:
            write(run.rollouts[-1:])  # what no checkpoint can hold is refused now


def switches(run: Run) -> bool:
    return run.config.rollout.in_flight == InFlight.switch


def fill_by_parts(run: Run, *, last: int, should_stop: Callable[[], bool]) -> None:
    """Draws what the policy as it is now owes to the rollouts of the steps up to `last`. Whole ones are scored, and refilled
    where groups are dropped. Done again by the same policy it draws nothing, so it may be interrupted."""
    config, sampler, version, progress = run.config, run.sampler, run.step, run.metrics.progress("sampling")
    started = time.perf_counter()
    with sampling_stream(run):
        begun = [*run.begun, *(
            begin(step, version, first_prompts(run.env, config, step, max_len=sampler.max_len,
                                               vocab_size=run.policy.config.vocab_size), num_samples=config.rollout.group_size)
            for step in range(version + len(run.rollouts) + len(run.begun), last + 1))]
        limits = [tokens_due(config.rollout, rollout.step - version) for rollout in begun]
        run.begun = go_on(sampler, begun, limits, SamplingParams.of(config.rollout), version=version, should_stop=should_stop,
                          progress=progress)
    if not run.has_stepped:
        write(run.begun)  # what no checkpoint can hold is refused now
    seconds = time.perf_counter() - started
    while run.begun and tokens_due(config.rollout, run.begun[0].step - version) == config.rollout.max_new_tokens:
        rollout = run.begun[0]
        with sampling_stream(run):
            groups = collect(run.env, sampler, config, rollout.step, should_stop, progress, begun=rollout.completions)
        stamp([completion for completion, _ in groups.scored], version=version)
        groups.metrics["time/rollout"] += seconds
        run.rollouts.append(Rollout(rollout.step, rollout.version, groups))
        run.begun, seconds = run.begun[1:], 0.0


def beside(run: Run, train: Callable[[], dict[str, float]], draw: Callable[..., None]) -> dict[str, float]:
    """Runs `train` in a thread of its own beside `draw`, and returns what it returned. If one fails, the other one stops, and
    this raises the failure.

    A signal to stop reaches the update only: it is abandoned, and then the rollout too, or it is made, and then the rollout is
    finished as well. So weights and rollouts always belong to the same step."""
    outcome: dict[str, object] = {}
    is_over = threading.Event()  # one of the two has failed

    def work() -> None:
        try:
            if run.policy.device.type == "cuda":
                torch.cuda.set_device(run.policy.device)
            outcome["stats"] = train()
        except BaseException as error:
            outcome["error"] = error
            is_over.set()

    thread = threading.Thread(target=work, name="update")
    with stopping_also(run, is_over), switching_often():
        thread.start()
        try:
            with run.behaviour.with_room():
                draw(should_stop=is_over.is_set)
        except BaseException as error:
            is_over.set()
            thread.join()
            if isinstance(error, Interrupted) and "error" in outcome:
                raise outcome["error"] from None
            raise
        thread.join()
    if "error" in outcome:
        raise outcome["error"]
    run.behaviour.refresh()
    return outcome["stats"]


def sampling_stream(run: Run) -> AbstractContextManager:
    """For a `with`: what is sampled inside may run beside an update."""
    if run.behaviour is None or run.policy.device.type == "cpu":
        return nullcontext()
    return torch.cuda.stream(first_served_stream(run.policy.device))


@contextmanager
def stopping_also(run: Run, event: threading.Event) -> Iterator[None]:
    """Inside the `with`, the run should also stop when the event is set."""
    should_stop = run.should_stop
    run.should_stop = lambda: event.is_set() or should_stop()
    try:
        yield
    finally:
        run.should_stop = should_stop


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def staleness(run: Run, rollout: Rollout) -> int:
    """How many steps older than the present policy is the one that drew the rollout."""
    found = run.step - rollout.version
    assert rollout.step == run.step and 0 <= found <= run.config.rollout.max_staleness, (
        rollout.step, run.step, rollout.version, run.config.rollout.max_staleness)
    return found


def age_metrics(run: Run, rollout: Rollout) -> dict[str, float]:
    """How many steps older than the present policy the one was that drew the trained tokens, and the share of each age."""
    most = run.config.rollout.max_staleness
    if not switches(run):
        return {"rollout/staleness": staleness(run, rollout)} if most else {}
    ages = [run.step - version for completion in rollout.groups.completions for segment in completion.segments
            for version in segment.versions or ()]
    num_tokens = sum(completion.num_policy_tokens for completion in rollout.groups.completions)
    assert len(ages) == num_tokens and all(0 <= age <= staleness(run, rollout) for age in ages), (set(ages), num_tokens, most)
    shares = {f"rollout/age_{age}": ages.count(age) / num_tokens if ages else math.nan for age in range(most + 1)}
    return {"rollout/staleness": statistics.fmean(ages) if ages else math.nan} | shares
