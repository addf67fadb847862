"""A point that has to reach a near goal, and a policy of one layer for it: enough to see reinforcement work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from emu_embodied.acting import Actor
from emu_embodied.models.ibq import IBQ, IBQConfig, to_pixels
from emu_embodied.models.transformer import EmuConfig, EmuForCausalLM
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.train.grpo import GRPOConfig
from emu_embodied.train.policy_loop import PolicyLoop
from emu_embodied.train.reinforce import Reference, RLConfig, RLResult, Trained, reinforce
from emu_embodied.train.simulators import open_crew
from emu_embodied.world_config import WorldModelConfig
from emu_embodied.world_model import WorldModel
from tests.point_mass import PIXELS, PointMass, State, draw

IBQ_CONFIG = IBQConfig(
    ch=4, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=PIXELS, z_channels=4, embed_dim=4,
    n_embed=12, norm_groups=2, patch=8,
)  # fmt: skip
CONFIG = RLConfig(
    rollouts=64, groups=2, objective=GRPOConfig(group=4), learning_rate=3e-3, epochs=2, batch=64, dtype="float32"
)


class NearPoint(PointMass):
    """Solved within 0.3 m of a goal that is 0.7 m away and somewhere to the right."""

    def __init__(self) -> None:
        super().__init__(max_episode_steps=30)

    def reset(self, *, seed: int | None = None) -> tuple[dict, dict]:
        angle = np.random.default_rng(seed).uniform(-0.6, 0.6)
        self.state = State(np.zeros(2), 0.7 * np.array([np.cos(angle), np.sin(angle)]), 0)
        return {}, {}

    def success(self) -> bool:
        return bool(np.linalg.norm(self.state.position - self.state.goal) < 0.3)


class Forgetful(NearPoint):
    """Has no snapshot."""

    snapshot = None  # type: ignore[assignment]


def make_near(env_id: str) -> NearPoint:
    if env_id == "Forgetful-v0":
        return Forgetful()
    if env_id not in ("PointMass-v0", "Twin-v0"):
        raise ValueError(f"unknown environment {env_id!r}")
    return NearPoint()


def make_policy_world(seed: int = 0) -> WorldModel:
    """A world model of random weights for the point."""
    config = WorldModelConfig(
        env_ids=("PointMass-v0",), data_hash="0" * 64, cameras=("front",), image_size=PIXELS, camera_tokens=4,
        codebook=12, block=5, action_dim=2, proprio=PointMass.proprio_fields, text_length=48, action_bins=6,
        state_bins=16, reward_bins=8, context_states=2, max_states=4, paths=("uniform",), decoding="dida",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = EmuConfig(
            vocab_size=config.layout.vocabulary.size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, action_dim=2, action_block=5,
        )  # fmt: skip
        backbone = EmuForCausalLM(shape)
        ibq = IBQ(IBQ_CONFIG)
        frames = np.stack([draw(p, -p) for p in np.random.default_rng(0).uniform(-1, 1, (40, 2))])
        ibq.initialise_codebook(ibq.vectors(to_pixels(torch.from_numpy(frames))).detach(), torch.Generator())
    return WorldModel(config, backbone, IBQFrameTokenizer(ibq))


def reinforced(
    out: Path,
    config: RLConfig = CONFIG,
    *,
    resume: bool = False,
    world: WorldModel | None = None,
    envs: tuple[str, ...] = ("PointMass-v0",),
) -> tuple[WorldModel, RLResult]:
    """Loop (a) on the point."""
    world = make_policy_world() if world is None else world
    world.backbone.requires_grad_(True)
    trained = Trained({"policy": world.backbone})
    with open_crew(make_near, config.workers) as crew:
        loop = PolicyLoop(crew, Actor(world), envs, config)
        result = reinforce(
            loop, trained, config, out, reference=Reference(trained), resume=resume, describe={},
            save=lambda: world.save_pretrained(out),
        )  # fmt: skip
    return world, result


def weights(world: WorldModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in world.backbone.named_parameters()}


def greedy_success(world: WorldModel, episodes: int = 40) -> float:
    """Share of seeds 0 .. episodes - 1 solved by the most likely actions."""
    actor, solved = Actor(world), 0
    for seed in range(episodes):
        point = NearPoint()
        point.reset(seed=seed)
        over = False
        while not over:
            drawn = actor.act(actor.see([point.observe()]))
            moved = point.step_block(drawn.actions_BKA[0].numpy(), render=False)
            over = moved.success_any or moved.truncated
            solved += moved.success_any
    return solved / episodes
