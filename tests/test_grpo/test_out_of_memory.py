"""Memory that is not enough, once or always, at any operation of an update: the weights are those of a run that had enough."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from refused_memory import REFUSAL, Refusing
from test_update import DAPO, Warnings, build_policy, draw_completions, move

from grpo.batch import halves, micro_batches, pack
from grpo.config import LoraSettings
from grpo.configuration.algorithm import KlConfig, KlReference
from grpo.configuration.launch import load_config
from grpo.groups import Groups
from grpo.kl import Reference
from grpo.out_of_memory import StillOutOfMemory, attempt, is_out_of_memory
from grpo.rollout.session import Sampler
from grpo.run import finish
from grpo.run.failures import describe_failure
from grpo.run.start import Run, make_optimizer
from grpo.update import train_minibatch, update
from models.block import Block

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config():
    config = load_config("train", ["+experiment=smoke", "name=test", "optim.max_tokens=40", "optim.lr=0.01"])
    return replace(config, kl=KlConfig(0.3, config.kl.estimator, KlReference.start))


def make_run(config, tmp_path, *, trains="adapter, norms and sinks", recomputes=False, loss_fn=DAPO, **optim):
    policy = build_policy(trains=trains)
    move(policy, seed=3, size=0.2)
    policy.activation_checkpointing = recomputes
    config = replace(config, optim=replace(config.optim, **optim))
    sampler = Sampler(policy, [], max_batch=4, seed=0)
    reference = Reference.of(policy)
    move(policy, seed=4, size=0.1)
    return Run(config, tmp_path, policy, None, None, loss_fn, sampler, Warnings(), lambda: False, reference=reference,
               optimizer=make_optimizer(config, policy), has_warned=True)


def groups_of(run) -> Groups:
    return Groups(*draw_completions(copy.deepcopy(run.policy)), [])


def weights_of(run) -> dict[str, torch.Tensor]:
    state = {name: parameter.detach() for name, parameter in run.policy.named_parameters()} | run.optimizer.state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same_bits(run, expected):
    for name, tensor in weights_of(run).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("minibatches, epochs, share_prompts, num_places", [(1, 1, True, 25), (2, 2, False, 8)],
                         ids=["one update", "four updates"])
def test_an_update_that_any_operation_refuses_once_gives_the_weights_of_one_that_had_enough(
        config, tmp_path, minibatches, epochs, share_prompts, num_places):
    optim = {"minibatches": minibatches, "epochs": epochs, "share_prompts": share_prompts}
    run = make_run(config, tmp_path, **optim)
    groups = groups_of(run)
    with Refusing() as counting:
        metrics = update(run, groups)
    expected, num_warned = weights_of(run), 0
    assert len(run.metrics) == 0 and counting.num_calls > 1000
    for failing in range(3, int(0.97 * counting.num_calls), counting.num_calls // num_places):
        run = make_run(config, tmp_path, **optim)
        with Refusing(lambda number, failing=failing: number == failing) as mode:
            measured = update(run, groups)
        assert mode.num_calls > counting.num_calls - 10, failing
        assert_same_bits(run, expected)
        assert measured == metrics
        num_warned += len(run.metrics)
        assert all("it was done again; from now on the backward computes each layer again" in text for text in run.metrics)
    assert num_warned > num_places // 3


def gradients_of(run, part, is_refused=lambda number: False):
    with Refusing(is_refused) as mode:
        micros = train_minibatch(run, part, num_updates=1, allowed=1.0)
    gradients = run.optimizer.gradients()
    run.optimizer.zero_grad()
    return gradients, micros, mode.num_calls


@pytest.mark.parametrize("share_prompts", [False, True])
def test_the_gradient_of_a_split_micro_batch_is_the_same_sum_in_another_order(config, tmp_path, share_prompts):
    config = replace(config, kl=replace(config.kl, coefficient=0.0))
    run = make_run(config, tmp_path, recomputes=True, share_prompts=share_prompts, max_tokens=1000)
    part, exact = pack(*draw_completions(copy.deepcopy(run.policy))), None
    for micro in micro_batches(part, max(part.lengths)):  # a float64 sum over parts of one or a few sequences
        gradients, _, _ = gradients_of(run, micro)
        exact = {name: gradient.double() + (exact[name] if exact else 0) for name, gradient in gradients.items()}
    whole, (micro,), num_calls = gradients_of(run, part)

    def error(gradients):
        differences = [(gradients[name] - exact[name]).square().sum() for name in exact]
        return float(sum(differences).sqrt() / sum(gradient.square().sum() for gradient in exact.values()).sqrt())

    for failing in (20, num_calls // 2, num_calls - 20):  # in the forward and in the backward
        run.most_tokens = 10**9
        found, micros, _ = gradients_of(run, part, lambda number, failing=failing: number == failing)
        assert len(micros) == 2 and sum(half.num_tokens for half in micros) >= micro.num_tokens
        assert run.most_tokens == max(half.num_tokens for half in micros)
        assert error(whole) < 1e-6 and error(found) < 1e-6  # a gradient that counts twice: above 0.1
        assert sum(half.stats["loss"] for half in micros) == pytest.approx(float(micro.stats["loss"]), rel=1e-6)
        assert "from now on a micro-batch has at most" in run.metrics[-1]
    assert len(run.metrics) == 3
    _, micros, _ = gradients_of(run, part)  # without a refusal
    assert len(micros) > 1 and all(micro.num_tokens <= run.most_tokens for micro in micros) and len(run.metrics) == 3


@pytest.mark.parametrize("coefficient", [0.0, 0.3])  # the reference's log-probs come first
def test_memory_that_never_suffices_ends_with_the_least_that_was_tried(config, tmp_path, monkeypatch, coefficient):
    run = make_run(config, tmp_path)
    groups, before = groups_of(run), weights_of(run)
    shortest, sizes = min(completion.num_tokens for completion in groups.completions), []

    def refuse(block, x, *_):
        sizes.append(len(x))
        raise torch.OutOfMemoryError(REFUSAL)

    if not coefficient:
        run.reference = None
    monkeypatch.setattr(Block, "forward", refuse)
    with pytest.raises(StillOutOfMemory) as caught:
        update(run, groups)
    least = f"{REFUSAL}. The least that was tried is a micro-batch of one sequence of {sizes[-1]} tokens"
    assert str(caught.value).startswith(least)
    assert shortest <= sizes[-1] < sizes[0] and run.policy.activation_checkpointing == (not coefficient)
    assert_same_bits(run, before)
    assert all(parameter.grad is None for parameter in run.policy.parameters())


def test_nothing_of_a_failed_attempt_stays():
    held = []

    def fail(refuse):
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        cycle = [tensor]
        cycle.append(cycle)
        refuse()

    def refuse_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")

    assert attempt(lambda: fail(refuse_memory)) == (None, "CUDA out of memory. Tried to allocate 1 GiB")
    assert [reference() for reference in held] == [None]
    with pytest.raises(RuntimeError, match="shapes"):
        attempt(lambda: torch.ones(2) @ torch.ones(3) if False else fail(lambda: exec('raise RuntimeError("shapes")')))
    assert attempt(lambda: 7) == (7, None)


def test_a_complaint_while_memory_was_refused_counts_as_refused():
    error = RuntimeError("the capture was invalidated")
    assert not is_out_of_memory(error)
    error.__context__ = torch.OutOfMemoryError(REFUSAL)
    assert is_out_of_memory(error)
    other = ValueError("no")
    other.__context__ = torch.OutOfMemoryError(REFUSAL)
    assert not is_out_of_memory(other)


def test_halves_have_about_as_many_tokens_and_a_micro_batchs_tokens_are_counted():
    completions, advantages = draw_completions(build_policy(trains="adapter"))
    batch = pack(completions, advantages)
    assert batch.lengths == [completion.num_tokens for completion in completions]
    for rows in ([0, 1], [3, 0, 5], [0, 1, 2, 3, 4, 5]):
        parts = halves(batch, rows)
        assert [*parts[0], *parts[1]] == rows and all(parts)
        loads = [[sum(batch.lengths[row] for row in part) for part in (rows[:cut], rows[cut:])] for cut in range(1, len(rows))]
        assert abs(sum(batch.lengths[row] for row in parts[0]) - sum(batch.lengths[row] for row in parts[1])) == min(
            abs(first - second) for first, second in loads)
        for share_prompts in (False, True):
            assert batch.num_tokens_of(rows, share_prompts=share_prompts) == len(
                batch.select(rows, share_prompts=share_prompts).tokens)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(REFUSAL), MemoryError()])
def test_memory_that_does_not_suffice_to_save_either_does_not_hide_the_first_error(config, tmp_path, monkeypatch, error):
    run = make_run(config, tmp_path)
    run.step = 3

    def refuse(run):
        raise error

    monkeypatch.setattr(finish, "save", refuse)
    text = finish.keep_finished_steps(run, torch.OutOfMemoryError(REFUSAL))
    assert text == "; memory is not enough to save step 3 either: the newest checkpoint stands"
    error = RuntimeError("shapes")
    with pytest.raises(RuntimeError, match="shapes"):
        finish.keep_finished_steps(run, torch.OutOfMemoryError(REFUSAL))


def test_the_message_names_what_still_helps(config):
    first = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    message = describe_failure(first, config=config, log=None).message
    assert message.startswith("out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB. To need less, set")
    assert "lower optim.max_tokens (now 40); these keys may change on resume" in message
    least, adapter = StillOutOfMemory("CUDA out of memory"), LoraSettings(8, 16.0, ["q_proj", "experts"], False, False, None)
    config = replace(config, model=replace(config.model, lora=adapter, memory_gb=15.0))
    failure = describe_failure(least, config=config, log=None)
    assert failure.code == 5 and failure.message == (
        "out of GPU memory: CUDA out of memory. To need less, raise model.memory_gb (now 15.0), lower model.lora.rank (now 8), "
        "name fewer in model.lora.targets (now ['q_proj', 'experts']), lower rollout.max_new_tokens (now 32); on resume only "
        "model.memory_gb may change")
