"""Each loss against its paper's formula, restated here for single tokens in plain loops and float64: value and gradient, in any
split into micro-batches, whatever stands at tokens that are not trained on."""
import math
import random
from functools import partial

import pytest
import torch

from grpo.batch import Completion, Prompt, Segment, micro_batches, pack
from grpo.config import ConfigError
from grpo.configuration.launch import load_config
from grpo.configuration.targets import bind
from grpo.loss_contract import call_loss, takes_step, try_loss
from grpo.losses import (
    LossInputs,
    StepTokens,
    cispo,
    clip_cov,
    dppo,
    dro,
    gmpo,
    gspo,
    kl_cov,
    ppo,
    reinforce,
    sapo,
    top_entropy,
    vespo,
)

LONGEST = 12


def clip(x, low, high):
    return x.clamp(low, high)


# For a token: J of log pi, log pi_old, log pi_sampler [numbers] and A; of a sequence, a list of J, from lists. Written from the
# papers; `x.detach()` is their stop-gradient.
def ppo_token(new, old, sampler, a, *, low=0.2, high=0.28):
    r = (new - old).exp()
    return torch.min(r * a, clip(r, 1 - low, 1 + high) * a)  # arXiv 2402.03300, eq. 3; 2503.14476, eq. 8


def two_sided_token(new, old, sampler, a):
    r = (new - old).exp()
    return torch.min(r.clamp(max=1.5) * a, clip(r, 0.8, 1.28) * a)  # arXiv 2505.07291


def dual_clip_token(new, old, sampler, a):
    j = ppo_token(new, old, sampler, a)
    return torch.max(j, 1.4 * a) if a < 0 else j  # arXiv 1912.09729, eq. 5


def cispo_token(new, old, sampler, a):
    return (new - old).exp().clamp(max=1.3).detach() * a * new  # arXiv 2506.13585, eq. 4


def sapo_token(new, old, sampler, a):
    tau = 1.0 if a > 0 else 1.05
    return 4 / tau / (1 + (-tau * ((new - old).exp() - 1)).exp()) * a  # arXiv 2511.20347


def dppo_token(new, old, sampler, a, *, kind):
    p, q = new.detach().exp(), sampler.exp()
    distance, most = {"tv": ((p - q).abs(), 0.05),  # arXiv 2602.04879
                      "kl": (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log(), 0.01)}[kind]
    is_out = distance > most and (p > q if a > 0 else p < q)
    return new * 0 if is_out else (p / q).clamp(max=1.2) * a * new


def reinforce_token(new, old, sampler, a):
    return a * new


def dro_token(new, old, sampler, a):
    return a * new - 0.3 / 2 * (new - old) ** 2


def gspo_sequence(new, old, sampler, a):
    log_s = sum(n - o for n, o in zip(new, old)) / len(new)  # arXiv 2507.18071, eq. 7 and 5: a sequence has one J
    return [torch.min(log_s.exp() * a[0], clip(log_s.exp(), 0.9, 1.1) * a[0])] * len(new)


def gspo_token_sequence(new, old, sampler, a):
    s = (sum(n - o for n, o in zip(new, old)) / len(new)).exp().detach()  # eq. 13 and 14
    return [torch.min(s * (n - n.detach()).exp() * x, clip(s * (n - n.detach()).exp(), 0.9, 1.1) * x) for n, x in zip(new, a)]


def gmpo_sequence(new, old, sampler, a):
    sign = 1.0 if a[0] > 0 else -1.0  # arXiv 2507.20673, eq. 4
    parts = [sign * torch.min(sign * (n - o), sign * clip(n - o, -0.2, 0.3)) for n, o in zip(new, old)]
    return [(sum(parts) / len(parts)).exp() * a[0]] * len(new)


def vespo_sequence(new, old, sampler, a):
    w = sum(n - o for n, o in zip(new, old)).exp().detach()  # arXiv 2602.10693
    return [w ** (2 if x > 0 else 3) * ((3 if x > 0 else 2) * (1 - w)).exp() * x * n for n, x in zip(new, a)]


def of_tokens(of_token):
    return lambda *lists: [of_token(*token) for token in zip(*lists)]


BAND = dict(cov_low=0.1, cov_high=0.6)
FORMULAS = {
    "ppo": (partial(ppo, clip_low=0.2, clip_high=0.28), of_tokens(ppo_token)),
    "two_sided": (partial(ppo, clip_low=0.2, clip_high=0.28, max_ratio=1.5), of_tokens(two_sided_token)),
    "dual_clip": (partial(ppo, clip_low=0.2, clip_high=0.28, dual_clip=1.4), of_tokens(dual_clip_token)),
    "gspo": (partial(gspo, clip_low=0.1, clip_high=0.1), gspo_sequence),
    "gspo_token": (partial(gspo, clip_low=0.1, clip_high=0.1), gspo_token_sequence),
    "cispo": (partial(cispo, max_ratio=1.3), of_tokens(cispo_token)),
    "sapo": (partial(sapo, temperature_positive=1.0, temperature_negative=1.05), of_tokens(sapo_token)),
    "gmpo": (partial(gmpo, clip_low=0.2, clip_high=0.3), gmpo_sequence),
    "vespo": (partial(vespo, k_positive=2.0, lambda_positive=3.0, k_negative=3.0, lambda_negative=2.0), vespo_sequence),
    "dppo_tv": (partial(dppo, divergence="tv", clip_low=0.05, clip_high=0.05, max_ratio=1.2),
                of_tokens(partial(dppo_token, kind="tv"))),
    "dppo_kl": (partial(dppo, divergence="kl", clip_low=0.01, clip_high=0.01, max_ratio=1.2),
                of_tokens(partial(dppo_token, kind="kl"))),
    "reinforce": (reinforce, of_tokens(reinforce_token)),
    "dro": (partial(dro, beta=0.3), of_tokens(dro_token)),
    "clip_cov": (partial(clip_cov, clip_low=0.2, clip_high=0.28, share=1.0, **BAND), None),
    "kl_cov": (partial(kl_cov, share=0.3, coefficient=0.7), None),
}


def draw(*, per_token: bool):
    """Nine completions of three prompts, some with tokens of an environment inside and one in two sequences; the log-probs of the
    packed tokens, NaN where nothing is trained."""
    rng = random.Random(4)
    completions = []
    for row in range(9):
        segments = [Segment([1] * (1 + row // 3), "prompt"), Segment([2] * (1 + row % 5), "policy", [0.0] * (1 + row % 5))]
        if row % 4 == 1:
            segments += [Segment([3] * 2, "env"), Segment([4] * 3, "policy", [0.0] * 3)]
        if row == 5:
            segments += [Segment([1, 2, 9], "prompt"), Segment([4] * 4, "policy", [0.0] * 4)]
        completions.append(Completion(Prompt(row // 3, [1] * (1 + row // 3), {}), row % 3, segments, "stop"))
    batch = pack(completions, [rng.choice((-1, 1)) * rng.uniform(0.3, 1.5) for _ in completions])
    count = len(batch.tokens)
    new, old, sampler, advantages = (torch.full((count,), math.nan, dtype=torch.float64) for _ in range(4))
    for place in batch.loss_mask.nonzero().flatten().tolist():
        old[place] = math.log(rng.uniform(0.1, 0.8))
        new[place], sampler[place] = old[place] + rng.gauss(0, 0.35), old[place] + rng.gauss(0, 0.1)
        new[place] = min(new[place], math.log(0.95))
        advantages[place] = batch.advantages[place].double() * (rng.uniform(0.5, 1.5) if per_token else 1)
    batch.sampler_log_probs, batch.old_log_probs, batch.advantages = sampler, old, advantages
    return batch, new


def covariance_choice(name, batch, new):
    """The tokens that Clip-Cov drops and KL-Cov penalises (arXiv 2505.22617, eq. 10 to 13), by place."""
    places = batch.loss_mask.nonzero().flatten().tolist()
    a, lp = (torch.stack([x[place] for place in places]) for x in (batch.advantages, new))
    covariance = dict(zip(places, ((a - a.mean()) * (lp - lp.mean())).tolist()))
    if name == "kl_cov":
        return sorted(places, key=lambda place: -covariance[place])[:int(0.3 * len(places))]
    ratio = (new - batch.old_log_probs).exp()
    is_free = {place: not (ratio[place] > 1.28 if batch.advantages[place] > 0 else ratio[place] < 0.8) for place in places}
    return [place for place in places if is_free[place] and BAND["cov_low"] < covariance[place] < BAND["cov_high"]]


def restate(name, batch, new, normalizer):
    """Value and gradient [T] of a step's loss, completion by completion."""
    leaf = new.clone().requires_grad_()
    rows = [[place for place in range(len(new)) if batch.loss_mask[place] and batch.sequence_ids[place] == row]
            for row in range(9)]
    chosen = covariance_choice(name, batch, new) if "cov" in name else ()
    total = torch.zeros((), dtype=torch.float64)
    for row, places in enumerate(rows):
        lists = [[x[place] for place in places] for x in (leaf, batch.old_log_probs, batch.sampler_log_probs, batch.advantages)]
        if name == "kl_cov":
            objectives = [(n - o).exp() * a - (0.7 * (n - o).abs() if place in chosen else 0)
                          for place, n, o, _, a in zip(places, *lists)]
        elif name == "clip_cov":
            objectives = [ppo_token(*token) * (place not in chosen) for place, *token in zip(places, *lists)]
        else:
            objectives = FORMULAS[name][1](*lists)
        group = [place for other in range(9) if other // 3 == row // 3 for place in rows[other]]
        divisor = {"token": sum(map(len, rows)), "sequence": 9 * len(places), "prompt": 3 * len(group),
                   "constant": 9 * LONGEST}.get(normalizer, 9 * normalizer if normalizer == 7.5 else None)
        total = total - sum(objectives) / divisor
    total.backward()
    return total.item(), torch.nan_to_num(leaf.grad)


def step_of(name, batch, new, normalizer, micros):
    loss_fn = partial(FORMULAS[name][0], normalizer=normalizer)
    leaf, value = new.clone().requires_grad_(), 0.0
    step = StepTokens(new, torch.zeros_like(new), batch.old_log_probs, batch.advantages, batch.loss_mask,
                      batch.num_policy_tokens, seed=1)
    for micro in micros:
        own = leaf[micro.token_index]
        inputs = LossInputs.of(micro, own, torch.zeros_like(own), old_log_probs=micro.old_log_probs, max_new_tokens=LONGEST)
        loss, stats = call_loss(loss_fn, inputs, step)
        assert all(math.isfinite(float(stat)) for stat in stats.values())
        loss.backward()
        value += loss.item()
    return value, leaf.grad


@pytest.mark.parametrize("normalizer", ["token", "sequence", "prompt", "constant", 7.5])
@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_are_those_of_the_formula_in_any_split(name, normalizer):
    if normalizer not in ("token", "prompt") and name != "ppo":
        normalizer = "sequence" if normalizer == "sequence" else "constant"
    batch, new = draw(per_token=name not in ("gspo", "gmpo"))
    value, gradient = restate(name, batch, new, normalizer)
    assert gradient.abs().max() > 1e-3 and (gradient[batch.loss_mask] == 0).sum() < 20
    for micros in ([batch], micro_batches(batch, 14), micro_batches(batch, 25, share_prompts=True)):
        own_value, own = step_of(name, batch, new, normalizer, micros)
        assert own_value == pytest.approx(value, rel=1e-6 if name == "dppo_kl" else 1e-12)
        torch.testing.assert_close(own, gradient, rtol=1e-12, atol=1e-15)
        assert (own[~batch.loss_mask] == 0).all()


def test_the_formulas_clip_gate_and_choose_something():
    """Else the comparison above would not see it."""
    batch, new = draw(per_token=True)
    _, plain = restate("reinforce", batch, new, "token")
    for name in ("ppo", "two_sided", "dual_clip", "dppo_tv", "dppo_kl", "gspo_token"):
        _, gradient = restate(name, batch, new, "token")
        assert ((gradient == 0) & (plain != 0)).sum() >= 2, name
    assert not torch.equal(restate("two_sided", batch, new, "token")[1], restate("ppo", batch, new, "token")[1])
    assert not torch.equal(restate("dual_clip", batch, new, "token")[1], restate("ppo", batch, new, "token")[1])
    for name in ("clip_cov", "kl_cov"):
        assert 2 < len(covariance_choice(name, batch, new)) < 20


def test_clip_cov_draws_its_share_at_random_and_the_same_in_any_split():
    batch, new = draw(per_token=True)
    candidates = set(covariance_choice("clip_cov", batch, new))
    found = []
    for seed in range(12):
        step = StepTokens(new, torch.zeros_like(new), batch.old_log_probs, batch.advantages, batch.loss_mask,
                          batch.num_policy_tokens, seed)
        loss_fn = partial(clip_cov, normalizer="token", clip_low=0.2, clip_high=0.28, share=0.1, **BAND)
        dropped = []
        for micros in ([batch], micro_batches(batch, 14)):
            leaf, chosen = new.clone().requires_grad_(), 0
            for micro in micros:
                own = leaf[micro.token_index]
                inputs = LossInputs.of(micro, own, torch.zeros_like(own), old_log_probs=micro.old_log_probs,
                                       max_new_tokens=LONGEST)
                loss, stats = loss_fn(inputs, step=step)
                loss.backward()
                chosen += int(stats["cov/chosen"])
            _, whole = restate("ppo", batch, new, "token")
            gone = ((leaf.grad == 0) & (whole != 0)).nonzero().flatten().tolist()
            assert chosen == len(gone) == int(0.1 * batch.num_policy_tokens) < len(candidates)
            dropped.append(gone)
        assert dropped[0] == dropped[1] and set(dropped[0]) <= candidates
        found.append(tuple(dropped[0]))
    assert len(set(found)) > 4  # seeds draw others


def test_the_entropy_quantile_is_of_the_step():
    mask = torch.tensor([True] * 10 + [False] * 5)
    entropy = torch.tensor([0.1 * x for x in (3, 9, 1, 7, 5, 2, 8, 10, 4, 6)] + [99.0] * 5)
    step = StepTokens(entropy, entropy, entropy, entropy, mask, 10, 0)
    # numpy.quantile(0.1 ... 1.0, 0.8) = 0.82: 0.9 and 1.0 remain
    assert top_entropy(step, 0.2).nonzero().flatten().tolist() == [1, 7]
    assert top_entropy(step, 0.5).sum() == 5 and top_entropy(step, 1.0).sum() == 10


# ---- the files of configs/loss


@pytest.mark.parametrize("name, baseline, scale, whiten, normalizer", [
    ("dapo", "group", "group", "none", "token"), ("grpo", "group", "group", "none", "sequence"),
    ("dr_grpo", "group", "none", "none", "constant"), ("rloo", "leave_one_out", "none", "none", "constant"),
    ("opo", "length_weighted", "none", "none", "constant"), ("max_rl", "group", "mean", "none", "constant"),
    ("remax", "greedy", "none", "none", "constant"), ("gpg", "group", "none", "none", "token"),
    ("reinforce", "none", "none", "none", "constant"), ("pass_at_k", "best_of_others", "none", "none", "constant"),
    ("reinforce_plus_plus", "none", "none", "tokens", "token"),
    ("reinforce_plus_plus_baseline", "group", "none", "tokens", "token"), ("gdpo", "group", "group", "sequences", "sequence")])
def test_a_name_stands_for_a_function_an_advantage_and_a_normalizer(name, baseline, scale, whiten, normalizer):
    config = load_config("train", [f"loss={name}"])
    advantage = config.advantage
    assert (advantage.baseline, advantage.scale, advantage.whiten, config.loss["normalizer"]) == (
        baseline, scale, whiten, normalizer)


def test_the_command_line_goes_before_what_a_loss_brings():
    assert load_config("train", ["loss=rloo", "advantage.scale=batch"]).advantage.scale == "batch"


@pytest.mark.parametrize("words, complaint", [
    (["loss=cispo", "loss.max_ratio=0.2"], r"loss.max_ratio = 0.2: must be >= 1: it is the largest ratio itself"),
    (["loss.max_ratio=1.1"], r"loss.max_ratio = 1.1: must be > 1 \+ loss.clip_high = 1.28"),
    (["loss.dual_clip=1"], "loss.dual_clip = 1: must be > 1"),
    (["loss=sapo", "loss.temperature_positive=0"], "loss.temperature_positive = 0"),
    (["loss=gmpo", "loss.clip_low=-1"], "loss.clip_low = -1"), (["loss=dro", "loss.beta=0"], "loss.beta = 0"),
    (["loss=dppo_tv", "loss.divergence=js"], "loss.divergence = 'js': must be tv or kl"),
    (["loss=vespo", "loss.k_negative=-1"], "loss.k_negative = -1: must be >= 0"),
    (["loss=clip_cov", "loss.cov_low=6"], "loss.cov_low = 6, loss.cov_high = 5.0: no token lies between"),
    (["loss=kl_cov", "loss.coefficient=-1"], "loss.coefficient = -1: must be >= 0"),
    (["loss=kl_cov", "loss.share=0"], "loss.share = 0"), (["loss.normalizer=mean"], "loss.normalizer = 'mean': must be one of")])
def test_a_keyword_out_of_range_is_refused_before_a_run(words, complaint):
    loss = load_config("train", words).loss
    with pytest.raises(ConfigError, match=complaint):
        try_loss(bind(loss, "loss"), loss["_target_"], group_size=2, max_new_tokens=10, has_reference=False)


def test_only_losses_that_ask_for_the_step_get_it(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def gap(inputs, step, *, scale: float):\n"
        "    mean = step.log_probs[step.loss_mask].mean()\n"
        "    return -scale * (inputs.log_probs - mean)[inputs.loss_mask].sum() / inputs.num_policy_tokens, {}\n")
    loss = bind({"_target_": f"{tmp_path}/mine.py:gap", "scale": 2.0}, "loss")
    try_loss(loss, "mine.py:gap", group_size=2, max_new_tokens=10, has_reference=False)
    assert takes_step(loss) and takes_step(FORMULAS["kl_cov"][0]) and not takes_step(FORMULAS["ppo"][0])


@pytest.mark.parametrize("name", [name for name in FORMULAS if name not in ("reinforce", "clip_cov")])
def test_on_policy_every_gradient_is_that_of_reinforce(name):
    """Whose expectation is the policy gradient, by enumeration (test_policy_gradient.py, test_advantages.py)."""
    batch, new = draw(per_token=name not in ("gspo", "gmpo"))
    batch.old_log_probs = batch.sampler_log_probs = new
    _, expected = step_of("reinforce", batch, new, "sequence", [batch])
    _, gradient = step_of(name, batch, new, "sequence", [batch])
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
