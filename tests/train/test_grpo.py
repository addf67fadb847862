"""The loss against a loop written by hand, and against trl's where that is installed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.train.grpo import (
    GRPOConfig,
    block_advantages,
    group_advantages,
    grpo_loss,
    has_signal,
    imitation_loss,
    token_weights,
)

VARIANTS = ("grpo", "dapo", "dr_grpo")


def data(rows: int = 6, tokens: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, tokens, generator=generator) < 0.7
    mask[:, 0] = True
    return {
        "new": (torch.randn(rows, tokens, generator=generator) - 1).requires_grad_(True),
        "old": torch.randn(rows, tokens, generator=generator) - 1,
        "reference": torch.randn(rows, tokens, generator=generator) - 1,
        "advantage": torch.randn(rows, generator=generator),
        "mask": mask,
        "entropy": torch.rand(rows, tokens, generator=generator),
    }


def by_hand(d: dict[str, torch.Tensor], config: GRPOConfig, rollout: list[int], longest: int) -> float:
    """The formula of the papers, one token at a time."""
    rows, tokens = d["mask"].shape
    per_rollout: dict[int, list[float]] = {}
    for r in range(rows):
        for t in range(tokens):
            if not d["mask"][r, t]:
                continue
            new, old, ref = (float(d[name][r, t].detach()) for name in ("new", "old", "reference"))
            ratio, advantage = math.exp(new - old), float(d["advantage"][r])
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            kl = math.exp(ref - new) - (ref - new) - 1
            loss = -min(ratio * advantage, clipped * advantage) + config.kl_weight * kl
            per_rollout.setdefault(rollout[r], []).append(loss)
    everything = [loss for losses in per_rollout.values() for loss in losses]
    if config.variant == "grpo":
        return sum(sum(losses) / len(losses) for losses in per_rollout.values()) / len(per_rollout)
    if config.variant == "dapo":
        return sum(everything) / len(everything)
    return sum(everything) / (len(per_rollout) * longest)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rollout", [[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 2]])
def test_equals_the_loop(variant, rollout):
    d, config = data(), GRPOConfig(variant=variant, kl_weight=0.3)
    weight = token_weights(d["mask"], torch.tensor(rollout), variant, longest=40)
    loss, _ = grpo_loss(d["new"], d["old"], d["reference"], d["advantage"], weight, config)
    assert loss.item() == pytest.approx(by_hand(d, config, rollout, 40), rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kl_weight", [0.0, 0.2])
def test_equals_trl(variant, kl_weight):
    """Loss, gradient and clip shares; trl's method is called on a stand-in for its trainer."""
    pytest.importorskip("trl", reason="trl is not installed: pip install 'emu-embodied[rl]'")
    from trl.trainer.grpo_trainer import GRPOTrainer

    d, config = data(seed=3), GRPOConfig(variant=variant, kl_weight=kl_weight)
    theirs = d["new"].detach().clone().requires_grad_(True)
    metrics: dict[str, list[float]] = {}

    class Metrics(dict):
        def __missing__(self, key):
            return metrics.setdefault(key, [])

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (theirs, d["entropy"], None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=kl_weight, loss_type=variant, use_vllm=False,
        epsilon_low=config.clip_low, epsilon_high=config.clip_high, _entropy_bonus_enabled=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, max_completion_length=40,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ),
        _metrics={"train": Metrics()},
    )  # fmt: skip
    rows, tokens = d["mask"].shape
    inputs = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long), "prompt_mask": torch.ones(rows, 1),
        "completion_ids": torch.zeros(rows, tokens, dtype=torch.long), "completion_mask": d["mask"].float(),
        "advantages": d["advantage"], "old_per_token_logps": d["old"], "ref_per_token_logps": d["reference"],
        "num_items_in_batch": d["mask"].sum(),
    }  # fmt: skip
    expected = GRPOTrainer._compute_loss(trainer, None, inputs)
    expected.backward()

    weight = token_weights(d["mask"], torch.arange(rows), variant, longest=40)
    reference = d["reference"] if kl_weight else None
    loss, found = grpo_loss(d["new"], d["old"], reference, d["advantage"], weight, config, d["entropy"])
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(d["new"].grad, theirs.grad)
    assert found.clipped_low == pytest.approx(metrics["clip_ratio/low_mean"][0])
    assert found.clipped_high == pytest.approx(metrics["clip_ratio/high_mean"][0])
    assert found.entropy == pytest.approx(metrics["entropy"][0])
    if kl_weight:
        assert found.kl == pytest.approx(metrics["kl"][0], rel=1e-5)


def test_parts_of_a_batch_add_up():
    d, config = data(), GRPOConfig()
    weight = token_weights(d["mask"], torch.arange(6), "grpo")
    whole, _ = grpo_loss(d["new"], d["old"], d["reference"], d["advantage"], weight, config)
    parts = [
        grpo_loss(*(d[n][s] for n in ("new", "old", "reference", "advantage")), weight[s], config)[0]
        for s in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(whole, sum(parts))


def test_more_room_upwards_than_downwards():
    config = GRPOConfig(clip_low=0.2, clip_high=0.5, kl_weight=0)
    old, weight = torch.zeros(4, 1), torch.full((4, 1), 0.25)
    new = torch.tensor([0.6, 1.4, 0.7, 1.6]).log()[:, None].requires_grad_(True)
    advantage = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    loss, found = grpo_loss(new, old, None, advantage, weight, config)
    loss.backward()
    assert new.grad[0] == 0 and new.grad[3] == 0, "held by the lower and the upper bound"
    assert new.grad[1] < 0 and new.grad[2] < 0, "inside them"
    assert (found.clipped_low, found.clipped_high, found.kl) == (0.25, 0.25, 0.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1, 10), min_size=2, max_size=8).filter(lambda r: max(r) - min(r) > 0.1))
def test_advantages_are_relative(rewards):
    group = torch.tensor([rewards, [r + 3 for r in rewards]], dtype=torch.float64)
    for variant in VARIANTS:
        found = group_advantages(group, variant)
        torch.testing.assert_close(found[0], found[1])
        assert float(found.sum().abs()) < 1e-9
    assert has_signal(group, 0.01).all() and not has_signal(torch.ones(1, 4), 0.01).any()
    assert float(group_advantages(group, "grpo")[0].std()) == pytest.approx(1, abs=0.02)


def test_blocks_are_credited_with_what_came_after_them():
    gains = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 3.0]), torch.tensor([5.0]), torch.tensor([1.0])]
    found = block_advantages(gains, 2, "dr_grpo", 0.5)
    to_go = [[1 + 0.25 * 2, 1.0, 2.0], [1.5, 3.0], [5.0], [1.0]]
    expected = [
        to_go[0][0] - 1.5, 1.0 - 2.0, 0.0,  # the third block has nobody beside it
        to_go[1][0] - 1.5, 3.0 - 2.0,
        2.0, -2.0,
    ]  # fmt: skip
    assert found.tolist() == pytest.approx(expected)
    scaled = block_advantages(gains, 2, "dapo", 0.5)
    spread = math.sqrt(sum(a * a for a in expected[:5]) / 5)
    assert scaled[:5].tolist() == pytest.approx([a / (spread + 1e-4) for a in expected[:5]])


def test_without_discount_the_first_block_is_credited_with_everything():
    rewards = torch.tensor([[2.0, 5.0, 6.0]], dtype=torch.float64)
    gains = [torch.tensor([0.5, float(r) - 1.5]) for r in rewards[0]]  # all begin at 1
    first = block_advantages(gains, 3, "dr_grpo", 1.0)[::2]
    torch.testing.assert_close(first, group_advantages(rewards, "dr_grpo")[0])


def test_masked_tokens_do_not_count():
    d = data()
    for name in ("new", "old"):
        d[name] = d[name].detach().masked_fill(~d["mask"], 1e9 if name == "new" else -1e9)
    weight = token_weights(d["mask"], torch.arange(6), "dapo")
    loss, found = grpo_loss(d["new"], d["old"], None, d["advantage"], weight, GRPOConfig(kl_weight=0))
    assert math.isfinite(float(loss)) and math.isfinite(found.ratio_max)


def test_imitation_is_likelihood():
    d = data()
    weight = token_weights(d["mask"], torch.arange(6), "dapo")
    expected = -d["new"].detach()[d["mask"]].mean()
    torch.testing.assert_close(imitation_loss(d["new"], weight).detach(), expected)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"group": 1}, "--group 2"),
        ({"variant": "drgrpo"}, "dr_grpo"),
        ({"clip_low": 1.5}, "clip"),
        ({"kl_weight": -1}, "kl_weight"),
        ({"discount": 1.5}, "discount"),
    ],
)
def test_bad_settings(wrong, said):
    with pytest.raises(ValueError, match=said):
        GRPOConfig(**wrong)
