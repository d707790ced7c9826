"""k1 in the reward against the exact gradient of E[reward] - coefficient KL(policy, reference), over all sequences."""
import itertools
from types import SimpleNamespace

import pytest
import torch

from grpo.batch import Completion, Prompt, Segment, pack
from grpo.configuration.algorithm import AdvantageConfig, Baseline, KlConfig, KlPlace, Scale
from grpo.groups import Groups
from grpo.kl import k1_to_go
from grpo.update import advantages_with_kl

COEFFICIENT = 0.7


def completion(tokens, log_probs, reward, sample=0):
    segments = [Segment([9], "prompt"), Segment(tokens[:1], "policy", log_probs[:1]), Segment([8], "env"),
                Segment(tokens[1:], "policy", log_probs[1:])]
    return Completion(Prompt(0, [9], {}), sample, segments, "stop", reward=reward)


def test_sums_of_k1_by_hand():
    batch = pack([completion([1, 2, 2], [-1.0, -2.0, -0.5], 0.0), completion([1, 2, 2], [-1.0, -1.0, -1.0], 0.0, 1)], [0.0, 0.0])
    batch.ref_log_probs = torch.tensor([5.0, -3.0, 5.0, -1.0, -1.5, 5.0, -1.5, 5.0, -1.0, -2.0])
    to_go, totals = k1_to_go(batch)
    # k1 of the first: 2, -1, 1; of the second 0.5, 0, 1
    assert totals.tolist() == [2.0, 1.5]
    assert to_go[batch.loss_mask].tolist() == [2.0, 0.0, 1.0, 1.5, 1.0, 1.0]


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
@pytest.mark.parametrize("place", ["reward", "reward_to_go"])
def test_the_expected_gradient_is_exact(place, baseline):
    """All 9 sequences of two tokens of three, in pairs; the second token's distribution depends on the first."""
    generator = torch.Generator().manual_seed(0)
    policy = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((3,), (3, 3))]
    reference = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 3))]
    rewards = torch.randn(3, 3, generator=generator, dtype=torch.float64)

    def log_probs(tables, first, second):
        return torch.stack([tables[0].log_softmax(-1)[first], tables[1].log_softmax(-1)[first, second]])

    space = list(itertools.product(range(3), repeat=2))
    own, held = ([log_probs(tables, *tokens) for tokens in space] for tables in (policy, reference))
    exact = sum(x.sum().exp() * (rewards[tokens] - COEFFICIENT * (x.sum() - y.sum())) for x, y, tokens in zip(own, held, space))
    run = SimpleNamespace(config=SimpleNamespace(kl=KlConfig(COEFFICIENT, "k3", place=KlPlace(place)),
                                                 advantage=AdvantageConfig(Baseline(baseline), Scale.none)))
    surrogate = 0.0
    for pair in itertools.product(range(9), repeat=2):
        completions = [completion(list(space[row]), own[row].tolist(), rewards[space[row]].item(), sample)
                       for sample, row in enumerate(pair)]
        batch = pack(completions, [0.0, 0.0])
        batch.ref_log_probs = torch.zeros(len(batch.tokens)).masked_scatter(
            batch.loss_mask, torch.cat([held[row] for row in pair]).float())
        advantages = advantages_with_kl(run, batch, Groups(completions, [0.0, 0.0], []))[batch.loss_mask].double()
        packed = torch.cat([own[row] for row in pair])
        surrogate = surrogate + packed.sum().exp().detach() * (advantages * packed).sum() / 2
    gradients = [torch.cat([part.flatten() for part in torch.autograd.grad(total, policy, retain_graph=True)])
                 for total in (exact, surrogate)]
    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)  # log-probs are packed in fp32
