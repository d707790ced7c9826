"""The optimizer against torch.optim.AdamW, schedules against hand-computed rates."""
from __future__ import annotations

import math
import weakref

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load, save

import models.adam_state
from grpo.optim import FLOAT16_LOSS_SCALE, LearningRate, NonFiniteError, Optimizer, check_finite, loss_scale_for
from models.adam_state import optimizer_bytes
from models.formats.hugging_face import load_model
from models.lora import set_full_training

SHAPES = {"a": (5, 7), "b": (3,), "experts": (2, 4, 3)}


def make_params(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for name, shape in SHAPES.items()}


def make_optimizer(params, **changes):
    rate = dict(lr=3e-3, warmup_steps=0, schedule="constant", decay_steps=None, final_lr_ratio=0.1, total_steps=20)
    rate |= {name: changes.pop(name) for name in rate.keys() & changes.keys()}
    settings = dict(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05, max_grad_norm=math.inf)
    return Optimizer(params, LearningRate(**rate), **{**settings, **changes})


def random_gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) * 10 ** (step % 3 - 1) for name, shape in SHAPES.items()}


def set_gradients(params, step):
    """By a backward pass, as the trainer's gradients come."""
    gradients = random_gradients(step)
    sum((param * gradients[name].to(param.dtype)).sum() for name, param in params.items()).backward()


def test_fp32_updates_equal_torch_adamw_with_its_clipping_to_the_last_bit():
    ours, theirs = make_params(), make_params()
    optimizer = make_optimizer(ours, max_grad_norm=2.0)
    reference = torch.optim.AdamW(theirs.values(), lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05)
    num_clipped = 0
    for step in range(12):
        set_gradients(ours, step)
        norm = optimizer.step()
        optimizer.zero_grad()
        set_gradients(theirs, step)
        reference_norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        reference.step()
        reference.zero_grad()
        assert norm == float(reference_norm)
        num_clipped += norm > 2.0
        for name in SHAPES:
            assert torch.equal(ours[name], theirs[name]), (step, name)
    assert 0 < num_clipped < 12


def test_bf16_parameters_follow_an_fp32_master_that_equals_torch_adamw():
    ours, theirs = make_params(torch.bfloat16), {name: torch.nn.Parameter(p.detach().float())
                                                 for name, p in make_params(torch.bfloat16).items()}
    optimizer = make_optimizer(ours, lr=1e-5)
    reference = torch.optim.AdamW(theirs.values(), lr=1e-5, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05)
    before = {name: param.detach().clone() for name, param in ours.items()}
    for step in range(30):
        set_gradients(ours, step)
        optimizer.step()
        optimizer.zero_grad()
        for name, param in theirs.items():
            param.grad = random_gradients(step)[name].bfloat16().float()
        reference.step()
    state = optimizer.state_dict()
    for name in SHAPES:
        assert torch.equal(state[f"master.{name}"], theirs[name])
        assert torch.equal(ours[name], theirs[name].bfloat16())
    # one update of 1e-5 is below half a bf16 step of nearly all of these weights: only masters let them add up
    assert any(not torch.equal(ours[name], before[name]) for name in SHAPES)


def test_gradients_of_bf16_parameters_accumulate_in_fp32():
    # in bf16, 256 + 1 = 256: accumulating there would lose the second micro-batch
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = make_optimizer({"w": param})
    (param * 256.0).sum().backward()
    (param * 1.0).sum().backward()
    assert optimizer.gradients()["w"].item() == 257.0
    assert param.grad is None
    assert optimizer.step() == 257.0


def test_a_closed_optimizer_leaves_its_parameters_to_the_next():
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    first = make_optimizer({"w": param})
    (param * 2.0).sum().backward()
    first.close()
    second = make_optimizer({"w": param})
    (param * 3.0).sum().backward()
    assert second.gradients()["w"].item() == 3.0
    with pytest.raises(ValueError, match="got no gradient"):
        first.gradients()


def test_rates_of_each_schedule_are_those_worked_out_by_hand():
    def rates(**settings):
        return [LearningRate(**settings).at(update) for update in range(settings["total_steps"])]

    common = dict(lr=1.0, warmup_steps=4, final_lr_ratio=0.1, total_steps=10)
    warm_up = [0.25, 0.5, 0.75, 1.0]
    assert rates(schedule="constant", decay_steps=None, **common) == warm_up + [1.0] * 6
    # 1 - 0.9 * k / 3 over the last three updates
    assert rates(schedule="linear", decay_steps=3, **common) == pytest.approx(warm_up + [1.0, 1.0, 1.0, 0.7, 0.4, 0.1])
    assert rates(schedule="linear", decay_steps=None, **common) == pytest.approx(
        warm_up + [0.85, 0.7, 0.55, 0.4, 0.25, 0.1])
    # cos(pi/3) = 1/2, cos(2 pi/3) = -1/2
    assert rates(schedule="cosine", decay_steps=3, **common) == pytest.approx(
        warm_up + [1.0, 1.0, 1.0, 0.775, 0.325, 0.1])
    assert LearningRate(schedule="linear", decay_steps=3, **common).at(50) == pytest.approx(0.1)


def test_the_optimizer_uses_the_rate_of_its_update():
    params = {"w": torch.nn.Parameter(torch.zeros(1))}
    optimizer = make_optimizer(params, lr=1.0, weight_decay=0.0, eps=1e-30, warmup_steps=2, schedule="linear",
                               final_lr_ratio=0.0, total_steps=4)
    moves = []
    for _ in range(4):
        before = params["w"].item()
        optimizer.backward(params["w"].sum())
        optimizer.step()
        optimizer.zero_grad()
        moves.append(before - params["w"].item())  # Adam moves by the rate itself while gradients are all equal
    assert moves == pytest.approx([0.5, 1.0, 0.5, 0.0], abs=1e-6)
    assert optimizer.num_updates == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_gradient_names_the_first_tensor_and_moves_nothing(bad, dtype):
    params = make_params(dtype)
    optimizer = make_optimizer(params)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.zero_grad()
    weights = {name: param.detach().clone() for name, param in params.items()}
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}
    set_gradients(params, 1)
    gradients = optimizer.gradients()
    gradients["b"][1] = bad
    gradients["experts"][0, 0, 0] = bad
    with pytest.raises(NonFiniteError, match="gradient of b is not finite at update 1") as caught:
        optimizer.step()
    assert (caught.value.step, caught.value.what, caught.value.name) == (1, "gradient", "b")
    assert all(torch.equal(params[name], weights[name]) for name in SHAPES)
    after = optimizer.state_dict()
    assert set(after) == set(state) and all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_scale_changes_no_bit_of_gradients_that_fp32_holds(dtype):
    results = []
    for loss_scale in (1.0, 2.0**20):
        params = make_params(dtype)
        optimizer = make_optimizer(params, loss_scale=loss_scale, max_grad_norm=1.0)
        norms = []
        for step in range(3):
            for part in range(2):  # two micro-batches
                gradients = random_gradients(step + 10 * part)
                optimizer.backward(sum((param * gradients[name].to(dtype)).sum() for name, param in params.items()))
            expected = {name: random_gradients(step)[name].to(dtype).float() + random_gradients(step + 10)[name].to(dtype).float()
                        for name in params}
            assert all(torch.equal(gradient, expected[name]) for name, gradient in optimizer.gradients().items())
            norms.append(optimizer.step())
            optimizer.zero_grad()
        results.append((norms, {name: param.detach().clone() for name, param in params.items()}))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in SHAPES)


def test_a_loss_scale_carries_through_float16_what_would_underflow_there():
    master = torch.nn.Parameter(torch.zeros(4))
    for loss_scale, expected in ((1.0, 0.0), (2.0**20, 3e-9)):
        optimizer = make_optimizer({"lora_A": master}, loss_scale=loss_scale)
        optimizer.zero_grad()
        optimizer.backward((master.half().float() * 3e-9).sum())
        assert optimizer.gradients()["lora_A"].tolist() == pytest.approx([expected] * 4, rel=1e-3)


def test_a_scaled_gradient_that_overflows_names_the_loss_scale():
    params = {"w": torch.nn.Parameter(torch.zeros(2))}
    optimizer = make_optimizer(params, loss_scale=2.0**20)
    optimizer.backward((params["w"].half() * 8.0).sum())
    with pytest.raises(NonFiniteError, match="scaled by 1.04858e.06: .*lower optim.loss_scale"):
        optimizer.step()


def test_float16_models_have_a_loss_scale_unless_another_is_configured():
    assert loss_scale_for(torch.float16, None) == FLOAT16_LOSS_SCALE and loss_scale_for(torch.bfloat16, None) == 1.0
    assert loss_scale_for(torch.float16, 8.0) == 8.0


def test_check_finite_counts_what_is_wrong():
    check_finite(torch.tensor([1.0, -3.0]), step=4, what="loss", name="dapo")
    with pytest.raises(NonFiniteError, match="loss of dapo is not finite at update 4 .2 NaN and 1 infinite of 4 val"):
        check_finite(torch.tensor([math.nan, 1.0, -math.inf, math.nan]), step=4, what="loss", name="dapo")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimizer_continues_bit_for_bit(dtype):
    def run(params, optimizer, steps):
        for step in steps:
            set_gradients(params, step)
            optimizer.step()
            optimizer.zero_grad()

    settings = dict(warmup_steps=3, schedule="cosine", decay_steps=5, max_grad_norm=1.0, total_steps=10)
    straight = make_params(dtype)
    straight_optimizer = make_optimizer(straight, **settings)
    run(straight, straight_optimizer, range(10))

    first = make_params(dtype)
    first_optimizer = make_optimizer(first, **settings)
    run(first, first_optimizer, range(6))
    stored = load(save({**first_optimizer.state_dict(), **{f"param.{name}": p.detach() for name, p in first.items()}}))

    resumed = make_params(dtype, seed=1)
    resumed_optimizer = make_optimizer(resumed, **settings)
    with torch.no_grad():
        for name, param in resumed.items():
            param.copy_(stored.pop(f"param.{name}"))
    resumed_optimizer.load_state_dict(stored)
    assert resumed_optimizer.lr == first_optimizer.lr
    run(resumed, resumed_optimizer, range(6, 10))
    for name in SHAPES:
        assert torch.equal(resumed[name], straight[name]), name
    expected, actual = straight_optimizer.state_dict(), resumed_optimizer.state_dict()
    assert set(expected) == set(actual)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_loading_state_rounds_bf16_parameters_from_their_masters():
    params = make_params(torch.bfloat16)
    optimizer = make_optimizer(params)
    set_gradients(params, 0)
    optimizer.step()
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}
    others = make_params(torch.bfloat16, seed=1)
    make_optimizer(others).load_state_dict(state)
    for name in SHAPES:
        assert torch.equal(others[name], params[name]) and torch.equal(others[name], state[f"master.{name}"].bfloat16())


def test_state_of_other_parameters_is_refused_with_a_list_and_changes_nothing():
    optimizer = make_optimizer(make_params())
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}
    state["num_updates"] += 5
    state["exp_avg.c"] = state.pop("exp_avg.b")
    state["exp_avg_sq.a"] = torch.zeros(5, 8)
    with pytest.raises(ValueError, match=r"3 problems.*missing exp_avg\.b.*unexpected exp_avg\.c.*exp_avg_sq\.a is "
                                         r"torch\.float32 \(5, 8\), expected torch\.float32 \(5, 7\)"):
        optimizer.load_state_dict(state)
    assert optimizer.num_updates == 0


def test_a_parameter_without_gradient_is_an_error_that_names_it():
    params = make_params()
    optimizer = make_optimizer(params)
    params["a"].sum().backward()
    with pytest.raises(ValueError, match="2 trainable parameters got no gradient.*b, experts"):
        optimizer.step()


def test_float16_weights_need_a_master():
    with pytest.raises(ValueError, match="optim.weights = 'stochastic': for bfloat16 and float32, and w is float16; set optim"):
        make_optimizer({"w": torch.nn.Parameter(torch.zeros(1).half())}, weights="stochastic")


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameters"):
        make_optimizer({})
    with pytest.raises(ValueError, match="without requires_grad.*w"):
        make_optimizer({"w": torch.nn.Parameter(torch.zeros(1), requires_grad=False)})


def test_the_learning_rate_is_that_of_the_position_which_may_run_ahead_of_the_updates():
    params = {"w": torch.nn.Parameter(torch.ones(1))}
    optimizer = make_optimizer(params, lr=0.1, weight_decay=0.0, schedule="linear", warmup_steps=0, total_steps=10,
                               final_lr_ratio=0.0)
    rates = []
    for position in (0, 4, 9):  # updates 1 to 4 and 5 to 9 were left out
        optimizer.position = position
        rates.append(optimizer.lr)
        optimizer.backward(params["w"].sum())
        optimizer.step()
        optimizer.zero_grad()
    assert rates == pytest.approx([0.09, 0.05, 0.0]) and (optimizer.num_updates, optimizer.position) == (3, 10)
    # a constant gradient moves Adam by the learning rate, its moments corrected for the updates made
    assert params["w"].item() == pytest.approx(1 - 0.09 - 0.05, abs=1e-5)


def test_gradients_share_a_buffer_that_is_there_from_the_first_backward_to_the_end_of_the_update():
    params = make_params()
    optimizer = make_optimizer(params)
    set_gradients(params, 0)
    parts = [param.grad for param in params.values()]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    once = {name: gradient.clone() for name, gradient in optimizer.gradients().items()}
    set_gradients(params, 1)
    assert [param.grad.data_ptr() for param in params.values()] == [part.data_ptr() for part in parts]  # added in place
    for name, gradient in random_gradients(1).items():
        assert torch.equal(optimizer.gradients()[name], once[name] + gradient)
    optimizer.step()
    del parts
    optimizer.zero_grad()
    assert all(param.grad is None for param in params.values())
    set_gradients(params, 1)  # the next update starts at zero
    assert torch.equal(optimizer.gradients()["b"], random_gradients(1)["b"])


def test_gradients_of_weights_without_master_add_up_in_their_own_dtype():
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = make_optimizer({"w": param}, weights="stochastic")
    for factor in (256.0, 1.0, 4.0):  # 256 + 1 rounds to 256
        (param * factor).sum().backward()
    assert optimizer.gradients()["w"].dtype == torch.bfloat16 and optimizer.gradients()["w"].item() == 260.0


def train(optimizer, params, steps):
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()


KINDS = [(torch.float32, "fp32", "master"), (torch.float32, "int8", "master"), (torch.bfloat16, "int8", "master"),
         (torch.bfloat16, "fp32", "stochastic"), (torch.bfloat16, "int8", "stochastic"), (torch.bfloat16, "int8", "compensated")]


@pytest.mark.parametrize("dtype, moments, weights", KINDS)
def test_every_kind_of_state_resumes_to_the_same_bytes(dtype, moments, weights):
    kind = dict(moments=moments, weights=weights, seed=4)
    straight, first, resumed = make_params(dtype), make_params(dtype), make_params(dtype, seed=1)
    optimizers = [make_optimizer(params, **kind) for params in (straight, first, resumed)]
    train(optimizers[0], straight, range(6))
    train(optimizers[1], first, range(3))
    stored = load(save(optimizers[1].state_dict()))
    with torch.no_grad():
        for name, param in resumed.items():
            param.copy_(first[name])
    optimizers[2].load_state_dict(stored)
    train(optimizers[2], resumed, range(3, 6))
    assert save(optimizers[0].state_dict()) == save(optimizers[2].state_dict())
    assert all(torch.equal(straight[name], resumed[name]) for name in SHAPES)
    assert any(not torch.equal(straight[name], first[name]) for name in SHAPES)


@pytest.mark.parametrize("dtype, moments, weights", KINDS)
def test_the_bytes_of_gradients_and_state_are_those_that_are_counted(dtype, moments, weights):
    params = make_params(dtype)
    optimizer = make_optimizer(params, moments=moments, weights=weights)
    set_gradients(params, 0)
    counted = optimizer_bytes([param.numel() for param in params.values()], dtype, moments, weights)
    held = {name: tensor.numel() * tensor.element_size() for name, tensor in optimizer.state_dict().items()}
    del held["num_updates"]
    assert counted.gradients == sum(tensor.numel() * tensor.element_size() for tensor in optimizer.gradients().values())
    assert counted.moments == sum(size for name, size in held.items() if name.startswith("exp_avg"))
    assert counted.masters == sum(held.values()) - counted.moments


def test_gpt_oss_20b_in_full_takes_the_bytes_of_its_table():
    """20.9e9 parameters in bf16: 8-bit moments with an absmax for 256 elements are 2 + 8 / 256 bytes each."""
    counted = optimizer_bytes([20_900_000_000], torch.bfloat16, "int8", "stochastic")
    assert counted.gradients == 41_800_000_000 and counted.moments == 42_453_125_000 and counted.masters == 0


@pytest.mark.parametrize("dtype, moments, weights", KINDS)
def test_parameters_updated_in_pieces_have_the_same_bits(monkeypatch, dtype, moments, weights):
    whole, parts = ({"w": torch.nn.Parameter(torch.linspace(-1, 1, 2000).to(dtype))} for _ in range(2))
    found = []
    for params, piece in ((whole, 1 << 23), (parts, 256)):
        monkeypatch.setattr(models.adam_state, "PIECE", piece)
        optimizer = make_optimizer(params, moments=moments, weights=weights)
        for step in range(3):
            optimizer.backward((params["w"] * torch.linspace(step, 3, 2000).to(dtype)).sum())
            optimizer.step()
            optimizer.zero_grad()
        found.append(save({**optimizer.state_dict(), "w": params["w"].detach()}))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype, moments, weights", KINDS)
@pytest.mark.parametrize("num_fine", [0, 1, 2])
def test_a_step_that_runs_out_of_memory_goes_on_where_it_was(monkeypatch, dtype, moments, weights, num_fine):
    plain, disturbed = make_params(dtype), make_params(dtype)
    kind = dict(moments=moments, weights=weights, max_grad_norm=0.5)
    optimizers = [make_optimizer(params, **kind) for params in (plain, disturbed)]
    for params in (plain, disturbed):
        set_gradients(params, 1)
    norm = optimizers[0].step()
    original, calls = models.adam_state.adamw, []

    def fails_once(*args, **settings):
        calls.append(None)
        if len(calls) == num_fine + 1:
            raise torch.OutOfMemoryError("made up")
        original(*args, **settings)

    monkeypatch.setattr(models.adam_state, "adamw", fails_once)
    with pytest.raises(torch.OutOfMemoryError):
        optimizers[1].step()
    assert optimizers[1].is_updating == (num_fine > 0) and optimizers[1].num_updates == 0
    assert optimizers[1].step() == norm and not optimizers[1].is_updating and optimizers[1].num_updates == 1
    assert save(optimizers[0].state_dict()) == save(optimizers[1].state_dict())
    assert all(torch.equal(plain[name], disturbed[name]) for name in SHAPES)


def test_an_update_in_the_backward_stops_at_a_gradient_that_is_not_finite_and_says_what_has_changed():
    params = make_params()
    optimizer = make_optimizer(params, in_backward=True)
    before = {name: param.detach().clone() for name, param in params.items()}
    loss = (params["a"] * math.nan).sum() + params["b"].sum() + params["experts"].sum()  # the backward begins with the last
    with pytest.raises(NonFiniteError, match="gradient of a is not finite.*2 parameters were changed before: the newest che"):
        optimizer.backward(loss, updates=True)
    assert torch.equal(params["a"], before["a"]) and optimizer.is_updating and optimizer.num_updates == 0


def test_parameters_do_not_keep_an_optimizer_alive():
    params = make_params()
    gone = weakref.ref(make_optimizer(params))
    assert gone() is None
    set_gradients(params, 0)
    assert all(torch.equal(params[name].grad, gradient) for name, gradient in random_gradients(0).items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, moments, weights", KINDS)
def test_state_in_host_memory_has_the_bits_of_state_on_the_gpu(monkeypatch, dtype, moments, weights):
    monkeypatch.setattr(models.adam_state, "PIECE", 1 << 14)  # many pieces
    sizes = {"a": 500_000, "b": 3, "c": 70_000, "d": (1 << 16) + 1}
    found = []
    for on_host in (False, True):
        params = {name: torch.nn.Parameter(torch.linspace(-1, 1, size).to("cuda", dtype)) for name, size in sizes.items()}
        optimizer = make_optimizer(params, moments=moments, weights=weights, state_on_host=on_host)
        for step in range(4):
            for micro in range(2):
                waves = {name: torch.arange(size, device="cuda").mul(step + micro + 1.0).sin() for name, size in sizes.items()}
                optimizer.backward(sum((param.float() * waves[name]).sum() for name, param in params.items()))
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state_dict()
        assert all(tensor.is_pinned() for name, tensor in state.items() if name != "num_updates") == on_host
        found.append(save({name: tensor.cpu() for name, tensor in state.items()} | {f"p.{name}": param.detach().cpu()
                                                                                  for name, param in params.items()}))
    assert found[0] == found[1]


@pytest.mark.gpu
def test_a_gpu_holds_gradients_during_an_update_only_and_a_streamed_state_not_at_all():
    params = {f"w{i}": torch.nn.Parameter(torch.zeros(1 << 20, device="cuda")) for i in range(16)}
    before = torch.cuda.memory_allocated()
    optimizer = make_optimizer(params, state_on_host=True)
    assert torch.cuda.memory_allocated() == before
    optimizer.allocate_gradients()
    assert torch.cuda.memory_allocated() == before + 16 * (4 << 20)
    optimizer.backward(sum(param.sum() for param in params.values()))
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    optimizer.zero_grad()
    counted = optimizer_bytes([1 << 20] * 16, torch.float32, "fp32", "master")
    assert torch.cuda.max_memory_allocated() <= before + counted.gradients + counted.scratch + counted.buffers + (1 << 20)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["stochastic", "compensated"])
def test_updates_in_the_backward_from_state_in_host_memory_have_the_bits_of_those_after_it_from_the_gpu(weights):
    found = []
    for updates in (False, True):
        policy = load_model(FIXTURES / "tiny_bf16", device="cuda", dtype=torch.bfloat16)
        set_full_training(policy)
        optimizer = make_optimizer(policy.trainable_parameters(), moments="int8", weights=weights, state_on_host=updates,
                                   in_backward=updates)
        for step in range(3):
            tokens = torch.randint(0, 30, (200,), generator=torch.Generator().manual_seed(step)).cuda()
            mask = torch.ones(200, dtype=torch.bool)
            mask[[0, 80]] = False
            log_probs, _ = policy.log_probs(tokens, torch.tensor([0, 80, 200]), temperature=1.0, mask=mask)
            optimizer.backward((log_probs * torch.linspace(-1, 1, 200, device="cuda")).sum(), updates=updates)
            optimizer.step()
            optimizer.zero_grad()
        found.append({**optimizer.state_dict(), **policy.trainable_parameters()})
    assert all(torch.equal(found[0][name].cpu(), found[1][name].cpu()) for name in found[0])
