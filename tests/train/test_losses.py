"""What a predicted state is scored by."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from emu_embodied.decode.grammar import StateLogits, expected_bin
from emu_embodied.train.losses import LossWeights, StateTargets, ordinal_cross_entropy, state_loss

STATES, CODES, FIELDS = 5, 6, 3


def draw(seed: int = 0) -> tuple[StateLogits, StateTargets]:
    generator = torch.Generator().manual_seed(seed)

    def logits(*shape):
        return torch.randn(*shape, generator=generator)

    def ids(most, *shape):
        return torch.randint(most, shape, generator=generator)

    found = StateLogits(logits(STATES, CODES, 12), logits(STATES, FIELDS, 16), logits(STATES, 8), logits(STATES, 2))
    changed = ids(2, STATES, CODES).bool()
    return found, StateTargets(ids(12, STATES, CODES), ids(16, STATES, FIELDS), ids(8, STATES), ids(2, STATES), changed)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 3, 2)])
def test_without_width_ordered_bins_are_plain_cross_entropy(shape):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, 9, generator=generator)
    target = torch.randint(9, shape, generator=generator)
    expected = F.cross_entropy(logits.reshape(-1, 9), target.reshape(-1))
    assert torch.equal(ordinal_cross_entropy(logits, target, 0.0), expected)
    torch.testing.assert_close(ordinal_cross_entropy(logits, target, 1e-3), expected)


@given(st.integers(0, 15), st.floats(0.5, 3))
def test_a_wide_target_is_a_gaussian_around_its_bin(target, width):
    best = torch.log_softmax(-0.5 * ((torch.arange(16.0) - target) / width) ** 2, -1)[None]
    least = ordinal_cross_entropy(best, torch.tensor([target]), width)
    assert float(least) == pytest.approx(float(-(best.exp() * best).sum()), rel=1e-4)
    # Nearby bins cost less than far ones, which plain cross-entropy cannot tell apart.
    peaks = [20 * F.one_hot(torch.tensor([b]), 16).float() for b in range(16)]
    costs = [float(ordinal_cross_entropy(peak, torch.tensor([target]), width)) for peak in peaks]
    assert min(costs) == costs[target]
    if 4 <= target <= 11:
        assert costs[target + 1] < costs[target + 4]
        assert float(expected_bin(best)) == pytest.approx(target, abs=0.6)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    logits, targets = draw()
    plain = LossWeights(frame=2.0, proprio=3.0, reward=5.0, success=7.0, changed=1.0, smoothing=0.0)
    loss, logs = state_loss(logits, targets, plain)
    parts = [
        F.cross_entropy(logits.frame.reshape(-1, 12), targets.codes_MN.flatten()),
        F.cross_entropy(logits.proprio.reshape(-1, 16), targets.proprio_MP.flatten()),
        F.cross_entropy(logits.reward, targets.reward_M),
        F.cross_entropy(logits.success, targets.success_M),
    ]
    torch.testing.assert_close(loss, sum(w * part for w, part in zip((2.0, 3.0, 5.0, 7.0), parts, strict=True)))
    for name, part in zip(("frame", "proprio", "reward", "success"), parts, strict=True):
        torch.testing.assert_close(logs[name], part)


def test_changed_codes_count_more():
    logits, targets = draw()
    weights = LossWeights(changed=3.0, proprio=0.0, reward=0.0, success=0.0, frame=1.0)
    nll = F.cross_entropy(logits.frame.movedim(-1, 1), targets.codes_MN, reduction="none")
    weight = 1 + 2 * targets.changed_MN.float()
    torch.testing.assert_close(state_loss(logits, targets, weights)[0], (nll * weight).sum() / weight.sum())


def test_accuracies_are_of_all_and_of_changed_codes():
    logits, targets = draw()
    frame = logits.frame.clone()
    right = torch.rand(STATES, CODES, generator=torch.Generator().manual_seed(1)) < 0.5
    wrong = (targets.codes_MN + 1) % 12
    frame.scatter_(2, torch.where(right, targets.codes_MN, wrong)[..., None], 50.0)
    _, logs = state_loss(StateLogits(frame, logits.proprio, logits.reward, logits.success), targets, LossWeights())
    assert float(logs["token_accuracy"]) == pytest.approx(float(right.float().mean()))
    assert float(logs["changed_token_accuracy"]) == pytest.approx(float(right[targets.changed_MN].float().mean()))


def test_gradients_reach_every_kind_of_logit():
    logits, targets = draw()
    parts = (logits.frame, logits.proprio, logits.reward, logits.success)
    for part in parts:
        part.requires_grad_(True)
    state_loss(logits, targets, LossWeights())[0].backward()
    assert all(float(part.grad.abs().sum()) > 0 for part in parts)
